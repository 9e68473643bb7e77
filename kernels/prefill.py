"""Prefill attention: ragged new tokens over all earlier keys of their sequences, cached ones and their own alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from bough.kernels.decode import dot_precision
from bough.kernels.paged_kv import PagedKV
from bough.kernels.tile import attend_span, weighted_mean
from bough.kernels.tuning import AttentionConfig, padded_head_dim

TILE_FIELDS = 4
_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit
def prefill_attention_kernel(
    q: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    kv_indices: tl.tensor, tiles: tl.tensor, out: tl.tensor, scale: tl.tensor, q_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    # The heads of a group share keys, so they are rows of one tile: row i is head i % GROUP of token i // GROUP.
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    GROUP_ROWS: tl.constexpr = GROUP if HEAD_TILES == 1 else BLOCK_M
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    tile = tiles + tl.program_id(0) // (NUM_KV_HEADS * HEAD_TILES) * _FIELDS
    head = tl.program_id(0) // HEAD_TILES % NUM_KV_HEADS
    first_token = tl.load(tile)
    num_tokens = tl.load(tile + 1)
    page_begin = tl.load(tile + 2)
    first_visible = tl.load(tile + 3)

    member = row % GROUP_ROWS + tl.program_id(0) % HEAD_TILES * GROUP_ROWS
    is_row = (row // GROUP_ROWS < num_tokens) & (member < GROUP)
    token = (first_token + row // GROUP_ROWS).to(tl.int64)
    # Rows beyond the last token see nothing.
    visible_len = tl.where(is_row, first_visible + row // GROUP_ROWS, 0)
    end = tl.where(num_tokens > 0, first_visible + num_tokens - 1, 0)
    q_head = head * GROUP + member
    mask = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    query = tl.load(q + (token * q_stride + q_head * HEAD_DIM)[:, None] + channel[None, :], mask=mask, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_visible - WINDOW, 0) // BLOCK_N * BLOCK_N
        diagonal = begin  # every tile may cross the window's edge
    else:
        # Tiles lie at absolute positions, so that a row sums in the same order however its prompt was cut.
        diagonal = tl.minimum(first_visible, end) // BLOCK_N * BLOCK_N
        acc, largest, total = attend_span(
            query, acc, largest, total, visible_len, k_pages, v_pages, k_scales, v_scales, kv_indices,
            page_begin, begin, diagonal, head, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, False, WINDOW, SOFT_CAP, QUANTISED, PRECISION,
        )  # fmt: skip
    acc, largest, total = attend_span(
        query, acc, largest, total, visible_len, k_pages, v_pages, k_scales, v_scales, kv_indices,
        page_begin, diagonal, end, head, scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True, WINDOW, SOFT_CAP, QUANTISED, PRECISION,
    )  # fmt: skip
    target = (token * NUM_HEADS + q_head) * HEAD_DIM
    result = weighted_mean(acc, total).to(out.dtype.element_ty)
    tl.store(out + target[:, None] + channel[None, :], result, mask=mask)


def prefill_attention(
    q: torch.Tensor,
    kv: PagedKV,
    kv_indices: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    config: AttentionConfig,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """Write the attention of every token in `tiles` into `out`; `reference.paged_attention` is the definition.

    q: (num_tokens, num_heads, head_dim), tokens may be strided, float16, bfloat16 or float32. kv_indices: int32 page
    ids. tiles: (num_tiles, TILE_FIELDS) int32 from `plan_tiles` for the same config; tiles of no tokens are skipped.
    out: like q, contiguous; other tokens are left as they are. window, soft_cap as in `decode.attend_items`.
    """
    num_heads, head_dim = q.shape[1:]
    group = num_heads // kv.num_kv_heads
    assert out.is_contiguous(), "the output must be contiguous"
    k_scales, v_scales = (kv.k_scales, kv.v_scales) if kv.is_quantised else (kv.k, kv.v)
    head_tiles = -(-group // config.block_m)
    prefill_attention_kernel[(len(tiles) * kv.num_kv_heads * head_tiles,)](
        q, kv.k, kv.v, k_scales, v_scales, kv_indices, tiles, out, scale, q.stride(0),
        NUM_KV_HEADS=kv.num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
        PAGE_SIZE=kv.page_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, QUANTISED=kv.is_quantised,
        PRECISION=dot_precision(q.dtype, kv.is_quantised),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def plan_tiles(
    seqs: npt.NDArray[np.intp],
    qo_indptr: npt.NDArray[np.int32],
    kv_indptr: npt.NDArray[np.int32],
    kv_lens: npt.NDArray[np.int32],
    group: int,
    block_m: int,
) -> npt.NDArray[np.int32]:
    """Return (num_tiles, TILE_FIELDS) int32, the tiles of `seqs`, those with most keys first.

    Columns: first token, number of tokens, index of the sequence's first page in kv_indices, keys that the first
    token sees. Arguments as in `attention.PagedLayout`; group: query heads per KV head.
    """
    per_tile = max(1, block_m // group)
    num_new = (qo_indptr[seqs + 1] - qo_indptr[seqs]).astype(np.int64)
    counts = -(-num_new // per_tile)
    owner = np.repeat(np.arange(len(seqs)), counts)
    offset = (np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]) * per_tile
    seq = np.asarray(seqs)[owner]
    tiles = np.empty((len(owner), TILE_FIELDS), dtype=np.int32)
    tiles[:, 0] = qo_indptr[seq] + offset
    tiles[:, 1] = np.minimum(per_tile, num_new[owner] - offset)
    tiles[:, 2] = kv_indptr[seq]
    tiles[:, 3] = kv_lens[seq] - num_new[owner] + offset + 1
    return np.ascontiguousarray(tiles[np.argsort(-tiles[:, 3], kind="stable")])
