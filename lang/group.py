"""What `fork` returns: the branches, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args, overload

from bough import joins
from bough.check import Feedback, Predicate, check_all
from bough.errors import InvalidRequest
from bough.expressions import Expression
from bough.race import end_all
from bough.race import race as run_race
from bough.sampling import seconds
from bough.state import State

JoinMode: TypeAlias = Literal[
    "gather_variable", "concate_and_append", "gather", "concat", "merge", "pick", "vote", "best"
]
JOIN_MODES: Final[tuple[str, ...]] = get_args(JoinMode)
_CHOOSING: Final = ("pick", "vote", "best")

Appended: TypeAlias = "str | Expression | Callable[[int], str | Expression] | Sequence[str | Expression]"


class Group(Sequence[State]):
    """States forked off one state, in order.

    `group += x` appends to each: text or an expression to all, a list item by item, a callable's result by index.
    `group[0]`, `group[1:]` and, where the branches have names, `group["plan"]` are some of them. As a `with` block it
    cancels, on the way out, whatever was not joined.
    """

    __slots__ = ("_parent", "_states")

    def __init__(self, parent: State, states: Sequence[State]) -> None:
        self._parent = parent
        self._states = list(states)

    def __repr__(self) -> str:
        return f"<Group of {len(self._states)}: {', '.join(map(repr, self._states))}>"

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, index: int | str) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> Group: ...
    def __getitem__(self, index: int | str | slice) -> State | Group:
        """Return one state, by its place or name, or a group of some of them."""
        if isinstance(index, slice):
            return Group(self._parent, self._states[index])
        return self._states[self._place(index)]

    @property
    def names(self) -> list[str | None]:
        """The names of the branches, None for those that have none."""
        return [state.branch_name for state in self._states]

    def _place(self, index: int | str) -> int:
        if not isinstance(index, str):
            return index
        if index not in self.names:
            known = ", ".join(name for name in self.names if name is not None) or "none"
            raise InvalidRequest(f"no branch is called {index!r}; called by name: {known}", field="name")
        return self.names.index(index)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        end_all([state for state in self._states if not state._interpreter.closed])

    def __setitem__(self, index: int | str, state: State) -> None:
        """Take `group[i] += ...`, which assigns the same state again; a group's states cannot be replaced."""
        if self._states[self._place(index)] is not state:
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

    # ------------------------------------------------------------------------------------------ join

    def join(self, mode: JoinMode = "gather_variable", by: Any = None) -> None:
        """Wait for the states, take what they made into the parent, and release their branches.

        gather_variable (SGLang's): each variable that any of them assigned becomes a list in the parent, in the order
        of the states, None where one did not assign it. Reading the list raises the first failed state's error.
        gather: the same, but the list is `Cells`: a cell raises its own branch's error, the others can be read.
        concat, or SGLang's concate_and_append: their new text is appended to the parent, one after the other. Raises
        the first failed state's error.
        merge: each variable goes to the parent as it is. Raises InvalidRequest if two branches assigned the same.
        pick, vote, best: as the methods of these names, with `by` as their argument.

        The states take no more text; they can still be read, and `group[i].error()` tells how each ended.
        """
        if mode not in JOIN_MODES:
            raise InvalidRequest(f"a join's mode must be one of {', '.join(JOIN_MODES)}, got {mode!r}", field="mode")
        if mode in _CHOOSING:
            getattr(self, mode)(joins.mean_logprob if mode == "best" and by is None else by)
            return
        if by is not None:
            raise InvalidRequest(f"join({mode!r}) takes nothing to choose by, got {by!r}", field="by")
        is_text = mode in ("concat", "concate_and_append")
        if is_text:
            joins.check_roles(self._states)
        self._wait()
        try:
            take = {"gather": joins.gather, "merge": joins.merge, "gather_variable": joins.gather_variables}
            (joins.concatenate if is_text else take[mode])(self._parent, self._states)
        finally:
            self._release()

    def pick(self, choose: Callable[[Group], State | int | str]) -> State:
        """Wait for the states, and let the parent go on as the one that `choose` returns: its text, its variables.

        `choose` gets the group and returns one of its states, a place or a name. Nothing is computed again; the other
        branches are ended and their KV freed. Returns the chosen branch, which can still be read, as all can. Raises
        InvalidRequest if the parent took text of its own since the fork::

            forks = s.fork(2)
            forks += bo.gen("plan", max_tokens=40)
            forks.pick(lambda forks: min(forks, key=lambda f: len(f["plan"])))
        """
        if not callable(choose):
            raise InvalidRequest(f"pick needs a function that chooses one of the states, got {choose!r}", field="by")
        self._wait()
        return self._choose(choose(self))

    def best(self, score: joins.Score = joins.mean_logprob) -> State:
        """Let the parent go on as the branch with the highest score; branches that failed have none. See `pick`.

        Raises the first error if all failed::

            forks.best(lambda f: -len(f["answer"]))
        """
        if not callable(score):
            raise InvalidRequest(f"best needs a function of a state that scores it, got {score!r}", field="by")
        self._wait()
        return self._choose(joins.best(self._states, score))

    def vote(self, key: joins.Key) -> State:
        """Let the parent go on as the first branch that holds the most frequent value. See `pick`.

        key: a variable's name, or a function of a state, whose value is counted. The value met first wins a tie;
        branches that failed have no vote; raises the first error if all failed::

            forks = s.fork(5)
            forks += bo.gen("answer", stop="\n")
            forks.vote(lambda f: f["answer"].strip().lower())
        """
        if not callable(key) and not isinstance(key, str):
            raise InvalidRequest(f"vote needs a variable's name or a function of a state, got {key!r}", field="by")
        self._wait()
        return self._choose(joins.voted(self._states, key))

    def race(self, k: int = 1, *, until: Callable[[State], bool] | None = None, timeout: float | None = None) -> Group:
        """Return the first `k` branches to finish what was appended so far, in that order, and end all the others.

        until: a branch wins only if it also satisfies this; what it reads is there. The others are cancelled in the
        runtime, which frees the KV that only they have; what they had done can still be read, and the winners go on.
        Fewer win if no more can. If none does because all failed, raises the first error; Timeout if `timeout` seconds
        pass before one has won::

            forks = s.fork(8)
            forks += bo.gen("proof", max_tokens=400)
            (first,) = forks.race(until=lambda f: "QED" in f["proof"])
        """
        return Group(self._parent, run_race(self._states, k, until, seconds("timeout", timeout)))

    def check(self, predicate: Predicate, *, retries: int = 3, feedback: Feedback | None = None) -> Group:
        """Check the last gen of every branch, as `State.check` does; return the branches that passed.

        All retries of a round are issued before one is waited for. A branch of which no attempt passed takes no more
        text: appending to it raises CheckFailed, and it is not in the returned group.
        """
        return Group(self._parent, check_all(self._states, predicate, retries, feedback))

    async def ajoin(self, mode: JoinMode = "gather_variable", by: Any = None) -> None:
        """Join, leaving the event loop free while the states are waited for; see `join`."""
        from bough.onloop import on_loop  # asyncio is not imported before somebody awaits

        await on_loop(self.join, mode, by)

    async def arace(
        self, k: int = 1, *, until: Callable[[State], bool] | None = None, timeout: float | None = None
    ) -> Group:
        """Race, leaving the event loop free; see `race`."""
        from bough.onloop import on_loop

        return await on_loop(self.race, k, until=until, timeout=timeout)

    async def acheck(self, predicate: Predicate, *, retries: int = 3, feedback: Feedback | None = None) -> Group:
        """Check, leaving the event loop free; see `check`."""
        from bough.onloop import on_loop

        return await on_loop(self.check, predicate, retries=retries, feedback=feedback)

    def _wait(self) -> None:
        for state in self._states:
            state._interpreter.wait()

    def _choose(self, chosen: State | int | str) -> State:
        state = chosen if isinstance(chosen, State) else self._states[self._place(chosen)]
        if not any(state is ours for ours in self._states):
            raise InvalidRequest("what was chosen is not a state of the group", field="by")
        joins.adopt(self._parent, state)
        end_all([other for other in self._states if other is not state])
        return state

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


class Scratch(State):
    """What `scratch` returns: a state, and a `with` block after which it is over."""

    __slots__ = ()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            end_all([self])
            return
        branch = self._interpreter.close(InvalidRequest("this scratch is over, nothing can be appended to it any more"))
        if branch is not None:
            self._interpreter.backend.release((branch,))


def race(
    states: Sequence[State], k: int = 1, *, until: Callable[[State], bool] | None = None, timeout: float | None = None
) -> list[State]:
    """Return the first `k` of some states to finish, and end all the others; any states, see `Group.race`."""
    return run_race(list(states), k, until, seconds("timeout", timeout))


async def arace(
    states: Sequence[State], k: int = 1, *, until: Callable[[State], bool] | None = None, timeout: float | None = None
) -> list[State]:
    """Race some states, leaving the event loop free; see `Group.race`."""
    from bough.onloop import on_loop

    return await on_loop(race, states, k, until=until, timeout=timeout)
