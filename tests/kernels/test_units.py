"""Which rows read which chunks together, and that it changes no bit of any result."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.kernels import native_attention
from bough.kernels.attention import PagedLayout, choose_attention, paged_attention
from bough.kernels.paged_kv import PagedKV
from bough.kernels.units import CHUNK, ROWS_PER_UNIT, Units, plan_units

PAGE = 64  # two pages a chunk


def layout_of(sequences: Sequence[tuple[Sequence[int], int, int]], page_size: int = PAGE) -> PagedLayout:
    """Return the layout of sequences (pages, tokens, new tokens)."""
    return PagedLayout(
        qo_indptr=np.cumsum([0, *(new for _, _, new in sequences)]).astype(np.int32),
        kv_indptr=np.cumsum([0, *(len(pages) for pages, _, _ in sequences)]).astype(np.int32),
        kv_indices=np.concatenate([np.asarray(pages) for pages, _, _ in sequences]).astype(np.int32),
        kv_lens=np.array([length for _, length, _ in sequences], dtype=np.int32),
        is_decode=np.array([new == 1 for _, _, new in sequences]),
        page_size=page_size,
    )


def described(units: Units) -> list[list[tuple[tuple[int, ...], int, int]]]:
    """Return each level's units as (rows, first chunk, end chunk), sorted."""
    levels = []
    for begin, end in pairwise(units.levels):
        fields = units.fields[begin:end].tolist()
        levels.append(sorted((tuple(units.rows[f[3] : f[4]].tolist()), f[1], f[2]) for f in fields))
    return levels


def test_sequences_with_nothing_in_common_are_a_unit_each() -> None:
    units = plan_units(layout_of([([1, 2, 3], 130, 1), ([4], 3, 1)]))
    assert described(units) == [[((0,), 0, 2), ((1,), 0, 1)]]
    assert units.num_shared == 0


def test_a_common_prefix_is_read_once_down_to_the_last_whole_chunk() -> None:
    units = plan_units(layout_of([([1, 2, 3, 4, 5, 6], 330, 1), ([1, 2, 3, 4, 5, 7], 330, 1), ([8], 9, 1)]))
    assert described(units) == [[((0, 1), 0, 2), ((2,), 0, 1)], [((0,), 2, 3), ((1,), 2, 3)]]


def test_a_tree_of_several_levels_parts_where_the_pages_part() -> None:
    a = [1, 2, 3, 4, 5, 6, 10]
    b = [1, 2, 3, 4, 5, 6, 11]
    c = [1, 2, 7, 8, 12]
    units = plan_units(layout_of([(a, 400, 1), (b, 400, 1), (c, 270, 1)]))
    assert described(units) == [
        [((0, 1, 2), 0, 1)],
        [((0, 1), 1, 3), ((2,), 1, 3)],
        [((0,), 3, 4), ((1,), 3, 4)],
    ]


def test_a_chunk_that_is_not_whole_for_one_of_them_is_not_shared() -> None:
    units = plan_units(layout_of([([1, 2], 128, 1), ([1, 2], 127, 1)]))
    assert described(units) == [[((0,), 0, 1), ((1,), 0, 1)]]


def test_prefills_over_a_common_prefix_share_it_too() -> None:
    units = plan_units(layout_of([([1, 2, 3], 140, 12), ([1, 2, 4], 130, 2), ([1, 2, 5], 129, 1)]))
    rows = tuple(range(15))
    assert described(units) == [[(rows, 0, 1)], [(rows[:12], 1, 2), (rows[12:14], 1, 2), (rows[14:], 1, 2)]]


def test_a_long_prefill_is_cut_into_units_that_see_no_further_than_they_may() -> None:
    units = plan_units(layout_of([(range(5), 300, 200)]))
    assert described(units) == [
        [
            (tuple(range(64)), 0, 2),
            (tuple(range(64, 128)), 0, 2),
            (tuple(range(128, 192)), 0, 3),
            (tuple(range(192, 200)), 0, 3),
        ]
    ]


def test_the_units_of_some_queries_read_what_those_of_all_read() -> None:
    units = plan_units(layout_of([([1, 2, 3], 140, 12), ([1, 2, 4], 130, 2), ([1, 2, 5], 129, 1)]))
    assert described(units.of(np.array([11, 14]), 15)) == [[((0, 1), 0, 1)], [((0,), 1, 2), ((1,), 1, 2)]]
    assert described(units.of(np.array([12, 13]), 15)) == [[((0, 1), 0, 1)], [((0, 1), 1, 2)]]
    assert described(units.of(np.array([], dtype=np.int64), 15)) == [[], []]


def test_nothing_is_shared_when_it_is_not_wanted_or_pages_and_chunks_do_not_fit() -> None:
    sequences = [([1, 2, 3], 140, 1), ([1, 2, 4], 140, 1)]
    assert plan_units(layout_of(sequences), share=False).num_shared == 0
    assert plan_units(layout_of(sequences, page_size=48)).num_shared == 0
    assert plan_units(layout_of(sequences)).num_shared == 1


@st.composite
def trees(draw: st.DrawFn) -> PagedLayout:
    """Sequences forked off one another at any page, with new tokens at their ends."""
    page_size = draw(st.sampled_from([1, 16, 64, 128, 256]))
    fresh = iter(range(1_000_000))
    sequences: list[tuple[list[int], int, int]] = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 700))
        count = -(-length // page_size)
        parent = sequences[draw(st.integers(0, len(sequences) - 1))][0] if sequences else []
        pages = parent[: draw(st.integers(0, min(len(parent), count)))]
        pages = [*pages, *(next(fresh) for _ in range(count - len(pages)))]
        sequences.append((pages, length, draw(st.sampled_from([1, 1, 1, 2, 70]))))
    return layout_of([(pages, length, min(new, length)) for pages, length, new in sequences], page_size)


@given(trees(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_row_reads_each_of_its_chunks_once_and_in_order(layout: PagedLayout, share: bool) -> None:
    units = plan_units(layout, share=share)
    owner = np.repeat(np.arange(len(layout.kv_lens)), np.diff(layout.qo_indptr))
    read: dict[int, list[tuple[int, int]]] = {row: [] for row in range(len(owner))}
    ended: list[int] = []
    for begin, end in pairwise(units.levels):
        in_level: list[int] = []
        for page, first, stop, at, to, is_first, is_last in units.fields[begin:end].tolist():
            assert 0 < to - at <= ROWS_PER_UNIT
            for row in units.rows[at:to].tolist():
                base = int(layout.kv_indptr[owner[row]])
                pages = -(-min(stop * CHUNK, int(layout.kv_lens[owner[row]])) // layout.page_size)
                mine = layout.kv_indices[base : base + pages]
                skipped = first * CHUNK // layout.page_size
                assert mine[skipped:].tolist() == layout.kv_indices[page : page + pages][skipped:].tolist()
                assert is_first == (not read[row])
                read[row].append((first, stop))
                in_level.append(row)
                ended += [row] * is_last
        assert len(set(in_level)) == len(in_level), "a row is in two units of a level"
    assert sorted(ended) == list(read)
    positions = layout.positions()
    for row, runs in read.items():
        assert runs[0][0] == 0
        assert all(before[1] == after[0] for before, after in pairwise(runs))
        assert runs[-1][1] > positions[row] // CHUNK, "its own token is seen"


@pytest.mark.skipif(not native_attention.works(4, 2, 64, torch.float32), reason="the compiled attention was not built")
@given(trees(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([(4, 4, 16), (4, 2, 32), (6, 2, 80)]))
@settings(deadline=None, max_examples=40)
def test_sharing_and_leaving_out_queries_change_no_bit(
    layout: PagedLayout, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    pages, places = np.unique(layout.kv_indices, return_inverse=True)
    layout = PagedLayout(
        layout.qo_indptr,
        layout.kv_indptr,
        places.astype(np.int32),
        layout.kv_lens,
        layout.is_decode,
        layout.page_size,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (len(pages), layout.page_size, num_kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(int(layout.qo_indptr[-1]), num_heads, head_dim, generator=generator).to(dtype)
    results = []
    for share in (True, False):
        attention = choose_attention(*heads, dtype, torch.device("cpu"), "native", share=share)
        results.append(paged_attention(q, PagedKV(k, v), attention.plan(layout), head_dim**-0.5))
    assert torch.equal(*results)
    wanted = np.flatnonzero(np.random.default_rng(0).random(len(q)) < 0.3)
    some = attention.narrow(attention.plan(layout), wanted)
    assert some is not None
    assert torch.equal(paged_attention(q[wanted], PagedKV(k, v), some, head_dim**-0.5), results[0][wanted])


@pytest.mark.skipif(not native_attention.works(4, 2, 64, torch.float32), reason="the compiled attention was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_prefilled_and_drawn(dtype: torch.dtype) -> None:
    """What exact mode costs time for elsewhere."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(20, 16, 2, 64, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(300, 4, 64, generator=generator).to(dtype)
    attention = choose_attention(4, 2, 64, dtype, torch.device("cpu"), "native")
    whole = paged_attention(q, PagedKV(k, v), attention.plan(layout_of([(range(19), 300, 300)], 16)), 0.125)
    for position in (0, 15, 16, 127, 128, 200, 299):
        length = position + 1
        alone = attention.plan(layout_of([(range(-(-length // 16)), length, 1)], 16))
        assert torch.equal(paged_attention(q[position:length], PagedKV(k, v), alone, 0.125), whole[position:length])
