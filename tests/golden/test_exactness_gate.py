"""The answer never depends on the cache: tokens and log-probabilities are the same bits however they came about.

A real model under the real scheduler, with native attention as it comes and with PyTorch's in exact mode, and with
int8 KV; each case first asserts that what it is about really happened.
Freed pages are filled with NaN, so that a page that is read after it was freed shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TypeAlias

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model

from bough.kernels import native_attention
from bough.kernels.units import CHUNK
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.vector import IntArray

PAGE_SIZE = 8
NUM_PAGES = 160
NUM_TOKENS = 24
PROMPT = random_ids(45, seed=1)
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True)

Draws: TypeAlias = list[tuple[int | None, float | None, tuple[tuple[float, int], ...]]]


@cache
def runner(mode: str) -> Runner:
    """`dtype` with native attention, as it comes; `dtype/torch` in exact mode, where there is no compiler."""
    dtype, *words = mode.split("/")
    load = partial(load_runner, tiny_model("qwen3"), dtype=dtype, page_size=PAGE_SIZE, num_pages=NUM_PAGES)
    load = partial(load, kv_dtype="int8" if "int8" in words else None)
    load = partial(load, weights="int8" if "w8" in words else None)
    return load(attention="torch", exact=True) if "torch" in words else load(attention="native")


class Machine:
    """A runtime without its wire: a fresh cache over the one model."""

    def __init__(self, dtype: str, *, budget: int = 256) -> None:
        self.runner = runner(dtype)
        self.runner.pool.poison(range(NUM_PAGES))
        self.cache = PrefixCache(NUM_PAGES, PAGE_SIZE)
        self.scheduler = Scheduler(self.cache, token_budget=budget, max_running=16)
        self.draws: dict[Sequence, Draws] = {}

    def submit(self, prompt: IntArray, seed: int = 7, num_tokens: int = NUM_TOKENS) -> Sequence:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True)
        sequence = Sequence(prompt, params=params, seed=seed)
        self.draws[sequence] = []
        self.scheduler.submit(sequence)
        return sequence

    def step(self) -> None:
        free = set(np.flatnonzero(self.cache.allocator.holders() == 0).tolist())
        step = self.scheduler.plan()
        if step is None:
            return
        for outcome in self.scheduler.commit(step, self.runner.execute(step.batch)):
            sequence, result = outcome.sequence, outcome.result
            if result.token is not None:
                self.draws[sequence].append((result.token, result.logprob, result.top))
                assert sequence.params is not None
                if len(sequence.generated) == sequence.params.max_tokens:
                    self.scheduler.finish(sequence)
        freed = set(np.flatnonzero(self.cache.allocator.holders() == 0).tolist()) - free
        if freed:
            self.runner.pool.poison(sorted(freed))

    def run(self, between: Callable[[int], None] = lambda step: None) -> None:
        step = 0
        while self.scheduler.has_work:
            self.step()
            between(step)
            step += 1
            assert step < 2000

    def draw(self, prompt: IntArray, **options: int) -> Draws:
        sequence = self.submit(prompt, **options)
        self.run()
        return self.draws[sequence]


@pytest.fixture(
    params=[
        "float32",
        "bfloat16",
        "float32/torch",
        "bfloat16/torch",
        "bfloat16/int8",
        "bfloat16/torch/int8",
        "bfloat16/w8",
    ]
)
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if "torch" not in name and not native_attention.works(4, 2, 32, torch.float32):
        pytest.skip("the compiled attention was not built here")
    return name


@cache
def cold(dtype: str) -> Draws:
    machine = Machine(dtype)
    draws = machine.draw(PROMPT)
    assert machine.scheduler.counters.cached_tokens == 0
    assert len({token for token, _, _ in draws}) > 5
    return draws


def test_warm_equals_cold(dtype: str) -> None:
    machine = Machine(dtype)
    machine.draw(PROMPT, num_tokens=3)
    again = machine.submit(PROMPT)
    machine.run()
    assert again.cached_tokens == len(PROMPT) - 1
    assert machine.draws[again] == cold(dtype)


@pytest.mark.parametrize("budget", [1, 3, 16, 44])
def test_chunked_equals_whole(dtype: str, budget: int) -> None:
    machine = Machine(dtype, budget=budget)
    assert machine.draw(PROMPT) == cold(dtype)
    assert machine.scheduler.counters.steps >= NUM_TOKENS - 1 + len(PROMPT) / budget


def test_forked_equals_its_own_text(dtype: str) -> None:
    machine = Machine(dtype)
    tails = [np.concatenate([PROMPT[:29], random_ids(16, seed=10 + i)]) for i in range(3)]
    forks = [machine.submit(tokens) for tokens in (*tails, PROMPT)]
    machine.run()
    assert sum(fork.cached_tokens >= 29 for fork in forks) >= 3
    assert machine.draws[forks[-1]] == cold(dtype)
    for fork, tokens in zip(forks, tails, strict=False):
        assert machine.draws[fork] == Machine(dtype).draw(tokens)


def test_branches_that_read_their_prefix_together_equal_themselves_alone(dtype: str) -> None:
    trunk = random_ids(2 * CHUNK + 20, seed=3)
    prompts = [np.concatenate([trunk[:cut], random_ids(4, seed=30 + i)]) for i, cut in enumerate((276, 270, 140, 9))]
    machine = Machine(dtype)
    branches = [machine.submit(tokens, seed=i, num_tokens=8) for i, tokens in enumerate(prompts)]
    whole_chunks = CHUNK // PAGE_SIZE
    shared = 0

    def watch(step: int) -> None:
        nonlocal shared
        rows = [s.lease.row.view()[:whole_chunks].tolist() for s in machine.scheduler.running if s.lease is not None]
        shared += len(rows) > 2 and rows[0] == rows[1] == rows[2]

    machine.run(watch)
    assert shared >= 5, "the first chunk is one for three of them"
    for i, (branch, tokens) in enumerate(zip(branches, prompts, strict=True)):
        assert machine.draws[branch] == Machine(dtype).draw(tokens, seed=i, num_tokens=8)


def test_batched_with_strangers_equals_alone(dtype: str) -> None:
    machine = Machine(dtype, budget=40)
    for i in range(8):
        machine.submit(random_ids(5 + 9 * i, seed=20 + i), seed=i, num_tokens=10 + i)
    ours = machine.submit(PROMPT)
    machine.run()
    assert machine.scheduler.counters.steps < sum(10 + i for i in range(8))
    assert machine.draws[ours] == cold(dtype)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("evict", [False, True])
def test_preempted_equals_undisturbed(dtype: str, every: int, evict: bool) -> None:
    machine = Machine(dtype)
    ours = machine.submit(PROMPT)

    def disturb(step: int) -> None:
        if step % every == 0 and ours in machine.scheduler.running:
            machine.scheduler.preempt(ours)
            if evict:  # what was drawn must be computed again, as a prefill
                machine.cache.flush()

    machine.run(disturb)
    assert ours.num_preemptions >= (NUM_TOKENS - 1) // every
    assert (machine.scheduler.counters.recomputed_tokens > len(PROMPT)) == evict
    assert machine.draws[ours] == cold(dtype)


@pytest.mark.parametrize("kept", [1, 10, 23])
def test_rolled_back_equals_never_gone_further(dtype: str, kept: int) -> None:
    machine = Machine(dtype)
    first = cold(dtype)
    machine.draw(np.concatenate([PROMPT, [token for token, _, _ in first[:kept]], [5, 6, 7]]).astype(np.int32), seed=3)
    drawn = [token for token, _, _ in first[:kept]]
    back = machine.submit(np.concatenate([PROMPT, drawn]).astype(np.int32), num_tokens=NUM_TOKENS - kept)
    machine.run()
    assert back.cached_tokens == len(PROMPT) + kept - 1
    assert machine.draws[back] == first[kept:]


@pytest.mark.parametrize("kept", [1, 10, 23])
def test_reopened_in_a_new_runtime_equals_never_interrupted(dtype: str, kept: int) -> None:
    first = cold(dtype)
    drawn = [token for token, _, _ in first[:kept]]
    machine = Machine(dtype)
    reopened = machine.submit(np.concatenate([PROMPT, drawn]).astype(np.int32), num_tokens=NUM_TOKENS - kept)
    machine.run()
    assert reopened.cached_tokens == 0
    assert machine.draws[reopened] == first[kept:]
