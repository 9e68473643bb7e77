"""The report's sections on whole steps: decode of random-weight models, graphs on and off, and a serving workload."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from gpu_kernels import PAGE_SIZE, copy_bandwidth
from gpu_report import Clock, Row

from bough.kernels.attention import choose_attention
from bough.kernels.triton_rows import TritonRows

_CONTEXT = 1024
_PEER = "transformers generate_batch"


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
        return torch.randn(shape, dtype=self.dtype, device=self._device) * 0.02


def shape_of(name: str) -> Any:
    """Return the configuration of Llama-3.2-1B, Llama-3.1-8B, or of something tiny."""
    from bough.runtime.models.config import ModelConfig, RopeConfig

    hidden, layers, heads, kv_heads, dim, mlp, vocab = {
        "1b": (2048, 16, 32, 8, 64, 8192, 128_256),
        "8b": (4096, 32, 32, 8, 128, 14_336, 128_256),
        "tiny": (64, 1, 4, 2, 16, 96, 320),
    }[name]
    return ModelConfig(
        "LlamaForCausalLM", hidden, layers, heads, kv_heads, dim, mlp, vocab, 1e-5, RopeConfig(theta=500_000.0),
        name != "8b", False, False, False, False, 40_960 if name != "tiny" else 256, (1,), 0, "bfloat16",
    )  # fmt: skip


class Shape:
    """A model of random weights and a pool of random keys, and runners on them."""

    def __init__(self, name: str, device: torch.device, num_pages: int) -> None:
        from bough.runtime.cache.kv_pool import KVPool
        from bough.runtime.models.llama import DeviceParts, Llama
        from bough.runtime.models.weights import Weights

        self.name, self.device = name, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.config = config = shape_of(name)
        with torch.inference_mode():
            parts = DeviceParts(TritonRows(8192, device), None)
            self.model = Llama(config, cast(Weights, RandomWeights(config, self.dtype, device)), parts, device)
            heads = (config.num_kv_heads, config.head_dim)
            self.pool = KVPool(config.num_layers, num_pages, PAGE_SIZE, *heads, self.dtype, device)
            for pages in (*self.pool.k, *self.pool.v):
                pages.normal_()

    def runner(self, *, graphs: bool = True, share: bool = True) -> Any:
        from bough.runtime.cuda.runner import CudaRunner

        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        attention = choose_attention(*heads, self.dtype, self.device, "triton", share=share)
        return CudaRunner(self.model, self.pool, self.dtype, self.device, attention=attention, cuda_graphs=graphs)

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
    bandwidth = copy_bandwidth(shape.device, shape.device.type == "cpu")
    shared, unshared, eager = shape.runner(), shape.runner(share=False), shape.runner(graphs=False)
    # What the goals are about comes first: one row alone, branches, graphs.
    cases = [(*alone[0], 0, [shared, eager]), *((*case, [shared, unshared]) for case in branches)]
    cases += [(*case, 0, [shared, unshared, eager]) for case in reversed(alone[1:])]
    for width, context, common, runners in cases:
        if clock.is_out:
            return
        times = _step_ms(runners, decode_batch(width, context, common))
        for runner, ms in zip(runners, times, strict=True):
            tokens = common + width * (context - common)
            row: Row = {
                "model": shape.name, "batch": width, "context": context, "shared": common, "new": 1,
                "graphs": runner is not eager, "share": runner is not unshared, "ms": ms,
            }  # fmt: skip
            if runner is shared:
                row["share_of_copy"] = shape.step_bytes(tokens) / ms * 1e3 / bandwidth
                row |= _idle(runner, decode_batch(width, context, common), ms)
            yield row
    (ms,) = _step_ms([shared], extend_batch(*extend))
    floor_ms = shape.step_bytes(0) / bandwidth * 1e3
    yield {"model": shape.name, "cached": extend[0], "new": extend[1], "ms": ms, "floors": ms / floor_ms}


def _step_ms(runners: Sequence[Any], batch: Any) -> list[float]:
    """Return the median milliseconds of a step by each runner, in turn."""
    times: list[list[float]] = [[] for _ in runners]
    for repetition in range(4 if runners[0].device == "cpu" else 18):
        for runner, found in zip(runners, times, strict=True):
            begin = time.perf_counter()
            runner.execute(batch)  # ends with a copy back: nothing is left running
            if repetition >= 3:  # the first two compile and capture
                found.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(found) for found in times]


def _idle(runner: Any, batch: Any, step_ms: float) -> Row:
    """Return the share of a step in which the device waits, from its time where the host has run ahead of it."""
    if runner.device == "cpu":
        return {}
    cuda: Any = torch.cuda
    found = []
    for _ in range(5):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda._sleep(20_000_000)  # some 10 ms, in which the host plans and launches
        begin.record()
        runner.execute(batch)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    device_ms = statistics.median(found)
    return {"device_ms": device_ms, "idle": max(0.0, 1 - device_ms / step_ms)}


# name, requests, tokens that all begin with, tokens of their own, tokens generated
_WORKLOADS = (("fork", 32, 1024, 32, 64), ("independent", 32, 0, 512, 64))
_TINY_WORKLOADS = (("fork", 2, 32, 4, 2),)


def serving(device: torch.device, with_peers: bool, clock: Clock) -> Iterator[Row]:
    """Serve prompts, scheduler and cache included but no wire; and the same by `transformers` continuous batching.

    Both have random weights of the same shape, the same prompts and the same number of tokens, greedy. A first run
    warms up; the second is the figure. bough begins each with an empty cache, and serves with steps that overlap, as
    it comes, and one after another.
    """
    workloads = _TINY_WORKLOADS if device.type == "cpu" else _WORKLOADS
    most = max(width * -(-(prefix + own + new) // PAGE_SIZE) for _, width, prefix, own, new in workloads)
    shape = Shape("tiny" if device.type == "cpu" else "1b", device, most)
    made = []
    for name, width, prefix, own, num_tokens in workloads:
        ids = partial(np.random.default_rng(0).integers, 2, shape.config.vocab_size, dtype=np.int32)
        shared = ids(prefix)
        made.append((name, [np.concatenate([shared, ids(own)]) for _ in range(width)], num_tokens))
    seconds = 0.0
    for name, prompts, num_tokens in made:
        runner = shape.runner()
        for system, overlap in (("bough", True), ("bough --no-overlap", False)):
            for _ in range(2):
                begin = time.perf_counter()
                found = serve(runner, prompts, num_tokens, overlap=overlap)
                seconds = time.perf_counter() - begin
            speed = found["generated"] / seconds
            yield {"workload": name, "system": system, "seconds": seconds, "tokens_per_s": speed, **found}
    del runner
    for name, prompts, num_tokens in made if with_peers else ():
        if clock.is_out:
            return
        try:
            texts = [prompt.tolist() for prompt in prompts]
            yield {"workload": name, **_continuous(shape.config, device, shape.dtype, texts, num_tokens)}
        except Exception as error:  # a baseline that is not here or does not run here
            yield {"workload": name, "system": _PEER, "no": f"{type(error).__name__}: {error}"[:120]}
            return


def serve(runner: Any, prompts: Sequence[Any], num_tokens: int, *, overlap: bool) -> Row:
    """Complete all prompts by `num_tokens` each; return what the scheduler counted."""
    from bough.runtime.cache.prefix_cache import PrefixCache
    from bough.runtime.pipeline import Pipeline
    from bough.runtime.protocol import SamplingParams
    from bough.runtime.scheduler import Scheduler
    from bough.runtime.sequence import Sequence as Running

    scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=1024, max_running=64)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for prompt in prompts:
        scheduler.submit(Running(prompt, params=params))
    pipeline = Pipeline(runner, runner if overlap else None)
    pipeline.fill(scheduler)
    while pipeline:
        step, results = pipeline.take()
        if isinstance(results, Exception):
            raise results
        for outcome in scheduler.commit(step, results):
            if len(outcome.sequence.generated) == num_tokens:
                scheduler.finish(outcome.sequence)
        pipeline.fill(scheduler)
    counters = scheduler.counters
    assert counters.generated_tokens == len(prompts) * num_tokens, "a sequence was left unfinished"
    return {
        "generated": counters.generated_tokens,
        "cached": counters.cached_tokens,
        "computed": counters.computed_tokens,
        "steps": counters.steps,
    }


def _continuous(
    config: Any, device: torch.device, dtype: torch.dtype, prompts: list[list[int]], num_tokens: int
) -> Row:
    """Complete the same prompts by `transformers`, on random weights of the same shape."""
    transformers: Any = importlib.import_module("transformers")
    shape = transformers.LlamaConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, intermediate_size=config.mlp_size,
        vocab_size=config.vocab_size, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.context_len,
    )  # fmt: skip
    with device:
        network = transformers.LlamaForCausalLM(shape).to(dtype).eval()
    options = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1)
    for _ in range(2):
        begin = time.perf_counter()
        answers = network.generate_batch(inputs=prompts, generation_config=options)
        seconds = time.perf_counter() - begin
    generated = sum(len(answer.generated_tokens) for answer in answers.values())
    if generated != len(prompts) * num_tokens:
        raise RuntimeError(f"{generated} tokens instead of {len(prompts) * num_tokens}")
    return {"system": _PEER, "seconds": seconds, "tokens_per_s": generated / seconds, "generated": generated}
