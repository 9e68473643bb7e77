"""Time what tree attention is made of, where a model is loaded on a GPU, so that its planner counts with this device.

    costs = calibrate(kernels, kv, dtype)            # some tens of milliseconds
    kernels = replace(kernels, options=replace(kernels.options, costs=costs))     before the first plan and capture

Work of a few shapes is made of the model's own heads, pages and kernels; its items are as the planner makes them. What
the timings mean is `tree_costs.fit`'s business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from bough.kernels.cuda_attention import Kernels
from bough.kernels.decode import attend_items
from bough.kernels.merge import merge_partials
from bough.kernels.paged_kv import PagedKV
from bough.kernels.tree_costs import Kind, Timing, TreeCosts, fit
from bough.kernels.tree_plan import ITEM_FIELDS, Int32Array
from bough.kernels.tree_runs import tokens_per_tile
from bough.kernels.tuning import AttentionConfig

log = logging.getLogger(__name__)

_REPETITIONS: Final = 7
_LEAST_REPETITIONS: Final = 3
_SECONDS: Final = 0.4  # after the least number of repetitions, and after compiling
_AHEAD_CYCLES: Final = 2_000_000  # some 1 ms, in which the host runs ahead: launches are not part of a time


@dataclass(frozen=True)
class Probe:
    """A shape of work, counted as in `Timing`, and what does it."""

    kind: Kind
    items: float
    tokens: float
    work: Callable[[], object]


Timer = Callable[[Probe], float]


def calibrate(
    kernels: Kernels, kv: PagedKV, dtype: torch.dtype, *, timer: Timer | None = None, seconds: float = _SECONDS
) -> TreeCosts:
    """Return the costs of tree attention on the device of `kv`, or the estimates there were, with the reason.

    kv: the pages of one layer, which are read, whatever they hold. dtype: of the queries. timer: returns the µs of a
    probe's work; None for CUDA events, and an estimate on other devices. Repetitions alternate between the probes and
    end after `seconds`, kernels compiled before that; medians count. Never raises: a model is served without it.
    """
    estimate = kernels.options.costs
    device = kv.k.device
    if timer is None and device.type != "cuda":
        return replace(estimate, source="estimated: no GPU")
    try:
        with torch.inference_mode():
            found = probes(kernels, kv, dtype)
            for probe in found:
                probe.work()
            costs = fit(measure(found, timer or EventTimer(device), seconds=seconds), estimate)
    except Exception as error:
        costs = replace(estimate, source=f"estimated: {type(error).__name__}: {error}"[:200])
    if costs.source == "measured":
        log.info("tree attention was timed: %s", costs)
    else:
        log.warning("tree attention is planned by costs that are %s", costs.source)
    return costs


def measure(found: Sequence[Probe], timer: Timer, *, seconds: float) -> list[Timing]:
    """Return each probe's times, taken in turn until `seconds` are over, but a few of each at least."""
    ends_at = time.perf_counter() + seconds
    times: list[list[float]] = [[] for _ in found]
    for repetition in range(_REPETITIONS):
        if repetition >= _LEAST_REPETITIONS and time.perf_counter() >= ends_at:
            break
        for probe, us in zip(found, times, strict=True):
            us.append(timer(probe))
    return [Timing(probe.kind, probe.items, probe.tokens, tuple(us)) for probe, us in zip(found, times, strict=True)]


def cooling(device: torch.device) -> Callable[[], object]:
    """Return what fills the second-level cache with something else; nothing where there is no GPU.

    It reads: what was written there would have to go back to memory in the time that is measured.
    """
    if device.type != "cuda":
        return lambda: None
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return torch.zeros(2 * cache_bytes // 4, dtype=torch.float32, device=device).sum


class EventTimer:
    """Times work by CUDA events, with the second-level cache full of something else."""

    def __init__(self, device: torch.device) -> None:
        self._cool = cooling(device)
        torch.cuda.synchronize(device)

    def __call__(self, probe: Probe) -> float:
        cuda: Any = torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(_AHEAD_CYCLES)
        self._cool()
        begin.record()
        probe.work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def probes(kernels: Kernels, kv: PagedKV, dtype: torch.dtype) -> list[Probe]:
    """Return the shapes of work that are timed: items of two lengths, one and some per program, in each tile, of keys
    of their own and of the same keys; merges of few and of many partial results; launches of kernels without work.

    Raises ValueError if the pages hold less than the longest item reads.
    """
    bench = _Bench(kernels, kv, dtype)
    return [
        *(bench.attend("narrow", items, tokens) for items in (1, 4) for tokens in (1, 4)),
        *(bench.attend("again", items, 4) for items in (1, 4)),
        # Exact mode has no wide tile, and compiling its kernel takes seconds.
        *(bench.attend("wide", *shape) for shape in _WIDE if kernels.options.exact_split is None),
        *(bench.merge(num_partials) for num_partials in _MERGED),
        *(bench.launch(count) for count in (1, 3, 6)),
    ]


_WIDE: Final = ((1, 1), (1, 4), (4, 1), (4, 4))  # items per program, shortest chunks of an item
_MERGED: Final = (8, 32, 128)  # partial results of a token


class _Bench:
    """Makes probes of one model's attention; all write the same partial results, which nobody reads."""

    def __init__(self, kernels: Kernels, kv: PagedKV, dtype: torch.dtype) -> None:
        options = kernels.options
        self._kernels, self._kv, self._device = kernels, kv, kv.k.device
        self._num_pages = kv.k.shape[0]
        self._num_heads = kv.num_kv_heads * options.group
        # A merge has a program for each token and head: one round of all that run at a time.
        self._num_merged = max(1, options.num_programs // self._num_heads)
        most_rows = max(self._num_merged, tokens_per_tile(options, is_wide=True))
        shape = (most_rows, self._num_heads, kv.head_dim)
        self._q = torch.zeros(shape, dtype=dtype, device=self._device)
        self._out = torch.zeros((self._num_merged, *shape[1:]), dtype=dtype, device=self._device)
        self._rows = self._there(np.arange(most_rows, dtype=np.int32))
        self._visible_lens = self._there(np.full(most_rows, 2**30, dtype=np.int32))
        self._kv_indices = self._there(np.arange(self._num_pages, dtype=np.int32))
        num_partials = max(
            _MERGED[-1] * self._num_merged,
            self._num_items(4, is_wide=False),
            self._num_items(4, is_wide=True) * tokens_per_tile(options, is_wide=True),
        )
        self._part_out = torch.zeros((num_partials, *shape[1:]), dtype=torch.float32, device=self._device)
        self._part_lse = torch.zeros((num_partials, self._num_heads), dtype=torch.float32, device=self._device)

    def attend(self, kind: Kind, per_program: int, length: int) -> Probe:
        """Return work of about `per_program` items per program, each of `length` times the shortest chunk."""
        options, is_wide = self._kernels.options, kind == "wide"
        tokens = length * options.min_split
        pages = -(-tokens // self._kv.page_size)
        if pages > self._num_pages:
            raise ValueError(f"{self._num_pages} pages hold less than an item of {tokens} tokens")
        count, num_rows = self._num_items(per_program, is_wide=is_wide), self._num_rows(is_wide)
        # As many different keys as the pool has; in a small one, items of the same keys lie far apart.
        places = 0 if kind == "again" else np.arange(count) % (self._num_pages // pages) * pages
        items = np.zeros((count, ITEM_FIELDS), dtype=np.int32)
        items[:, 1], items[:, 2], items[:, 4] = num_rows, places, tokens
        items[:, 5] = np.arange(count) * num_rows
        works = count * self._kv.num_kv_heads * self._head_tiles(is_wide) / self._programs(is_wide)
        return Probe(kind, works, works * tokens, self._attending(items, count, is_wide=is_wide))

    def merge(self, num_partials: int) -> Probe:
        """Return the merge of so many partial results of each of some tokens."""
        total = num_partials * self._num_merged
        indptr = self._there(np.arange(self._num_merged + 1, dtype=np.int32) * num_partials)
        indices = self._there(np.arange(total, dtype=np.int32))
        per_program = total * self._kv.num_kv_heads / self._kernels.options.num_programs
        work = partial(merge_partials, self._part_out, self._part_lse, indptr, indices, self._out)
        return Probe("merge", per_program, 0, work)

    def launch(self, count: int) -> Probe:
        """Return `count` kernels that have nothing to do."""
        work = self._attending(np.zeros((1, ITEM_FIELDS), dtype=np.int32), 0, is_wide=False)

        def launch() -> None:
            for _ in range(count):
                work()

        return Probe("launch", count, 0, launch)

    def _attending(self, items: Int32Array, count: int, *, is_wide: bool) -> Callable[[], object]:
        kernels = self._kernels
        config: AttentionConfig = kernels.wide if is_wide else kernels.narrow
        return partial(
            attend_items, self._q, self._kv, self._kv_indices, self._visible_lens, self._there(items),
            self._there(np.array([count], dtype=np.int32)), self._rows, self._part_out, self._part_lse,
            self._kv.head_dim**-0.5, config, self._programs(is_wide),
            window=kernels.window, soft_cap=kernels.soft_cap,
        )  # fmt: skip

    def _num_items(self, per_program: int, *, is_wide: bool) -> int:
        units = self._kv.num_kv_heads * self._head_tiles(is_wide)
        return max(1, per_program * self._programs(is_wide) // units)

    def _num_rows(self, is_wide: bool) -> int:
        """Return a token alone, as in a branch's tail, or a full tile, as of many branches."""
        return tokens_per_tile(self._kernels.options, is_wide=True) if is_wide else 1

    def _programs(self, is_wide: bool) -> int:
        options = self._kernels.options
        return options.wide_programs if is_wide else options.num_programs

    def _head_tiles(self, is_wide: bool) -> int:
        """Return how many tiles a group of heads takes."""
        options = self._kernels.options
        return -(-options.group // (options.wide_rows if is_wide else options.narrow_rows))

    def _there(self, numbers: Int32Array) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._device)
