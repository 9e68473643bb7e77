"""What `fork` returns: the branches, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, overload

from bough.errors import InvalidRequest
from bough.expressions import Expression, RoleBegin, RoleEnd
from bough.pieces import Gathered, Item, Mark, text_of
from bough.state import State

JoinMode: TypeAlias = Literal["gather_variable", "concate_and_append"]
JOIN_MODES: Final[tuple[str, ...]] = ("gather_variable", "concate_and_append")

Appended: TypeAlias = "str | Expression | Callable[[int], str | Expression] | Sequence[str | Expression]"


class Group(Sequence[State]):
    """States forked off one state, in order.

    `group += x` appends to each: text or an expression to all, a list item by item, a callable's result by index.
    """

    __slots__ = ("_parent", "_states")

    def __init__(self, parent: State, states: Sequence[State]) -> None:
        self._parent = parent
        self._states = list(states)

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, index: int) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> Group: ...
    def __getitem__(self, index: int | slice) -> State | Group:
        """Return one state, or a group of some of them."""
        if isinstance(index, slice):
            return Group(self._parent, self._states[index])
        return self._states[index]

    def __setitem__(self, index: int, state: State) -> None:
        """Take `group[i] += ...`, which assigns the same state again; a group's states cannot be replaced."""
        if self._states[index] is not state:
            raise InvalidRequest("a group's states cannot be replaced, only appended to")

    def __iter__(self) -> Iterator[State]:
        return iter(self._states)

    def __iadd__(self, other: Appended) -> Group:
        """Append to every state. Raises InvalidRequest if a list has another length than the group."""
        if isinstance(other, (str, Expression)):
            each: Sequence[str | Expression] = [other] * len(self._states)
        elif callable(other):
            each = [other(index) for index in range(len(self._states))]
        elif isinstance(other, Sequence):
            each = other
        else:
            raise InvalidRequest(f"a group takes text, an expression, a callable or a list, got {other!r}")
        if len(each) != len(self._states):
            raise InvalidRequest(f"the list must have one item per state, {len(self._states)}, got {len(each)}")
        for state, item in zip(self._states, each, strict=True):
            state += item
        return self

    def cancel(self) -> None:
        """Cancel every state of the group."""
        for state in self._states:
            state.cancel()

    def join(self, mode: JoinMode = "gather_variable") -> None:
        """Wait for the states, take what they made into the parent, and release their branches.

        gather_variable: each variable that any of them assigned becomes a list in the parent, in the order of the
        states, None where one did not assign it. Reading the list raises the first failed state's error.
        concate_and_append: their new text is appended to the parent, one after the other. Raises the first failed
        state's error.

        The states take no more text; they can still be read, and `group[i].error()` tells how each ended.
        """
        if mode not in JOIN_MODES:
            raise InvalidRequest(f"a join's mode must be one of {', '.join(JOIN_MODES)}, got {mode!r}", field="mode")
        if mode == "concate_and_append":
            for index, state in enumerate(self._states):
                _check_roles(index, state)
        for state in self._states:
            state._interpreter.wait()
        try:
            if mode == "gather_variable":
                self._gather()
            else:
                self._concatenate()
        finally:
            self._release()

    async def ajoin(self, mode: JoinMode = "gather_variable") -> None:
        """Join, leaving the event loop free while the states are waited for; see `join`."""
        from bough.onloop import on_loop  # asyncio is not imported before somebody awaits

        await on_loop(self.join, mode)

    def _gather(self) -> None:
        names = dict.fromkeys(name for state in self._states for name in state._assigned)
        for name in names:
            cells = [state._variables[name] if name in state._assigned else None for state in self._states]
            self._parent[name] = Gathered(cells)

    def _concatenate(self) -> None:
        failures = (state.error() for state in self._states)
        error = next((failure for failure in failures if failure is not None), None)
        if error is not None:
            raise error
        for state in self._states:
            for piece in _as_text(state._interpreter.strand.items):
                self._parent += piece

    def _release(self) -> None:
        reason = InvalidRequest("this branch was joined, nothing can be appended to it any more")
        branches = [state._interpreter.close(reason) for state in self._states]
        held = [branch for branch in branches if branch is not None]
        if held:
            self._parent._interpreter.backend.release(held)


class Copy(State):
    """What `copy` returns: a state, and a `with` block that joins it on the way out."""

    __slots__ = ("_parent",)

    _parent: State

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        group = Group(self._parent, [self])
        if kind is None:
            group.join()
        else:
            group.cancel()


def _check_roles(index: int, state: State) -> None:
    """A branch's text can be appended elsewhere only if its messages begin and end in it."""
    marks = [item for item in state._interpreter.strand.items if isinstance(item, Mark)]
    if marks and (marks[0].role is None or marks[-1].role is not None):
        raise InvalidRequest(f"branch {index} begins or ends a message across the fork, its text cannot be appended")


def _as_text(items: Sequence[Item]) -> Iterator[Any]:
    """Yield the pieces again, with what was generated as text."""
    plain: list[Item] = []
    for item in items:
        if not isinstance(item, Mark):
            plain.append(item)
            continue
        yield text_of(plain)
        plain = []
        yield RoleEnd() if item.role is None else RoleBegin(item.role)
    yield text_of(plain)
