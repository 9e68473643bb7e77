"""What a decoder layer does to rows between its products: norms, rotation, the gate. In PyTorch, or compiled.

`TorchRows` is the definition. A row's result depends on that row alone, bit by bit, in both; they differ from each
other in the last bits.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final, NamedTuple, Protocol

import torch

from bough.kernels.attention import store_kv
from bough.kernels.native_library import LANES, native_library
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import dequantised

_MAX_HEAD_DIM: Final = 256
_DTYPES: Final = (torch.float32, torch.bfloat16)


class HeadNorms(NamedTuple):
    """Weights (head_dim,) of the norms of each query head and each key head."""

    q: torch.Tensor
    k: torch.Tensor


class Rotation(NamedTuple):
    """What a step's tokens share in all layers.

    cos, sin: (num_tokens, head_dim / 2) float32. slots: (num_tokens,) int64, where their keys and values belong.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor


class RowOps(Protocol):
    """The operations; all tensors contiguous."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta, which may take x's memory, and it over its root mean square, times the weight.

        x, delta: (num_rows, size). RMSNorm (arXiv:1910.07467), rounded to x's dtype before the weight as transformers
        does.
        """

    def split_rotate_store(
        self,
        qkv: torch.Tensor,
        kv: PagedKV,
        rotation: Rotation,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        """Return the rotated queries (num_tokens, num_heads, head_dim); write keys and values into their slots.

        qkv: (num_tokens, (num_heads + 2 num_kv_heads) head_dim). Channels i and i + head_dim / 2 of a head are turned
        by the token's angle (RoPE, arXiv:2104.09864), after the head norms if there are any. int8 pages get what would
        be stored otherwise, quantised as `reference.quantise` says.
        """

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up for gate_up (num_rows, 2 size), the two side by side: (num_rows, size)."""


class TorchRows:
    """The operations in PyTorch."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowOps`."""
        total = x if delta is None else x + delta
        return total, _normed(total, weight, eps)

    def split_rotate_store(
        self,
        qkv: torch.Tensor,
        kv: PagedKV,
        rotation: Rotation,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        """See `RowOps`."""
        num_kv_heads, head_dim = kv.num_kv_heads, kv.head_dim
        heads = qkv.view(len(qkv), -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q, k = _normed(q, norms.q, eps), _normed(k, norms.k, eps)
        store_kv(_rotated(k, rotation), v, kv, rotation.slots)
        return _rotated(q, rotation).contiguous()

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `RowOps`.

        Not F.silu: where it hands a share of the elements to a thread, the last few are computed one by one, and
        differ in the last bit from the same ones computed 16 at a time. A share ends in the middle of a row, so a row's
        bits would depend on the batch. exp has no such tail.
        """
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.float()
        divisor = gate.neg().exp_().add_(1)
        return torch.div(gate, divisor, out=divisor).to(up.dtype).mul_(up)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype) * weight


def _rotated(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate (num_tokens, num_heads, head_dim); products and sums round one by one in float32."""
    cos, sin = rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1)
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


class SplitArgs(ctypes.Structure):
    """The struct `Split` of native/step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "q_weight", "k_weight", "cosine", "sine", "slots")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales")),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_heads", "num_kv_heads", "dim", "is_bf16")),
        ("eps", ctypes.c_float),
    )

    @classmethod
    def of(cls, kv: PagedKV, norms: HeadNorms | None, num_heads: int, eps: float, *, is_bf16: bool) -> SplitArgs:
        """Return the arguments but for qkv, q, the rotation and how many tokens there are."""
        args = cls()
        norm_weights = (None, None) if norms is None else (w.data_ptr() for w in norms)
        args.q_weight, args.k_weight = norm_weights
        args.k, args.v = kv.k.data_ptr(), kv.v.data_ptr()
        args.k_scales, args.v_scales = (None if x is None else x.data_ptr() for x in (kv.k_scales, kv.v_scales))
        args.num_heads, args.num_kv_heads, args.dim = num_heads, kv.num_kv_heads, kv.head_dim
        args.is_bf16, args.eps = is_bf16, eps
        return args


class NativeRows:
    """The operations in compiled code (native/rows.c), one pass over memory each."""

    def __init__(self) -> None:
        self._library = native_library()

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowOps`."""
        out = torch.empty_like(x)
        self._library.bough_add_rms_norm(
            *(_pointer(t) for t in (x, delta, weight, out)), *x.shape, ctypes.c_float(eps), x.dtype == torch.bfloat16
        )
        return x, out

    def split_rotate_store(
        self,
        qkv: torch.Tensor,
        kv: PagedKV,
        rotation: Rotation,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        """See `RowOps`."""
        num_kv_heads, head_dim = kv.num_kv_heads, kv.head_dim
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        q = torch.empty(len(qkv), num_heads, head_dim, dtype=qkv.dtype)
        args = SplitArgs.of(kv, norms, num_heads, eps, is_bf16=qkv.dtype == torch.bfloat16)
        args.num_tokens, args.qkv, args.q = len(qkv), qkv.data_ptr(), q.data_ptr()
        args.cosine, args.sine, args.slots = (x.data_ptr() for x in rotation)
        self._library.bough_split_rotate_store(ctypes.byref(args))
        return q

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `RowOps`."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._library.bough_gated_silu(_pointer(gate_up), _pointer(out), *out.shape, out.dtype == torch.bfloat16)
        return out


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous(), "arrays are read in place"
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def choose_rows(sizes: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> RowOps:
    """Return compiled operations where they serve rows of all `sizes` and heads of `head_dim`, else PyTorch's."""
    fits = all(size % LANES == 0 for size in (*sizes, head_dim)) and head_dim <= _MAX_HEAD_DIM and dtype in _DTYPES
    return NativeRows() if fits and native_library() is not None and _agrees(dtype) else TorchRows()


@functools.cache
def _agrees(dtype: torch.dtype) -> bool:
    """Whether compiled and PyTorch's operations agree on a few rows."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, delta, weight, qkv, gate_up = some(3, 64), some(3, 64), some(64), some(3, 8 * 32), some(3, 96)
    norms, rotation = (
        HeadNorms(some(32), some(32)),
        Rotation(torch.rand(3, 16), torch.rand(3, 16), torch.tensor([5, 0, 9])),
    )
    results, stored = [], []
    for ops in (NativeRows(), TorchRows()):
        k, v = torch.zeros(2, 4, 4, 2, 32, dtype=dtype)
        small = PagedKV(*torch.zeros(2, 4, 4, 2, 32, dtype=torch.int8), *torch.zeros(2, 4, 4, 2))
        q = ops.split_rotate_store(qkv, PagedKV(k, v), rotation, norms, 1e-6)
        again = ops.split_rotate_store(qkv, small, rotation, norms, 1e-6)
        results.append((*ops.add_norm(x.clone(), delta, weight, 1e-6), q, again, k, v, ops.gated_silu(gate_up)))
        stored.append(dequantised(small))
    limit = 4 * torch.finfo(dtype).eps
    agree = all(torch.allclose(a.float(), b.float(), rtol=limit, atol=limit) for a, b in zip(*results, strict=True))
    # A last bit that differs may round to the next of 127 steps.
    return agree and all(torch.allclose(a, b, rtol=limit, atol=0.04) for a, b in zip(*stored, strict=True))
