"""All layers of a small step in one call of compiled code (native/step.c).

It calls the very functions that `rows`, `linear` and `native_attention` call, with the same arguments, so results have
the same bits. A step of 8 layers makes 56 such calls: from Python they take, with the memory for their results, 0.3 ms,
and 0.5 ms where the step's weights have pushed Python out of the cache, of 4.5 ms at 8 rows and of 11 ms at 32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from bough.kernels import native_attention
from bough.kernels.linear import LayerArgs, NativeLinear
from bough.kernels.native_library import native_library
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rows import HeadNorms, Rotation, SplitArgs

MOST_ROWS: Final = 64
"""Most tokens of a step that it computes: the memory between operations is made once, for so many."""


class LayerParts(NamedTuple):
    """A decoder layer's weights; norms (hidden_size,) before attention and before the MLP."""

    norms: tuple[torch.Tensor, torch.Tensor]
    qkv: NativeLinear
    head_norms: HeadNorms | None
    out: NativeLinear
    gate_up: NativeLinear
    down: NativeLinear


class _DecoderLayer(ctypes.Structure):
    """The struct of the same name in native/step.c."""

    _fields_ = (
        ("norms", ctypes.c_void_p * 2),
        *((name, LayerArgs) for name in ("qkv", "out", "gate_up", "down")),
        ("split", SplitArgs),
        ("attended", ctypes.c_void_p),
    )


class _DecoderStep(ctypes.Structure):
    """The struct of the same name in native/step.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "attention", "x", "cosine", "sine", "slots")),
        *((name, ctypes.c_int32) for name in ("num_layers", "num_tokens")),
    )


class NativeStep:
    """The layers of a decoder in bfloat16, for steps of at most `MOST_ROWS` tokens. One caller, one thread.

    layers: their weights; head_dim: of each head; eps: of the norms; scale: of the attention's scores.
    """

    def __init__(self, layers: Sequence[LayerParts], head_dim: int, eps: float, scale: float) -> None:
        self._run: Any = native_library().bough_decoder_step
        self._layers = layers
        self._head_dim, self._eps, self._scale = head_dim, eps, scale
        first = layers[0]
        sizes = {
            "normed": first.qkv.in_size,
            "qkv": first.qkv.out_size,
            "q": first.out.in_size,
            "attended": first.out.in_size,
            "delta": first.out.out_size,
            "gate_up": first.gate_up.out_size,
            "gated": first.down.in_size,
        }
        self._room = {name: torch.empty(MOST_ROWS, size, dtype=torch.bfloat16) for name, size in sizes.items()}
        self._kv: Sequence[PagedKV] | None = None
        self._array: Any = None

    def run(
        self, x: torch.Tensor, rotation: Rotation, plan: native_attention.Plan, kv: Sequence[PagedKV]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two tensors whose sum (num_tokens, hidden_size) is the decoder's output for embeddings x, likewise.

        Takes x's memory; the second is overwritten by the next call. Writes the tokens' KV into the pages `kv` of each
        layer.
        """
        num_tokens = len(x)
        assert num_tokens <= MOST_ROWS, "the memory is made for so many tokens"
        assert x.dtype == torch.bfloat16, "the weights' dtype"
        if kv is not self._kv:
            self._kv, self._array = kv, self._arguments(kv)
        args = native_attention.arguments(plan, True, self._scale)
        tensors = (x, *rotation)
        assert all(tensor.is_contiguous() for tensor in tensors), "arrays are read in place"
        addresses = (tensor.data_ptr() for tensor in tensors)
        layers, attention = ctypes.addressof(self._array), ctypes.addressof(args)
        self._run(ctypes.byref(_DecoderStep(layers, attention, *addresses, len(self._layers), num_tokens)))
        return x, self._room["delta"][:num_tokens]

    def _arguments(self, kv: Sequence[PagedKV]) -> Any:
        """Return an array of `_DecoderLayer`."""
        array = (_DecoderLayer * len(self._layers))()
        for filled, layer, pages in zip(array, self._layers, kv, strict=True):
            assert pages.k.dtype in (torch.bfloat16, torch.int8), "queries and KV are of one type, or KV is int8"
            self._fill(filled, layer, pages)
        return array

    def _fill(self, filled: _DecoderLayer, layer: LayerParts, kv: PagedKV) -> None:
        room = self._room
        filled.norms[0], filled.norms[1] = (weight.data_ptr() for weight in layer.norms)
        filled.qkv = layer.qkv.arguments(room["normed"], room["qkv"])
        filled.out = layer.out.arguments(room["attended"], room["delta"])
        filled.gate_up = layer.gate_up.arguments(room["normed"], room["gate_up"])
        filled.down = layer.down.arguments(room["gated"], room["delta"])
        q = room["q"].view(MOST_ROWS, -1, self._head_dim)
        filled.split = SplitArgs.of(room["qkv"], kv, None, layer.head_norms, q, self._eps)
        filled.attended = room["attended"].data_ptr()
