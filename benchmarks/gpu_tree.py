"""The report's section on tree attention: one layer's decode of branches over one prefix, beside other systems."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import PAGE_SIZE, Parts, attention_of, copy_bandwidth, layout_of, medians_us, prepared, some
from gpu_report import Clock, Row

from bough.kernels.cuda_attention import run
from bough.kernels.layout import PagedLayout
from bough.kernels.paged_kv import PagedKV

_OWN = 128  # private tokens of each branch
_MOST_COPY_BYTES = 40 << 30  # of KV gathered for a baseline that cannot read pages


def parts(device: torch.device, with_peers: bool) -> Parts:
    """Return the section: name -> (seconds, what yields rows)."""
    return {"tree": (150.0, lambda clock: tree(device, device.type == "cpu", with_peers, clock))}


def tree(device: torch.device, tiny: bool, with_peers: bool, clock: Clock) -> Iterator[Row]:
    """Time one layer's decode of `width` branches over one prefix, by each system that can.

    error_NAME: how far the others' output is from that of tree decode, relative to its largest value.
    """
    heads, kv_heads, dim = (4, 2, 64) if tiny else (32, 8, 128)
    dtype = torch.float32 if tiny else torch.bfloat16
    bandwidth = copy_bandwidth(device, tiny)
    cases = [(2, 64)] if tiny else [(w, p) for p in (8192, 1024, 32768) for w in (16, 64, 4, 256)]
    own = 16 if tiny else _OWN
    for width, prefix in cases:
        if clock.is_out:
            return
        layout = layout_of([prefix + own] * width, [1] * width, prefix)
        num_pages = int(layout.kv_indices.max()) + 1
        pages = torch.randn(2, num_pages, PAGE_SIZE, kv_heads, dim, device=device).to(dtype)
        kv, q = PagedKV(pages[0], pages[1]), some(width, heads, dim, dtype=dtype, device=device)
        works: dict[str, Callable[[], object]] = {}
        for name, share in (("tree", True), ("each", False)):
            chosen = attention_of(heads, kv_heads, dim, dtype, device, share)
            works[name] = partial(run, q, kv, *prepared(layout, chosen, heads, dim, device), chosen, dim**-0.5)
        row: Row = {"width": width, "prefix": prefix}
        for name, make in _PEERS if with_peers else ():
            try:
                work = make(q, kv, layout)
                work()
                works[name] = work
            except Exception as error:  # a baseline that is not here or does not do this shape
                row[f"no_{name}"] = f"{type(error).__name__}: {error}"[:120]
        outputs = {name: _output(work).view(width, heads, dim) for name, work in works.items()}
        times = medians_us(works, device, 9)
        largest = outputs["tree"].abs().max()
        row |= {
            f"error_{name}": float((output - outputs["tree"]).abs().max() / largest)
            for name, output in outputs.items()
            if name != "tree"
        }
        row |= {f"{name}_us": us for name, us in times.items()}
        row |= {f"{name}/tree": us / times["tree"] for name, us in times.items() if name != "tree"}
        token = 2 * kv_heads * dim * pages.element_size()
        row["share_of_copy"] = (prefix + width * own) * token / times["tree"] * 1e6 / bandwidth
        yield row
        del works, pages, kv


def _output(work: Callable[[], Any]) -> torch.Tensor:
    output: torch.Tensor = work()
    return output.float()


def _gathered(q: torch.Tensor, kv: PagedKV, layout: PagedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V (width, num_kv_heads, length, head_dim): what a system without pages reads."""
    width, length = len(layout.kv_lens), int(layout.kv_lens[0])
    num_bytes = 2 * width * length * kv.num_kv_heads * kv.head_dim * kv.k.element_size()
    if num_bytes > _MOST_COPY_BYTES:
        raise MemoryError(f"{num_bytes >> 30} GiB of gathered KV")
    pages = torch.from_numpy(layout.kv_indices).long().to(q.device).view(width, -1)
    k, v = (side[pages].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for side in (kv.k, kv.v))
    return k, v


def _sdpa(q: torch.Tensor, kv: PagedKV, layout: PagedLayout) -> Callable[[], object]:
    k, v = _gathered(q, kv, layout)
    return lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)


def _flex(q: torch.Tensor, kv: PagedKV, layout: PagedLayout) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import flex_attention

    k, v = _gathered(q, kv, layout)
    work: Any = torch.compile(flex_attention) if q.device.type == "cuda" else flex_attention
    return lambda: work(q.unsqueeze(2), k, v, enable_gqa=True)


def _flashinfer(q: torch.Tensor, kv: PagedKV, layout: PagedLayout) -> Callable[[], object]:
    flashinfer: Any = importlib.import_module("flashinfer")
    room = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", use_tensor_cores=True)
    last = torch.from_numpy((layout.kv_lens - 1) % PAGE_SIZE + 1)
    indptr, indices = torch.from_numpy(layout.kv_indptr), torch.from_numpy(layout.kv_indices)
    there = [t.to(q.device) for t in (indptr, indices, last)]
    wrapper.plan(*there, q.shape[1], kv.num_kv_heads, kv.head_dim, PAGE_SIZE, q_data_type=q.dtype)
    return lambda: wrapper.run(q, (kv.k, kv.v))


def _cascade(q: torch.Tensor, kv: PagedKV, layout: PagedLayout) -> Callable[[], object]:
    """FlashInfer's own tree attention: the common pages once for all, then each branch's."""
    flashinfer: Any = importlib.import_module("flashinfer")
    width = len(layout.kv_lens)
    pages = torch.from_numpy(layout.kv_indices).view(width, -1)
    common = int((pages == pages[0]).all(0).sum())
    own = pages.shape[1] - common
    steps = torch.arange(width + 1, dtype=torch.int32)
    last = torch.from_numpy((layout.kv_lens - 1) % PAGE_SIZE + 1)
    levels = [
        [torch.tensor([0, width], dtype=torch.int32), steps],
        [torch.tensor([0, common], dtype=torch.int32), steps * own],
        [pages[0, :common].contiguous(), pages[:, common:].flatten()],
        [torch.tensor([PAGE_SIZE], dtype=torch.int32), last],
    ]
    there = [[tensor.to(q.device) for tensor in level] for level in levels]
    room = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper: Any = flashinfer.MultiLevelCascadeAttentionWrapper(2, room, "NHD")
    wrapper.plan(*there, q.shape[1], kv.num_kv_heads, kv.head_dim, PAGE_SIZE, q_data_type=q.dtype)
    return lambda: wrapper.run(q, (kv.k, kv.v))


_PEERS = (("sdpa", _sdpa), ("flex", _flex), ("flashinfer", _flashinfer), ("cascade", _cascade))
