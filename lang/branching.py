"""How a `State` branches: forks, copies, scratch states, and going on as one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from bough.errors import InvalidRequest
from bough.sampling import count

if TYPE_CHECKING:
    from bough.group import Copy, Group, Scratch
    from bough.state import State


class Branching:
    """The part of a state that is about its branches."""

    __slots__ = ()

    def fork(self, size: int | Sequence[Any] | Mapping[str, Any] = 1, *, names: Sequence[str] | None = None) -> Group:
        """Return states that share all that this one holds; nothing is copied, re-sent or waited for.

        size: how many; or a list of arguments, one state each, which knows it as `state.arg`; or a dict of arguments by
        the states' names. names: the states' names, for `forks["plan"]`; as many states if no size is given.

        They inherit text, variables, messages, meta information and the open role. Raises InvalidRequest if there were
        not between 1 and 4096 of them::

            for f in s.fork(["kind", "strict"]):
                f += bo.user(f"Be {f.arg}.") + bo.assistant(bo.gen("review"))
        """
        from bough.group import Group

        return Group(cast("State", self), self._named_fork(size, names))

    def branches(
        self, size: int | Sequence[Any] | Mapping[str, Any] = 1, *, names: Sequence[str] | None = None
    ) -> Group:
        """Fork for a `with` block that cancels on the way out, also by an exception, what was not joined.

        ::

            with s.branches(4) as forks:
                forks += bo.gen("answer", max_tokens=200)
                (first,) = forks.race()
                s["answer"] = first["answer"]
        """
        return self.fork(size, names=names)

    @property
    def arg(self) -> Any:
        """The argument that this state, or the one it was forked off, was forked for; None without one."""
        return cast("State", self)._arg

    @property
    def branch_name(self) -> str | None:
        """The name that this state was forked under; None without one."""
        return cast("State", self)._name

    def _named_fork(self, size: int | Sequence[Any] | Mapping[str, Any], names: Sequence[str] | None) -> list[State]:
        from bough.state import State

        if isinstance(size, Mapping):
            if names is not None:
                raise InvalidRequest("a fork over a dict takes its names from there: leave names out", field="names")
            names, size = list(size), list(size.values())
        args = list(size) if isinstance(size, Sequence) and not isinstance(size, (str, bytes)) else None
        number: Any = size if args is None else len(args)
        if names is not None:
            names = _checked_names(names)
            number = len(names) if args is None and size == 1 else number
            if len(names) != number:
                raise InvalidRequest(f"names must be one per branch, {number!r}, got {len(names)}", field="names")
        states = self._fork(number, State)
        for number, state in enumerate(states):
            if names is not None:
                state._name = state._interpreter.strand.name = names[number]
            if args is not None:
                state._arg = args[number]
        return states

    def scratch(self) -> Scratch:
        """Return a state for a `with` block whose text never enters this one; only what is taken from it does.

        ::

            with s.scratch() as t:
                t += bo.user("Think aloud first.") + bo.assistant(bo.gen("thoughts"))
                s["thoughts"] = t["thoughts"]
        """
        from bough.group import Scratch

        (child,) = self._fork(1, Scratch)
        assert isinstance(child, Scratch)
        return child

    def adopt(self, branch: State) -> None:
        """Go on as a branch that was forked off this state, or off such a branch: its text, its variables, its KV.

        The branch takes no more text; it can still be read. Raises InvalidRequest if this state took text of its own
        since the fork::

            leaves = s.fork(2)[0].fork(2)
            s.adopt(leaves[1])
        """
        from bough.joins import adopt
        from bough.state import State

        if not isinstance(branch, State):
            raise InvalidRequest(f"adopt takes a branch of this state, got {branch!r}", field="branch")
        adopt(cast("State", self), branch)

    def copy(self) -> Copy:
        """Return one state that shares all that this one holds.

        `with s.copy() as c:` also joins it: the variables that c assigns become lists of one in `s`.
        """
        from bough.group import Copy

        (child,) = self._fork(1, Copy)
        assert isinstance(child, Copy)
        child._parent = cast("State", self)
        return child

    def _fork(self, size: int, kind: type[State]) -> list[State]:
        if count("a fork's size", size) is None:
            raise InvalidRequest("a fork's size must be a whole number, got None")
        state = cast("State", self)
        return [state._child(interpreter, kind) for interpreter in state._interpreter.fork(size)]

    def cancel(self) -> None:
        """End what is running on this branch and its forks; reads of what was not done raise Cancelled.

        The state takes no more text; what was done before can still be read.
        """
        cast("State", self)._interpreter.cancel()


def _checked_names(names: Sequence[str]) -> list[str]:
    checked = list(names)
    for name in checked:
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"a branch's name must be a text that is not empty, got {name!r}", field="names")
        if checked.count(name) > 1:
            raise InvalidRequest(f"names must differ, {name!r} is there twice", field="names")
    return checked
