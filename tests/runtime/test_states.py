"""Every state an operation can be in, and every way to end it there; then overload, stalled readers and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from oracle import World, draw

from bough.runtime.batch import Batch, RowResult
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.protocol import Cancel, Extend, Failed, Fork, Generated, Release, Rollback, Score, Select, Text
from bough.runtime.vector import IntArray

LONG = "b the ab a the b a ab the a b a the ab"


def busy() -> World:
    """Work in every state at some step: few places, few pages, small steps, one reader that does not read."""
    world = World(num_pages=36, page_size=2, token_budget=5, max_running=3, credit=2)
    world.branch(0, 1, Text(LONG))
    world.generate(0, 1, max_tokens=9, timeout_s=1.0)
    world.send(0, Extend, branch=1, parts=[Text(" and")])
    world.send(0, Fork, branch=1, children=[2, 3])
    world.generate(0, 2, max_tokens=4, timeout_s=1.0)
    world.generate(0, 3, max_tokens=4, timeout_s=1.0)
    world.branch(1, 1, Text("a b"))
    world.generate(1, 1, max_tokens=30, stream=True, timeout_s=1.0)
    world.branch(1, 2, Text(LONG))
    world.send(1, Select, branch=2, choices=[" the a b", "ab", " b the ab a"], timeout_s=1.0)
    world.generate(1, 2, max_tokens=20, timeout_s=1.0)
    world.branch(2, 1, Text(LONG + " b"))
    world.generate(2, 1, max_tokens=30, timeout_s=1.0)
    world.send(2, Release, branches=[1])
    return world


def unfinished(world: World) -> list[tuple[int, int]]:
    return [(slot, op) for slot, session in enumerate(world.sessions) for op in session.operations]


def at_every_boundary(end: Callable[[World, int], bool]) -> Counter[str]:
    """Run `busy` up to every step boundary, end something there, drain, and look that nothing is left.

    end(world, index) ends the index-th thing that can be ended, and tells whether there was one.
    """
    seen: Counter[str] = Counter()
    for steps in range(200):
        for index in range(100):
            world = busy()
            world.seen = seen
            for _ in range(steps):
                world.step()
            if not unfinished(world) or (world.scheduler.has_work is False and steps > 60):
                return seen
            if not end(world, index):
                break
            world.check()
            world.finish()
    raise AssertionError("not done")


def test_any_operation_can_be_cancelled_at_any_step_in_any_state() -> None:
    def end(world: World, index: int) -> bool:
        found = unfinished(world)
        if index >= len(found):
            return False
        slot, op = found[index]
        was = world.state_of(slot, op)
        count = world.send(slot, Cancel, target=op)
        assert getattr(world.last(slot, count), "count", None) == 1, was
        failed = world.last(slot, op)
        assert isinstance(failed, Failed)
        assert failed.kind == "cancelled"
        return True

    seen = at_every_boundary(end)
    states = {name.removeprefix("cancel: ") for name in seen if name.startswith("cancel: ")}
    assert states >= {"queued", "unborn", "waiting", "prefill", "decode", "paused decode", "paused preempted"}, seen


def test_all_work_below_any_branch_can_be_cancelled_at_any_step() -> None:
    def end(world: World, index: int) -> bool:
        found = [(slot, branch) for slot, session in enumerate(world.sessions) for branch in session.branches]
        if index < len(found):
            world.send(found[index][0], Cancel, branch=found[index][1])
        return index < len(found)

    at_every_boundary(end)


def test_any_client_can_die_at_any_step() -> None:
    def end(world: World, index: int) -> bool:
        if index < len(world.sessions):
            world.close(index)
        return index < len(world.sessions)

    at_every_boundary(end)


def test_deadlines_can_be_over_at_any_step() -> None:
    def end(world: World, index: int) -> bool:
        world.clock.now = 2.0
        world.step()
        return index == 0

    seen = at_every_boundary(end)
    assert seen["failed: timeout"]


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_the_smallest_pool_serves_sixty_four_clients_and_every_operation_ends(page_size: int) -> None:
    longest = 40
    world = World(
        num_pages=-(-longest // page_size),
        page_size=page_size,
        token_budget=16,
        max_running=64,
        tenants=[f"tenant {i % 3}" for i in range(64)],
    )
    wanted = []
    for slot in range(64):
        world.branch(slot, 1, Text(LONG[: slot % 16]), Text(" the"))
        world.send(slot, Fork, branch=1, children=[2, 3])
        wanted += [(slot, world.generate(slot, branch, max_tokens=4 + slot % 8)) for branch in (2, 3)]
        if slot % 4 == 0:
            wanted.append((slot, world.send(slot, Score, branch=1, choices=["a", " the b"])))
    idle = 0
    for _ in range(6000):
        if not world.engine.num_unfinished:
            break
        idle = 0 if world.step() else idle + 1
        assert idle < 3, "there is work, and the step counter does not move"
    assert all(not isinstance(world.last(slot, op), Failed) for slot, op in wanted)
    assert world.cache.num_evictions
    world.finish()


def test_a_reader_that_stalls_slows_nobody_and_its_messages_do_not_pile_up() -> None:
    def steps_of_the_others(stalled: int) -> int:
        world = World(num_pages=32, page_size=2, token_budget=8, max_running=2, credit=3)
        streams = []
        for branch in range(1, 1 + stalled):
            world.branch(1, branch, Text("a b"))
            streams.append(world.generate(1, branch, max_tokens=40, stream=True))
        for _ in range(12):
            world.step()
        others = []
        for branch in range(1, 7):
            world.branch(0, branch, Text("b" * branch))
            others.append(world.generate(0, branch, max_tokens=10))
        for steps in range(500):
            if all(isinstance(world.replies[0].get(op, [None])[-1], Generated) for op in others):
                assert all(len(world.replies[1][op]) <= 3 for op in streams)
                world.finish()
                return steps
            world.step()
        raise AssertionError("the others never end")

    alone = steps_of_the_others(0)
    assert steps_of_the_others(1) <= alone + 3
    assert steps_of_the_others(5) <= alone + 8


def test_a_preemption_costs_no_computation_while_the_cache_has_room() -> None:
    def run(preempt_at: int) -> World:
        world = World(num_pages=64, page_size=4, token_budget=8)
        world.branch(0, 1, Text(LONG))
        world.generate(0, 1, max_tokens=12)
        for step in range(100):
            if step == preempt_at:
                world.preempt(0)
            if not world.step() and not world.engine.num_unfinished:
                break
        world.finish()
        return world

    undisturbed = run(1000).runner.num_computed
    for preempt_at in range(1, 12):
        world = run(preempt_at)
        counters = world.scheduler.counters
        assert counters.preemptions == 1
        assert world.runner.num_computed == undisturbed
        assert counters.recomputed_tokens == 0


@pytest.mark.parametrize("every", [1000, 7, 3, 2])
def test_counters_tell_what_the_runner_computed(every: int) -> None:
    world = World(num_pages=14, page_size=2, token_budget=4, max_running=4)
    for branch in range(1, 6):
        world.branch(0, branch, Text(LONG[branch : 5 * branch]))
        world.generate(0, branch, max_tokens=14)
    for step in range(1, 2000):
        if step % every == 0:
            world.preempt(step)
        if not world.step() and not world.engine.num_unfinished:
            break
    world.finish()
    counters = world.scheduler.counters
    assert bool(counters.preemptions) == (
        every < 1000
    )  # left alone, each waits until there is room for all it may grow
    assert counters.generated_tokens == 5 * 14
    decoded = counters.generated_tokens - 5  # the last token of each needs no KV
    assert world.runner.num_computed == counters.computed_tokens + counters.recomputed_tokens + decoded


def test_what_needs_the_same_pages_twice_still_fits_the_pool() -> None:
    """Where edges meet inside a page, a cached path pins more pages than its tokens fill; then it is computed anew."""
    world = World(num_pages=15, page_size=2, token_budget=1, max_running=1)
    world.branch(1, 1, Text("a b"))
    world.branch(0, 1, Text("a b"))
    next_branch = 2
    for slot, parent, text, max_tokens in ((1, 1, "a", 1), (0, 1, "b the ab a the b a", 9), (0, 2, " the a b", 8)):
        children = [next_branch, next_branch + 1]
        next_branch += 2
        world.send(slot, Fork, branch=parent, children=children)
        for index, child in enumerate(children):
            world.send(slot, Extend, branch=child, parts=[Text(text * (1 + index))])
            world.generate(slot, child, max_tokens=max_tokens)
    world.finish()


@pytest.mark.parametrize("at", range(1, 8))
def test_a_choice_that_is_preempted_between_two_chunks_is_scored_once(at: int) -> None:
    world = World(num_pages=20, page_size=1, token_budget=3, max_running=1)
    world.branch(0, 1, Text("a b"))
    op = world.send(0, Select, branch=1, choices=["b the ab a the b a", " the a b"])
    for _ in range(at):
        world.step()
    world.preempt(0)
    world.finish()
    assert not isinstance(world.last(0, op), Failed)


def test_a_long_queue_of_failures_and_cures_ends_however_long_it_is() -> None:
    world = World(num_pages=8, page_size=2, context_len=200)
    world.branch(0, 1, Text("a b"))
    world.generate(0, 1)
    for _ in range(600):
        world.send(0, Extend, branch=1, parts=[Text(LONG * 2)], commit=True)
        refused = world.generate(0, 1)
        world.send(0, Rollback, branch=1, length=1)
    world.finish()
    assert isinstance(world.last(0, refused), Failed)


def test_a_long_chain_of_forks_of_released_branches_ends_however_long_it_is() -> None:
    world = World(num_pages=8, page_size=2, context_len=200)
    world.branch(0, 1, Text("a b"))
    world.generate(0, 1)
    for branch in range(1, 600):
        world.send(0, Release, branches=[branch])
        refused = world.send(0, Fork, branch=branch, children=[branch + 1])
    world.finish()
    assert isinstance(world.last(0, refused), Failed)


def test_what_was_used_last_is_evicted_last() -> None:
    cache = PrefixCache(3, page_size=2)
    prompts = [np.array([token, token], dtype=np.int32) for token in range(4)]

    def compute(tokens: IntArray) -> None:
        lease = cache.acquire("ns", tokens, limit=1, headroom=0)
        assert lease is not None
        cache.publish(lease, tokens)
        cache.release(lease)

    for tokens in prompts[:3]:
        compute(tokens)
    assert cache.matched_len("ns", prompts[0]) == 2  # looked at: now the most recently used
    compute(prompts[3])
    assert [cache.matched_len("ns", tokens) for tokens in prompts] == [2, 0, 2, 2]


def test_pages_released_while_a_step_is_in_flight_are_free_once_it_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(num_pages=16, page_size=2)
    world.branch(0, 1, Text("a b"))
    world.generate(0, 1)
    world.steal(5)
    allocator, execute, free = world.cache.allocator, world.runner.execute, []

    def give_back_in_between(batch: Batch) -> list[RowResult]:
        free.append(allocator.num_free)
        world.give_back()
        free.append(allocator.num_free)
        return execute(batch)

    monkeypatch.setattr(world.runner, "execute", give_back_in_between)
    world.step()
    assert free[0] == free[1] == allocator.num_free - 5
    world.finish()


def test_the_fake_model_draws_what_is_allowed() -> None:
    first = draw([1, 2, 3])
    assert draw([1, 2, 3], forbidden=[first]) != first
