"""What the attention kernels share: a running softmax of some query rows over a span of one sequence's keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def page_ids(
    kv_indices: tl.tensor, page_begin: tl.tensor, positions: tl.tensor, end: tl.tensor, PAGE_SIZE: tl.constexpr
) -> tl.tensor:
    """Return the page of each position below `end`; page 0 for the others, whose keys are masked.

    A loop carries the pages of its next tile as a variable: looked up in the iteration that needs them, they keep
    Triton from loading keys ahead (shared memory of 3 stages of 64 keys: 39 KB against 72 KB carried).
    """
    return tl.load(kv_indices + page_begin + positions // PAGE_SIZE, mask=positions < end, other=0)


@triton.jit
def slots_of(pages: tl.tensor, positions: tl.tensor, PAGE_SIZE: tl.constexpr) -> tl.tensor:
    """Return the slot of each position, int64: a pool can hold more than 2^31 numbers."""
    return pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE


@triton.jit
def load_tile(
    pages: tl.tensor, scales: tl.tensor, slots: tl.tensor, inside: tl.tensor, head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUANTISED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return keys or values as stored, (BLOCK_N, BLOCK_D), and their scales (BLOCK_N,); 0 where not `inside`.

    Slots of no token of the sequence are never read: what they hold (NaN) must not meet a weight of 0.
    """
    channel = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    rows = slots * NUM_KV_HEADS + head
    tile = tl.load(pages + rows[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
    scale = tl.load(scales + rows, mask=inside, other=0.0) if QUANTISED else inside.to(tl.float32)
    return tile, scale


@triton.jit
def attend_span(
    query: tl.tensor, acc: tl.tensor, largest: tl.tensor, total: tl.tensor, visible_len: tl.tensor,
    k_pages: tl.tensor, v_pages: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor, kv_indices: tl.tensor,
    page_begin: tl.tensor, begin: tl.tensor, end: tl.tensor, head: tl.tensor, scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    QUANTISED: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add positions [begin, end) to a running softmax and return it: acc, largest, total.

    query: (BLOCK_M, BLOCK_D). acc: (BLOCK_M, BLOCK_D), largest score in units of log 2 and total weight (BLOCK_M,),
    all float32. Row i sees positions below visible_len[i]; not MASKED promises that every row sees all of the span,
    and that its length is a multiple of BLOCK_N.

    A row that has seen no key yet has largest = -inf; it subtracts 0 instead, and adds exact zeros. So a tile that is
    masked for a row changes none of its bits.
    """
    key = tl.arange(0, BLOCK_N)
    pages = page_ids(kv_indices, page_begin, begin + key, end, PAGE_SIZE)
    for start in range(begin, end, BLOCK_N):
        positions = start + key
        slots = slots_of(pages, positions, PAGE_SIZE)
        pages = page_ids(kv_indices, page_begin, positions + BLOCK_N, end, PAGE_SIZE)
        inside = positions < end
        k, k_scale = load_tile(k_pages, k_scales, slots, inside, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, QUANTISED)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision=PRECISION) * scale
        if QUANTISED:
            scores *= k_scale[None, :]
        if SOFT_CAP > 0:
            # tanh(x) = 2 sigmoid(2 x) - 1, which needs no library function and does not overflow.
            scores = SOFT_CAP * (2 * tl.sigmoid(2 * scores / SOFT_CAP) - 1)
        scores *= LOG2_E
        if MASKED:
            visible = positions[None, :] < tl.minimum(visible_len, end)[:, None]
            if WINDOW > 0:
                visible = visible & (positions[None, :] >= visible_len[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = new_largest
        if MASKED:
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(largest - reference)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v, v_scale = load_tile(v_pages, v_scales, slots, inside, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_D, QUANTISED)
        if QUANTISED:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(query.dtype), v.to(query.dtype), acc, input_precision=PRECISION)
        largest = new_largest
    return acc, largest, total


@triton.jit
def weighted_mean(acc: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return acc / total; 0 for a row without visible keys, whose total is 0."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]
