"""`KVPool`: the tensors that hold K and V of every page, in every layer. Only the runner writes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from bough.kernels.paged_kv import QUANTISED_DTYPES, PagedKV
from bough.runtime.batch import PageCopy

_FP8_NAN = 0x7F


class KVPool:
    """K and V of `num_pages` pages of `page_size` slots.

    k[layer], v[layer]: (num_pages, page_size, num_kv_heads, head_dim), contiguous. In int8 and float8 each token and
    head has a scale in k_scales[layer], v_scales[layer]: (num_pages, page_size, num_kv_heads) float32; these lists are
    empty otherwise. layers: the same tensors, as kernels take them. The memory is not touched before it is written, so
    an unused page costs no RAM; what an unwritten slot holds is undefined, NaN included, and attention never reads it.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        layers = range(num_layers)
        scaled = layers if dtype in QUANTISED_DTYPES else range(0)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.k_scales = [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in scaled]
        self.v_scales = [torch.empty(shape[:3], dtype=torch.float32, device=device) for _ in scaled]
        self.layers = [PagedKV(*tensors) for tensors in zip(*filter(None, self._lists()), strict=True)]
        self.dtype = dtype

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page's K and V over all layers."""
        return sum(tensor[0].nbytes for tensor in self._tensors()) if self.num_pages else 0

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Carry out all copies as if at once: every source is read before any target is written."""
        by_length: defaultdict[int, list[PageCopy]] = defaultdict(list)
        for copy in copies:
            by_length[copy.num_slots].append(copy)
        device = self.k[0].device
        groups = [
            (
                _there([c.source for c in group], device),
                _there([c.target for c in group], device),
                num_slots,
            )
            for num_slots, group in by_length.items()
            if num_slots
        ]
        for tensor in map(_bytes_of, self._tensors()) if groups else ():
            read = [tensor[sources, :num_slots] for sources, _, num_slots in groups]
            for (_, targets, num_slots), slots in zip(groups, read, strict=True):
                tensor[targets, :num_slots] = slots

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages, or their scales, with NaN: a test's way to show that nothing reads what it does not own."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.k[0].device)
        for tensor in self._tensors():
            if tensor.is_floating_point():
                raw = _bytes_of(tensor)
                raw.index_fill_(0, index, float("nan") if raw.is_floating_point() else _FP8_NAN)

    def _lists(self) -> tuple[list[torch.Tensor], ...]:
        return self.k, self.v, self.k_scales, self.v_scales

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensors in self._lists() for tensor in tensors]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return float8 as bytes, which every operation of PyTorch knows; other tensors as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _there(pages: list[int], device: torch.device) -> torch.Tensor:
    """Return page ids on the device, without waiting for what runs there."""
    return torch.tensor(pages, pin_memory=device.type == "cuda").to(device, non_blocking=True)
