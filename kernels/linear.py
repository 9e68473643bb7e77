"""Linear layers in compiled code (native/linear.c), where the processor has dot products of bfloat16 and of bytes.

A row's bits do not depend on the rows beside it, at any number of rows. Measured against oneDNN's packed products on
Zen 4, one thread, the weights in memory rather than in a cache: 1.4 to 2 times as fast for 1 to 8 rows, where they run
at the speed of the memory, 1.05 for 32 to 512; and nothing is compiled when a number of rows comes for the first time.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import torch
import torch.nn.functional as F

from bough.kernels.native_library import LANES, native_library

_PANEL: Final = 64
_BF16: Final = 1
_BYTES: Final = 2
_MOST_IN: Final = 1 << 16  # so many products of a byte and an int8 are below 2^31


class LayerArgs(ctypes.Structure):
    """The struct `Layer` of native/step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "scales", "offset")),
        *((name, ctypes.c_void_p) for name in ("units", "row_scales", "out")),
        *((name, ctypes.c_int32) for name in ("num_rows", "in_size", "out_size", "kind", "is_bf16")),
        *((name, ctypes.c_int32) for name in ("is_gated", "num_skipped")),
    )


class NativeLinear:
    """x -> x Wᵀ + b for x (num_rows, in_size), on a packed copy of the weights; made by the functions below.

    is_bfloat16: the weights are. is_gated: what comes out is silu(gate) · up of that, (num_rows, out_size), and the
    weights have twice as many rows.
    """

    def __init__(
        self,
        kind: int,
        packed: torch.Tensor,
        shape: torch.Size,
        *outputs: torch.Tensor | None,
        is_gated: bool = False,
    ) -> None:
        self.is_bfloat16, self.is_gated = kind == _BF16, is_gated
        self._kind = kind
        self._run = native_library().bough_linear
        self._num_outputs, self.in_size = shape
        self.out_size = self._num_outputs // 2 if is_gated else self._num_outputs
        self._kept = (packed, *outputs)  # what the addresses point to
        self._addresses = tuple(None if tensor is None else tensor.data_ptr() for tensor in self._kept)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, out_size), like x."""
        assert x.is_contiguous(), "arrays are read in place"
        num_rows, is_bf16 = len(x), x.dtype == torch.bfloat16
        out = x.new_empty(num_rows, self.out_size)
        room: tuple[int | None, int | None] = (None, None)
        if self._kind == _BYTES:
            assert is_bf16 or x.dtype == torch.float32, "the dtypes of activations on a CPU"
            units, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(num_rows, dtype=torch.float32)
            room = units.data_ptr(), scales.data_ptr()
        else:
            assert is_bf16, "the weights' dtype"
        self._run(ctypes.byref(self._arguments(x, out, *room)))
        return out

    def arguments(self) -> LayerArgs:
        """Return what compiled code takes for bfloat16, but for x, how many rows it has, and out."""
        assert self.is_bfloat16, "others need room for the units of x"
        sizes = (0, self.in_size, self._num_outputs, self._kind, True, self.is_gated, 0)
        return LayerArgs(None, *self._addresses, None, None, None, *sizes)

    def _arguments(self, x: torch.Tensor, out: torch.Tensor, units: int | None, scales: int | None) -> LayerArgs:
        sizes = (len(x), self.in_size, self._num_outputs, self._kind, x.dtype == torch.bfloat16, self.is_gated, 0)
        return LayerArgs(x.data_ptr(), *self._addresses, units, scales, out.data_ptr(), *sizes)


def bfloat16_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear | None:
    """Return the product by weight (out_size, in_size), summed in float32; None where it cannot be done.

    bias: (out_size,) or None. weight, x and the result are bfloat16.
    """
    if weight.dtype != torch.bfloat16 or not _can(_BF16, weight.shape[1]):
        return None
    return NativeLinear(_BF16, _panels(weight, 2), weight.shape, _filled(bias), None, None)


def gated_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear | None:
    """Return silu(gate) · up of the product, rounded once; None where it cannot be done.

    weight: (2 size, in_size), the gate's rows before the others; bias: (2 size,) or None. As in `bfloat16_linear`.
    """
    half = _PANEL // 2
    if weight.dtype != torch.bfloat16 or not _can(_BF16, weight.shape[1]) or len(weight) % (2 * half):
        return None
    order = torch.arange(len(weight)).view(2, -1, half).transpose(0, 1).flatten()  # a panel: gates, and what they gate
    filled = _filled(None if bias is None else bias[order])
    return NativeLinear(_BF16, _panels(weight[order], 2), weight.shape, filled, None, None, is_gated=True)


def int8_linear(units: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear | None:
    """Return the product by W = units · scales, x quantised row by row as it comes; None where it cannot be done.

    units: (out_size, in_size) int8; scales: (out_size,) float32; bias: (out_size,) or None. x and the result are
    float32 or bfloat16. The sums are of integers, and exact.
    """
    if not _can(_BYTES, units.shape[1]) or units.shape[1] > _MOST_IN:
        return None
    offset = F.pad(units.sum(-1, dtype=torch.int32) * 128, (0, -len(units) % _PANEL))
    return NativeLinear(_BYTES, _panels(units, 4), units.shape, _filled(bias), _filled(scales), offset)


@functools.cache
def _kinds() -> int:
    library: Any = native_library()
    return 0 if library is None else int(library.bough_linear_kinds())


def _can(kind: int, in_size: int) -> bool:
    return bool(_kinds() & kind) and in_size % LANES == 0 and in_size > 0


def _panels(weight: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return (panels, in_size / neighbours, _PANEL, neighbours), zero beyond out_size."""
    out_size, in_size = weight.shape
    whole = F.pad(weight, (0, 0, 0, -out_size % _PANEL))
    return whole.view(-1, _PANEL, in_size // neighbours, neighbours).permute(0, 2, 1, 3).contiguous()


def _filled(values: torch.Tensor | None) -> torch.Tensor | None:
    """Return (out_size,) values as float32, with zeros up to whole panels."""
    return None if values is None else F.pad(values.float(), (0, -len(values) % _PANEL))
