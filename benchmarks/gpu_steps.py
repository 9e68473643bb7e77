"""The report's sections on whole steps: decode of random-weight models, graphs on and off, and a serving workload."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from gpu_kernels import PAGE_SIZE, Parts, copy_bandwidth
from gpu_report import Clock, Row

from bough.kernels.attention import choose_attention
from bough.kernels.triton_rows import TritonRows

_CONTEXT = 1024
_PEER = "transformers generate_batch"


def parts(device: torch.device, with_peers: bool) -> Parts:
    """Return the sections: name -> (seconds, what yields rows)."""
    tiny = device.type == "cpu"
    return {
        "steps": (110.0, lambda clock: steps(device, tiny, clock)),
        "serving": (80.0, lambda clock: serving(device, tiny, with_peers, clock)),
    }


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


def runner_of(config: Any, device: torch.device, dtype: torch.dtype, num_pages: int, graphs: bool, model: Any) -> Any:
    """Return a runner on random weights, and share them with `model` if there is one."""
    from bough.runtime.cache.kv_pool import KVPool
    from bough.runtime.cuda.runner import CudaRunner
    from bough.runtime.models.llama import DeviceParts, Llama
    from bough.runtime.models.weights import Weights

    if model is None:
        rows = DeviceParts(TritonRows(8192, device), None)
        model = Llama(config, cast(Weights, RandomWeights(config, dtype, device)), rows, device)
    attention = choose_attention(config.num_heads, config.num_kv_heads, config.head_dim, dtype, device, "triton")
    pool = KVPool(config.num_layers, num_pages, PAGE_SIZE, config.num_kv_heads, config.head_dim, dtype, device)
    for pages in (*pool.k, *pool.v):
        pages.normal_()
    return CudaRunner(model, pool, dtype, device, attention=attention, cuda_graphs=graphs)


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


def steps(device: torch.device, tiny: bool, clock: Clock) -> Iterator[Row]:
    """Time whole decode steps, planning, sampling and the copies included, as the runtime's loop runs them."""
    from bough.runtime.cuda.memory import weight_bytes

    dtype = torch.float32 if tiny else torch.bfloat16
    bandwidth = copy_bandwidth(device, tiny)
    for name in ("tiny",) if tiny else ("8b", "1b"):
        config, model = shape_of(name), None
        cases = [(2, 20, 0)] if tiny else [(1, _CONTEXT, 0), (8, _CONTEXT, 0), (64, _CONTEXT, 0), (64, 8320, 8192)]
        for graphs in (True, False):
            num_pages = max(w * (c - s) // PAGE_SIZE + c // PAGE_SIZE + w + 1 for w, c, s in cases)
            runner = runner_of(config, device, dtype, num_pages, graphs, model)
            model = runner.model
            for width, context, shared in cases:
                if clock.is_out:
                    return
                ms = _step_ms(runner, decode_batch(width, context, shared), 3 if tiny else 20)
                token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
                num_bytes = weight_bytes(config, dtype.itemsize) + token * (shared + width * (context - shared))
                yield {
                    "model": name, "batch": width, "context": context, "shared": shared, "graphs": graphs, "ms": ms,
                    "share_of_copy": num_bytes / ms * 1e3 / bandwidth,
                }  # fmt: skip
            del runner


def _step_ms(runner: Any, batch: Any, repetitions: int) -> float:
    times = []
    for _ in range(repetitions + 3):
        begin = time.perf_counter()
        runner.execute(batch)  # ends with a copy back: nothing is left running
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[3:])


def serving(device: torch.device, tiny: bool, with_peers: bool, clock: Clock) -> Iterator[Row]:
    """Serve one fork, scheduler and cache included but no wire; and its prompts by `transformers` continuous batching.

    Both have random weights of the same shape, the same prompts and the same number of tokens, greedy. A first run
    warms up; the second is the figure. bough begins both with an empty cache.
    """
    dtype = torch.float32 if tiny else torch.bfloat16
    config = shape_of("tiny" if tiny else "1b")
    width, prefix, own, num_tokens = (2, 32, 4, 2) if tiny else (32, 1024, 32, 64)
    ids = partial(np.random.default_rng(0).integers, 2, config.vocab_size, dtype=np.int32)
    shared = ids(prefix)
    prompts = [np.concatenate([shared, ids(own)]) for _ in range(width)]
    num_pages = width * -(-(prefix + own + num_tokens) // PAGE_SIZE)
    runner = runner_of(config, device, dtype, num_pages, True, None)
    for _ in range(2):
        begin = time.perf_counter()
        found = serve(runner, prompts, num_tokens)
        seconds = time.perf_counter() - begin
    yield {"system": "bough", "seconds": seconds, **found}
    del runner
    if clock.is_out or not with_peers:
        return
    try:
        yield _continuous(config, device, dtype, [prompt.tolist() for prompt in prompts], num_tokens)
    except Exception as error:  # a baseline that is not here or does not run here
        yield {"system": _PEER, "no": f"{type(error).__name__}: {error}"[:120]}


def serve(runner: Any, prompts: Sequence[Any], num_tokens: int) -> Row:
    """Complete all prompts by `num_tokens` each; return what the scheduler counted."""
    from bough.runtime.cache.prefix_cache import PrefixCache
    from bough.runtime.protocol import SamplingParams
    from bough.runtime.scheduler import Scheduler
    from bough.runtime.sequence import Sequence as Running

    scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=1024, max_running=64)
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for prompt in prompts:
        scheduler.submit(Running(prompt, params=params))
    while (step := scheduler.plan()) is not None:
        for outcome in scheduler.commit(step, runner.execute(step.batch)):
            if len(outcome.sequence.generated) == num_tokens:
                scheduler.finish(outcome.sequence)
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
    return {"system": _PEER, "seconds": seconds, "generated": generated}
