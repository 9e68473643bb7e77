"""What is planned and chosen for a GPU, checked without one and without Triton's compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bough.kernels.cuda_attention import Capacity, Launches, choose_kernels, plan_step
from bough.kernels.layout import PagedLayout
from bough.kernels.prefill import plan_tiles


def layout(lens: list[tuple[int, int]], decode: list[bool]) -> PagedLayout:
    """Return sequences (tokens, new ones) over pages of 16 that none share."""
    pages = [-(-tokens // 16) for tokens, _ in lens]
    return PagedLayout(
        np.concatenate([[0], np.cumsum([new for _, new in lens])]).astype(np.int32),
        np.concatenate([[0], np.cumsum(pages)]).astype(np.int32),
        np.arange(sum(pages), dtype=np.int32),
        np.array([tokens for tokens, _ in lens], dtype=np.int32),
        np.array(decode, dtype=np.bool_),
        16,
    )


def test_tiles_cover_every_new_token_once_and_the_longest_come_first() -> None:
    lens = [(100, 100), (5, 1), (300, 70), (1, 1)]
    given = layout(lens, [False] * 4)
    tiles = plan_tiles(np.array([0, 2, 3]), given.qo_indptr, given.kv_indptr, given.kv_lens, group=3, block_m=64)
    tokens = sorted(token for first, count, _, _ in tiles.tolist() for token in range(first, first + count))
    assert tokens == [*range(100), *range(101, 172)]
    assert (tiles[:, 1] <= 64 // 3).all()
    assert (np.diff(tiles[:, 3]) <= 0).all()
    first = {int(tile[0]): tile.tolist() for tile in tiles}
    assert first[0] == [0, 21, 0, 1]
    assert first[101] == [101, 21, given.kv_indptr[2], 231]


def test_short_extends_are_planned_like_decodes_but_not_in_exact_mode() -> None:
    given = layout([(500, 1), (500, 16), (500, 17), (40, 40)], [True, False, False, False])
    free = plan_step(given, choose_kernels(8, 2, 64, torch.bfloat16, (9, 0), 132))
    exact = plan_step(given, choose_kernels(8, 2, 64, torch.bfloat16, (9, 0), 132, exact_split=256))
    assert np.flatnonzero(np.diff(free.tree.merge_indptr)).tolist() == list(range(17))
    assert np.flatnonzero(np.diff(exact.tree.merge_indptr)).tolist() == [0]
    assert free.visible_lens.tolist() == [500, *range(485, 501), *range(484, 501), *range(1, 41)]
    assert sorted(free.tiles[:, 0].tolist())[0] == 17
    assert len(exact.tree.wide) == 0


def test_a_captured_graph_serves_plans_that_need_no_more_than_it_launches() -> None:
    kernels = choose_kernels(8, 2, 64, torch.bfloat16, (9, 0), 132)
    decode = Launches.of(plan_step(layout([(500, 1)], [True]), kernels))
    prefill = Launches.of(plan_step(layout([(500, 500)], [False]), kernels))
    assert decode == Launches(narrow=True, wide=False, num_tiles=0, page_size=16)
    assert not prefill.narrow
    assert Launches(narrow=True, wide=True, num_tiles=0, page_size=16).cover(decode)
    assert not Launches(narrow=True, wide=True, num_tiles=0, page_size=1).cover(decode)
    assert not decode.cover(prefill)
    assert not prefill.cover(decode)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_float32_queries_take_the_tiles_of_float32_whatever_the_keys_are(kv_dtype: torch.dtype) -> None:
    """With the tiles of 1-byte keys they spilled 7 KB per thread, with these 0.3: no tensor cores, all in registers."""
    plain = choose_kernels(8, 2, 128, torch.float32, (9, 0), 132)
    quantised = choose_kernels(8, 2, 128, kv_dtype, (9, 0), 132, dtype=torch.float32)
    assert (quantised.narrow, quantised.wide, quantised.prefill) == (plain.narrow, plain.wide, plain.prefill)
    assert choose_kernels(8, 2, 128, kv_dtype, (9, 0), 132, dtype=torch.bfloat16).narrow != plain.narrow


def test_an_empty_step_needs_nothing() -> None:
    kernels = choose_kernels(8, 2, 64, torch.bfloat16, (9, 0), 132)
    plan = plan_step(layout([], []), kernels)
    assert Capacity.of(plan) == Capacity(0, 0, 0, 0, 0, 0, 0, 0)
    assert Launches.of(plan) == Launches(narrow=False, wide=False, num_tiles=0, page_size=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 2, 64, torch.float8_e4m3fn, (8, 0), 108), "float8_e4m3fn KV needs compute capability 8.9"),
        ((8, 2, 64, torch.bfloat16, (7, 5), 40), "compute capability 8.0, the device has 7.5"),
        ((8, 3, 64, torch.bfloat16, (9, 0), 132), "num_heads 8 is not a multiple of num_kv_heads 3"),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    arguments: tuple[int, int, int, torch.dtype, tuple[int, int], int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_kernels(*arguments)
