"""What a `State` can search for among its own continuations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from bough.group import Group
    from bough.joins import Score
    from bough.search import Policy, Step
    from bough.state import State


class Searching:
    """The part of a state that is about search."""

    __slots__ = ()

    def best_of(self, n: int, step: Step, score: Score | None = None) -> State:
        """Take a step `n` times at once and go on as the branch with the highest score; return that branch.

        step: an expression, or a function that appends to the state it gets. score: a function of a state; by default
        the mean log-probability of what it generated. Raises the first error if all branches failed::

            s.best_of(4, bo.gen("answer", stop="\\n"), score=lambda b: -len(b["answer"]))
        """
        from bough.search import best_of

        return best_of(cast("State", self), n, step, score)

    def beam(
        self,
        width: int,
        step: Step,
        score: Score | None = None,
        *,
        depth: int,
        branching: int = 2,
        is_final: Callable[[State], bool] | None = None,
    ) -> Group:
        """Return the `width` best branches after `depth` rounds in which each grows by `branching` steps; best first.

        A branch that `is_final` says yes to grows no more, and stays among the rest. This state does not change:
        `adopt` the branch it should go on as; what is left of the others ends with the `with` block of the group, or
        with its states::

            with s.beam(3, bo.gen("line", stop="\\n") + "\\n", depth=4) as beams:
                s.adopt(beams[0])
        """
        from bough.group import Group
        from bough.search import beam

        state = cast("State", self)
        return Group(
            state,
            beam(state, step, width=width, depth=depth, branching=branching, score=score, is_final=is_final),
        )

    def search(
        self,
        step: Step,
        score: Score | None = None,
        *,
        rounds: int,
        branching: int = 3,
        parallel: int = 1,
        policy: Policy = "uct",
        exploration: float = math.sqrt(2),
        max_depth: int | None = None,
        max_leaves: int | None = None,
        is_final: Callable[[State], bool] | None = None,
    ) -> Group:
        """Search the tree of continuations: in each round expand the `parallel` most promising leaves, as one batch.

        policy: uct weighs a branch's mean score against how seldom it was tried; best_first takes the highest score.
        max_leaves: the worst beyond so many are ended. Returns the leaves, best first; see `beam` for what then, and
        `TreeSearch` for the steps one by one::

            with s.search(thought, score=judge, rounds=8, parallel=4, max_depth=3) as leaves:
                s.adopt(leaves[0])
        """
        from bough.group import Group
        from bough.search import TreeSearch

        state = cast("State", self)
        tree = TreeSearch(
            state,
            step,
            score,
            branching=branching,
            parallel=parallel,
            policy=policy,
            exploration=exploration,
            max_depth=max_depth,
            max_leaves=max_leaves,
            is_final=is_final,
        )
        return Group(state, tree.run(rounds))
