"""Steps that overlap: step k + 1 is planned and launched before anybody knows what step k drew.

On a fake device that computes as late as can be: when the host waits for it (see `FakeStep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fakes import FakeRunner, FakeStep, next_token
from oracle import EOS, World

from bough.runtime.batch import Batch, RowResult
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.grammar.constraint import Words
from bough.runtime.lifecycle import PageState
from bough.runtime.pipeline import Pipeline
from bough.runtime.protocol import Cancel, Credit, Failed, Generated, SamplingParams, Text
from bough.runtime.scheduler import Scheduler, Step
from bough.runtime.sequence import Sequence as Running
from bough.runtime.trie import TokenTrie


class Bench:
    """A scheduler, and a device whose steps are taken back by hand."""

    def __init__(self, *, pages: int = 64, page_size: int = 4, budget: int = 64, **options: Any) -> None:
        self.cache = PrefixCache(pages, page_size)
        self.runner = FakeRunner(pages, page_size)
        self.scheduler = Scheduler(self.cache, token_budget=budget, max_running=8, **options)
        self.flying: list[tuple[Step, FakeStep]] = []

    def generate(self, prompt: Sequence[int], max_tokens: int = 20, **options: Any) -> Running:
        params = SamplingParams(max_tokens=max_tokens, **options.pop("params", {}))
        sequence = Running(np.array(prompt, dtype=np.int32), params=params, **options)
        self.scheduler.submit(sequence)
        return sequence

    def launch(self) -> Step | None:
        """Plan the next step, ahead if another is in flight, and launch it."""
        before = self.flying[-1] if self.flying else None
        step = self.scheduler.plan(None if before is None else before[0])
        if step is not None:
            self.flying.append((step, self.runner.launch(step.batch, None if before is None else before[1])))
        self.scheduler.check_invariants()
        return step

    def take(self) -> list[Running]:
        """Take the oldest step back; return whose rows counted."""
        step, launched = self.flying.pop(0)
        outcomes = self.scheduler.commit(step, launched.result())
        self.scheduler.check_invariants()
        return [outcome.sequence for outcome in outcomes]


def drawn(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, 100))
    return ids[len(prompt) :]


def test_a_step_planned_ahead_goes_on_from_tokens_that_nobody_knows_yet() -> None:
    bench = Bench()
    one, two = bench.generate([1, 2, 3, 4, 5]), bench.generate([7, 8])
    first = bench.launch()
    second = bench.launch()
    assert first is not None
    assert second is not None
    rows = dict(zip(second.sequences, second.batch.rows, strict=True))
    assert [rows[s].start for s in (one, two)] == [5, 2]
    assert [first.sequences[rows[s].drawn_by or 0] for s in (one, two)] == [one, two]
    assert [row.sample.position for row in rows.values() if row.sample] == [rows[s].start + 1 for s in rows]
    assert len(one.generated) == len(two.generated) == 0
    for count in range(1, 12):
        assert set(bench.take()) == {one, two}
        assert one.generated.tolist() == drawn([1, 2, 3, 4, 5], count)
        assert two.generated.tolist() == drawn([7, 8], count)
        assert bench.launch() is not None
    assert bench.runner.num_ahead == 12


def test_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    bench = Bench(budget=4)
    one = bench.generate(range(1, 11))
    starts = []
    for _ in range(3):
        step = bench.launch()
        assert step is not None
        starts += [(row.start, row.drawn_by) for row in step.batch.rows]
    assert starts == [(0, None), (4, None), (8, None)]
    assert [bench.take() for _ in range(3)] == [[one]] * 3
    assert one.generated.tolist() == drawn(range(1, 11), 1)


def test_no_row_is_planned_beyond_the_last_token_that_can_be() -> None:
    bench = Bench()
    short, long = bench.generate([1, 2, 3], max_tokens=2), bench.generate([4, 5, 6], max_tokens=9)
    cut = bench.generate([9, 9], max_tokens=9, most_len=3)  # the context ends there
    assert set(bench.launch().sequences) == {short, long, cut}  # type: ignore[union-attr]
    assert set(bench.launch().sequences) == {short, long}  # type: ignore[union-attr]
    bench.take()
    bench.scheduler.finish(cut)
    assert bench.launch().sequences == (long,)  # type: ignore[union-attr]
    bench.take()
    assert len(short.generated) == 2


class Odd:
    """A constraint: odd ids only, and once it is free, any."""

    def __init__(self, is_free: bool = False) -> None:
        self.is_free = is_free
        self.is_ended = False
        self.num_forced = 0

    def begin(self) -> list[int]:
        return []

    def fill(self, words: Words, forbidden: tuple[int, ...] = ()) -> None:
        words[:] = 0xAAAAAAAA

    def advance(self, token: int) -> list[int]:
        return [token]


@pytest.mark.parametrize(
    "options",
    [
        {"constraint": Odd()},
        {"params": {"repetition_penalty": 1.1}},
        {"params": {"frequency_penalty": 0.5}},
        {"params": {"presence_penalty": 0.5}},
    ],
)
def test_who_needs_the_token_itself_makes_the_next_step_wait_for_it(options: dict[str, Any]) -> None:
    bench = Bench()
    needy, other = bench.generate([1, 2, 3], **options), bench.generate([4, 5])
    for _ in range(3):
        assert bench.launch() is not None
        assert bench.launch() is None, "not ahead"
        assert set(bench.take()) == {needy, other}
    bench.scheduler.finish(needy)
    assert bench.launch() is not None
    assert bench.launch() is not None, "the other does not need it"


def test_a_constraint_that_is_over_and_a_count_of_tokens_need_no_values() -> None:
    bench = Bench()
    healed = bench.generate([1, 2, 3], constraint=Odd(is_free=True))
    early = bench.generate([4, 5], params={"min_tokens": 2}, forbidden_early=(1,))
    bench.launch()
    forbidden = []
    for _ in range(2):
        step = bench.launch()
        assert step is not None
        forbidden += [
            row.sample.forbidden
            for s, row in zip(step.sequences, step.batch.rows, strict=True)
            if row.sample and s is early
        ]
        bench.take()
    assert forbidden == [(1,), ()], "of the second and the third token"
    assert healed.generated.tolist() == drawn([1, 2, 3], 2)


def test_scores_and_generations_share_steps_that_overlap() -> None:
    bench = Bench(budget=6)
    one = bench.generate([1, 2, 3])
    trie = TokenTrie([[5, 6, 7, 8], [5, 9, 10], [11, 12, 13, 14, 15]])
    scoring = Running(np.arange(1, 10, dtype=np.int32), trie=trie)
    bench.scheduler.submit(scoring)
    scored = 0
    while scoring.num_computed < scoring.goal:
        while len(bench.flying) < 2 and bench.launch() is not None:
            pass
        step = bench.flying[0][0]
        scored += sum(len(row.score_ids) for row in step.batch.rows if row.score_ids is not None)
        bench.take()
    assert scored == len(trie.edge_tokens)
    assert bench.runner.num_ahead > 2
    assert one.generated.tolist() == drawn([1, 2, 3], len(one.generated))


# ------------------------------------------------------------------------------------------ who ends meanwhile


def finish(bench: Bench, sequence: Running) -> None:
    bench.scheduler.finish(sequence)


def preempt(bench: Bench, sequence: Running) -> None:
    bench.scheduler.preempt(sequence)
    bench.scheduler.pause(sequence)  # does not come back at once


@pytest.mark.parametrize("leave", [finish, preempt])
def test_the_row_of_who_left_counts_for_nothing_and_its_pages_wait_for_the_step(
    leave: Callable[[Bench, Running], None],
) -> None:
    bench = Bench(page_size=2)
    gone, other = bench.generate([1, 2, 3, 6]), bench.generate([4, 5])
    bench.launch()
    bench.launch()
    bench.take()
    assert gone.lease is not None
    pages = gone.lease.row.view().tolist()
    leave(bench, gone)
    allocator = bench.cache.allocator
    unheld = [page for page in pages if allocator.state(page) is not PageState.HELD]
    assert unheld
    assert all(allocator.state(page) is PageState.LIMBO for page in unheld)
    third = bench.launch()
    assert third is not None
    assert third.sequences == (other,)
    assert not set(unheld) & set(np.concatenate([row.pages for row in third.batch.rows]).tolist())
    assert bench.take() == [other]
    assert all(allocator.state(page) is PageState.FREE for page in unheld)
    published = bench.cache.matched_len(None, np.array([1, 2, 3, 6, *drawn([1, 2, 3, 6], 3)], dtype=np.int32))
    assert published == 4, "what was computed and taken back, nothing of the step that ran meanwhile"
    assert gone.generated.tolist() == drawn([1, 2, 3, 6], 1)


def test_who_comes_back_while_its_old_row_is_in_flight_draws_the_same() -> None:
    bench = Bench()
    one, other = bench.generate([1, 2, 3]), bench.generate([4, 5])
    bench.launch()
    bench.launch()
    bench.take()
    bench.scheduler.preempt(one)
    third = bench.launch()
    assert third is not None
    assert set(third.sequences) == {one, other}
    assert bench.take() == [other], "the row of before counts no more"
    assert set(bench.take()) == {one, other}
    assert one.generated.tolist() == drawn([1, 2, 3], 2)


def test_who_is_paused_goes_on_where_it_was_even_if_its_old_row_is_in_flight() -> None:
    bench = Bench()
    one = bench.generate([1, 2, 3])
    bench.launch()
    bench.launch()
    bench.take()
    bench.scheduler.pause(one)
    bench.scheduler.resume(one)
    again = bench.launch()
    assert again is not None
    assert again.batch.rows[0].drawn_by is None
    assert bench.take() == []
    assert bench.take() == [one]
    assert one.generated.tolist() == drawn([1, 2, 3], 2)


def test_nobody_is_preempted_for_a_step_planned_ahead() -> None:
    bench = Bench(pages=6, page_size=2, usual_len=1.0)
    old, new = bench.generate([1, 2, 3]), bench.generate([4, 5, 6])
    bench.launch()
    for _ in range(3):
        assert bench.launch() is not None
        assert set(bench.take()) == {old, new}
    assert bench.launch() is None, "the seventh token needs a page that somebody has to give up"
    assert bench.scheduler.counters.preemptions == 0
    assert set(bench.take()) == {old, new}
    step = bench.launch()
    assert step is not None
    assert step.sequences == (old,)
    assert bench.scheduler.counters.preemptions == 1


def test_nobody_is_told_that_the_pool_is_too_small_while_pages_are_in_limbo() -> None:
    bench = Bench(pages=4, page_size=2)
    first, second = bench.generate([1, 2, 3]), bench.generate([9, 8, 7, 6, 5, 4, 3])
    bench.launch()
    bench.launch()
    bench.take()
    bench.scheduler.finish(first)
    assert bench.launch() is None
    assert bench.scheduler.take_exhausted() == []
    bench.take()
    step = bench.launch()
    assert step is not None
    assert step.sequences == (second,)


# ------------------------------------------------------------------------------------------ the engine


def world(**config: Any) -> World:
    made = World(overlap=True, **config)
    made.branch(0, 1, Text("a b"))
    return made


def test_a_stop_comes_a_step_late_and_costs_one_row() -> None:
    costs = []
    for overlap in (False, True):
        one = World(overlap=overlap)
        one.branch(0, 1, Text("a b"))
        op = one.generate(0, 1, max_tokens=30, ignore_eos=False, stop_token_ids=(EOS,))
        one.drain()
        reply = one.last(0, op)
        assert isinstance(reply, Generated)
        assert reply.finish_reason == "stop"
        one.finish()
        costs.append(one.runner.num_computed)
    assert costs[1] == costs[0] + 1


def test_a_stream_never_runs_ahead_of_its_credit() -> None:
    one = world(credit=3)
    op = one.generate(0, 1, max_tokens=12, stream=True)
    for _ in range(10):
        one.step()
        one.check()
    assert len(one.sessions[0].operations[op].work.sequences[0].generated) == 3  # type: ignore[union-attr]
    one.send(0, Credit, target=op, tokens=2)
    one.finish()


def test_cancel_while_two_steps_know_of_it_leaves_nothing() -> None:
    one = world()
    op = one.generate(0, 1, max_tokens=30)
    for _ in range(3):
        one.step()
    one.send(0, Cancel, branch=1, discard=True)
    assert isinstance(one.last(0, op), Failed)
    assert one.engine.has_work, "a step is in flight"
    one.finish()


def test_the_cache_is_rebuilt_only_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    one.generate(0, 1, max_tokens=30)
    one.step()
    assert len(one.runner.pending) == 1
    with monkeypatch.context() as patch:
        patch.setattr(one.scheduler, "plan", lambda **options: 1 / 0)
        one.step()
    assert one.scheduler.counters.rebuilds == 1
    assert not one.runner.pending
    one.drain()


class Fails:
    """A launcher whose steps or launches fail when told."""

    def __init__(self) -> None:
        self.launch_fails: list[bool] = []
        self.launched = 0

    def execute(self, batch: Batch) -> list[RowResult]:
        raise AssertionError("steps are launched")

    def launch(self, batch: Batch, previous: Fails.Step | None) -> Fails.Step:
        if self.launch_fails.pop(0):
            raise RuntimeError("no launch")
        self.launched += 1
        return Fails.Step(len(batch.rows))

    class Step:
        def __init__(self, count: int) -> None:
            self.count = count

        def result(self) -> list[RowResult]:
            return [RowResult(5)] * self.count


def test_nothing_is_launched_behind_a_launch_that_failed() -> None:
    bench, device = Bench(), Fails()
    pipeline = Pipeline(device, device)
    bench.generate([1, 2, 3])
    device.launch_fails = [False, True]
    pipeline.fill(bench.scheduler)
    assert (len(pipeline), device.launched) == (2, 1)
    step, results = pipeline.take()
    assert not isinstance(results, Exception)
    bench.scheduler.commit(step, results)
    pipeline.fill(bench.scheduler)
    assert (len(pipeline), device.launched) == (1, 1)
    _, failure = pipeline.take()
    assert isinstance(failure, RuntimeError)
