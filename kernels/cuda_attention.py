"""Attention over paged KV on a GPU: choose the kernels once, plan each step on the host, run it in every layer.

    kernels = choose_kernels(...)                   once, pure
    plan = plan_step(layout, kernels)               each step, numpy only: may run while the step before computes
    buffers.write(plan)                             one copy of small integers to the device
    run(q, kv, buffers, launches, kernels, scale)   each layer; nothing in it depends on the host, so it can be captured

Buffers have fixed places, grids are fixed and counts are read on the device: a CUDA graph captured with `launches`
serves every later plan that needs no other launches and fits the buffers. Run once before a capture: kernels are
compiled at their first launch. While `TreePlan.growth` lasts, a later step may move `visible_lens` on (and write new
page ids, for which a layout may leave room: nothing reads kv_indptr[b + 1]) instead of writing a new plan.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from bough.kernels.decode import attend_items
from bough.kernels.layout import PagedLayout
from bough.kernels.merge import merge_partials
from bough.kernels.paged_kv import PagedKV
from bough.kernels.prefill import TILE_FIELDS, plan_tiles, prefill_attention
from bough.kernels.segments import find_segments
from bough.kernels.tree_plan import ITEM_FIELDS, Int32Array, TreePlan, plan_tree
from bough.kernels.tree_runs import Options
from bough.kernels.tuning import Arch, AttentionConfig, decode_config, prefill_config

_ALIGNMENT = 4  # int32 numbers: every section of a buffer begins at a multiple of 16 bytes


@dataclass(frozen=True, slots=True)
class Kernels:
    """How the attention of a model is computed on a device: compiled configurations and the planner's options."""

    narrow: AttentionConfig
    wide: AttentionConfig
    prefill: AttentionConfig
    options: Options
    window: int | None
    soft_cap: float | None
    max_extend_tokens: int


def choose_kernels(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    arch: Arch,
    num_sms: int,
    *,
    exact_split: int | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    max_extend_tokens: int = 16,
    share: bool = True,
    dtype: torch.dtype | None = None,
) -> Kernels:
    """Return the kernels of a model whose KV pages hold `kv_dtype`, on `num_sms` multiprocessors of an architecture.

    dtype: of the queries, where keys are quantised; products of float32 take smaller tiles whatever the keys are.

    exact_split: None, or the chunk of positions whose partial sums are merged, 256 or 512 say: then a token's bits
    do not depend on the batch, the tree, or how its prompt was cut. max_extend_tokens: prefills of at most so many new
    tokens are computed like a decode with more rows, split over the keys and sharing what is shared; not in exact mode.
    Raises ValueError if the architecture has no such dtype or is older than 8.0, or if heads do not divide evenly.
    """
    if arch < (8, 0):
        raise ValueError(f"kernels need compute capability 8.0, the device has {arch[0]}.{arch[1]}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    if kv_dtype == torch.float8_e4m3fn and arch < (8, 9):
        raise ValueError(f"float8_e4m3fn KV needs compute capability 8.9, the device has {arch[0]}.{arch[1]}")
    element_bytes = 4 if dtype == torch.float32 else kv_dtype.itemsize
    narrow, wide = (decode_config(head_dim, element_bytes, arch, wide=wide) for wide in (False, True))
    options = Options(
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        num_programs=num_sms * narrow.per_sm,
        wide_programs=num_sms * wide.per_sm,
        narrow_rows=narrow.block_m,
        wide_rows=wide.block_m,
        block_n=max(narrow.block_n, wide.block_n),
        exact_split=exact_split,
        window=window,
        share=share,
    )
    extend = max_extend_tokens if exact_split is None else 0
    prefill = prefill_config(head_dim, element_bytes, arch, windowed=window is not None)
    return Kernels(narrow, wide, prefill, options, window, soft_cap, extend)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's plan on the host, int32: work items of decode, tiles of prefill (num_tiles, TILE_FIELDS), the page
    ids, in pages of page_size, and visible_lens (num_tokens,), the keys each token sees."""

    tree: TreePlan
    tiles: Int32Array
    kv_indices: Int32Array
    visible_lens: Int32Array
    page_size: int


def plan_step(layout: PagedLayout, kernels: Kernels) -> StepPlan:
    """Return the plan of a step; pure, on the host."""
    num_new = np.diff(layout.qo_indptr)
    assert (num_new[layout.is_decode] == 1).all(), "a decode sequence has one query"
    assert (num_new <= layout.kv_lens).all(), "a sequence has more queries than tokens"
    options = kernels.options
    by_items = layout.is_decode | (num_new <= kernels.max_extend_tokens)
    seqs = np.flatnonzero(by_items & (num_new > 0))
    segments = find_segments(layout.kv_indptr, layout.kv_indices, layout.kv_lens, layout.page_size, seqs.tolist())
    prefills = np.flatnonzero(~by_items)
    owner = np.repeat(np.arange(len(num_new)), num_new)
    visible_lens = layout.kv_lens[owner] - (layout.qo_indptr[owner + 1] - np.arange(len(owner))) + 1
    return StepPlan(
        plan_tree(segments, layout.qo_indptr, layout.kv_indptr, layout.kv_lens, options),
        plan_tiles(
            prefills, layout.qo_indptr, layout.kv_indptr, layout.kv_lens, options.group, kernels.prefill.block_m
        ),
        layout.kv_indices,
        visible_lens.astype(np.int32),
        layout.page_size,
    )


@dataclass(frozen=True, slots=True)
class Launches:
    """Which kernels a step launches; a captured graph's may launch more than a plan needs, never fewer.

    page_size: of the plan's page ids, which need not be that of the pool: a trie of choices is planned slot by slot.
    """

    narrow: bool
    wide: bool
    num_tiles: int
    page_size: int

    @classmethod
    def of(cls, plan: StepPlan) -> Launches:
        return cls(len(plan.tree.narrow) > 0, len(plan.tree.wide) > 0, len(plan.tiles), plan.page_size)

    def cover(self, other: Launches) -> bool:
        more = self.narrow >= other.narrow and self.wide >= other.wide and self.num_tiles >= other.num_tiles
        return more and self.page_size == other.page_size


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a plan in `PlanBuffers` may hold, each number a count."""

    num_tokens: int
    num_pages: int
    num_narrow: int
    num_wide: int
    num_rows: int
    num_merges: int
    num_partials: int
    num_tiles: int

    @classmethod
    def of(cls, plan: StepPlan) -> Capacity:
        tree = plan.tree
        return cls(
            len(plan.visible_lens), len(plan.kv_indices), len(tree.narrow), len(tree.wide), len(tree.rows),
            len(tree.merge_indices), tree.num_partials, len(plan.tiles),
        )  # fmt: skip


class PlanBuffers:
    """A plan on the device, in tensors that never move, and room for the partial results of a layer.

    All int32 but the partial results, float32: part_out (num_partials, num_heads, head_dim), part_lse (num_partials,
    num_heads). They serve one layer after another. extra: (num_extra,) numbers of the caller's that travel along.
    """

    def __init__(
        self, capacity: Capacity, num_heads: int, head_dim: int, device: torch.device, num_extra: int = 0
    ) -> None:
        self.capacity = capacity
        sizes = [
            num_extra,
            2 * _ALIGNMENT, capacity.num_narrow * ITEM_FIELDS, capacity.num_wide * ITEM_FIELDS, capacity.num_rows,
            capacity.num_tokens + 1, capacity.num_merges, capacity.num_tokens, capacity.num_tiles * TILE_FIELDS,
            capacity.num_pages,
        ]  # fmt: skip
        padded = [-(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._packed = torch.zeros(sum(padded), dtype=torch.int32, device=device)
        # Two on the host take turns: the copy of one step may still run when the next is written.
        self._hosts = [torch.zeros(sum(padded), dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._copied = [_event(device) for _ in range(2)]
        self._starts = np.cumsum(padded) - padded
        views = [self._packed[start : start + size] for start, size in zip(self._starts, sizes, strict=True)]
        self.extra, num_items, narrow, wide, self.rows, self.merge_indptr, self.merge_indices = views[:7]
        self.num_narrow, self.num_wide = num_items[:1], num_items[_ALIGNMENT : _ALIGNMENT + 1]
        self.visible_lens, tiles, self.kv_indices = views[7:]
        self.narrow, self.wide = narrow.view(-1, ITEM_FIELDS), wide.view(-1, ITEM_FIELDS)
        self.tiles = tiles.view(-1, TILE_FIELDS)
        num_partials = max(1, capacity.num_partials)
        self.part_out = torch.empty(num_partials, num_heads, head_dim, dtype=torch.float32, device=device)
        self.part_lse = torch.empty(num_partials, num_heads, dtype=torch.float32, device=device)

    def write(self, plan: StepPlan, extra: Int32Array | None = None) -> None:
        """Copy a plan, and (num_extra,) `extra`, to the device, in the current stream.

        Raises ValueError naming what does not fit.

        Beyond the plan's tokens, tokens have no partial results, and tiles hold no tokens.
        """
        needed = Capacity.of(plan)
        for field in fields(Capacity):
            limit, value = getattr(self.capacity, field.name), getattr(needed, field.name)
            if value > limit:
                raise ValueError(f"the plan's {field.name} is {value}, the buffers hold {limit}")
        tree, num_padding = plan.tree, self.capacity.num_tokens - needed.num_tokens
        sections = [
            np.zeros(0, dtype=np.int32) if extra is None else extra,
            np.repeat([needed.num_narrow, needed.num_wide], _ALIGNMENT), tree.narrow, tree.wide, tree.rows,
            np.pad(tree.merge_indptr, (0, num_padding), mode="edge"), tree.merge_indices, plan.visible_lens,
            np.pad(plan.tiles, ((0, self.capacity.num_tiles - needed.num_tiles), (0, 0))), plan.kv_indices,
        ]  # fmt: skip
        host, event = self._hosts[0], self._copied[0]
        self._hosts.reverse()
        self._copied.reverse()
        if event is not None:
            event.synchronize()
        numbers = host.numpy()
        for start, section in zip(self._starts, sections, strict=True):
            numbers[start : start + section.size] = section.reshape(-1)
        used = int(self._starts[-1]) + needed.num_pages
        self._packed[:used].copy_(host[:used], non_blocking=True)
        if event is not None:
            event.record()


def _event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def run(
    q: torch.Tensor,
    kv: PagedKV,
    buffers: PlanBuffers,
    launches: Launches,
    kernels: Kernels,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each query to the keys at its own and earlier positions of its sequence (see `reference`).

    q: (num_tokens, num_heads, head_dim), tokens may be strided; at most the buffers' num_tokens. kv: of one layer, the
    new tokens' KV already in it. out: like q, contiguous, or None to allocate it. Returns out; tokens beyond the plan
    keep what was there.
    """
    assert len(q) <= buffers.capacity.num_tokens, "more queries than the buffers' tokens"
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kv = kv.in_pages_of(launches.page_size)
    if launches.num_tiles:
        tiles = buffers.tiles[: launches.num_tiles]
        prefill_attention(
            q, kv, buffers.kv_indices, tiles, out, scale, kernels.prefill,
            window=kernels.window, soft_cap=kernels.soft_cap,
        )  # fmt: skip
    options = kernels.options
    for is_launched, items, num_items, config, num_programs in (
        (launches.narrow, buffers.narrow, buffers.num_narrow, kernels.narrow, options.num_programs),
        (launches.wide, buffers.wide, buffers.num_wide, kernels.wide, options.wide_programs),
    ):
        if is_launched:
            attend_items(
                q, kv, buffers.kv_indices, buffers.visible_lens, items, num_items, buffers.rows,
                buffers.part_out, buffers.part_lse, scale, config, num_programs,
                window=kernels.window, soft_cap=kernels.soft_cap,
            )  # fmt: skip
    if launches.narrow or launches.wide:
        merge_indptr = buffers.merge_indptr[: len(q) + 1]
        merge_partials(buffers.part_out, buffers.part_lse, merge_indptr, buffers.merge_indices, out)
    return out


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A plan that lies in `buffers`, and the kernels that carry it out: what the layers of a step share."""

    buffers: PlanBuffers
    launches: Launches
    kernels: Kernels
