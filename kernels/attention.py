"""Attention over paged KV: plan once per step, run once per layer; dispatch by device.

Arguments use FlashInfer's names. A plan holds index tensors that all layers of a step share, so that a layer does
nothing but arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch

from bough.kernels import cpu_attention
from bough.kernels.layout import PagedLayout

__all__ = ["PagedLayout", "Plan", "paged_attention", "plan_attention", "store_kv"]

Plan = cpu_attention.Plan


def plan_attention(layout: PagedLayout, num_heads: int, num_kv_heads: int, device: torch.device) -> Plan:
    """Return what `paged_attention` needs of a step's layout. Raises RuntimeError on a device without kernels."""
    _check_device(device)
    assert num_heads % num_kv_heads == 0, "query heads must be a multiple of key/value heads"
    qo_lens = np.diff(layout.qo_indptr)
    assert (qo_lens[layout.is_decode] == 1).all(), "a decode sequence has one query"
    assert (qo_lens <= layout.kv_lens).all(), "a sequence has more queries than tokens"
    return cpu_attention.make_plan(
        layout.qo_indptr,
        layout.kv_indptr,
        layout.kv_indices,
        layout.kv_lens,
        layout.is_decode,
        layout.page_size,
        num_heads,
        num_kv_heads,
    )


def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, plan: Plan, scale: float
) -> torch.Tensor:
    """Attend each query to the keys at its own and earlier positions of its sequence (see `reference`).

    q: (num_tokens, num_heads, head_dim). k_pages, v_pages: (num_pages, page_size, num_kv_heads, head_dim), same dtype
    as q, contiguous; the new tokens' KV is already in them. Returns (num_tokens, num_heads, head_dim) in q's dtype.
    Slots that hold no token of the sequence are never read, whatever is in them.
    """
    _check_device(q.device)
    return cpu_attention.run(q, k_pages, v_pages, plan, scale)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write new keys and values into their slots, in place.

    k, v: (num_tokens, num_kv_heads, head_dim). slots: (num_tokens,) int64, page * page_size + offset, all different.
    """
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, slots, k)
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, slots, v)


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise RuntimeError(f"attention has no kernels for device {device.type!r}, only for 'cpu'")
