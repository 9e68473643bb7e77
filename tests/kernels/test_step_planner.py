"""A GPU's step is planned from an earlier one's work items, and reads what its own plan would read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from bough.kernels.cuda_attention import Kernels, StepPlan, choose_kernels
from bough.kernels.layout import PagedLayout
from bough.kernels.step_planner import StepPlanner

PAGE = 4


def kernels(exact_split: int | None = None) -> Kernels:
    """Return kernels of an imagined small GPU, whose planner cuts runs of few tokens."""
    chosen = choose_kernels(4, 2, 64, torch.bfloat16, (9, 0), 2)
    small = replace(chosen.options, block_n=4, min_split=8, min_shared_tokens=4, exact_split=exact_split)
    return replace(chosen, options=small)


class Branches:
    """Sequences that decode, fork and leave; a fork shares whole pages and copies the one they part in."""

    def __init__(self, *lens: int) -> None:
        self.pages: list[list[int]] = []
        self.lens: list[int] = []
        self._fresh = iter(range(100_000))
        for length in lens:
            self.pages.append([])
            self.lens.append(0)
            self.grow(-1, length)

    def grow(self, index: int, count: int = 1) -> None:
        self.lens[index] += count
        for _ in range(-(-self.lens[index] // PAGE) - len(self.pages[index])):
            self.pages[index].append(next(self._fresh))

    def fork(self, index: int) -> None:
        self.pages.append(self.pages[index][: self.lens[index] // PAGE])
        self.lens.append(self.lens[index])
        self.grow(-1)

    def leave(self, index: int) -> None:
        del self.pages[index], self.lens[index]

    def step(self) -> None:
        for index in range(len(self.lens)):
            self.grow(index)

    def layout(self, *, prefill: int | None = None) -> PagedLayout:
        """Return the step that computes each one's last token; prefill: which one's is not a decode."""
        count = len(self.lens)
        return PagedLayout(
            np.arange(count + 1, dtype=np.int32),
            np.cumsum([0, *map(len, self.pages)], dtype=np.int32),
            np.concatenate(self.pages).astype(np.int32),
            np.array(self.lens, dtype=np.int32),
            np.arange(count) != (-1 if prefill is None else prefill),
            PAGE,
        )


def slots_read(plan: StepPlan) -> list[Counter[int]]:
    """Return how often each token reads each slot, clipped as a kernel clips."""
    read: list[Counter[int]] = [Counter() for _ in plan.visible_lens]
    for row_begin, num_rows, page_begin, begin, end, *_ in np.concatenate([plan.tree.narrow, plan.tree.wide]).tolist():
        for token in plan.tree.rows[row_begin : row_begin + num_rows].tolist():
            for position in range(begin, min(end, int(plan.visible_lens[token]))):
                read[token][int(plan.kv_indices[page_begin + position // PAGE]) * PAGE + position % PAGE] += 1
    return read


def check(plan: StepPlan, branches: Branches) -> None:
    """Every token reads each of its keys once, and its partial results are merged in the order of positions."""
    expected = [
        Counter(pages[p // PAGE] * PAGE + p % PAGE for p in range(length))
        for pages, length in zip(branches.pages, branches.lens, strict=True)
    ]
    assert slots_read(plan) == expected
    begins: dict[int, int] = {}
    for _, num_rows, _, begin, _, part, *_ in np.concatenate([plan.tree.narrow, plan.tree.wide]).tolist():
        begins |= dict.fromkeys(range(part, part + num_rows), begin)
    for token in range(len(branches.lens)):
        first, last = plan.tree.merge_indptr[token : token + 2].tolist()
        of_token = [begins[part] for part in plan.tree.merge_indices[first:last].tolist()]
        assert of_token == sorted(of_token)


def test_a_decode_keeps_its_items_until_the_plan_has_grown_as_far_as_it_may() -> None:
    branches, planner, chosen = Branches(40), StepPlanner(), kernels()
    for _ in range(3):
        branches.fork(0)
    branches.step()
    first = planner.plan(branches.layout(), chosen)
    for _ in range(first.tree.growth):
        branches.step()
        plan = planner.plan(branches.layout(), chosen)
        assert plan.tree.rows is first.tree.rows
        check(plan, branches)
    branches.step()
    plan = planner.plan(branches.layout(), chosen)
    assert plan.tree.rows is not first.tree.rows
    check(plan, branches)


def test_in_exact_mode_a_plan_ends_with_the_first_chunk_that_does() -> None:
    branches, planner, chosen = Branches(42, 39), StepPlanner(), kernels(exact_split=8)
    first = planner.plan(branches.layout(), chosen)
    assert first.tree.growth == 1
    branches.step()
    assert planner.plan(branches.layout(), chosen).tree.rows is first.tree.rows
    branches.step()
    assert planner.plan(branches.layout(), chosen).tree.rows is not first.tree.rows


@pytest.mark.parametrize("change", ["fork", "leave", "order", "page", "prefill", "kernels", "shorter"])
def test_what_is_another_step_is_planned_anew(change: str) -> None:
    branches, planner, chosen = Branches(40, 40), StepPlanner(), kernels()
    first = planner.plan(branches.layout(), chosen)
    if change == "fork":
        branches.fork(0)
    elif change == "leave":
        branches.leave(1)
    elif change == "order":
        branches.pages.reverse()
    elif change == "page":
        branches.pages[1][-1] = 99_000
    elif change == "kernels":
        chosen = kernels()
    elif change == "shorter":
        branches.lens[0] -= 1
    plan = planner.plan(branches.layout(prefill=0 if change == "prefill" else None), chosen)
    assert plan.tree.rows is not first.tree.rows
    if change != "prefill":
        check(plan, branches)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.lists(st.sampled_from(["step"] * 8 + ["fork", "leave", "grow"]), max_size=40),
    st.sampled_from([None, 8]),
    st.randoms(use_true_random=False),
)
def test_every_step_reads_each_of_its_keys_once(
    lens: list[int], does: list[str], exact: int | None, random: Random
) -> None:
    branches, planner, chosen = Branches(*lens), StepPlanner(), kernels(exact)
    for doing in does:
        index = random.randrange(len(branches.lens))
        if doing == "fork":
            branches.fork(index)
        elif doing == "leave" and len(branches.lens) > 1:
            branches.leave(index)
        elif doing == "grow":
            branches.grow(index, random.randint(1, 20))
        else:
            branches.step()
        plan = planner.plan(branches.layout(), chosen)
        check(plan, branches)
        if exact is not None:  # where sums are cut decides bits: as a plan of this step alone cuts them
            alone = StepPlanner().plan(branches.layout(), chosen)
            assert _cuts(plan) == _cuts(alone)


def _cuts(plan: StepPlan) -> list[list[tuple[int, int]]]:
    """Return (first, last + 1) position of each of a token's partial results, in the order of their merge."""
    spans: dict[int, tuple[int, int, int]] = {}
    for row_begin, num_rows, _, begin, end, part, *_ in np.concatenate([plan.tree.narrow, plan.tree.wide]).tolist():
        spans |= {part + i: (begin, end, int(plan.tree.rows[row_begin + i])) for i in range(num_rows)}
    cuts: list[list[tuple[int, int]]] = []
    for token, length in enumerate(plan.visible_lens.tolist()):
        first, last = plan.tree.merge_indptr[token : token + 2].tolist()
        cuts.append([(spans[p][0], min(spans[p][1], length)) for p in plan.tree.merge_indices[first:last].tolist()])
    return cuts
