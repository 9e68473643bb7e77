"""The report's sections on whole steps: decode of random-weight models, graphs on and off, and a short extend."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from gpu_kernels import PAGE_SIZE, copy_bandwidth
from gpu_report import Clock, Row

from bough.kernels.attention import choose_attention
from bough.kernels.calibration import calibrate
from bough.kernels.tree_costs import TreeCosts
from bough.kernels.triton_rows import TritonRows

_CONTEXT = 1024
_REPETITIONS = 9
_REPETITION_MS = 24.0  # of steps in a row that are timed as one


class RandomWeights:
    """Weights of a shape that nobody trained; speed does not depend on what they are."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        from bough.runtime.models.weights import expected_tensors

        self._shapes = expected_tensors(config)
        self.dtype = dtype
        self._device = device

    def has(self, name: str) -> bool:
        return name in self._shapes

    def take(self, *names: str) -> torch.Tensor:
        shape = (sum(self._shapes[name][0] for name in names), *self._shapes[names[0]][1:])
        if len(shape) == 1:  # of norms, near 1 in models that were trained: else nobody attends to anything
            return torch.ones(shape, dtype=self.dtype, device=self._device)
        return torch.randn(shape, dtype=self.dtype, device=self._device) * 0.02


def shape_of(name: str) -> Any:
    """Return the configuration of Llama-3.2-1B, Llama-3.1-8B, or of something small or tiny."""
    from bough.runtime.models.config import ModelConfig, RopeConfig

    hidden, layers, heads, kv_heads, dim, mlp, vocab = {
        "1b": (2048, 16, 32, 8, 64, 8192, 128_256),
        "8b": (4096, 32, 32, 8, 128, 14_336, 128_256),
        "small": (512, 2, 8, 2, 64, 1024, 4096),
        "tiny": (64, 1, 4, 2, 16, 96, 320),
    }[name]
    return ModelConfig(
        "LlamaForCausalLM", hidden, layers, heads, kv_heads, dim, mlp, vocab, 1e-5, RopeConfig(theta=500_000.0),
        name != "8b", False, False, False, False, 40_960 if name != "tiny" else 256, (1,), 0, "bfloat16",
    )  # fmt: skip


class Shape:
    """A model of random weights and a pool of random keys, and runners on them."""

    def __init__(self, name: str, device: torch.device, num_pages: int, dtype: torch.dtype = torch.bfloat16) -> None:
        from bough.runtime.cache.kv_pool import KVPool
        from bough.runtime.models.llama import DeviceParts, Llama
        from bough.runtime.models.weights import Weights

        self.name, self.device = name, device
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.config = config = shape_of(name)
        with torch.inference_mode():
            parts = DeviceParts(TritonRows(8192, device), None)
            self.model = Llama(config, cast(Weights, RandomWeights(config, self.dtype, device)), parts, device)
            heads = (config.num_kv_heads, config.head_dim)
            self.pool = KVPool(config.num_layers, num_pages, PAGE_SIZE, *heads, self.dtype, device)
            for pages in (*self.pool.k, *self.pool.v):
                pages.normal_()

    def runner(self, *, graphs: bool = True, share: bool = True, costs: TreeCosts | None = None) -> Any:
        from bough.runtime.cuda.runner import CudaRunner

        attention = choose_attention(*self._heads, self.dtype, self.device, "triton", share=share)
        assert attention.kernels is not None
        options = replace(attention.kernels.options, costs=costs or self.costs)
        attention = replace(attention, kernels=replace(attention.kernels, options=options))
        return CudaRunner(self.model, self.pool, self.dtype, self.device, attention=attention, cuda_graphs=graphs)

    @cached_property
    def costs(self) -> TreeCosts:
        """What tree attention costs here, as a runtime finds it when it loads a model."""
        kernels = choose_attention(*self._heads, self.dtype, self.device, "triton").kernels
        assert kernels is not None
        return calibrate(kernels, self.pool.layers[0], self.dtype)

    @property
    def _heads(self) -> tuple[int, int, int]:
        return self.config.num_heads, self.config.num_kv_heads, self.config.head_dim

    def step_bytes(self, tokens: int) -> int:
        """Return what a step must read: the weights, and the keys and values of so many tokens."""
        from bough.runtime.cuda.memory import weight_bytes

        config, size = self.config, self.dtype.itemsize
        # Of the embedding only the rows of the tokens are read; where it is the head, too, all of it.
        embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * size
        return int(weight_bytes(config, size) - embedding + tokens * self.token_bytes)

    @property
    def token_bytes(self) -> int:
        config: Any = self.config
        return int(2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize)


def decode_batch(width: int, context: int, shared: int) -> Any:
    """Return one decode step of `width` sequences of `context` tokens, the first `shared` in common."""
    from bough.runtime.batch import Batch, Row, SampleRequest
    from bough.runtime.protocol import SamplingParams

    each, common = -(-context // PAGE_SIZE), shared // PAGE_SIZE
    drawn = np.array([5], dtype=np.int32)
    none = np.zeros(0, dtype=np.int32)
    rows = []
    for i in range(width):
        own = np.arange(common + i * (each - common), common + (i + 1) * (each - common), dtype=np.int32)
        pages = np.concatenate([np.arange(common, dtype=np.int32), own])
        request = SampleRequest(SamplingParams(temperature=0.0), i, context, drawn, none, ())
        rows.append(Row(drawn, context - 1, pages, request))
    return Batch(tuple(rows))


def extend_batch(context: int, new: int) -> Any:
    """Return one sequence's step of `new` prompt tokens after `context` cached ones."""
    from bough.runtime.batch import Batch, Row, SampleRequest
    from bough.runtime.protocol import SamplingParams

    none = np.zeros(0, dtype=np.int32)
    pages = np.arange(-(-(context + new) // PAGE_SIZE), dtype=np.int32)
    request = SampleRequest(SamplingParams(temperature=0.0), 0, context + new, none, none, ())
    return Batch((Row(np.full(new, 5, dtype=np.int32), context, pages, request),))


def steps(device: torch.device) -> dict[str, Callable[[Clock], Iterator[Row]]]:
    """Return the sections on whole steps, planning, sampling and copies included, one after the other."""
    if device.type == "cpu":
        shared = [(2, 80, 64)]
        return {"tiny": lambda clock: _steps(Shape("tiny", device, 16), [(2, 20)], shared, (48, 18), clock)}
    alone = [(1, _CONTEXT), (8, _CONTEXT), (64, _CONTEXT)]
    branches = [(16, 8320, 8192), (64, 8320, 8192), (64, 32_896, 32_768)]
    num_pages = 64 * (_CONTEXT // PAGE_SIZE) + 64
    return {
        "8b": lambda clock: _steps(Shape("8b", device, num_pages), alone, branches, (8192, 64), clock),
        "1b": lambda clock: _steps(Shape("1b", device, num_pages), alone[:1], branches[:2], (8192, 64), clock),
    }


def _steps(
    shape: Shape,
    alone: list[tuple[int, int]],
    branches: list[tuple[int, int, int]],
    extend: tuple[int, int],
    clock: Clock,
) -> Iterator[Row]:
    """Time steps as they are served, the next one planned and launched while one runs."""
    bandwidth = copy_bandwidth(shape.device, shape.device.type == "cpu")
    yield {"model": shape.name, **shape.costs.figures()}
    shared, unshared, eager = shape.runner(), shape.runner(share=False), shape.runner(graphs=False)
    # What the goals are about comes first: one row alone, a short extend, branches, graphs.
    first = (*alone[0], 0, [shared, eager])
    others = [(*case, [shared, unshared]) for case in branches]
    others += [(*case, 0, [shared, unshared, eager]) for case in reversed(alone[1:])]

    def row(width: int, context: int, common: int, runner: Any, ms: float) -> Row:
        found: Row = {
            "model": shape.name, "batch": width, "context": context, "shared": common, "new": 1,
            "graphs": runner is not eager, "share": runner is not unshared, "ms": ms,
        }  # fmt: skip
        if runner is shared:
            tokens = common + width * (context - common)
            found["share_of_copy"] = shape.step_bytes(tokens) / ms * 1e3 / bandwidth
            found |= _idle(runner, decode_batch(width, context, common), ms)
        return found

    for number, (width, context, common, runners) in enumerate((first, *others)):
        if clock.is_out:
            yield {"model": shape.name, "batch": width, "context": context, "no": "not run: no time left"}
            continue
        batch = decode_batch(width, context, common)
        ready = []
        for runner in runners:
            reason = _failure(runner, batch)
            if reason is None:
                ready.append(runner)
            else:
                how = f"graphs={runner is not eager} share={runner is not unshared}"
                yield {"model": shape.name, "batch": width, "context": context, "no": f"{how}: {reason}"}
        for runner, ms in zip(ready, _served_ms(ready, batch), strict=True):
            yield row(width, context, common, runner, ms)
        if number == 0 and shared in ready:
            ms = _alone_ms(shared, extend_batch(*extend))
            floor_ms = shape.step_bytes(0) / bandwidth * 1e3
            yield {"model": shape.name, "cached": extend[0], "new": extend[1], "ms": ms, "floors": ms / floor_ms}


def _failure(runner: Any, batch: Any) -> str | None:
    """Compile, capture, and replay once; return what is wrong with that, which costs no other runner its figures."""
    try:
        for _ in range(3):
            runner.execute(batch)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:120]
    return None


def _served_ms(runners: Sequence[Any], batch: Any) -> list[float]:
    """Return the median milliseconds of a step by each runner, in turn: of several in a row, two of them in flight."""
    counts = [_count_for(_alone_ms(runner, batch, repetitions=1)) for runner in runners]
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(1 if not runners or runners[0].device == "cpu" else _REPETITIONS):
        for runner, count, found in zip(runners, counts, times, strict=True):
            found.append(_in_a_row_ms(runner, batch, count))
    return [statistics.median(found) for found in times]


def _count_for(step_ms: float) -> int:
    return max(2, min(12, round(_REPETITION_MS / step_ms)))


def _in_a_row_ms(runner: Any, batch: Any, count: int) -> float:
    """Return the milliseconds of each of `count` steps, whose rows go on from the tokens that the one before draws."""
    from msgspec import structs

    rows = (structs.replace(row, drawn_by=i, token_ids=np.zeros(1, np.int32)) for i, row in enumerate(batch.rows))
    following = type(batch)(tuple(rows))
    running = runner.launch(batch)
    launched = runner.launch(following, running)
    running.result()
    begin = time.perf_counter()
    for _ in range(count):
        running, launched = launched, runner.launch(following, launched)
        running.result()
    seconds = time.perf_counter() - begin
    launched.result()
    return seconds / count * 1e3


def _alone_ms(runner: Any, batch: Any, repetitions: int = 9) -> float:
    """Return the median milliseconds of a step that is waited for."""
    found = []
    for repetition in range(2 + (1 if runner.device == "cpu" else repetitions)):
        begin = time.perf_counter()
        runner.execute(batch)  # ends with a copy back: nothing is left running
        if repetition >= 2:  # the first two compile and capture
            found.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(found)


def _idle(runner: Any, batch: Any, step_ms: float) -> Row:
    """Return the share of a step, as served, in which the device waits: it takes device_ms when the host is ahead."""
    if runner.device == "cpu":
        return {}
    cuda: Any = torch.cuda
    found = []
    for _ in range(5):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(20_000_000)  # some 10 ms, in which the host plans and launches
        begin.record()
        step = runner.launch(batch)
        end.record()
        end.synchronize()
        step.result()
        found.append(begin.elapsed_time(end))
    device_ms = statistics.median(found)
    return {"device_ms": device_ms, "idle": max(0.0, 1 - device_ms / step_ms)}
