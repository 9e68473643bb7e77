"""Programs on an event loop and in batches, on a real runtime."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until, within

import bough as bo

END_S = 60.0
SAMPLED: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0}
ENDLESS: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def write_drafts(s: bo.State, number: int) -> str:
    s += bo.user(f"What is {number} + 4?")
    forks = s.fork(2)
    forks += bo.assistant("It is " + bo.gen("draft", stop="."))
    forks.join()
    s += bo.assistant(bo.select("best", choices=["short", "long"]))
    return f"{s['best']}: {s['draft']}"


drafts = bo.function(write_drafts)


@bo.function
async def drafts_async(s: bo.State, number: int) -> str:
    s += bo.user(f"What is {number} + 4?")
    forks = s.fork(2)
    forks += bo.assistant("It is " + bo.gen("draft", stop="."))
    await forks.ajoin()
    s += bo.assistant(bo.select("best", choices=["short", "long"]))
    return f"{await s.get('best')}: {await s.get('draft')}"


@bo.function
def endless(s: bo.State) -> None:
    s += "Once " + bo.gen("x")
    s["x"]


def test_all_ways_to_run_a_program_say_the_same(pocket: bo.Runtime) -> None:
    numbers = list(range(8))

    def with_seed(run: Callable[..., Any], number: int) -> Any:
        return run(number, seed=100 + number, backend=pocket, **SAMPLED)

    def plainly(program: bo.Program) -> list[str]:
        return [with_seed(program.run, number).ret_value for number in numbers]

    expected = within(END_S, lambda: plainly(drafts))

    async def on_a_loop(program: bo.Program) -> list[str]:
        before = threading.active_count()
        states = await asyncio.gather(*[with_seed(program.arun, number) for number in numbers])
        assert threading.active_count() == before
        return [await state.aret_value() for state in states]

    assert within(END_S, lambda: plainly(drafts_async)) == expected
    assert within(END_S, lambda: asyncio.run(on_a_loop(drafts))) == expected
    assert within(END_S, lambda: asyncio.run(on_a_loop(drafts_async))) == expected
    in_batches = drafts.run_batch([(n,) for n in numbers], seed=1, backend=pocket, **SAMPLED)
    again = drafts_async.run_batch([(n,) for n in numbers], seed=1, max_in_flight=2, backend=pocket, **SAMPLED)
    assert [s.ret_value for s in in_batches] == [s.ret_value for s in again]


def test_a_loop_goes_on_while_its_programs_wait(pocket: bo.Runtime) -> None:
    async def main() -> int:
        running = asyncio.ensure_future(drafts.arun(1, backend=pocket, **SAMPLED))
        turns = 0
        while not running.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert within(END_S, lambda: asyncio.run(main())) > 3


def test_a_stream_is_followed_on_the_loop_that_makes_it(pocket: bo.Runtime) -> None:
    async def main() -> None:
        state = await drafts_async.arun(2, backend=pocket, stream=True, **SAMPLED)
        chunks = [chunk async for chunk in state.text_async_iter()]
        assert "".join(chunks) == await state.atext()
        assert len(chunks) > 2

    within(END_S, lambda: asyncio.run(main()))


def test_a_cancelled_program_ends_in_the_runtime(pocket: bo.Runtime) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(endless.arun(backend=pocket, **ENDLESS), 0.2)

    within(END_S, lambda: asyncio.run(main()))
    wait_until(lambda: pocket.stats()["num_running"] == 0, 5, "the cancelled gen has ended")


def test_leaving_a_batch_ends_it_in_the_runtime(pocket: bo.Runtime) -> None:
    @bo.function
    def mixed(s: bo.State, number: int) -> None:
        s += f"{number} " + bo.gen("x", **(ENDLESS if number else {"max_tokens": 2}))
        s["x"]

    states = mixed.run_batch([(n,) for n in range(20)], order="completion", backend=pocket)
    assert within(END_S, lambda: next(states)).index == 0
    states.close()  # type: ignore[attr-defined]
    wait_until(lambda: pocket.stats()["num_running"] == 0, 10, "what was in flight has ended")


def test_a_batch_that_died_with_its_runtime_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first runtime is killed after a few items; the second runs the others, and no item is lost or run twice."""
    path, items = tmp_path / "results.jsonl", [(number,) for number in range(24)]
    killed = threading.Event()

    @bo.function
    def item(s: bo.State, number: int) -> str:
        assert number < 12 or killed.wait(END_S), "half of them come after the runtime's death"
        return write_drafts(s, number)

    with bo.Runtime(seed=3) as runtime:
        first = []
        for state in item.run_batch(items, order="completion", max_in_flight=4, resume=path, backend=runtime):
            first.append(state)
            if len(first) == 6:
                os.kill(runtime.pid, signal.SIGKILL)
                killed.set()
    lost = [state for state in first if isinstance(state.error(), bo.RuntimeLost)]
    assert len(first) == 24
    assert 0 < len(lost) <= 18
    with bo.Runtime(seed=3) as runtime:
        states = within(END_S, lambda: item.run_batch(items, resume=path, backend=runtime))
        assert sum(state.is_saved for state in states) == 24 - len(lost)
        assert all(state.error() is None for state in states)
        by_index = {state.index: state for state in first if state.error() is None}
        for state in states:
            if state.is_saved:
                assert state.ret_value == by_index[state.index].ret_value


def test_the_kv_cache_of_a_runtime_bounds_its_batches() -> None:
    """A cache of 512 tokens, and items that write some 80: once the first has ended, about five are in flight."""
    running: set[int] = set()
    with_it: dict[int, int] = {}

    @bo.function
    def item(s: bo.State, number: int) -> None:
        running.add(number)
        with_it[number] = len(running)
        for turn in range(3):
            s += f"{number} {turn} " + bo.gen(f"x{turn}", max_tokens=16, ignore_eos=True, temperature=0)
            s[f"x{turn}"]
        running.discard(number)

    with bo.Runtime(seed=3, max_total_tokens=512) as runtime:
        states = within(END_S, lambda: item.run_batch([(n,) for n in range(16)], backend=runtime))
        assert all(state.error() is None for state in states)
        assert 1 < max(with_it.values()) <= 9
        assert runtime.stats()["preemptions"] == 0
