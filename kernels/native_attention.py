"""Attention over paged KV on the CPU by compiled code that reads the pages in place (native/attention.c).

It is compiled when the package is installed, and used if that worked and the library passes a test; `cpu_attention`
does the same in PyTorch. Against it, 32 sequences of 1,024 tokens, bfloat16: no copy of the KV is made, and what
branches share is read once. A query's result is a function of its sequence's tokens and its position alone.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels import reference
from bough.kernels.layout import Int32Array, PagedLayout
from bough.kernels.native_library import LANES, native_library
from bough.kernels.paged_kv import PagedKV
from bough.kernels.units import Units, plan_units

log = logging.getLogger(__name__)

_MAX_HEAD_DIM: Final = 256
_DTYPES: Final = (torch.float32, torch.bfloat16)


class AttentionArgs(ctypes.Structure):
    """The struct `Args` of native/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales", "out", "acc", "stat")),
        *((name, ctypes.c_void_p) for name in ("pages", "positions", "rows", "units", "levels")),
        *((name, ctypes.c_int32) for name in ("num_levels", "num_heads", "num_kv_heads", "dim", "page_size")),
        ("is_bf16", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work, and the memory that its layers take turns in.

    arrays: what `args` points into. acc: (num_tokens, num_heads, head_dim) float32; stat: (num_tokens, num_heads, 2).
    """

    units: Units
    arrays: tuple[Any, ...]
    acc: torch.Tensor
    stat: torch.Tensor
    args: AttentionArgs


class Room:
    """The memory of plans whose steps come one after another: made anew only where a step is of another size."""

    def __init__(self) -> None:
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, num_tokens: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return acc and stat of a `Plan`; what they hold is whatever was there."""
        if self._tensors is None or self._tensors[0].shape != (num_tokens, num_heads, head_dim):
            self._tensors = torch.empty(num_tokens, num_heads, head_dim), torch.empty(num_tokens, num_heads, 2)
        return self._tensors


def works(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the compiled attention is there, can do these shapes and agrees with the definition on a small step."""
    if head_dim % LANES or not 0 < head_dim <= _MAX_HEAD_DIM or dtype not in _DTYPES or native_library() is None:
        return False
    agrees = _agrees(num_heads, num_kv_heads, head_dim, dtype)
    if not agrees:
        log.warning("attention runs in PyTorch: the compiled library gives wrong results on this machine")
    return agrees


def make_plan(
    layout: PagedLayout, units: Units, num_heads: int, num_kv_heads: int, head_dim: int, room: Room | None = None
) -> Plan:
    """Return the plan of a step. units: those of the layout; they may be another plan's, too.

    room: whose memory it takes, which no other plan uses at that time; None: its own.
    """
    sizes = (num_heads, num_kv_heads, head_dim, layout.page_size)
    return _plan(layout.kv_indices, layout.positions(), units, *sizes, room or Room())


def narrow(plan: Plan, tokens: npt.NDArray[np.int64]) -> Plan:
    """Return the plan of some queries of a step alone, `tokens` ascending: of a q that has these only."""
    args, (pages, positions, *_) = plan.args, plan.arrays
    units = plan.units.of(tokens, len(positions))
    sizes = (args.num_heads, args.num_kv_heads, args.dim, args.page_size)
    return _plan(pages, positions[tokens], units, *sizes, Room())


def _plan(
    pages: Int32Array,
    positions: Int32Array,
    units: Units,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    room: Room,
) -> Plan:
    arrays = tuple(
        np.ascontiguousarray(array, dtype=np.int32)
        for array in (pages, positions, units.rows, units.fields, units.levels)
    )
    acc, stat = room.take(len(positions), num_heads, head_dim)
    args = AttentionArgs()
    args.acc, args.stat = acc.data_ptr(), stat.data_ptr()
    args.pages, args.positions, args.rows, args.units, args.levels = (array.ctypes.data for array in arrays)
    args.num_levels = len(units.levels) - 1
    args.num_heads, args.num_kv_heads, args.dim, args.page_size = num_heads, num_kv_heads, head_dim, page_size
    return Plan(units, arrays, acc, stat, args)


def run(q: torch.Tensor, kv: PagedKV, plan: Plan, scale: float) -> torch.Tensor:
    """Compute one layer's attention; arguments as in `attention.paged_attention`."""
    library = native_library()
    assert library is not None, "a plan is made where the library is"
    assert q.shape == plan.acc.shape, "the queries are those of the plan"
    assert q.is_contiguous(), "arrays are read in place"
    assert kv.k.dtype in (q.dtype, torch.int8), "queries and KV are of one type, or KV is int8"
    out = torch.empty_like(q)
    args = arguments(plan, q.dtype == torch.bfloat16, scale)
    args.q, args.k, args.v, args.out = q.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), out.data_ptr()
    args.k_scales, args.v_scales = (None if x is None else x.data_ptr() for x in (kv.k_scales, kv.v_scales))
    library.bough_attention(ctypes.byref(args))
    return out


def arguments(plan: Plan, is_bf16: bool, scale: float) -> AttentionArgs:
    """Return what compiled code takes, but for queries, keys, values and the result: those are a layer's."""
    plan.args.is_bf16, plan.args.scale = is_bf16, scale
    return plan.args


@functools.cache
def _agrees(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    page_size, kv_lens, num_new = 4, [150, 131, 3], [1, 5, 3]
    pages = [-(-length // page_size) for length in kv_lens]
    layout = PagedLayout(
        qo_indptr=np.cumsum([0, *num_new]).astype(np.int32),
        kv_indptr=np.cumsum([0, *pages]).astype(np.int32),
        kv_indices=np.concatenate([np.arange(count, dtype=np.int32) + 40 * (i > 1) for i, count in enumerate(pages)]),
        kv_lens=np.array(kv_lens, dtype=np.int32),
        is_decode=np.array([True, False, False]),
        page_size=page_size,
    )
    shape = (64, page_size, num_kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(sum(num_new), num_heads, head_dim, generator=generator).to(dtype)
    plan = make_plan(layout, plan_units(layout), num_heads, num_kv_heads, head_dim)
    qo_indptr, kv_indptr, kv_indices, lens = map(
        torch.from_numpy, (layout.qo_indptr, layout.kv_indptr, layout.kv_indices, layout.kv_lens)
    )
    (k_bytes, k_scales), (v_bytes, v_scales) = (reference.quantise(x, torch.int8) for x in (k, v))
    for kv in (PagedKV(k, v), PagedKV(k_bytes, v_bytes, k_scales, v_scales)):
        found = run(q, kv, plan, head_dim**-0.5)
        wide = (q.double(), *reference.dequantised(kv))
        exact = reference.paged_attention(*wide, qo_indptr, kv_indptr, kv_indices, lens, head_dim**-0.5)
        if not bool((found.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()):
            return False
    return True
