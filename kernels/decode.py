"""Attention of work items: some query rows over one run of keys, each giving a partial result (see `merge`).

One kernel serves decode split over the keys, tree decode and short extends: they differ only in the list of items,
which `tree_plan` makes. The grid is fixed and the number of items is read on the device, so a captured CUDA graph
serves every plan that fits its buffers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bough.kernels.paged_kv import PagedKV
from bough.kernels.tile import attend_span, weighted_mean
from bough.kernels.tree_plan import ITEM_FIELDS
from bough.kernels.tuning import AttentionConfig, padded_head_dim

_FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def attend_items_kernel(
    q: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    kv_indices: tl.tensor, visible_lens: tl.tensor, items: tl.tensor, num_items: tl.tensor, rows: tl.tensor,
    part_out: tl.tensor, part_lse: tl.tensor, scale: tl.tensor, q_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # A group of more heads than a tile has rows takes several tiles; else a tile holds the groups of several tokens.
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    GROUP_ROWS: tl.constexpr = GROUP if HEAD_TILES == 1 else BLOCK_M
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    num_work = tl.load(num_items) * (NUM_KV_HEADS * HEAD_TILES)
    # Neighbouring programs take the heads of one item, whose keys lie side by side in memory.
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        item = items + work // (NUM_KV_HEADS * HEAD_TILES) * _FIELDS
        head = work // HEAD_TILES % NUM_KV_HEADS
        row_begin = tl.load(item)
        num_rows = tl.load(item + 1)
        page_begin = tl.load(item + 2)
        begin = tl.load(item + 3)
        end = tl.load(item + 4)
        part_begin = tl.load(item + 5)

        member = row % GROUP_ROWS + work % HEAD_TILES * GROUP_ROWS
        is_row = (row // GROUP_ROWS < num_rows) & (member < GROUP)
        token = tl.load(rows + row_begin + row // GROUP_ROWS, mask=is_row, other=0)
        visible_len = tl.load(visible_lens + token, mask=is_row, other=0)
        end = tl.minimum(end, tl.max(visible_len, 0))
        if WINDOW > 0:
            first = tl.min(tl.where(is_row, visible_len, 2147483647), 0) - WINDOW
            begin = tl.maximum(begin, first // BLOCK_N * BLOCK_N)
        q_head = head * GROUP + member
        q_rows = token.to(tl.int64) * q_stride + q_head * HEAD_DIM
        q_mask = is_row[:, None] & (channel < HEAD_DIM)[None, :]
        query = tl.load(q + q_rows[:, None] + channel[None, :], mask=q_mask, other=0.0)

        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc, largest, total = attend_span(
            query, acc, largest, total, visible_len, k_pages, v_pages, k_scales, v_scales, kv_indices,
            page_begin, begin, end, head, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True, WINDOW, SOFT_CAP, QUANTISED, PRECISION,
        )  # fmt: skip

        # A row without visible keys has a log-sum-exp of -inf, which the merge weighs 0.
        lse = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        part = (part_begin + row // GROUP_ROWS).to(tl.int64) * NUM_HEADS + q_head
        tl.store(part_lse + part, lse, mask=is_row)
        tl.store(part_out + part[:, None] * HEAD_DIM + channel[None, :], weighted_mean(acc, total), mask=q_mask)


def attend_items(
    q: torch.Tensor,
    kv: PagedKV,
    kv_indices: torch.Tensor,
    visible_lens: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    rows: torch.Tensor,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    scale: float,
    config: AttentionConfig,
    num_programs: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """Write the partial result of every work item; `reference.attend_items` is the definition.

    q: (num_tokens, num_heads, head_dim), tokens may be strided, float16, bfloat16 or float32. kv_indices: int32 page
    ids. visible_lens: (num_tokens,) int32, the keys a token sees: its position + 1. items: (max_items, ITEM_FIELDS)
    int32, of which the first num_items, a tensor (1,) int32, are worked on; see `tree_plan.Item`. rows: int32 token
    indices that items refer to. part_out: (max_partials, num_heads, head_dim) and part_lse: (max_partials, num_heads),
    both float32, the latter log2 of the sum of exp. num_programs: the grid, of any size; a few per multiprocessor.
    window: keys at most this many positions back are seen, the token's own included. soft_cap: scores become
    soft_cap * tanh(score / soft_cap). Shapes are the planner's promise and are not checked again in each layer.
    """
    num_heads, head_dim = q.shape[1:]
    k_scales, v_scales = (kv.k_scales, kv.v_scales) if kv.is_quantised else (kv.k, kv.v)
    attend_items_kernel[(num_programs,)](
        q, kv.k, kv.v, k_scales, v_scales, kv_indices, visible_lens, items, num_items, rows, part_out, part_lse,
        scale, q.stride(0),
        NUM_KV_HEADS=kv.num_kv_heads, GROUP=num_heads // kv.num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim), PAGE_SIZE=kv.page_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, QUANTISED=kv.is_quantised,
        PRECISION=dot_precision(q.dtype, kv.is_quantised),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def dot_precision(dtype: torch.dtype, is_quantised: bool) -> str:
    """Return how products of float32 queries are rounded: not at all, or to 10 bits (tf32) of each factor.

    Keys and values of 8 bits are whole in tf32, so rounding the other factor is less than what they have lost; exact
    products of widened ones keep whole tiles in registers, which spill from 80 channels on.
    """
    return "ieee" if dtype == torch.float32 and not is_quantised else "tf32"
