"""The ways in which branches become one again: what of them their parent takes over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bough.calls import GenCall
from bough.cells import Dense
from bough.errors import InvalidRequest
from bough.expressions import RoleBegin, RoleEnd
from bough.interpreter import Interpreter
from bough.lease import Lease
from bough.pieces import Item, Mark, text_of
from bough.strands import Onward, Strand, Trunk, items_after
from bough.variables import Gathered

if TYPE_CHECKING:
    from bough.state import State

Score: TypeAlias = "Callable[[State], float]"
Key: TypeAlias = "str | Callable[[State], Hashable]"


def gather_variables(parent: State, states: Sequence[State]) -> None:
    """Make each variable of the states a list in the parent; reading it raises the first failure."""
    for name in _assigned(states):
        parent[name] = Gathered(_cells(name, states))


def gather(parent: State, states: Sequence[State]) -> None:
    """Make each variable of the states `Cells` in the parent, whose failures are raised cell by cell."""
    for name in _assigned(states):
        parent[name] = Dense(_cells(name, states))


def merge(parent: State, states: Sequence[State]) -> None:
    """Give the parent each variable of the states as it is. Raises InvalidRequest if two assigned the same."""
    for name in _assigned(states):
        owners = [number for number, state in enumerate(states) if name in state._assigned]
        if len(owners) > 1:
            raise InvalidRequest(
                f"branches {owners[0]} and {owners[1]} both assigned {name!r}: merge takes a name from one branch, "
                "gather makes lists",
                name=name,
            )
    for state in states:
        for name in state._assigned:
            parent[name] = state._variables[name]


def concatenate(parent: State, states: Sequence[State]) -> None:
    """Append the states' new text to the parent. Raises the first failed state's error."""
    for state in states:
        error = state.error()
        if error is not None:
            raise error
    for state in states:
        for piece in _as_text(state._interpreter.own_items()):
            parent += piece


def check_roles(states: Sequence[State]) -> None:
    """Raise InvalidRequest unless the messages of every state begin and end in it: else its text fits nowhere else."""
    for index, state in enumerate(states):
        marks = [item for item in state._interpreter.own_items() if isinstance(item, Mark)]
        if marks and (marks[0].role is None or marks[-1].role is not None):
            raise InvalidRequest(
                f"branch {index} begins or ends a message across the fork, its text cannot be appended"
            )


def best(states: Sequence[State], score: Score) -> State:
    """Return the first of the states with the highest score; those that failed have none. Raises if all failed."""
    alive = sound(states)
    if score is mean_logprob:
        scores = [_mean_logprob(state._interpreter.own_items()) for state in alive]
    else:
        scores = [score_of(score, state) for state in alive]
    return alive[scores.index(max(scores))]


def score_of(score: Score, state: State) -> float:
    """Return the score of a branch. Raises InvalidRequest for what puts branches in no order."""
    value = score(state)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InvalidRequest(f"a score must be a number, got {value!r}", field="score", value=repr(value))
    return number


def voted(states: Sequence[State], key: Key) -> State:
    """Return the first of the states that hold the most frequent value; the value met first wins a tie."""
    alive = sound(states)
    values = [state[key] if isinstance(key, str) else key(state) for state in alive]
    try:
        (winner, _), *_ = Counter(values).most_common(1)
    except TypeError:
        raise InvalidRequest(f"votes must be hashable values, got {values[0]!r}", field="key") from None
    return alive[values.index(winner)]


def sound(states: Sequence[State]) -> list[State]:
    """Wait for the states; return those that did not fail. Raises the first error if none is left."""
    alive, first = [], None
    for state in states:
        error = state.error()
        if error is None:
            alive.append(state)
        else:
            first = first or error
    if not alive:
        raise first or InvalidRequest("there is no branch to choose from")
    return alive


def adopt(parent: State, child: State) -> None:
    """Let a state go on as one of the branches that were forked off it: nothing is computed again."""
    ours, theirs = parent._interpreter, child._interpreter
    theirs.flush()
    with ours.lock, theirs.lock:
        ours._check_open()
        theirs._check_open()
        theirs.check_no_thought("a choice")
        if ours._sent < len(ours.strand.items) or not _continues(theirs, ours):
            raise InvalidRequest("a state can go on only as a branch forked off where it stands: it went on itself")
        branch = theirs.close(InvalidRequest("this branch is the state's own now, which goes on"))
        assert branch is not None, "an open branch that was forked off is held"
        old = ours.lease.take()
        if ours._has_children:  # a cancel of the state has to reach the other branches
            ours._kept.append(Lease(ours.backend, old))
        elif old is not None:
            ours.backend.release((old,))
        ours.lease.branch = branch
        ours.trunk = Trunk(theirs.trunk, theirs.strand, len(theirs.strand.items))
        ours.strand = Strand()
        ours._inherited = theirs.lengths()
        theirs.strand.forks.append((ours.trunk.length, Onward(ours.strand, "chosen, then")))
        ours._sent = 0
        ours.role = theirs.role
        ours._last_extend = theirs._last_extend
        ours._ancestors = [*ours._ancestors, *theirs._ancestors]
        ours._has_children = theirs._has_children
        ours._kept = [*ours._kept, *theirs._kept]
    parent._variables.update(child._variables)
    for name in child._assigned:
        parent._assigned[name] = None
    if parent._feed is not None:
        parent._feed.notify()


def _continues(theirs: Interpreter, ours: Interpreter) -> bool:
    """Whether a branch was forked off exactly where ours ends."""
    trunk, end = theirs.trunk, len(ours.strand.items)
    while trunk is not None:
        if trunk.strand is ours.strand:
            return trunk.length == end
        trunk = trunk.parent
    return False


def _assigned(states: Sequence[State]) -> dict[str, None]:
    return dict.fromkeys(name for state in states for name in state._assigned)


def _cells(name: str, states: Sequence[State]) -> list[object]:
    return [state._variables[name] if name in state._assigned else None for state in states]


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


def mean_logprob(state: State) -> float:
    """Return the mean natural-log probability of the tokens that a state generated, its forks' past included.

    The usual score of a branch; of gens with `return_logprob=True`, and 0 for a state that generated nothing. `best`
    and the searches leave out what was generated before the fork, the same for all branches. Raises InvalidRequest if
    it generated something, but none of it has log-probabilities::

        forks = s.fork(4)
        forks += bo.gen("answer", return_logprob=True)
        forks.best(bo.mean_logprob)
    """
    return _mean_logprob(state._interpreter.items())


def mean_logprob_since(root: State) -> Score:
    """Return the same score for branches of branches: of what was generated since the first fork off `root`."""
    interpreter = root._interpreter
    point = (interpreter.strand, len(interpreter.strand.items))

    def score(state: State) -> float:
        items = items_after(state._interpreter.trunk, state._interpreter.strand, point)
        assert items is not None, "a branch comes after the state it was forked off"
        return _mean_logprob(items)

    return score


def _mean_logprob(items: Iterable[Item]) -> float:
    total, number, without = 0.0, 0, None
    for item in items:
        if isinstance(item, GenCall):
            meta = item.meta()
            first = meta[0] if isinstance(meta, list) else meta
            logprobs = first.get("output_token_logprobs")
            if logprobs is None:
                without = item
            else:
                total += sum(logprob for logprob, *_ in logprobs)
                number += len(logprobs)
    if without is not None and not number:
        name = without.name or "(unnamed)"
        raise InvalidRequest(
            f"gen {name} has no log-probabilities: give return_logprob=True, or choose by another score",
            field="return_logprob",
        )
    return total / number if number else 0.0
