"""The operations of `rows.RowOps` as Triton kernels: one launch, and one pass over memory, each."""

from __future__ import annotations

import torch

from bough.kernels.gated_silu import gated_silu
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rms_norm import rms_norm
from bough.kernels.rope import HeadNorm, rotate_and_store
from bough.kernels.rows import HeadNorms, Rotation


class TritonRows:
    """The operations on a GPU. Nothing in them depends on the host, so a CUDA graph may hold them.

    max_tokens: most tokens of one step. Slots below 0 are padding: their keys and values are not kept.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        # A step's cos and sin lie by token, not by position; a table that never moves, for graphs keep its address.
        self._places = torch.arange(max_tokens, dtype=torch.int32, device=device)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowOps`."""
        return x, rms_norm(x, weight, eps) if delta is None else rms_norm(delta, weight, eps, residual=x)

    def split_rotate_store(
        self,
        qkv: torch.Tensor,
        kv: PagedKV,
        rotation: Rotation,
        norms: HeadNorms | None,
        eps: float,
    ) -> torch.Tensor:
        """See `RowOps`; the queries are a view of qkv, whose tokens lie further apart."""
        num_tokens = len(qkv)
        assert num_tokens <= len(self._places), "more tokens than a step may have"
        heads = qkv.view(num_tokens, -1, kv.head_dim)
        num_heads = heads.shape[1] - 2 * kv.num_kv_heads
        norm = None if norms is None else HeadNorm(norms.q, norms.k, eps)
        cos, sin, slots = rotation
        places = self._places[:num_tokens]
        return rotate_and_store(heads, num_heads, kv, places, cos, sin, slots, norm)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `RowOps`."""
        return gated_silu(gate_up)
