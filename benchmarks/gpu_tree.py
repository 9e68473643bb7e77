"""The report's sections on attention: decode of branches over one prefix, and cold prompts, beside other systems."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import (
    PAGE_SIZE,
    attention_of,
    copy_bandwidth,
    layout_of,
    measured_costs,
    medians_us,
    prepared,
    some,
)
from gpu_report import Clock, Row

from bough.kernels.cuda_attention import plan_step, run
from bough.kernels.layout import PagedLayout
from bough.kernels.paged_kv import PagedKV
from bough.kernels.tree_costs import ESTIMATED, TreeCosts

_OWN = 128  # private tokens of each branch
_MOST_COPY_BYTES = 20 << 30  # of KV gathered for a baseline that cannot read pages
_HEADS, _TINY_HEADS = (32, 8, 128), (4, 2, 64)
# With which everything is shared that can be, for comparison with what the planner chooses.
SHARE_ALL = TreeCosts(0.0, 0.0, 0.1, 1.0, 0.0, 0.0)
_FIRST = ((16, 8192), (64, 8192), (64, 32768))  # what the goals are about
_GRID = tuple((width, prefix) for prefix in (8192, 1024, 32768) for width in (16, 64, 4, 256))
_NOT_RUN: Row = {"no": "not run: no time left"}
Work = Callable[[], object]
MakePeer = Callable[[torch.Tensor, PagedKV, PagedLayout], Work]
Peers = tuple[tuple[str, MakePeer], ...]


class Case:
    """One layer's decode of `width` branches of private tokens over one prefix; prefix 0: nothing is shared."""

    def __init__(self, width: int, prefix: int, device: torch.device, own: int = _OWN) -> None:
        tiny = device.type == "cpu"
        self.device, self.width, self.prefix, self.own = device, width, prefix, own
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.heads, kv_heads, dim = _TINY_HEADS if tiny else _HEADS
        self.layout = layout_of([prefix + own] * width, [1] * width, prefix)
        num_pages = int(self.layout.kv_indices.max()) + 1
        pages = torch.randn(2, num_pages, PAGE_SIZE, kv_heads, dim, device=device, dtype=self.dtype)
        self.kv = PagedKV(pages[0], pages[1])
        self.q = some(width, self.heads, dim, dtype=self.dtype, device=device)
        self.token_bytes = 2 * kv_heads * dim * pages.element_size()

    def ours(self, *, share: bool, costs: TreeCosts = ESTIMATED) -> Work:
        kv, dim = self.kv, self.kv.head_dim
        chosen = attention_of(self.heads, kv.num_kv_heads, dim, self.dtype, self.device, share, costs)
        return partial(run, self.q, kv, *prepared(self.layout, chosen, self.heads, dim, self.device), chosen, dim**-0.5)

    def is_shared(self, costs: TreeCosts) -> bool:
        """Tell whether the planner shares anything here."""
        heads = (self.heads, self.kv.num_kv_heads, self.kv.head_dim)
        plan = plan_step(self.layout, attention_of(*heads, self.dtype, self.device, True, costs)).tree
        return bool((plan.narrow[:, 1] > 1).any() or (plan.wide[:, 1] > 1).any())


def tree(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time tree attention beside the same kernels reading each branch by itself.

    each_tb_per_s: what the branches read, over the time it took: above the copy bandwidth where the second-level cache
    serves the prefix. The last cases, of short prefixes and few branches, tell from where on sharing pays, and whether
    the planner knows: shared_us is with sharing whatever it costs, tree_us as planned by the costs measured here.
    """
    tiny = device.type == "cpu"
    bandwidth = copy_bandwidth(device, tiny)
    heads, kv_heads, dim = _TINY_HEADS if tiny else _HEADS
    costs = measured_costs(heads, kv_heads, dim, torch.float32 if tiny else torch.bfloat16, device)
    yield costs.figures()
    more = [case for case in _GRID if case not in _FIRST]
    few = [(w, p) for w in (2, 4, 16) for p in (64, 128, 256, 512)]
    for width, prefix in [(2, 64)] if tiny else [*_FIRST, *more, *few]:
        if clock.is_out:
            yield {"width": width, "prefix": prefix, **_NOT_RUN}
            continue
        try:
            yield _tree_row(Case(width, prefix, device, 16 if tiny else _OWN), costs, bandwidth, (width, prefix) in few)
        except Exception as error:  # one that does not fit, say: the others can
            traceback.print_exc()
            yield {"width": width, "prefix": prefix, "no": f"{type(error).__name__}: {error}"[:120]}


def _tree_row(case: Case, costs: TreeCosts, bandwidth: float, with_shared: bool) -> Row:
    works = {"tree": case.ours(share=True, costs=costs), "each": case.ours(share=False, costs=costs)}
    if with_shared:
        works["shared"] = case.ours(share=True, costs=SHARE_ALL)
    outputs = {name: _output(work) for name, work in works.items()}
    times = medians_us(works, case.device, 9, cold=True)
    width, prefix = case.width, case.prefix
    num_bytes = (prefix + width * case.own) * case.token_bytes
    return {
        "width": width, "prefix": prefix, **{f"{name}_us": us for name, us in times.items()},
        "each/tree": times["each"] / times["tree"], "is_shared": case.is_shared(costs),
        "share_of_copy": num_bytes / times["tree"] * 1e6 / bandwidth,
        "each_tb_per_s": width * (prefix + case.own) * case.token_bytes / times["each"] / 1e6,
        **_checked(outputs["each"], outputs["tree"], "tree against each", case.dtype),
    }  # fmt: skip


def _checked(found: torch.Tensor, expected: torch.Tensor, kernel: str, dtype: torch.dtype) -> Row:
    error = float((found - expected).abs().max() / expected.abs().max())
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    return {"kernel": kernel, "dtype": str(dtype)[6:], "error": error, "limit": limit, "right": error <= limit}


def peers(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time tree attention beside PyTorch's."""
    return _beside(device, clock, _TORCH_PEERS)


def flashinfer_peers(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time tree attention beside FlashInfer's, plain and cascade, if it is here."""
    return _beside(device, clock, _FLASHINFER_PEERS)


def _beside(device: torch.device, clock: Clock, made_by: Peers) -> Iterator[Row]:
    """Time tree attention beside each other system that can; a row for each, so that one that takes long costs itself.

    error: how far the other's output is from ours, relative to the largest value. prefix 0: nothing is shared.
    """
    tiny = device.type == "cpu"
    first = [(2, 64)] if tiny else [*_FIRST, (64, 0), (16, 1024)]
    more = [] if tiny else [case for case in _GRID if case not in first]
    missing: set[str] = set()
    for cases in (first, more):
        for name, make in made_by:
            for width, prefix in cases if name not in missing else ():
                row: Row = {"peer": name, "width": width, "prefix": prefix}
                try:
                    yield row | (_NOT_RUN if clock.is_out else _against(name, make, width, prefix, device))
                except Exception as error:  # a baseline that is not here or does not do this shape
                    yield row | {"no": f"{type(error).__name__}: {error}"[:120]}
                    if isinstance(error, ImportError):
                        missing.add(name)
                        break


def _against(name: str, make: MakePeer, width: int, prefix: int, device: torch.device) -> Row:
    """Return the times of tree attention and of another system's."""
    case = Case(width, prefix, device, 16 if device.type == "cpu" else _OWN if prefix else 1024)
    works = {"tree": case.ours(share=True), name: make(case.q, case.kv, case.layout)}
    outputs = {name: _output(work) for name, work in works.items()}
    difference = (outputs[name].view_as(outputs["tree"]) - outputs["tree"]).abs().max()
    times = medians_us(works, device, 7, cold=True)
    return {
        "error": float(difference / outputs["tree"].abs().max()),
        **{f"{name}_us": us for name, us in times.items()}, f"{name}/tree": times[name] / times["tree"],
    }  # fmt: skip


def flashinfer_kernels(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Tell how FlashInfer could run here, and let it load or compile the kernels that are compared later."""
    found = flashinfer_state()
    yield {"flashinfer": found}
    if device.type != "cuda" or found.startswith("no"):
        return
    for name, make in _FLASHINFER_PEERS:
        begin = time.monotonic()
        case = Case(2, 64, device)
        try:
            make(case.q, case.kv, case.layout)()
            torch.cuda.synchronize(device)
            yield {"flashinfer": name, "ready_after_s": time.monotonic() - begin}
        except Exception as error:
            yield {"flashinfer": name, "no": f"{type(error).__name__}: {error}"[:120]}


def flashinfer_state() -> str:
    """Return how FlashInfer's kernels would come to run: "not installed", "no ..." if they cannot, or from where."""
    if not _is_installed("flashinfer"):
        return "not installed"
    if _is_installed("flashinfer_jit_cache"):
        return "compiled ahead: the package flashinfer_jit_cache"
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home())) / ".cache" / "flashinfer"
    cached = sorted({path.parent.name for path in base.glob("**/cached_ops/*/*.so")})
    if any("decode" in name or "prefill" in name for name in cached):
        return f"compiled before: {', '.join(cached)}"[:200]
    missing = [tool for tool in ("nvcc", "ninja") if _tool(tool) is None]
    if missing:
        return f"no compiled kernels, and no {' or '.join(missing)} to make them"
    return "to be compiled now, by nvcc"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _tool(name: str) -> str | None:
    """Return where a program is, on the path or in CUDA's folder."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    return shutil.which(name) or shutil.which(name, path=folders)


def prefill(device: torch.device, with_peers: bool, clock: Clock) -> Iterator[Row]:
    """Time one layer's attention of a cold prompt, beside PyTorch's and FlashInfer's."""
    tiny = device.type == "cpu"
    heads, kv_heads, dim = _TINY_HEADS if tiny else _HEADS
    dtype = torch.float32 if tiny else torch.bfloat16
    for tokens in (40,) if tiny else (4096, 1024, 8192):
        if clock.is_out:
            yield {"tokens": tokens, "no": "not run: no time left"}
            continue
        layout = layout_of([tokens], [tokens], 0)
        q = some(tokens, heads, dim, dtype=dtype, device=device)
        pages = torch.randn(2, -(-tokens // PAGE_SIZE), PAGE_SIZE, kv_heads, dim, device=device, dtype=dtype)
        kv = PagedKV(pages[0], pages[1])
        chosen = attention_of(heads, kv_heads, dim, dtype, device, True)
        works: dict[str, Work] = {
            "ours": partial(run, q, kv, *prepared(layout, chosen, heads, dim, device), chosen, dim**-0.5)
        }
        row: Row = {"tokens": tokens}
        for name, make in _PREFILL_PEERS if with_peers else ():
            try:
                work = make(q, kv.k.flatten(0, 1)[:tokens], kv.v.flatten(0, 1)[:tokens])
                work()
                works[name] = work
            except Exception as error:
                row[f"no_{name}"] = f"{type(error).__name__}: {error}"[:120]
        times = medians_us(works, device, 9)
        row |= {f"{name}_us": us for name, us in times.items()}
        row |= {f"{name}/ours": us / times["ours"] for name, us in times.items() if name != "ours"}
        yield row | {"tflop_per_s": 2.0 * tokens * tokens * heads * dim / times["ours"] / 1e6}


def _torch_prefill(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Work:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))

    def work() -> object:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return work


def _fa3_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Work:
    """FlashAttention 3, by its own package or FlashInfer's build of it."""
    if _is_installed("flash_attn_interface"):
        package: Any = importlib.import_module("flash_attn_interface")
        return lambda: package.flash_attn_func(*(x.unsqueeze(0) for x in (q, k, v)), causal=True)
    state = flashinfer_state()
    if state.startswith("no"):
        raise ImportError(f"FlashAttention 3: no flash_attn_interface; FlashInfer: {state}")
    flashinfer: Any = importlib.import_module("flashinfer")
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, backend="fa3")


_PREFILL_PEERS: tuple[tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Work]], ...] = (
    ("flash", partial(_torch_prefill, "FLASH_ATTENTION")),
    ("cudnn", partial(_torch_prefill, "CUDNN_ATTENTION")),
    ("fa3", _fa3_prefill),
)


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


_TORCH_PEERS: Peers = (("sdpa", _sdpa), ("flex", _flex))  # what has to be compiled first comes last
_FLASHINFER_PEERS: Peers = (("flashinfer", _flashinfer), ("cascade", _cascade))
