"""The scheduler on a fake runner: the same tokens under every schedule, budgets kept, nobody starves or leaks."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeRunner, logprob, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.lifecycle import Status
from bough.runtime.protocol import RequestError, SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.trie import TokenTrie
from bough.runtime.vector import IntArray, common_prefix


class Bench:
    """A scheduler with a fake runner and the engine's smallest possible stand-in."""

    def __init__(
        self,
        *,
        pages: int = 64,
        page_size: int = 4,
        budget: int = 16,
        max_running: int = 8,
        policy: str = "lpm",
        cache: bool = True,
        usual_len: float = 256.0,
        speculate: bool = False,
    ) -> None:
        self.cache = PrefixCache(pages, page_size, enabled=cache)
        self.runner = FakeRunner(pages, page_size)
        self.scheduler = Scheduler(
            self.cache,
            token_budget=budget,
            max_running=max_running,
            policy=policy,
            usual_len=usual_len,
            speculator=Speculator(10_000) if speculate else None,
        )
        self.scores: dict[Sequence, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
        self.exhausted: list[Sequence] = []

    def generate(self, prompt: list[int], num_tokens: int, **options: object) -> Sequence:
        sequence = Sequence(
            np.array(prompt, dtype=np.int32),
            params=SamplingParams(max_tokens=num_tokens),
            **options,  # type: ignore[arg-type]
        )
        self.scheduler.submit(sequence)
        return sequence

    def score(self, context: list[int], ids: list[int]) -> Sequence:
        return self.score_all(context, [ids])

    def score_all(self, context: list[int], choices: list[list[int]]) -> Sequence:
        trie = TokenTrie(choices)
        sequence = Sequence(np.array(context, dtype=np.int32), trie=trie)
        self.scores[sequence] = np.full(trie.num_nodes, np.nan)
        self.scheduler.submit(sequence)
        return sequence

    def step(self) -> bool:
        step = self.scheduler.plan()
        for sequence in self.scheduler.take_exhausted():
            self.exhausted.append(sequence)
            self.scheduler.finish(sequence)
        if step is None:
            return False
        for outcome in self.scheduler.commit(step, self.runner.execute(step.batch)):
            sequence = outcome.sequence
            if sequence.params is None:
                if outcome.result.score_logprobs is not None:
                    scores = outcome.result.score_logprobs
                    self.scores[sequence][sequence.edges_taken(len(scores))] = scores
                is_done = sequence.num_computed == sequence.goal
            else:
                is_done = len(sequence.generated) == sequence.params.max_tokens
            if is_done:
                self.scheduler.finish(sequence)
        self.scheduler.check_invariants()
        for sequence in self.scheduler.running:
            assert sequence.lease is not None
            pages = self.cache.num_pages_for(sequence.num_slots)
            assert len(sequence.lease.row) <= pages, "a row keeps pages that its tokens do not need"
        return True

    def run(self, limit: int = 2000) -> int:
        for steps in range(limit):
            if not self.scheduler.has_work:
                return steps
            self.step()
        raise AssertionError(f"not done after {limit} steps")


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids, 100))
    return ids[len(prompt) :]


PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    work=st.lists(st.tuples(PROMPTS, st.integers(1, 9)), min_size=1, max_size=8),
    page_size=st.sampled_from([1, 2, 3, 16]),
    budget=st.integers(1, 20),
    max_running=st.integers(1, 8),
    spare=st.integers(0, 12),
    policy=st.sampled_from(["lpm", "fcfs"]),
    cache=st.booleans(),
    speculate=st.booleans(),
)
def test_every_schedule_gives_the_same_tokens_and_returns_every_page(
    work: list[tuple[list[int], int]],
    page_size: int,
    budget: int,
    max_running: int,
    spare: int,
    policy: str,
    cache: bool,
    speculate: bool,
) -> None:
    largest = max(len(prompt) + num_tokens for prompt, num_tokens in work)
    pages = -(-largest // page_size) + spare  # the smallest pool that can serve the largest, or a little more
    bench = Bench(
        pages=pages,
        page_size=page_size,
        budget=budget,
        max_running=max_running,
        policy=policy,
        cache=cache,
        speculate=speculate,
    )
    sequences = [bench.generate(prompt, num_tokens) for prompt, num_tokens in work]
    bench.run()
    assert not bench.exhausted
    for sequence, (prompt, num_tokens) in zip(sequences, work, strict=True):
        assert sequence.generated.tolist() == expected(prompt, num_tokens)
    counters = bench.scheduler.counters
    assert counters.prompt_tokens == counters.cached_tokens + counters.computed_tokens
    bench.cache.flush()
    assert bench.cache.allocator.num_free == pages


def test_no_more_run_at_once_than_may() -> None:
    bench = Bench(max_running=2)
    for i in range(5):
        bench.generate([10 * i + 1], 3)
    most = 0
    while bench.step():
        most = max(most, len(bench.scheduler.running))
    assert most == 2


def test_what_was_preempted_takes_its_old_place_again() -> None:
    bench = Bench()
    first, second = bench.generate([1, 2], 9), bench.generate([3, 4], 9)
    bench.step()
    bench.scheduler.preempt(first)
    assert bench.scheduler.running == [second]
    bench.step()
    assert bench.scheduler.running == [first, second], "the youngest is to be preempted next, not the one that just was"


def test_what_was_generated_before_comes_in_fewer_steps() -> None:
    bench = Bench(budget=64, speculate=True)
    prompt = [1, 2, 3, 4, 5]
    bench.generate(prompt, 20)
    assert bench.run() == 20
    again = bench.generate(prompt, 20)
    assert bench.run() <= 6
    assert again.generated.tolist() == expected(prompt, 20)
    counters = bench.scheduler.counters
    assert again.pace.accepted == counters.accepted_tokens > 12
    assert counters.generated_tokens == 40


def test_a_draft_takes_no_page_from_anyone() -> None:
    bench = Bench(pages=9, page_size=2, budget=64, speculate=True)
    bench.generate([1, 1, 1], 6)
    bench.run()
    held = bench.generate([2] * 9, 5)
    again = bench.generate([1, 1, 1], 6)
    bench.run()
    assert again.generated.tolist() == expected([1, 1, 1], 6)
    assert held.generated.tolist() == expected([2] * 9, 5)
    assert bench.scheduler.counters.preemptions == 0


@pytest.mark.parametrize("has_pages", [True, False])
def test_a_draft_takes_pages_that_are_free_and_evicts_nothing(has_pages: bool) -> None:
    bench = Bench(page_size=2, budget=64, speculate=True)
    prompt = [1, 2, 3, 4, 5]
    bench.generate(prompt, 12)
    bench.run()
    bench.generate(prompt, 12)
    bench.step()
    if not has_pages:
        bench.cache.allocator.allocate(bench.cache.allocator.num_free)
    step = bench.scheduler.plan()
    assert step is not None
    assert [row.draft > 0 for row in step.batch.rows] == [has_pages]
    assert bench.cache.num_evictions == 0, "what is cached is worth more than a guess"


class Liar(Speculator):
    """Drafts what is never drawn."""

    def draft(self, namespace: object, tokens: IntArray, cached: IntArray, count: int) -> IntArray:
        return np.full(count, 100, dtype=np.int32)


def test_a_draft_that_does_not_come_true_leaves_no_token_and_no_page() -> None:
    bench = Bench(pages=128, page_size=1, budget=64)
    bench.scheduler = Scheduler(bench.cache, token_budget=64, max_running=4, speculator=Liar(10_000))
    sequence = bench.generate([1, 2, 3], 90)
    bench.run()  # every step looks at the pages of the row
    assert sequence.generated.tolist() == expected([1, 2, 3], 90)
    assert bench.scheduler.counters.drafted_tokens > 2
    assert bench.scheduler.counters.accepted_tokens == 0


def test_a_second_identical_prompt_computes_only_its_last_token() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 4, 5, 6, 7]
    bench.generate(prompt, 2)
    bench.run()
    again = bench.generate(prompt, 2)
    bench.run()
    assert (again.cached_tokens, again.computed_tokens) == (6, 1)


def test_sixty_four_forks_of_a_cold_prefix_prefill_it_once() -> None:
    bench = Bench(pages=400, budget=64, max_running=64)
    prefix = list(range(1, 51))
    sequences = [bench.generate([*prefix, 60 + i], 1) for i in range(64)]
    bench.run()
    assert sum(s.computed_tokens for s in sequences) == len(prefix) + 64
    assert bench.runner.num_computed == len(prefix) + 64


@settings(max_examples=200, deadline=None)
@given(cached=PROMPTS, first=PROMPTS, second=PROMPTS, shared=PROMPTS)
def test_a_prompt_waits_exactly_for_a_prefill_that_computes_a_page_more_of_it_than_is_cached(
    cached: list[int], first: list[int], second: list[int], shared: list[int]
) -> None:
    bench = Bench(pages=32, page_size=4, budget=64, policy="fcfs", usual_len=1.0)
    bench.generate(cached, 1)
    bench.run()
    bench.generate(shared + first, 1)
    later = bench.generate(shared + second, 1)
    wanted = (shared + second)[:-1]
    matched = bench.cache.matched_len(None, np.array(wanted, dtype=np.int32))
    bench.scheduler.plan()
    comes = common_prefix(np.array(shared + first, dtype=np.int32), np.array(wanted, dtype=np.int32))
    assert (later.status is Status.WAITING) == (comes - matched >= 4)


def test_without_a_radix_cache_nothing_is_shared() -> None:
    bench = Bench(cache=False, pages=100)
    for _ in range(2):
        bench.generate([1, 2, 3, 4, 5], 1)
        bench.run()
    assert bench.scheduler.counters.cached_tokens == 0
    assert bench.cache.allocator.num_free == 100


def test_namespaces_share_nothing() -> None:
    bench = Bench()
    for namespace in ("a", "b", "a"):
        last = bench.generate([1, 2, 3, 4, 5], 1, namespace=namespace)
        bench.run()
    assert bench.scheduler.counters.cached_tokens == last.cached_tokens == 4


def test_a_step_never_computes_more_than_the_token_budget() -> None:
    bench = Bench(budget=7, pages=200)
    for i in range(6):
        bench.generate([10 + i] * 20, 5)
    bench.run()
    assert max(sum(len(row.token_ids) for row in batch.rows) for batch in bench.runner.batches) == 7


def test_decodes_go_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    bench = Bench(budget=8, pages=200)
    short = bench.generate([1, 2], 30)
    bench.step()
    bench.generate([5] * 100, 1)
    for _ in range(10):
        before = len(short.generated)
        bench.step()
        assert len(short.generated) == before + 1


def test_no_plan_is_empty() -> None:
    bench = Bench()
    assert bench.scheduler.plan() is None
    bench.generate([1, 2, 3], 1)
    bench.run()
    assert all(batch.rows for batch in bench.runner.batches)


def test_when_pages_run_out_the_newest_is_preempted_and_loses_no_work() -> None:
    bench = Bench(pages=10, page_size=2, budget=32, usual_len=1.0)  # expecting short texts, it starts both at once
    first, second = bench.generate([1, 1, 1], 15), bench.generate([2, 2, 2], 15)
    bench.run()
    assert bench.scheduler.counters.preemptions > 0
    assert first.num_preemptions == 0
    assert first.generated.tolist() == expected([1, 1, 1], 15)
    assert second.generated.tolist() == expected([2, 2, 2], 15)


def test_what_is_expected_to_grow_waits_for_room_instead_of_being_preempted() -> None:
    bench = Bench(pages=10, page_size=2, budget=32)
    first, second = bench.generate([1, 1, 1], 15), bench.generate([2, 2, 2], 15)
    bench.run()
    assert bench.scheduler.counters.preemptions == 0
    assert first.generated.tolist() == expected([1, 1, 1], 15)
    assert second.generated.tolist() == expected([2, 2, 2], 15)


def test_what_was_used_lately_is_not_evicted_for_something_new_while_others_run() -> None:
    bench = Bench(pages=40, page_size=2, budget=64, usual_len=1.0)
    chat = [5] * 32
    bench.generate(chat, 1)
    running = bench.generate([9, 9], 12)
    bench.step()
    bench.generate([3] * 48, 1)  # cold: it would fit, were the chat's prefix evicted
    for _ in range(3):
        bench.step()
    turn = bench.generate([*chat, 6, 6], 1)
    bench.step()
    assert running.status is Status.RUNNING
    assert turn.cached_tokens == len(chat)
    bench.run()
    assert not bench.exhausted


def test_a_sequence_that_outgrows_the_whole_pool_is_reported_once() -> None:
    bench = Bench(pages=4, page_size=2)
    sequence = bench.generate([1, 2, 3], 20)
    bench.run()
    assert bench.exhausted == [sequence]
    assert len(sequence.tokens) == 9  # 8 slots hold KV, the last token needs none
    bench.cache.flush()
    assert bench.cache.allocator.num_free == 4


def test_a_prompt_larger_than_the_pool_is_refused_with_both_numbers() -> None:
    bench = Bench(pages=4, page_size=2)
    with pytest.raises(RequestError, match="9 tokens need 5 pages, the KV pool has 4"):
        bench.generate([1] * 9, 1)


@pytest.mark.parametrize("steps", range(6))
def test_finishing_at_any_step_boundary_gives_every_page_back(steps: int) -> None:
    bench = Bench(budget=4, pages=40, max_running=2)
    sequences = [bench.generate([1, 2, 3, 4, 5, 6, i], 4) for i in range(4)]
    for _ in range(steps):
        bench.step()
    for sequence in sequences:
        if sequence.status is not Status.FINISHED:
            bench.scheduler.finish(sequence)
    bench.scheduler.check_invariants()
    assert not bench.scheduler.has_work
    bench.cache.flush()
    assert bench.cache.allocator.num_free == 40


def test_a_sequence_cannot_finish_twice() -> None:
    bench = Bench()
    sequence = bench.generate([1, 2, 3], 1)
    bench.run()
    with pytest.raises(AssertionError, match="finished twice"):
        bench.scheduler.finish(sequence)


def test_a_paused_sequence_does_not_run_and_makes_room_for_others() -> None:
    bench = Bench(pages=6, page_size=2, max_running=1)
    stalled = bench.generate([1, 1, 1, 1], 20)
    bench.step()
    bench.scheduler.pause(stalled)
    other = bench.generate([2, 2, 2, 2], 4)
    bench.run()
    assert other.generated.tolist() == expected([2, 2, 2, 2], 4)
    assert not bench.scheduler.has_work
    bench.scheduler.resume(stalled)
    bench.run()
    assert stalled in bench.exhausted or len(stalled.generated) > 1


def test_longest_prefix_runs_first_but_age_wins_in_the_end() -> None:
    bench = Bench(pages=400, max_running=1, budget=64)
    bench.generate([7] * 40, 1)
    bench.run()
    cold = bench.generate([3] * 8, 1)
    hits = [bench.generate([7] * 40 + [i], 1) for i in range(1, 5)]
    bench.step()
    assert [cold.status, hits[0].status] == [Status.WAITING, Status.FINISHED]
    rounds = 0
    while cold.status is not Status.FINISHED:
        bench.generate([7] * 40 + [50 + rounds], 1)
        bench.step()
        rounds += 1
        assert rounds < 10


def test_scores_are_those_of_the_full_sequence_whatever_is_cached() -> None:
    bench = Bench(budget=3)
    context, choices = [1, 2, 3, 4, 5], [[6], [6, 7], [8, 9, 10, 11]]
    for _ in range(2):
        scored = [bench.score(context, ids) for ids in choices]
        bench.run()
        for sequence, ids in zip(scored, choices, strict=True):
            full = [logprob([*context, *ids[:j]], token) for j, token in enumerate(ids)]
            assert bench.scores[sequence].tolist() == full
    assert scored[2].computed_tokens <= 4


def test_choices_are_computed_once_per_different_token_in_one_step_and_nothing_of_the_prompt_again() -> None:
    bench = Bench(budget=64, pages=64)
    context = list(range(1, 23))
    bench.generate(context, 1)
    bench.run()
    choices = [[30, 31, 32], [30, 31, 33], [30, 34], [35], [30, 31, 32, 36]]
    before = bench.scheduler.counters.steps
    sequence = bench.score_all(context, choices)
    bench.run()
    assert bench.scheduler.counters.steps - before == 1
    assert (sequence.cached_tokens, sequence.computed_tokens) == (21, 1 + 3), "the last of the prompt; 30, 31, 32"
    assert sequence.trie is not None
    expected = [[logprob([*context, *ids[:j]], token) for j, token in enumerate(ids)] for ids in choices]
    assert sequence.trie.per_choice(bench.scores[sequence]) == expected


def test_a_trie_larger_than_the_pool_reuses_the_slots_of_what_is_done() -> None:
    bench = Bench(budget=8, pages=10)
    context = list(range(1, 12))
    choices = [[a, b, c, 9] for a in range(1, 5) for b in range(1, 6) for c in range(1, 6)]
    sequence = bench.score_all(context, choices)
    assert sequence.trie is not None
    assert len(sequence.trie) == 4 + 20 + 100
    bench.run()
    expected = [[logprob([*context, *ids[:j]], token) for j, token in enumerate(ids)] for ids in choices]
    assert sequence.trie.per_choice(bench.scores[sequence]) == expected
    assert sequence.num_slots <= 11 + 3 + 8
    assert sequence.computed_tokens == 11 + 124


def test_a_choice_too_long_for_the_pool_is_refused_with_the_pages_it_needs() -> None:
    bench = Bench(pages=3)
    with pytest.raises(RequestError, match="14 tokens need 4 pages, the KV pool has 3"):
        bench.score([1] * 10, [2] * 5)
