"""`StepPlanner`: the plans of a GPU's steps, made anew only where `TreePlan.growth` ends or the sequences change.

In a decode each sequence grows by one token, and for `Options.min_split` steps (in exact mode up to the next end of a
chunk) the work items stay what they are: keys that are new are read by items without an end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bough.kernels.layout import Int32Array, PagedLayout

if TYPE_CHECKING:  # these import Triton, which a machine without a GPU need not have
    from bough.kernels.cuda_attention import Kernels, StepPlan

_PAGE_BEGIN = 2  # of an item's numbers, see `tree_plan.Item`


class StepPlanner:
    """Plans the steps of one runner; what is computed by its plans is what is computed by those of `plan_step`.

    It remembers one step, and reads that layout's arrays again: nobody may change them.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def plan(self, layout: PagedLayout, kernels: Kernels) -> StepPlan:
        """Return the plan of a step; arguments as in `plan_step`. Do not change it: later steps have parts of it."""
        if self._made is not None and self._made.lasts(layout, kernels):
            return self._made.moved_on(layout)
        from bough.kernels.cuda_attention import plan_step

        plan = plan_step(layout, kernels)
        self._made = _Made.of(layout, plan, kernels)
        return plan


@dataclass(frozen=True, slots=True)
class _Made:
    """A plan and what it was made for.

    pages: the ids of the pages that held the tokens of each sequence, one sequence after another, counts: (num_seqs,)
    how many. narrow_seqs, wide_seqs: (num_items,) the sequence whose pages each item reads.
    """

    layout: PagedLayout
    kernels: Kernels
    plan: StepPlan
    counts: list[int]
    pages: Int32Array
    narrow_seqs: npt.NDArray[np.intp]
    wide_seqs: npt.NDArray[np.intp]

    @staticmethod
    def of(layout: PagedLayout, plan: StepPlan, kernels: Kernels) -> _Made | None:
        """Return None if the plan serves no other step."""
        if not layout.is_decode.all() or not plan.tree.growth:
            return None
        counts = (-(-layout.kv_lens // layout.page_size)).tolist()
        owners = (_owners(layout, items) for items in (plan.tree.narrow, plan.tree.wide))
        return _Made(layout, kernels, plan, counts, _pages(layout, counts), *owners)

    def lasts(self, layout: PagedLayout, kernels: Kernels) -> bool:
        """Tell whether the sequences are those of then, in the same order, each grown by no more than the plan allows.

        They are known by the pages that they had. What has come since is read by each sequence for itself.
        """
        then = self.layout
        if kernels is not self.kernels or layout.page_size != then.page_size:
            return False
        if len(layout.kv_lens) != len(then.kv_lens) or not layout.is_decode.all():
            return False
        grown = layout.kv_lens - then.kv_lens
        if grown.min() < 0 or grown.max() > self.plan.tree.growth:
            return False
        return np.array_equal(self.pages, _pages(layout, self.counts))

    def moved_on(self, layout: PagedLayout) -> StepPlan:
        """Return the plan for the sequences' present lengths, and for where their pages are listed now."""
        tree = self.plan.tree
        if not np.array_equal(layout.kv_indptr, self.layout.kv_indptr):
            tree = replace(
                tree,
                narrow=_relocated(tree.narrow, layout.kv_indptr[self.narrow_seqs]),
                wide=_relocated(tree.wide, layout.kv_indptr[self.wide_seqs]),
            )
        return replace(self.plan, tree=tree, kv_indices=layout.kv_indices, visible_lens=layout.kv_lens)


def _owners(layout: PagedLayout, items: Int32Array) -> npt.NDArray[np.intp]:
    # No two sequences begin at one place: each has pages.
    return np.searchsorted(layout.kv_indptr, items[:, _PAGE_BEGIN], side="right") - 1


def _pages(layout: PagedLayout, counts: list[int]) -> Int32Array:
    """Return the first page ids of each sequence, as many as `counts` says."""
    begins = layout.kv_indptr.tolist()
    return np.concatenate([layout.kv_indices[at : at + count] for at, count in zip(begins, counts, strict=False)])


def _relocated(items: Int32Array, page_begins: Int32Array) -> Int32Array:
    moved = items.copy()
    moved[:, _PAGE_BEGIN] = page_begins
    return moved
