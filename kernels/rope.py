"""Between the fused projection and attention: norm of query and key heads, rotary embedding, and the KV write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bough.kernels.paged_kv import QUANTISED_DTYPES, PagedKV
from bough.kernels.store_kv import quantised


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """The RMSNorm of Qwen 3's query and key heads; weights (head_dim,)."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


@triton.jit
def _normed_halves(
    first: tl.tensor, second: tl.tensor, weight: tl.tensor, eps: tl.tensor, half: tl.tensor, mask: tl.tensor,
    HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return RMSNorm of heads given as two halves (heads, HALF) float32, rounded as `reference.rms_norm` rounds."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    first_weight = tl.load(weight + half, mask=mask, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HEAD_DIM // 2 + half, mask=mask, other=0.0).to(tl.float32)
    first = (first * scale).to(DTYPE).to(tl.float32) * first_weight[None, :]
    second = (second * scale).to(DTYPE).to(tl.float32) * second_weight[None, :]
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def rotate_and_store_kernel(
    qkv: tl.tensor, positions: tl.tensor, cos: tl.tensor, sin: tl.tensor, slots: tl.tensor,
    k_pages: tl.tensor, v_pages: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    q_weight: tl.tensor, k_weight: tl.tensor, eps: tl.tensor, stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr, LARGEST: tl.constexpr, IS_INTEGER: tl.constexpr,
) -> None:  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    position = tl.load(positions + token).to(tl.int64)
    turn_cos = tl.load(cos + position * HALF + half, mask=in_half, other=0.0)[None, :]
    turn_sin = tl.load(sin + position * HALF + half, mask=in_half, other=0.0)[None, :]

    # The group's query heads and, as one row more, its key head.
    row = tl.arange(0, BLOCK_G)
    is_key = row == GROUP
    source = tl.where(is_key, NUM_KV_HEADS * GROUP + head, head * GROUP + row)
    mask = (row <= GROUP)[:, None] & in_half[None, :]
    place = qkv + token * stride + source[:, None] * HEAD_DIM + half[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        q_first, q_second = _normed_halves(first, second, q_weight, eps, half, in_half, HEAD_DIM, DTYPE)
        k_first, k_second = _normed_halves(first, second, k_weight, eps, half, in_half, HEAD_DIM, DTYPE)
        first = tl.where(is_key[:, None], k_first, q_first)
        second = tl.where(is_key[:, None], k_second, q_second)
    turned_first = (first * turn_cos - second * turn_sin).to(DTYPE)
    turned_second = (second * turn_cos + first * turn_sin).to(DTYPE)
    is_query = mask & (row < GROUP)[:, None]
    tl.store(place, turned_first, mask=is_query)
    tl.store(place + HALF, turned_second, mask=is_query)

    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        value_place = qkv + token * stride + (NUM_KV_HEADS * (GROUP + 1) + head) * HEAD_DIM + half
        v_first = tl.load(value_place, mask=in_half, other=0.0).to(tl.float32)
        v_second = tl.load(value_place + HALF, mask=in_half, other=0.0).to(tl.float32)
        kv_row = slot * NUM_KV_HEADS + head
        # The key is one row of the tile: the others add zeros.
        key_first = tl.sum(tl.where(is_key[:, None], turned_first.to(tl.float32), 0.0), 0)
        key_second = tl.sum(tl.where(is_key[:, None], turned_second.to(tl.float32), 0.0), 0)
        if LARGEST > 0:
            k_scale = tl.max(tl.maximum(tl.abs(key_first), tl.abs(key_second)), 0) / LARGEST
            v_scale = tl.max(tl.maximum(tl.abs(v_first), tl.abs(v_second)), 0) / LARGEST
            tl.store(k_scales + kv_row, k_scale)
            tl.store(v_scales + kv_row, v_scale)
            key_first = quantised(key_first, k_scale, k_pages, IS_INTEGER)
            key_second = quantised(key_second, k_scale, k_pages, IS_INTEGER)
            v_first = quantised(v_first, v_scale, v_pages, IS_INTEGER)
            v_second = quantised(v_second, v_scale, v_pages, IS_INTEGER)
        page_place = kv_row * HEAD_DIM + half
        tl.store(k_pages + page_place, key_first.to(k_pages.dtype.element_ty), mask=in_half)
        tl.store(k_pages + page_place + HALF, key_second.to(k_pages.dtype.element_ty), mask=in_half)
        tl.store(v_pages + page_place, v_first.to(v_pages.dtype.element_ty), mask=in_half)
        tl.store(v_pages + page_place + HALF, v_second.to(v_pages.dtype.element_ty), mask=in_half)


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    kv: PagedKV,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    norm: HeadNorm | None = None,
) -> torch.Tensor:
    """Rotate query and key heads and write keys and values into their slots; `reference.rotate_and_store` defines it.

    qkv: (num_tokens, num_heads + 2 * num_kv_heads, head_dim), contiguous within a token: query heads, key heads, value
    heads; the query heads are changed in place. cos, sin: (num_positions, head_dim / 2) float32 of every position, as
    `runtime.models.rope.RopeTable` makes them; channel pairs are (i, i + head_dim / 2). positions, slots: (num_tokens,)
    int32 or int64; slots as in `store_kv`, negative for padding. norm: applied to query and key heads before they
    turn. Returns the query heads, a view of qkv: (num_tokens, num_heads, head_dim). Raises ValueError for shapes that
    do not fit.
    """
    num_tokens, all_heads, head_dim = qkv.shape
    num_kv_heads = kv.num_kv_heads
    if all_heads != num_heads + 2 * num_kv_heads or head_dim != kv.head_dim or cos.shape[1] != head_dim // 2:
        raise ValueError(
            f"rotate_and_store: qkv {tuple(qkv.shape)} does not fit {num_heads} query heads, KV {tuple(kv.k.shape)} "
            f"and cos {tuple(cos.shape)}"
        )
    assert qkv.stride()[1:] == (head_dim, 1), "the heads of a token must lie side by side"
    group = num_heads // num_kv_heads
    k_scales, v_scales = (kv.k_scales, kv.v_scales) if kv.is_quantised else (kv.k, kv.v)
    q_weight, k_weight, eps = (norm.q_weight, norm.k_weight, norm.eps) if norm is not None else (qkv, qkv, 0.0)
    if num_tokens:
        rotate_and_store_kernel[(num_tokens, num_kv_heads)](
            qkv, positions, cos, sin, slots, kv.k, kv.v, k_scales, v_scales, q_weight, k_weight, eps, qkv.stride(0),
            NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
            BLOCK_G=triton.next_power_of_2(group + 1), BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            HAS_NORM=norm is not None,
            LARGEST=QUANTISED_DTYPES.get(kv.k.dtype, 0.0), IS_INTEGER=kv.k.dtype == torch.int8,
            num_warps=warps_for(group),
        )  # fmt: skip
    return qkv[:, :num_heads]


def warps_for(group: int) -> int:
    """Return warps for the heads of one group and their key head."""
    return 2 if group < 16 else 4
