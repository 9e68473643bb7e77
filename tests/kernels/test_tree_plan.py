"""Plans of tree decode, checked as arithmetic: what is covered, what is shared, how evenly it is cut."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.kernels.segments import Segment, find_segments
from bough.kernels.tree_costs import TreeCosts
from bough.kernels.tree_plan import OPEN_END, TreePlan, plan_tree
from bough.kernels.tree_runs import Options, fold, shortest

PAGE = 4
Sequences = list[tuple[list[int], int, int]]  # (pages, tokens, new tokens)


def costs(**changes: float) -> TreeCosts:
    """Return costs of a device whose programs read as fast in either tile, and again as fast as for the first time."""
    plain = {
        "item_tokens": 0.0, "wide_item_tokens": 0.0, "wide_token": 4 / 6, "again_token": 1.0, "partial_tokens": 1.0,
        "launch_tokens": 0.0,
    }  # fmt: skip
    return TreeCosts(**{**plain, **changes})  # type: ignore[arg-type]


def options(**changes: object) -> Options:
    small: dict[str, object] = {
        "num_kv_heads": 2, "group": 2, "num_programs": 6, "wide_programs": 4, "narrow_rows": 4, "wide_rows": 8,
        "block_n": 4, "min_split": 8, "min_shared_tokens": 4, "costs": costs(),
    }  # fmt: skip
    return Options(**{**small, **changes})  # type: ignore[arg-type]


@st.composite
def sequences(draw: st.DrawFn) -> Sequences:
    """Up to 6 sequences whose pages are paths in a small tree; the last page of some is private, as after a copy."""
    result: Sequences = []
    fresh = iter(range(1000, 2000))
    for _ in range(draw(st.integers(1, 6))):
        path = draw(st.lists(st.integers(0, 1), min_size=1, max_size=7))
        pages = [int("1" + "".join(map(str, path[: i + 1])), 2) for i in range(len(path))]
        if draw(st.booleans()):
            pages[-1] = next(fresh)
        tokens = len(pages) * PAGE - draw(st.integers(0, PAGE - 1))
        result.append((pages, tokens, draw(st.integers(1, min(3, tokens)))))
    return result


def arrays(given_sequences: Sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return qo_indptr, kv_indptr, kv_indices, kv_lens."""
    qo_indptr = np.concatenate([[0], np.cumsum([new for _, _, new in given_sequences])]).astype(np.int32)
    kv_indptr = np.concatenate([[0], np.cumsum([len(pages) for pages, _, _ in given_sequences])]).astype(np.int32)
    kv_indices = np.concatenate([pages for pages, _, _ in given_sequences]).astype(np.int32)
    return qo_indptr, kv_indptr, kv_indices, np.array([tokens for _, tokens, _ in given_sequences], dtype=np.int32)


def plan_for(given_sequences: Sequences, chosen: Options) -> TreePlan:
    qo_indptr, kv_indptr, kv_indices, kv_lens = arrays(given_sequences)
    segments = find_segments(kv_indptr, kv_indices, kv_lens, PAGE, range(len(kv_lens)))
    return plan_tree(segments, qo_indptr, kv_indptr, kv_lens, chosen)


def slots_read(given_sequences: Sequences, plan: TreePlan) -> dict[int, Counter[int]]:
    """Return how often each token reads each slot, by what the items say and as a kernel would clip them."""
    _, _, kv_indices, _ = arrays(given_sequences)
    visible = [tokens - new + 1 + i for _, tokens, new in given_sequences for i in range(new)]
    read: dict[int, Counter[int]] = {token: Counter() for token in range(len(visible))}
    for row_begin, num_rows, page_begin, begin, end, *_ in np.concatenate([plan.narrow, plan.wide]).tolist():
        for token in plan.rows[row_begin : row_begin + num_rows].tolist():
            for position in range(begin, min(end, visible[token])):
                read[token][int(kv_indices[page_begin + position // PAGE]) * PAGE + position % PAGE] += 1
    return read


@settings(deadline=None, max_examples=150)
@given(sequences(), st.sampled_from([None, 8, 12]), st.booleans(), st.sampled_from([1, 2, 6]))
def test_every_token_reads_each_of_its_keys_once(
    given_sequences: Sequences, exact_split: int | None, share: bool, group: int
) -> None:
    plan = plan_for(given_sequences, options(exact_split=exact_split, share=share, group=group))
    read = slots_read(given_sequences, plan)
    token = 0
    for pages, tokens, new in given_sequences:
        for i in range(new):
            visible = tokens - new + 1 + i
            assert read[token] == Counter(pages[p // PAGE] * PAGE + p % PAGE for p in range(visible))
            token += 1


@settings(deadline=None, max_examples=100)
@given(sequences(), st.sampled_from([None, 8]))
def test_partial_results_are_written_once_and_merged_in_the_order_of_positions(
    given_sequences: Sequences, exact_split: int | None
) -> None:
    plan = plan_for(given_sequences, options(exact_split=exact_split))
    begin_of, token_of = {}, {}
    for items, per_tile in ((plan.narrow, 2), (plan.wide, 4)):
        for row_begin, num_rows, _, begin, _, part_begin, *_ in items.tolist():
            assert 1 <= num_rows <= per_tile
            for i in range(num_rows):
                assert part_begin + i not in begin_of
                begin_of[part_begin + i], token_of[part_begin + i] = begin, int(plan.rows[row_begin + i])
    assert sorted(begin_of) == list(range(plan.num_partials)) == sorted(plan.merge_indices.tolist())
    for token in range(len(plan.merge_indptr) - 1):
        parts = plan.merge_indices[plan.merge_indptr[token] : plan.merge_indptr[token + 1]].tolist()
        assert parts
        assert all(token_of[part] == token for part in parts)
        begins = [begin_of[part] for part in parts]
        assert begins == sorted(set(begins))


@settings(deadline=None, max_examples=100)
@given(sequences())
def test_exact_chunks_end_at_multiples_of_the_split_whatever_the_tree(given_sequences: Sequences) -> None:
    plan = plan_for(given_sequences, options(exact_split=8))
    assert len(plan.wide) == 0
    assert (plan.narrow[:, 3] % 8 == 0).all()
    longest = plan.narrow[:, 4] - plan.narrow[:, 3]
    assert (longest <= 8).all()
    alone = plan_for(given_sequences[:1], options(exact_split=8))
    for token in range(given_sequences[0][2]):
        assert np.diff(plan.merge_indptr)[token] == np.diff(alone.merge_indptr)[token]


def tree(width: int, prefix: int, tail: int) -> Sequences:
    """Return `width` sequences that share `prefix` pages and have `tail` of their own."""
    shared = list(range(prefix))
    return [(shared + list(range(10_000 * (b + 1), 10_000 * (b + 1) + tail)), (prefix + tail) * PAGE, 1)
            for b in range(width)]  # fmt: skip


def keys_read(plan: TreePlan, kv_len: int) -> int:
    items = np.concatenate([plan.narrow, plan.wide]).astype(np.int64)
    return int((np.minimum(items[:, 4], kv_len) - items[:, 3]).sum())


def test_a_shared_prefix_is_read_once_per_tile_and_not_once_per_sequence() -> None:
    width, prefix, tail = 16, 500, 5
    shared = plan_for(tree(width, prefix, tail), options(narrow_rows=16, wide_rows=64))
    apart = plan_for(tree(width, prefix, tail), options(narrow_rows=16, wide_rows=64, share=False))
    kv_len = (prefix + tail) * PAGE
    assert keys_read(shared, kv_len) == (prefix + width * tail) * PAGE
    assert keys_read(apart, kv_len) == width * kv_len
    assert len(apart.wide) == 0


def test_levels_of_a_tree_are_shared_each_by_its_own_branches() -> None:
    found = find_segments(
        np.array([0, 4, 8, 12], np.int32),
        np.array([1, 2, 3, 4, 1, 2, 3, 5, 1, 6, 7, 8], np.int32),
        np.array([16, 15, 14], np.int32),
        PAGE,
        range(3),
    )
    assert {(s.begin, s.end, s.seqs) for s in found} == {
        (0, 4, (0, 1, 2)), (4, 12, (0, 1)), (12, 16, (0,)), (12, 15, (1,)), (4, 14, (2,)),
    }  # fmt: skip
    assert [s.parent < i for i, s in enumerate(found)] == [True] * len(found)


def test_short_segments_are_read_by_each_branch_with_its_own_keys() -> None:
    """A segment pays where (branches - 1) times its tokens exceed what the partial results of its sequences cost."""
    segments = [Segment(0, 40, (0, 1, 2), -1), Segment(40, 50, (0,), 0), Segment(40, 60, (1,), 0),
                Segment(40, 45, (2,), 0)]  # fmt: skip
    kv_lens, indptr = np.array([50, 60, 45], np.int32), np.arange(4, dtype=np.int32)

    def runs(**changes: object) -> Sequence[tuple[int, int]]:
        return [(run.begin, run.end) for run in fold(segments, indptr, kv_lens, options(**changes))]

    assert runs(costs=costs(partial_tokens=26.0)) == [(0, 40), (40, 50), (40, 60), (40, 45)]  # 2 * 40 > 3 * 26
    assert runs(costs=costs(partial_tokens=27.0)) == [(0, 50), (0, 60), (0, 45)]
    assert runs(min_shared_tokens=41) == [(0, 50), (0, 60), (0, 45)]
    assert runs(exact_split=16) == [(0, 32), (32, 50), (32, 60), (32, 45)]


def test_a_sequence_that_ends_inside_a_shared_segment_is_covered_when_that_is_not_shared() -> None:
    segments = [Segment(0, 40, (0, 1), -1), Segment(40, 80, (1,), 0)]
    kv_lens, indptr = np.array([39, 80], np.int32), np.arange(3, dtype=np.int32)
    assert [(r.begin, r.end, r.seqs) for r in fold(segments, indptr, kv_lens, options(share=False))] == [
        (0, 39, (0,)), (0, 80, (1,)),
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 1_000, 128_000])
@pytest.mark.parametrize("batch", [1, 3, 33, 200])
def test_programs_get_nearly_equal_shares(batch: int, tokens: int) -> None:
    """The busiest program, items dealt in turns, does at most 1.35 times the mean, or one chunk of the least size."""
    chosen = Options(num_kv_heads=8, group=4, num_programs=396, wide_programs=264)
    segments = [Segment(0, tokens + 37 * b, (b,), -1) for b in range(batch)]
    kv_lens = np.array([segment.end for segment in segments], np.int32)
    indptr = np.arange(batch + 1, dtype=np.int32)
    plan = plan_tree(segments, indptr, indptr, kv_lens, chosen)
    open_ends = plan.narrow[:, 4] == OPEN_END
    longest = np.where(open_ends, 0, plan.narrow[:, 4] - plan.narrow[:, 3])
    lengths = np.where(open_ends, np.maximum(longest.max(initial=0), chosen.min_split), longest).repeat(8)
    if batch == 1 and tokens == 1:
        assert len(plan.narrow) == 1
        return
    loads = np.bincount(np.arange(len(lengths)) % 396, weights=lengths, minlength=396)
    assert loads.max() <= max(1.35 * loads.mean() + lengths.max(), chosen.min_split)
    assert plan.num_partials <= max(batch, 0.01 * kv_lens.sum())


def test_window_leaves_out_keys_before_every_query_of_an_item() -> None:
    plan = plan_for([(list(range(100)), 400, 3)], options(window=10))
    assert plan.wide[:, 3].min() == (400 - 3 + 1 - 10) // 4 * 4


def test_growth_says_how_long_a_plan_stays_valid() -> None:
    assert plan_for(tree(3, 8, 3), options()).growth == options().min_split
    assert plan_for(tree(3, 8, 0), options()).growth == 0  # no keys of their own: their first new ones need items
    lengths = [(pages, tokens - 1, 1) for pages, tokens, _ in tree(2, 8, 3)]  # 43 tokens: chunks end at 48
    assert plan_for(lengths, options(exact_split=8)).growth == 5


EXPENSIVE = costs(item_tokens=500.0, wide_item_tokens=500.0, partial_tokens=200.0, launch_tokens=4000.0)
CHEAP = costs(partial_tokens=0.0)


def spans(given_sequences: Sequences, plan: TreePlan) -> list[list[tuple[int, int]]]:
    """Return the stretches of positions whose partial results each token merges, in the order of the merge."""
    visible = [tokens - new + 1 + i for _, tokens, new in given_sequences for i in range(new)]
    items = np.concatenate([plan.narrow, plan.wide]).tolist()
    of_part = {part_begin + i: (begin, end) for _, rows, _, begin, end, part_begin, *_ in items for i in range(rows)}
    merged = [plan.merge_indices[begin:end].tolist() for begin, end in itertools.pairwise(plan.merge_indptr)]
    return [
        [(of_part[part][0], min(of_part[part][1], seen)) for part in parts]
        for parts, seen in zip(merged, visible, strict=True)
    ]


@settings(deadline=None, max_examples=100)
@given(sequences(), st.sampled_from([8, 12]))
def test_in_exact_mode_the_sums_do_not_depend_on_the_costs(given_sequences: Sequences, exact_split: int) -> None:
    """Which keys a partial result sums up, and in which order they are merged: with one tile size, that is all."""
    plans = [plan_for(given_sequences, options(exact_split=exact_split, costs=each)) for each in (CHEAP, EXPENSIVE)]
    first, second = (spans(given_sequences, plan) for plan in plans)
    assert first == second
    assert all(len(plan.wide) == 0 for plan in plans)


@settings(deadline=None, max_examples=100)
@given(sequences(), st.sampled_from([CHEAP, EXPENSIVE, costs(launch_tokens=20.0), costs(again_token=0.1)]))
def test_no_other_way_is_shorter_than_the_one_taken(given_sequences: Sequences, given_costs: TreeCosts) -> None:
    qo_indptr, kv_indptr, kv_indices, kv_lens = arrays(given_sequences)
    segments = find_segments(kv_indptr, kv_indices, kv_lens, PAGE, range(len(kv_lens)))
    taken = shortest(segments, qo_indptr, kv_lens, options(costs=given_costs))
    alone = shortest(segments, qo_indptr, kv_lens, options(costs=given_costs, share=False))
    assert taken.duration <= alone.duration


def is_shared(plan: TreePlan) -> bool:
    return bool((np.concatenate([plan.narrow, plan.wide])[:, 1] > 1).any())


def test_branches_read_a_prefix_by_themselves_where_that_takes_less_time() -> None:
    forked = tree(6, 16, 4)  # 64 tokens for six, 16 of each
    assert is_shared(plan_for(forked, options(costs=CHEAP)))
    assert not is_shared(plan_for(forked, options(costs=EXPENSIVE)))
    # Another branch's keys come from the cache: reading them again costs next to nothing.
    assert not is_shared(plan_for(forked, options(costs=costs(again_token=0.01))))
    longer = tree(6, 1600, 4)
    assert is_shared(plan_for(longer, options(costs=EXPENSIVE)))


def test_the_wide_tile_is_left_out_where_its_kernel_costs_more_than_it_saves() -> None:
    forked = tree(3, 16, 4)  # three rows: two narrow tiles, or one wide one
    assert len(plan_for(forked, options(costs=CHEAP)).wide)
    without = plan_for(forked, options(costs=costs(partial_tokens=0.0, launch_tokens=30.0)))
    assert len(without.wide) == 0
    assert is_shared(without)


def test_a_split_that_cuts_through_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="exact_split 100 is not a multiple of block_n 64"):
        Options(num_kv_heads=8, group=4, num_programs=1, wide_programs=1, exact_split=100)
