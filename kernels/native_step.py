"""All layers of a step in one call of compiled code (native/step.c).

It calls the very functions that `rows`, `linear` and `native_attention` call, so results have the same bits. A step of
8 layers makes 56 such calls: from Python they take, with the memory for their results, 0.3 ms, and 0.5 ms where the
step's weights have pushed Python out of the cache, of 4.5 ms at 8 rows and of 11 ms at 32. In a prefill each thread
takes a block of rows through all that lies between two attentions, so that what it works on stays in its cache.
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

BLOCK_ROWS: Final = 126
"""Most rows of a thread's block: what an MLP of 1,536 makes of so many is 380 KB, beside 130 KB of input."""


class LayerParts(NamedTuple):
    """A decoder layer's weights; norms (hidden_size,) before attention and before the MLP. gated: `gated_linear`."""

    norms: tuple[torch.Tensor, torch.Tensor]
    qkv: NativeLinear
    head_norms: HeadNorms | None
    out: NativeLinear
    gated: NativeLinear
    down: NativeLinear


class Kept(NamedTuple):
    """Of which tokens the last layer is computed.

    tokens: (num_kept,) int64 ascending. plan: their attention, see `native_attention.narrow`.
    """

    tokens: torch.Tensor
    plan: native_attention.Plan


class _DecoderLayer(ctypes.Structure):
    """The struct of the same name in native/step.c."""

    _fields_ = (
        ("norms", ctypes.c_void_p * 2),
        *((name, LayerArgs) for name in ("qkv", "out", "gated", "down")),
        ("split", SplitArgs),
    )


class _Tokens(ctypes.Structure):
    """The struct of the same name in native/step.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention", "cosine", "sine", "slots")),
        ("num_tokens", ctypes.c_int32),
    )


class _RoomArgs(ctypes.Structure):
    """The struct `Room` of native/step.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("normed", "qkv", "gated", "delta", "q", "attended")),
        *((name, ctypes.c_int32) for name in ("block_rows", "num_threads")),
    )


class _DecoderStep(ctypes.Structure):
    """The struct of the same name in native/step.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "x", "kept")),
        *((name, _Tokens) for name in ("all", "last")),
        ("room", _RoomArgs),
        ("num_layers", ctypes.c_int32),
    )


class _Room:
    """Memory between operations, of the last step: rows of blocks for so many threads, queries of so many tokens."""

    def __init__(self, layer: LayerParts, block_rows: int, num_threads: int, num_tokens: int) -> None:
        self.num_threads, self.num_tokens = num_threads, num_tokens
        sizes = (layer.qkv.in_size, layer.qkv.out_size, layer.gated.out_size, layer.down.out_size)
        heads = layer.out.in_size
        self._tensors = [
            *(torch.empty(num_threads * block_rows, size, dtype=torch.bfloat16) for size in sizes),
            *(torch.empty(num_tokens, heads, dtype=torch.bfloat16) for _ in range(2)),
        ]
        self.args = _RoomArgs(*(tensor.data_ptr() for tensor in self._tensors), block_rows, num_threads)


class NativeStep:
    """The layers of a decoder in bfloat16. One caller, one thread.

    layers: their weights; head_dim: of each head; eps: of the norms; scale: of the attention's scores. block_rows: most
    rows of a thread's block.
    """

    def __init__(
        self, layers: Sequence[LayerParts], head_dim: int, eps: float, scale: float, block_rows: int = BLOCK_ROWS
    ) -> None:
        self._run: Any = native_library().bough_decoder_step
        self._layers = layers
        self._head_dim, self._eps, self._scale = head_dim, eps, scale
        self._block_rows = block_rows
        self._room: _Room | None = None
        self._kv: Sequence[PagedKV] | None = None
        self._array: Any = None

    def run(
        self,
        x: torch.Tensor,
        rotation: Rotation,
        plan: native_attention.Plan,
        kv: Sequence[PagedKV],
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Return the decoder's output for embeddings x (num_tokens, hidden_size), likewise, in x's memory.

        Writes the tokens' KV into the pages `kv` of each layer. kept: the tokens whose output is needed, which are all
        that is returned; None for all.
        """
        assert x.dtype == torch.bfloat16, "the weights' dtype"
        assert x.is_contiguous(), "arrays are read in place"
        if kv is not self._kv:
            self._kv, self._array = kv, self._arguments(kv)
        step = _DecoderStep(ctypes.addressof(self._array), x.data_ptr())
        step.num_layers, step.room = len(self._layers), self._room_for(len(x)).args
        step.all = self._tokens(rotation, plan)
        count = len(x)
        if kept is not None:
            count, step.kept = len(kept.tokens), kept.tokens.data_ptr()
            rotation = Rotation(*(tensor.index_select(0, kept.tokens) for tensor in rotation))
            step.last = self._tokens(rotation, kept.plan)
        self._run(ctypes.byref(step))
        return x[:count]

    def _tokens(self, rotation: Rotation, plan: native_attention.Plan) -> _Tokens:
        assert all(tensor.is_contiguous() for tensor in rotation), "arrays are read in place"
        args = native_attention.arguments(plan, True, self._scale)
        addresses = (tensor.data_ptr() for tensor in rotation)
        return _Tokens(ctypes.addressof(args), *addresses, len(rotation.slots))

    def _room_for(self, num_tokens: int) -> _Room:
        room, num_threads = self._room, torch.get_num_threads()
        if room is None or room.num_threads != num_threads or room.num_tokens < num_tokens:
            num_tokens = max(num_tokens, 0 if room is None else room.num_tokens)
            self._room = room = _Room(self._layers[0], self._block_rows, num_threads, num_tokens)
        return room

    def _arguments(self, kv: Sequence[PagedKV]) -> Any:
        """Return an array of `_DecoderLayer`."""
        array = (_DecoderLayer * len(self._layers))()
        for filled, layer, pages in zip(array, self._layers, kv, strict=True):
            assert pages.k.dtype in (torch.bfloat16, torch.int8), "queries and KV are of one type, or KV is int8"
            filled.norms[0], filled.norms[1] = (weight.data_ptr() for weight in layer.norms)
            filled.qkv, filled.out, filled.gated, filled.down = (
                linear.arguments() for linear in (layer.qkv, layer.out, layer.gated, layer.down)
            )
            num_heads = layer.out.in_size // self._head_dim
            filled.split = SplitArgs.of(pages, layer.head_norms, num_heads, self._eps, is_bf16=True)
        return array
