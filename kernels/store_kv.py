"""Write new keys and values into their slots, quantised if the pages are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bough.kernels.paged_kv import QUANTISED_DTYPES, PagedKV
from bough.kernels.tuning import padded_head_dim


@triton.jit
def quantised(values: tl.tensor, scale: tl.tensor, pages: tl.tensor, IS_INTEGER: tl.constexpr) -> tl.tensor:
    """Return float32 values / scale in the pages' dtype, integers rounded to the nearest, halves up."""
    values = values / tl.where(scale > 0, scale, 1.0)
    if IS_INTEGER:
        values = tl.floor(values + 0.5)
    return values.to(pages.dtype.element_ty)


@triton.jit
def store_kv_kernel(
    k: tl.tensor, v: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    slots: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr, IS_INTEGER: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    mask = channel < HEAD_DIM
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        row = slot * NUM_KV_HEADS + head
        key = tl.load(k + token * k_stride + head * HEAD_DIM + channel, mask=mask, other=0.0)
        value = tl.load(v + token * v_stride + head * HEAD_DIM + channel, mask=mask, other=0.0)
        if LARGEST > 0:
            key, value = key.to(tl.float32), value.to(tl.float32)
            k_scale = tl.max(tl.abs(key), 0) / LARGEST
            v_scale = tl.max(tl.abs(value), 0) / LARGEST
            tl.store(k_scales + row, k_scale)
            tl.store(v_scales + row, v_scale)
            key = quantised(key, k_scale, k_pages, IS_INTEGER)
            value = quantised(value, v_scale, v_pages, IS_INTEGER)
        tl.store(k_pages + row * HEAD_DIM + channel, key.to(k_pages.dtype.element_ty), mask=mask)
        tl.store(v_pages + row * HEAD_DIM + channel, value.to(v_pages.dtype.element_ty), mask=mask)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: PagedKV, slots: torch.Tensor) -> None:
    """Write new keys and values into their slots, in place; `reference.store_kv` is the definition.

    k, v: (num_tokens, num_kv_heads, head_dim), tokens may be strided. slots: (num_tokens,) int32 or int64, page *
    page_size + offset, all different; a token with a negative slot is padding and is not stored. In int8 and float8
    pages each token and head has a scale, its largest magnitude / 127 or 448; 0 for zeros.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    k_scales, v_scales = (kv.k_scales, kv.v_scales) if kv.is_quantised else (kv.k, kv.v)
    if num_tokens:
        store_kv_kernel[(num_tokens, num_kv_heads)](
            k, v, kv.k, kv.v, k_scales, v_scales, slots, k.stride(0), v.stride(0),
            NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            LARGEST=QUANTISED_DTYPES.get(kv.k.dtype, 0.0), IS_INTEGER=kv.k.dtype == torch.int8, num_warps=1,
        )  # fmt: skip
