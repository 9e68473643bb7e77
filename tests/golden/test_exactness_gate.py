"""The answer never depends on the cache: tokens and log-probabilities are the same bits however they came about.

A real model under the real scheduler, with native attention as it comes and with PyTorch's in exact mode, and with
int8 KV; each case first asserts that what it is about really happened.
Freed pages are filled with NaN, so that a page that is read after it was freed shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import torch
from fakes import LateRunner
from tiny_models import random_ids, tiny_model

from bough.kernels import native_attention
from bough.kernels.units import CHUNK
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.drafts import DraftCosts
from bough.runtime.lifecycle import PageState
from bough.runtime.pipeline import Pipeline
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.vector import IntArray

PAGE_SIZE = 8
NUM_PAGES = 160
NUM_TOKENS = 24
PROMPT = random_ids(45, seed=1)
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True)

Draws: TypeAlias = list[tuple[int | None, tuple[float | None, float | None, tuple[tuple[float, int], ...]]]]


@cache
def runner(mode: str) -> Runner:
    """`dtype` with native attention, as it comes; `dtype/torch` in exact mode, where there is no compiler."""
    dtype, *words = mode.split("/")
    load = partial(load_runner, tiny_model("qwen3"), dtype=dtype, page_size=PAGE_SIZE, num_pages=NUM_PAGES)
    load = partial(load, kv_dtype="int8" if "int8" in words else None)
    load = partial(load, weights="int8" if "w8" in words else None)
    return load(attention="torch", exact=True) if "torch" in words else load(attention="native")


class Machine:
    """A runtime without its wire: a fresh cache over the one model. overlap: see `FakeStep`."""

    def __init__(
        self, dtype: str, *, budget: int = 256, speculator: Speculator | None = None, overlap: bool = False
    ) -> None:
        self.runner = runner(dtype)
        self.late = LateRunner(self.runner.execute)
        self.pipeline = Pipeline(self.runner, self.late if overlap else None)
        self.runner.pool.poison(range(NUM_PAGES))
        self.cache = PrefixCache(NUM_PAGES, PAGE_SIZE)
        self.scheduler = Scheduler(self.cache, token_budget=budget, max_running=16, speculator=speculator)
        self.draws: dict[Sequence, Draws] = {}

    def submit(
        self, prompt: IntArray, seed: int = 7, num_tokens: int = NUM_TOKENS, params: SamplingParams = PARAMS
    ) -> Sequence:
        params = msgspec.structs.replace(params, max_tokens=num_tokens)
        early = params.stop_token_ids if params.min_tokens else ()
        sequence = Sequence(prompt, params=params, seed=seed, forbidden_early=early)
        self.draws[sequence] = []
        self.scheduler.submit(sequence)
        return sequence

    def step(self) -> None:
        free = self._free()
        self.pipeline.fill(self.scheduler)
        if not self.pipeline:
            return
        step, results = self.pipeline.take()
        if isinstance(results, Exception):
            raise results
        for outcome in self.scheduler.commit(step, results):
            sequence, result = outcome.sequence, outcome.result
            if result.token is not None:
                self.draws[sequence] += [(r.token, (r.logprob, r.entropy, r.top)) for r in (result, *result.further)]
                assert sequence.params is not None
                if len(sequence.generated) == sequence.params.max_tokens:
                    self.scheduler.finish(sequence)
        freed = self._free() - free
        if freed:
            self.runner.pool.poison(sorted(freed))

    def _free(self) -> set[int]:
        allocator = self.cache.allocator
        unheld = np.flatnonzero(allocator.holders() == 0).tolist()
        return {page for page in unheld if allocator.state(page) is PageState.FREE}

    def run(self, between: Callable[[int], None] = lambda step: None) -> None:
        step = 0
        while self.scheduler.has_work or self.pipeline:
            self.step()
            between(step)
            step += 1
            assert step < 2000

    def draw(self, prompt: IntArray, **options: Any) -> Draws:
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
    assert len({token for token, _ in draws}) > 5
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
    machine.draw(np.concatenate([PROMPT, [token for token, _ in first[:kept]], [5, 6, 7]]).astype(np.int32), seed=3)
    drawn = [token for token, _ in first[:kept]]
    back = machine.submit(np.concatenate([PROMPT, drawn]).astype(np.int32), num_tokens=NUM_TOKENS - kept)
    machine.run()
    assert back.cached_tokens == len(PROMPT) + kept - 1
    assert machine.draws[back] == first[kept:]


@pytest.mark.parametrize("kept", [1, 10, 23])
def test_reopened_in_a_new_runtime_equals_never_interrupted(dtype: str, kept: int) -> None:
    first = cold(dtype)
    drawn = [token for token, _ in first[:kept]]
    machine = Machine(dtype)
    reopened = machine.submit(np.concatenate([PROMPT, drawn]).astype(np.int32), num_tokens=NUM_TOKENS - kept)
    machine.run()
    assert reopened.cached_tokens == 0
    assert machine.draws[reopened] == first[kept:]


@pytest.mark.parametrize("budget", [7, 256])
def test_overlapped_equals_one_after_another(dtype: str, budget: int) -> None:
    """Sequences that come, end and are preempted while the next step is launched already."""
    machine = Machine(dtype, overlap=True, budget=budget)
    for i in range(5):
        machine.submit(random_ids(5 + 9 * i, seed=20 + i), seed=i, num_tokens=6 + 2 * i)
    ours = machine.submit(PROMPT)

    def disturb(step: int) -> None:
        if step % 7 == 6 and ours in machine.scheduler.running:
            machine.scheduler.preempt(ours)
        if step == 12:
            machine.submit(PROMPT[:30], seed=9, num_tokens=4)

    machine.run(disturb)
    assert ours.num_preemptions > 0
    assert machine.late.num_ahead > machine.late.num_launched / 2
    assert machine.draws[ours] == cold(dtype)
    machine.scheduler.check_invariants()
    machine.cache.flush()
    assert machine.cache.allocator.num_free == NUM_PAGES


class Prophet(Speculator):
    """Knows what will be drawn after the prompt, but every `wrong`-th token it says is another."""

    def __init__(self, prompt: IntArray, draws: Draws, wrong: int) -> None:
        super().__init__(context_len=1000, costs=DraftCosts(row=0.0, draft=0.0, look=0.0))  # it drafts in every step
        self.prompt = prompt
        self.drawn = [token for token, _ in draws if token is not None]
        self.wrong = wrong

    def draft(self, namespace: object, tokens: IntArray, cached: IntArray, count: int) -> IntArray:
        if tokens[: len(self.prompt)].tolist() != self.prompt.tolist():
            return cached[:0]
        begin = len(tokens) - len(self.prompt)
        said = enumerate(self.drawn[begin : begin + count], begin)
        return np.array([token ^ (i % self.wrong == self.wrong - 1) for i, token in said], dtype=np.int32)


SPECULATED = [
    PARAMS,
    SamplingParams(temperature=0.0, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=40, min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.3, logprobs=0),
    SamplingParams(temperature=0.9, min_tokens=17, stop_token_ids=tuple(range(0, 100, 2)), ignore_eos=True, logprobs=1),
]


@pytest.mark.parametrize("params", SPECULATED, ids=["sampled", "greedy", "penalised", "min_tokens"])
@pytest.mark.parametrize("wrong", [2, 5, 99])
def test_speculated_equals_plain(dtype: str, params: SamplingParams, wrong: int) -> None:
    plain = Machine(dtype).draw(PROMPT, params=params)
    machine = Machine(dtype, speculator=Prophet(PROMPT, plain, wrong))
    strangers = [machine.submit(random_ids(9 + 20 * i, seed=60 + i), seed=i, num_tokens=12) for i in range(3)]
    ours = machine.submit(PROMPT, params=params)
    machine.run()
    counters = machine.scheduler.counters
    assert counters.accepted_tokens > 0
    assert (counters.accepted_tokens < counters.drafted_tokens) == (wrong != 99)
    assert machine.draws[ours] == plain
    assert all(len(machine.draws[stranger]) == 12 for stranger in strangers)
    machine.scheduler.check_invariants()
    machine.cache.flush()
    assert machine.cache.allocator.num_free == NUM_PAGES


def test_what_was_speculated_serves_others_like_what_was_drawn(dtype: str) -> None:
    machine = Machine(dtype, speculator=Prophet(PROMPT, cold(dtype), wrong=4))
    machine.draw(PROMPT)
    assert machine.scheduler.counters.accepted_tokens < machine.scheduler.counters.drafted_tokens
    drawn = [token for token, _ in cold(dtype)[:19]]
    after = machine.submit(np.concatenate([PROMPT, drawn]).astype(np.int32), num_tokens=NUM_TOKENS - 19)
    machine.run()
    assert after.cached_tokens == len(PROMPT) + 18
    assert machine.draws[after] == cold(dtype)[19:]


@pytest.mark.parametrize("every", [2, 3])
def test_preempted_while_speculating_equals_undisturbed(dtype: str, every: int) -> None:
    machine = Machine(dtype, speculator=Prophet(PROMPT, cold(dtype), wrong=3))
    ours = machine.submit(PROMPT)

    def disturb(step: int) -> None:
        if step % every == 0 and ours in machine.scheduler.running:
            machine.scheduler.preempt(ours)
            machine.cache.flush()

    machine.run(disturb)
    assert ours.num_preemptions > 2
    assert 0 < machine.scheduler.counters.accepted_tokens < machine.scheduler.counters.drafted_tokens
    assert machine.draws[ours] == cold(dtype)


def test_the_same_again_is_drafted_from_the_tree(dtype: str) -> None:
    machine = Machine(dtype, speculator=Speculator(1000))
    assert machine.draw(PROMPT) == cold(dtype)
    steps = machine.scheduler.counters.steps
    assert machine.draw(PROMPT) == cold(dtype)
    assert machine.scheduler.counters.steps - steps < NUM_TOKENS // 3
