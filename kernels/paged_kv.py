"""The paged KV of one layer as kernels take it: keys, values and, where they are quantised, their scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUANTISED_DTYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # and the largest value of each


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's keys and values.

    k, v: (num_pages, page_size, num_kv_heads, head_dim), contiguous; float16, bfloat16, float32, int8 or
    float8_e4m3fn. k_scales, v_scales: (num_pages, page_size, num_kv_heads) float32 for the last two, where a key is
    k * k_scale; None for the others. Raises ValueError naming what does not fit.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.k.dim() != 4 or self.k.shape != self.v.shape or self.k.dtype != self.v.dtype:
            raise ValueError(f"k and v must be alike and have 4 axes, got {describe(self.k)} and {describe(self.v)}")
        if self.k.dtype not in FLOAT_DTYPES and self.k.dtype not in QUANTISED_DTYPES:
            raise ValueError(f"KV pages cannot be {self.k.dtype}")
        for name, scales in (("k_scales", self.k_scales), ("v_scales", self.v_scales)):
            if (scales is not None) != self.is_quantised:
                raise ValueError(f"{name} must be given for int8 and float8 pages and for no others")
            if scales is not None and (scales.shape != self.k.shape[:3] or scales.dtype != torch.float32):
                raise ValueError(f"{name} must be float32 {tuple(self.k.shape[:3])}, got {describe(scales)}")
        tensors = (self.k, self.v, self.k_scales, self.v_scales)
        if not all(tensor.is_contiguous() for tensor in tensors if tensor is not None):
            raise ValueError("KV pages and scales must be contiguous")

    @property
    def is_quantised(self) -> bool:
        return self.k.dtype in QUANTISED_DTYPES

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    def in_pages_of(self, page_size: int) -> PagedKV:
        """Return the same slots counted in pages of another size, which divides them all."""
        if page_size == self.page_size:
            return self
        slots = (self.k.shape[0] * self.k.shape[1] // page_size, page_size)
        sides = (None if t is None else t.view(*slots, *t.shape[2:]) for t in (self.v, self.k_scales, self.v_scales))
        return PagedKV(self.k.view(*slots, *self.k.shape[2:]), *sides)  # type: ignore[arg-type]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]


def describe(tensor: torch.Tensor) -> str:
    """Return what an error says of a tensor: its dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
