"""The report's sections on serving: the paper's eleven workloads, a fork and prompts that share nothing.

Random weights of Llama-3.2-1B's shape, scheduler and cache included but no wire; the same by the continuous batching of
`transformers`. What is not begun before a section's time is over, or not done within a workload's, is told as such.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import torch
import traces
from asks import Program, Trace
from gpu_report import Clock, Row
from gpu_steps import Shape, shape_of
from gpu_tree import SHARE_ALL
from models import VOCAB_SIZE

_POOL_TOKENS: Final = 65_536
_TRACE_S: Final = 6.0  # of one run of one workload by bough; the peer gets twice that
_WARM_UP_S: Final = 12.0  # more for a first run, which compiles and captures
_PEER: Final = "transformers continuous batching"
_CONCURRENCY: Final = 32
# The most telling first, and how many requests: some 2,000 steps in all, of up to 32 programs at once.
_PAPER: Final = (
    (traces.TREE, 120), (traces.JUDGE, 84), (traces.MMLU, 128), (traces.HELLASWAG, 96), (traces.REACT, 96),
    (traces.JSON, 120), (traces.AGENTS, 120), (traces.RAG, 72), (traces.SKELETON, 120), (traces.CHAT, 96),
    (traces.LONG_CHAT, 64),
)  # fmt: skip


def workloads(*, tiny: bool) -> list[Trace]:
    """Return what is served, the most telling first; the paper's texts at half their length. tiny: to try it out."""
    if tiny:
        chat = traces.from_shape(traces.CHAT, 2, 0.02)
        return [traces.fork(2, 32, 4, 2), traces.control(2, 8, 2), traces.from_shape(traces.HELLASWAG, 2, 0.02), chat]
    paper = (traces.from_shape(place, num_requests, 0.5, _CONCURRENCY) for place, num_requests in _PAPER)
    return [traces.fork(32, 1024, 32, 64), traces.control(16, 512, 32), *paper]


def serving(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Serve each workload with steps that overlap, as it comes; the first two also with one step after another.

    A first run warms up; the second is the figure, and begins with an empty cache like the first.
    """
    tiny = device.type == "cpu"
    runner = Shape("tiny" if tiny else "1b", device, 32 if tiny else _POOL_TOKENS // 16).runner()
    if not tiny:
        runner.warm_up()
    ways = [("bough", True), ("bough --no-overlap", False)]
    for number, trace in enumerate(workloads(tiny=tiny)):
        for system, overlap in ways[: 2 if number < 2 else 1]:
            row: Row = {"workload": trace.name, "system": system}
            if clock.is_out:
                yield row | {"no": "not run: no time left"}
                continue
            try:
                for seconds in (_TRACE_S + _WARM_UP_S, _TRACE_S):
                    served = Served(runner, trace, overlap=overlap)
                    served.run(time.monotonic() + (600.0 if tiny else seconds))
                yield row | served.figures()
            except TimeoutError as error:
                yield row | {"no": str(error)}
            except Exception as error:  # it costs no other workload its figures
                traceback.print_exc()
                yield row | {"no": f"{type(error).__name__}: {error}"[:120]}


def agreement(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Tell whether steps that are captured, overlap and share what can be shared give the same tokens as others.

    error: how many answers differ from those of single kernels, one step after another, each branch by itself. In
    float32, where another order of the sums may choose another token of random weights once in some 100,000.
    """
    tiny = device.type == "cpu"
    shape = Shape("tiny" if tiny else "small", device, 32 if tiny else 4096, torch.float32)
    plain = shape.runner(graphs=False, share=False, costs=SHARE_ALL)
    served = shape.runner(costs=SHARE_ALL)
    for trace in workloads(tiny=True)[:1] if tiny else [traces.fork(24, 512, 16, 8), traces.control(12, 300, 24)]:
        found = []
        for runner, overlap in ((plain, False), (served, True)):
            one = Served(runner, trace, overlap=overlap)
            one.run(time.monotonic() + 600.0)
            found.append(one.answers())
            if clock.is_out:
                return
        wrong = sum(a[place] != b[place] for a, b in zip(*found, strict=True) for place in a)
        limit, num_replays = 0.0 if tiny else 1.0, served.graphs.num_replays
        yield {
            "kernel": f"steps of {trace.name}", "dtype": "float32", "error": float(wrong), "limit": limit,
            "right": wrong <= limit and num_replays > 0, "num_replays": num_replays,
        }  # fmt: skip


class Served:
    """One run of a workload, in an empty cache: requests are submitted as those before them have their answers."""

    def __init__(self, runner: Any, trace: Trace, *, overlap: bool) -> None:
        from bough.runtime.cache.prefix_cache import PrefixCache
        from bough.runtime.pipeline import Pipeline
        from bough.runtime.scheduler import Scheduler

        cache = PrefixCache(runner.num_pages, runner.page_size)
        self._scheduler = Scheduler(cache, token_budget=1024, max_running=64)
        self._pipeline = Pipeline(runner, runner if overlap else None)
        self._vocab_size = runner.vocab_size
        self._trace = trace
        self._waiting = list(reversed(trace.programs))
        self._begun: list[_Progress] = []
        self._running: dict[Any, tuple[_Progress, int]] = {}
        self._seconds = 0.0

    def run(self, ends_at: float) -> None:
        """Carry the workload out. Raises TimeoutError if it is not done at `ends_at`, on the monotonic clock."""
        begin = time.perf_counter()
        for _ in range(min(self._trace.concurrency, len(self._waiting))):
            self._begin()
        self._pipeline.fill(self._scheduler)
        while self._pipeline:
            if time.monotonic() >= ends_at:
                self._pipeline.abandon()  # what is in flight must land before the pool is used again
                raise TimeoutError(f"not done: {len(self._running)} requests were left when its time was over")
            step, results = self._pipeline.take()
            if isinstance(results, Exception):
                self._pipeline.abandon()
                raise results
            done = [outcome.sequence for outcome in self._scheduler.commit(step, results) if _is_done(outcome.sequence)]
            for sequence in done:
                self._scheduler.finish(sequence)
                self._answered(sequence)
            self._pipeline.fill(self._scheduler)
        self._seconds = time.perf_counter() - begin
        assert not self._running, "a request was left unfinished"
        assert not self._waiting, "a program was not begun"

    def figures(self) -> Row:
        """Return seconds, and what the scheduler counted."""
        counters = self._scheduler.counters
        assert counters.generated_tokens == self._trace.num_generated(), "tokens were lost"
        return {
            "seconds": self._seconds,
            "tokens_per_s": (counters.generated_tokens + counters.prompt_tokens) / self._seconds,
            "prompt": counters.prompt_tokens, "cached": counters.cached_tokens, "computed": counters.computed_tokens,
            "generated": counters.generated_tokens, "steps": counters.steps,
        }  # fmt: skip

    def answers(self) -> list[dict[int, list[int]]]:
        """Return each program's answers, by the place of the ask."""
        return [progress.answers for progress in self._begun]

    def _begin(self) -> None:
        self._begun.append(_Progress(self._waiting.pop()))
        self._submit(self._begun[-1])

    def _submit(self, progress: _Progress) -> None:
        from bough.runtime.protocol import SamplingParams
        from bough.runtime.sequence import Sequence
        from bough.runtime.trie import TokenTrie

        for place in progress.take_ready():
            ask = progress.program[place]
            prompt = np.array(ask.prompt(progress.answers), dtype=np.int32) % self._vocab_size
            if ask.choices:
                choices = [[token % self._vocab_size for token in choice] for choice in ask.choices]
                sequence = Sequence(prompt, trie=TokenTrie(choices))
            else:
                params = SamplingParams(max_tokens=ask.num_tokens, temperature=0.0, ignore_eos=True)
                sequence = Sequence(prompt, params=params)
            self._running[sequence] = progress, place
            self._scheduler.submit(sequence)

    def _answered(self, sequence: Any) -> None:
        progress, place = self._running.pop(sequence)
        # Of a select no later prompt holds the answer: scores are computed, which is best is not looked at.
        progress.answers[place] = [0] if sequence.params is None else list(sequence.generated)
        self._submit(progress)
        if len(progress.answers) == len(progress.program) and self._waiting:
            self._begin()


class _Progress:
    """A program under way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.answers: dict[int, list[int]] = {}
        self._sent: set[int] = set()

    def take_ready(self) -> list[int]:
        """Return the places of the asks that can be sent now, each once."""
        ready = [
            place
            for place, ask in enumerate(self.program)
            if place not in self._sent and all(before in self.answers for before in ask.after)
        ]
        self._sent.update(ready)
        return ready


def _is_done(sequence: Any) -> bool:
    if sequence.params is None:
        return bool(sequence.num_computed == sequence.goal)
    return bool(len(sequence.generated) == sequence.params.max_tokens)


def peer(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Serve the same by `transformers`, on random weights of the same shape; its manager is made anew for each.

    The first workload is served once before, as a warm-up.
    """
    tiny = device.type == "cpu"
    todo = workloads(tiny=tiny)
    try:
        shape, dtype = shape_of("tiny" if tiny else "1b"), torch.float32 if tiny else torch.bfloat16
        system, network = _continuous(shape, device, dtype)
    except Exception as error:  # not installed, or another version of it
        yield {"system": _PEER, "workload": todo[0].name, "no": f"{type(error).__name__}: {error}"[:120]}
        return
    with suppress(Exception):  # as ours: a first run loads and chooses kernels; if it cannot, the second one says why
        system.run(todo[0], seconds=2 * _TRACE_S)
    for trace in todo:
        row: Row = {"workload": trace.name, "system": _PEER}
        if clock.is_out:
            yield row | {"no": "not run: no time left"}
            continue
        try:
            done = system.run(trace, seconds=2 * _TRACE_S)
            generated, prompt = trace.num_generated(), trace.num_prompt_tokens()
            yield row | {
                "seconds": done.wall_s, "tokens_per_s": (generated + prompt) / done.wall_s, "prompt": prompt,
                "generated": generated, "attention": str(getattr(network.config, "_attn_implementation", "unknown")),
            }  # fmt: skip
        except Exception as error:  # a baseline that does not do this
            yield row | {"no": f"{type(error).__name__}: {error}"[:120]}


def _continuous(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the peer and its network."""
    transformers: Any = importlib.import_module("transformers")
    from baselines import ContinuousBatching

    shape = transformers.LlamaConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, intermediate_size=config.mlp_size,
        vocab_size=max(config.vocab_size, VOCAB_SIZE), tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.context_len,
    )  # fmt: skip
    with device:
        network = transformers.LlamaForCausalLM(shape).to(dtype).eval()
    cuda_graphs = None if device.type == "cuda" else False
    system = ContinuousBatching((torch, network), pool_tokens=_POOL_TOKENS, cuda_graphs=cuda_graphs)
    return system, network
