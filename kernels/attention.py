"""Attention over paged KV: plan once per step, run once per layer; dispatch by device.

Arguments use FlashInfer's names. A plan holds index tensors that all layers of a step share, so that a layer does
nothing but arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels import cpu_attention, native_attention
from bough.kernels.layout import PagedLayout
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import quantise
from bough.kernels.step_planner import StepPlanner
from bough.kernels.unit_planner import UnitPlanner

if TYPE_CHECKING:  # these import Triton, which a machine without a GPU need not have
    from bough.kernels.cuda_attention import DevicePlan, Kernels, StepPlan

__all__ = ["Attention", "Implementation", "PagedLayout", "Plan", "choose_attention", "paged_attention", "store_kv"]

Plan: TypeAlias = Union["cpu_attention.Plan", "native_attention.Plan", "StepPlan", "DevicePlan"]
Implementation: TypeAlias = Literal["native", "torch", "triton"]


@dataclass(frozen=True, slots=True)
class Attention:
    """How the attention of one model is carried out.

    implementation: "native", compiled code in which a token's bits do not depend on whether it was prefilled or drawn,
    "torch", where they do, or "triton", a GPU's `kernels`. share: sequences read the KV they have in common together
    (tree attention; not "torch"). unit_planner, step_planner, room: remember a step, so an `Attention` is one runner's.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    implementation: Implementation
    share: bool = True
    kernels: Kernels | None = None
    unit_planner: UnitPlanner = field(default_factory=UnitPlanner, compare=False, repr=False)
    step_planner: StepPlanner = field(default_factory=StepPlanner, compare=False, repr=False)
    room: native_attention.Room = field(default_factory=native_attention.Room, compare=False, repr=False)

    def plan(self, layout: PagedLayout) -> Plan:
        """Return what `paged_attention` needs of a step's layout; on a GPU still on the host, as a `StepPlan`."""
        layout.check()
        heads = (self.num_heads, self.num_kv_heads)
        if self.implementation == "native":
            units = self.unit_planner.plan(layout, share=self.share)
            return native_attention.make_plan(layout, units, *heads, self.head_dim, self.room)
        if self.kernels is not None:
            return self.step_planner.plan(layout, self.kernels)
        return cpu_attention.make_plan(
            layout.qo_indptr,
            layout.kv_indptr,
            layout.kv_indices,
            layout.kv_lens,
            layout.is_decode,
            layout.page_size,
            *heads,
        )

    def narrow(self, plan: Plan, tokens: npt.NDArray[np.int64]) -> Plan | None:
        """Return the plan of some queries of a step alone, `tokens` ascending; None where there is none but the whole.

        Their results have the same bits as in the whole.
        """
        return native_attention.narrow(plan, tokens) if isinstance(plan, native_attention.Plan) else None


def choose_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: Implementation | None = None,
    *,
    share: bool = True,
    exact_split: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Attention:
    """Return the attention for a model's shapes; by default the fastest that works here.

    "triton" is that of CUDA devices, and of the CPU where Triton interprets its kernels (TRITON_INTERPRET=1).
    exact_split: as in `cuda_attention.choose_kernels`, for "triton". dtype: of the queries; kv_dtype: of the keys on a
    GPU, None for the same. Raises RuntimeError on a device without kernels,
    ValueError if the implementation asked for does not work here.
    """
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"attention has no kernels for device {device.type!r}, only for 'cpu' and 'cuda'")
    assert num_heads % num_kv_heads == 0, "query heads must be a multiple of key/value heads"
    if device.type == "cuda" or implementation == "triton":
        if implementation not in (None, "triton"):
            raise ValueError(f"{implementation} attention is the CPU's, the device is {device.type!r}")
        dtypes = (dtype, dtype if kv_dtype is None else kv_dtype)
        kernels = _kernels(num_heads, num_kv_heads, head_dim, dtypes, device, exact_split, share=share)
        return Attention(num_heads, num_kv_heads, head_dim, "triton", share, kernels)
    works = implementation != "torch" and native_attention.works(num_heads, num_kv_heads, head_dim, dtype)
    if implementation == "native" and not works:
        raise ValueError(f"native attention does not work here for heads of {head_dim} in {dtype}")
    return Attention(num_heads, num_kv_heads, head_dim, "native" if works else "torch", share)


def _kernels(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    exact_split: int | None,
    *,
    share: bool,
) -> Kernels:
    """Return the Triton kernels of a device, for queries and keys of `dtypes`.

    On the CPU, interpreted, those of a small imagined GPU.
    """
    arch, num_sms = (9, 0), 2
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch, num_sms = (properties.major, properties.minor), properties.multi_processor_count
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("triton attention needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)")
    from bough.kernels.cuda_attention import choose_kernels

    heads, (dtype, kv_dtype) = (num_heads, num_kv_heads, head_dim), dtypes
    return choose_kernels(*heads, kv_dtype, arch, num_sms, exact_split=exact_split, share=share, dtype=dtype)


def paged_attention(q: torch.Tensor, kv: PagedKV, plan: Plan, scale: float) -> torch.Tensor:
    """Attend each query to the keys at its own and earlier positions of its sequence (see `reference`).

    q: (num_tokens, num_heads, head_dim). kv: pages in q's dtype or int8; the new tokens' KV is already in them.
    Returns (num_tokens, num_heads, head_dim) in q's dtype. Slots that hold no token of the sequence are never read,
    whatever is in them.
    """
    if isinstance(plan, native_attention.Plan):
        return native_attention.run(q, kv, plan, scale)
    if not isinstance(plan, cpu_attention.Plan):
        from bough.kernels.cuda_attention import DevicePlan, run

        assert isinstance(plan, DevicePlan), "the plan of a GPU's step has to be in its buffers"
        return run(q, kv, plan.buffers, plan.launches, plan.kernels, scale)
    return cpu_attention.run(q, kv, plan, scale)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: PagedKV, slots: torch.Tensor) -> None:
    """Write new keys and values into their slots, in place, quantised if the pages are (see `reference.quantise`).

    k, v: (num_tokens, num_kv_heads, head_dim). slots: (num_tokens,) int64, page * page_size + offset, all different.
    """
    for values, pages, scales in ((k, kv.k, kv.k_scales), (v, kv.v, kv.v_scales)):
        stored = values
        if scales is not None:
            stored, row_scales = quantise(values, pages.dtype)
            scales.flatten(0, 1).index_copy_(0, slots, row_scales)
        pages.flatten(0, 1).index_copy_(0, slots, stored)
