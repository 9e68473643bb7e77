"""Search over states: best of n, beams, and trees that are expanded where it is most promising.

All of it is forks: every generation of a frontier is issued before any is read, so that it decodes as one batch over
one shared prefix; what is pruned is cancelled and its private KV freed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from bough.errors import InvalidRequest
from bough.expressions import Expression
from bough.joins import Score, mean_logprob, mean_logprob_since, score_of, sound
from bough.race import end_all
from bough.sampling import count

if TYPE_CHECKING:
    from bough.state import State

Step: TypeAlias = "str | Expression | Callable[[State], object]"
"""What to append to a branch: an expression, or a function that appends to the state it gets, and reads nothing."""
Policy: TypeAlias = Literal["uct", "best_first"]


def best_of(state: State, n: int, step: Step, score: Score | None) -> State:
    """Take the step n times, and go on as the branch with the highest score; return that branch."""
    from bough.group import Group

    issued: list[State] = []
    try:
        return Group(state, _stepped(state, n, step, score, issued)).best(score or mean_logprob)
    except BaseException:
        _end_rest(issued)
        raise


def beam(
    state: State,
    step: Step,
    *,
    width: int,
    depth: int,
    branching: int,
    score: Score | None,
    is_final: Callable[[State], bool] | None,
) -> list[State]:
    """Return at most `width` branches, the best first, each grown by up to `depth` steps."""
    width, depth, branching = _whole("width", width), _whole("depth", depth), _whole("branching", branching)
    judge = score or mean_logprob_since(state)
    beams: list[tuple[float, State, bool]] = []
    issued: list[State] = []
    try:
        for level in range(depth):
            grown = [(entry, _stepped(entry[1], branching, step, score, issued)) for entry in beams if not entry[2]]
            if level == 0:
                grown = [((0.0, state, False), _stepped(state, width * branching, step, score, issued))]
            elif not grown:
                break
            parents = [entry[1] for entry, _ in grown if entry[1] is not state]
            beams = [entry for entry in beams if entry[2]]
            for _, children in grown:
                beams += [
                    (score_of(judge, child), child, bool(is_final and is_final(child))) for child in _alive(children)
                ]
            if not beams:
                _raise_first([child for _, children in grown for child in children])
            beams.sort(key=lambda entry: -entry[0])
            end_all([child for _, child, _ in beams[width:]])
            beams = beams[:width]
            for parent in parents:
                _retire(parent)
    except BaseException:
        _end_rest(issued)
        raise
    return [child for _, child, _ in beams]


@dataclass(eq=False)
class SearchNode:
    """A state of a search tree: its own score, and the mean of all scores at and below it."""

    state: State
    parent: SearchNode | None = None
    score: float = 0.0
    is_final: bool = False
    children: list[SearchNode] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        """The mean of the scores that were backed up through this node; 0 before any."""
        return self.total / self.visits if self.visits else 0.0

    def back_up(self, score: float) -> None:
        """Count a score for this node and all above it."""
        node: SearchNode | None = self
        while node is not None:
            node.visits += 1
            node.total += score
            node = node.parent

    def walk(self) -> Iterator[SearchNode]:
        """Yield this node and all below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)


class TreeSearch:
    """Grows a tree of states below one; the steps of it are its methods, `run` takes them in turn.

    `select` leaves → `expand` each into `branching` branches, as one batch → score them and `back_up` → `prune`.
    """

    def __init__(
        self,
        state: State,
        step: Step,
        score: Score | None = None,
        *,
        branching: int = 3,
        parallel: int = 1,
        policy: Policy = "uct",
        exploration: float = math.sqrt(2),
        max_depth: int | None = None,
        max_leaves: int | None = None,
        is_final: Callable[[State], bool] | None = None,
    ) -> None:
        if policy not in ("uct", "best_first"):
            raise InvalidRequest(f"policy must be uct or best_first, got {policy!r}", field="policy")
        self.root = SearchNode(state)
        self._step, self._score = step, score
        self._branching, self._parallel = _whole("branching", branching), _whole("parallel", parallel)
        self._policy, self._exploration = policy, exploration
        self._max_depth = None if max_depth is None else _whole("max_depth", max_depth)
        self._max_leaves = None if max_leaves is None else _whole("max_leaves", max_leaves)
        self._is_final = is_final
        self._issued: list[State] = []

    def run(self, rounds: int) -> list[State]:
        """Take `rounds` rounds; return the leaves that are left, the best first. What else there was is ended."""
        try:
            for _ in range(_whole("rounds", rounds)):
                leaves = self.select()
                if not leaves:
                    break
                self.expand(leaves)
                self.prune()
        except BaseException:
            _end_rest(self._issued)
            raise
        return [node.state for node in sorted(self._leaves(), key=lambda node: -node.score)]

    def select(self) -> list[SearchNode]:
        """Return the most promising leaves that can be expanded, at most `parallel`."""
        leaves = [node for node in self._leaves(with_root=True) if self._can_grow(node)]
        worth = self._uct if self._policy == "uct" else (lambda node: node.score)
        return sorted(leaves, key=lambda node: -worth(node))[: self._parallel]

    def expand(self, leaves: list[SearchNode]) -> None:
        """Grow every leaf by its branches, all of which are issued before one is read; score them and back up."""
        grown = [
            (leaf, _stepped(leaf.state, self._branching, self._step, self._score, self._issued)) for leaf in leaves
        ]
        judge = self._score or mean_logprob_since(self.root.state)
        for leaf, children in grown:
            for child in _alive(children):
                score = score_of(judge, child)
                leaf.children.append(SearchNode(child, leaf, score, bool(self._is_final and self._is_final(child))))
                leaf.children[-1].back_up(score)
            if not leaf.children and leaf is self.root:
                _raise_first(children)
            leaf.is_final = leaf.is_final or not leaf.children  # none of its branches worked: a dead end
            if leaf is not self.root and leaf.children:
                _retire(leaf.state)

    def prune(self) -> None:
        """End the worst leaves beyond `max_leaves`."""
        if self._max_leaves is None:
            return
        leaves = sorted(self._leaves(), key=lambda node: -node.score)
        for node in leaves[self._max_leaves :]:
            assert node.parent is not None, "the root is no leaf of the tree"
            node.parent.children.remove(node)
        end_all([node.state for node in leaves[self._max_leaves :]])

    def _leaves(self, *, with_root: bool = False) -> list[SearchNode]:
        leaves = [node for node in self.root.walk() if not node.children and not node.state._interpreter.closed]
        return leaves if with_root else [node for node in leaves if node is not self.root]

    def _can_grow(self, node: SearchNode) -> bool:
        depth, above = 0, node.parent
        while above is not None:
            depth, above = depth + 1, above.parent
        return not node.is_final and (self._max_depth is None or depth < self._max_depth)

    def _uct(self, node: SearchNode) -> float:
        """Upper confidence bound for trees (Kocsis and Szepesvari, 2006), the least along the path from the root.

        A leaf is as promising as the least promising step on the way to it, which is where a descent would turn off.
        """
        worth, at = math.inf, node
        while at.parent is not None:
            bonus = self._exploration * math.sqrt(math.log(max(1, at.parent.visits)) / max(1, at.visits))
            worth = min(worth, at.mean + bonus)
            at = at.parent
        return worth


def _stepped(state: State, number: int, step: Step, score: Score | None, issued: list[State]) -> list[State]:
    """Return branches of a state that took the step, and add them to `issued`; nothing is waited for."""
    if not isinstance(step, (str, Expression)) and not callable(step):
        raise InvalidRequest(f"step must be an expression or a function of a state, got {step!r}", field="step")
    children = list(state.fork(number))
    issued.extend(children)
    for child in children:
        if score is None:  # the default score reads log-probabilities
            sampling = child._interpreter.sampling
            if sampling.params.logprobs is None:
                params = msgspec.structs.replace(sampling.params, logprobs=0)
                child._interpreter.sampling = replace(sampling, params=params)
        if isinstance(step, (str, Expression)):
            child += step
        else:
            step(child)
    return children


def _alive(children: list[State]) -> list[State]:
    """Wait for the branches; return those that did not fail, and give the others up."""
    failed = [child for child in children if child.error() is not None]
    end_all(failed)
    return [child for child in children if not any(child is other for other in failed)]


def _end_rest(issued: list[State]) -> None:
    end_all([state for state in issued if not state._interpreter.closed])


def _raise_first(children: list[State]) -> None:
    sound(children)


def _retire(state: State) -> None:
    """Take a state that was expanded out of the game: its branches go on, it takes no more text."""
    branch = state._interpreter.close(InvalidRequest("this state was expanded by a search, its branches go on"))
    if branch is not None:
        state._interpreter.backend.release((branch,))


def _whole(name: str, value: int) -> int:
    checked = count(name, value)
    if checked is None:
        raise InvalidRequest(f"{name} must be a whole number, got None", field=name)
    return checked
