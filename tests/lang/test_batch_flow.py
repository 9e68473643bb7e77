"""Batches in motion: how many are in flight on how few threads, in which order they end, and what ends them early."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

import bough as bo
from bough.hub import FIRST_THREADS
from bough.inflight import FIRST, MAX_AUTO

WAIT_S = 10.0
ITEMS = [{"number": i} for i in range(600)]


@bo.function
def doubled(s: bo.State, number: int) -> int:
    s += f"{number} "
    forks = s.fork(2)
    forks += bo.gen("x")
    forks.join()
    return sum(int(x) for x in s["x"])


@bo.function
async def doubled_async(s: bo.State, number: int) -> int:
    s += f"{number} "
    forks = s.fork(2)
    forks += bo.gen("x")
    await forks.ajoin()
    return sum(int(x) for x in await s.get("x"))


BOTH = pytest.mark.parametrize("program", [doubled, doubled_async], ids=["def", "async def"])


def echo(text: str, params: object) -> str:
    return text.split()[0]


class Slow(bo.ScriptedBackend):
    """Carries out its calls one by one in a thread of its own, and counts how many branches there were at most."""

    def __init__(self, reply: Callable[[str, Any], str] = echo, **info: object) -> None:
        super().__init__(reply)
        self._counting = threading.Lock()
        self.most_open = 0
        self.most_threads = 0
        self._info = info
        self._has_ended = threading.Event()

    def server_info(self) -> dict[str, object]:
        return {**super().server_info(), **self._info}

    def open(self) -> int:
        branch = super().open()
        with self._counting:
            self.most_open = max(self.most_open, sum(not b.parent for b in list(self._branches.values())))
            self.most_threads = max(self.most_threads, threading.active_count())
        return branch

    @contextmanager
    def working(self, after: int = 0) -> Iterator[Slow]:
        """Carry out calls, from when so many programs have begun."""

        def work() -> None:
            while not self._has_ended.wait(0.0005):
                if self.most_open >= after:
                    self.step(50)

        worker = threading.Thread(target=work, daemon=True)
        with self.paused():
            worker.start()
            try:
                yield self
            finally:
                self._has_ended.set()
                worker.join(WAIT_S)


# ------------------------------------------------------------------------------------------------ how many


@BOTH
def test_hundreds_are_in_flight_on_a_few_threads(program: bo.Program) -> None:
    before = threading.active_count()
    with Slow().working(after=MAX_AUTO) as backend:
        most: list[int] = []
        for state in program.run_batch(ITEMS, generator_style=True, backend=backend):
            most.append(state.ret_value)
            del state
    assert most == [2 * i for i in range(600)]
    assert backend.most_open >= MAX_AUTO
    assert backend.most_threads <= before + 2 + FIRST_THREADS


@BOTH
@pytest.mark.parametrize("name", ["num_threads", "max_in_flight"])
def test_no_more_are_in_flight_than_wanted(program: bo.Program, name: str) -> None:
    in_flight = 0
    most = 0
    lock = threading.Lock()

    @bo.function
    def counted(s: bo.State, number: int) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        s += bo.gen("x")
        s["x"]
        with lock:
            in_flight -= 1

    with Slow(lambda text, params: "ok").working() as backend:
        limits: dict[str, Any] = {name: 7}
        states = counted.run_batch(ITEMS[:100], backend=backend, **limits)
    assert all(state.error() is None for state in states)
    assert most == 7


def test_the_kv_cache_bounds_what_is_in_flight() -> None:
    words = " ".join(["word"] * 99)
    running: set[int] = set()
    with_it: dict[int, int] = {}

    @bo.function
    def writes(s: bo.State, number: int) -> None:
        running.add(number)
        with_it[number] = len(running)
        s += f"{number} " + bo.gen("x", max_tokens=1000)
        s["x"]
        running.discard(number)

    with Slow(lambda text, params: words, total_pages=100, page_size=10).working() as backend:  # 1,000 tokens
        states = writes.run_batch(ITEMS[:200], backend=backend)
    assert all(state.error() is None for state in states)
    assert [with_it[number] for number in range(FIRST)] == [1, 2, 3, 4], "until the first has ended"
    assert max(with_it.values()) == 9, "each writes 100 tokens, a tenth is kept free"


def test_a_program_that_blocks_its_thread_does_not_hold_up_the_others() -> None:
    meeting = threading.Barrier(3 * FIRST_THREADS)

    @bo.function
    def meets(s: bo.State, number: int) -> int:
        s += f"{number} " + bo.gen("x")
        s["x"]
        return meeting.wait(WAIT_S)

    states = meets.run_batch(ITEMS[: 3 * FIRST_THREADS], backend=bo.ScriptedBackend(echo))
    assert sorted(state.ret_value for state in states) == list(range(3 * FIRST_THREADS))


def test_each_item_has_a_context_of_its_own() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")

    @bo.function
    def asks(s: bo.State, number: int) -> list[str]:
        seen = [who.get()]
        who.set(str(number))
        s += f"{number} " + bo.gen("x")
        s["x"]
        return [*seen, who.get()]

    who.set("caller")
    with Slow().working() as backend:
        states = asks.run_batch(ITEMS[:20], backend=backend)
    assert [state.ret_value for state in states] == [["caller", str(i)] for i in range(20)]
    assert who.get() == "caller"


@BOTH
def test_what_an_item_draws_does_not_depend_on_who_is_faster(program: bo.Program) -> None:
    def texts(most: int, **given: Any) -> list[Any]:
        states = program.run_batch(
            ITEMS[:20], max_in_flight=most, backend=bo.ScriptedBackend(lambda text, params: str(params.seed)), **given
        )
        return [state["x"] for state in states]

    assert texts(1, seed=5) == texts(20, seed=5)
    alike = texts(20)
    assert len({x for drawn in alike for x in drawn}) == 40, "without a seed, every item has one of its own"


# ------------------------------------------------------------------------------------------------ order


@BOTH
def test_results_come_as_they_end_or_in_order(program: bo.Program) -> None:
    held = threading.Event()

    def reply(text: str, params: object) -> str:
        if text.startswith("0 "):
            assert held.wait(WAIT_S)
        return echo(text, params)

    class PerThread(bo.ScriptedBackend):
        """Lets the first item's gens take longer than all the others'."""

        def generate(self, branch: int, params: Any, **rest: Any) -> Any:
            if not self._branches[branch].whole().startswith("0 "):
                return super().generate(branch, params, **rest)
            future: Future[Any] = Future()
            late = super().generate

            def work() -> None:
                assert held.wait(WAIT_S)
                future.set_result(late(branch, params, **rest).result())

            threading.Thread(target=work, daemon=True).start()
            return future

    backend = PerThread(echo)
    states = program.run_batch(ITEMS[:50], order="completion", backend=backend)
    first = [next(states).index for _ in range(49)]
    assert sorted(first) == list(range(1, 50))
    held.set()
    assert [state.index for state in states] == [0]
    held.clear()
    ordered = program.run_batch(ITEMS[:50], order="input", backend=backend)
    threading.Timer(0.01, held.set).start()
    assert [state.ret_value for state in ordered] == [2 * i for i in range(50)]


def test_a_reader_that_is_slow_bounds_what_is_started() -> None:
    started: list[int] = []

    @bo.function
    def starts(s: bo.State, number: int) -> None:
        started.append(number)

    states = starts.run_batch([(i,) for i in range(3000)], order="completion", backend=bo.ScriptedBackend(echo))
    next(states)
    while threading.active_count() and len(started) < 1024:
        threading.Event().wait(0.001)
    assert len(started) <= 1030
    assert 1 + len(list(states)) == len(started) == 3000


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    backend = bo.ScriptedBackend(echo)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"order": "random"}, "order must be one of"),
        ({"errors": "ignore"}, "errors must be one of"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1, got 0"),
        ({"max_in_flight": 2, "num_threads": 2}, "another name"),
        ({"retries": -1}, "retries must be"),
        ({"retries": "many"}, "retries must be"),
    ]
    for given, words in wrong:
        with pytest.raises(bo.InvalidRequest, match=words):
            doubled.run_batch(ITEMS[:3], backend=backend, **given)
        if "num_threads" not in given:
            with pytest.raises(bo.InvalidRequest, match=words):
                doubled.arun_batch(ITEMS[:3], backend=backend, **given)
    assert backend.stats()["num_calls"] == 0


# ------------------------------------------------------------------------------------------------ early ends


def fails_at_five(text: str, params: object) -> str:
    if text.startswith("5 "):
        raise bo.ResourceExhausted("no room")
    return echo(text, params)


@BOTH
def test_errors_may_end_the_batch(program: bo.Program) -> None:
    backend = bo.ScriptedBackend(fails_at_five)
    with pytest.raises(bo.ResourceExhausted, match="no room"):
        program.run_batch(ITEMS, errors="raise", max_in_flight=4, backend=backend)
    seen: list[int] = []

    def follow() -> None:
        for state in program.run_batch(ITEMS, errors="raise", order="input", max_in_flight=4, backend=backend):
            seen.append(state.index)

    with pytest.raises(bo.ResourceExhausted):
        follow()
    assert seen == [0, 1, 2, 3, 4]

    @bo.function
    def breaks(s: bo.State) -> None:
        raise LookupError("mine")

    with pytest.raises(bo.ProgramError, match="item 0 of the batch: the program raised LookupError: mine") as caught:
        breaks.run_batch([{}], errors="raise", backend=backend)
    assert isinstance(caught.value.__cause__, LookupError)


def ends(thread_prefix: str) -> bool:
    """Whether no thread of a batch is left, within some time."""
    for thread in threading.enumerate():
        if thread.name.startswith(thread_prefix):
            thread.join(WAIT_S)
    return not any(thread.name.startswith(thread_prefix) for thread in threading.enumerate())


@BOTH
def test_leaving_the_loop_ends_what_is_in_flight(program: bo.Program) -> None:
    backend = bo.ScriptedBackend(echo)
    with backend.paused():
        states = program.run_batch(ITEMS, order="completion", max_in_flight=10, backend=backend)
        reader = threading.Thread(target=lambda: next(states), daemon=True)
        reader.start()
        while backend.stats()["num_calls"] == 0:
            backend.step()
        while reader.is_alive():
            backend.step()
        states.close()  # type: ignore[attr-defined]
        assert ends("bough-batch-doubled")
    assert int(backend.stats()["num_calls"]) < len(ITEMS), "each makes three"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where these tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@BOTH
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_starts_nothing_more_and_leaves_nothing_waiting(program: bo.Program) -> None:
    backend = bo.ScriptedBackend(echo)

    def interrupt(s: bo.State, number: int) -> None:
        if number == 50:
            _thread.interrupt_main()
        s += f"{number} " + bo.gen("x")

    @bo.function
    def interrupts(s: bo.State, number: int) -> None:
        interrupt(s, number)
        s["x"]

    @bo.function
    async def interrupts_async(s: bo.State, number: int) -> None:
        interrupt(s, number)
        await s.get("x")

    with backend.paused():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                (interrupts_async if program.is_async else interrupts).run_batch(
                    ITEMS, max_in_flight=100, backend=backend
                )
            assert ends("bough-batch-interrupts")
    assert backend.stats()["num_calls"] == 0


def test_an_exit_in_a_program_ends_the_batch() -> None:
    @bo.function
    def exits(s: bo.State, number: int) -> None:
        if number == 3:
            raise SystemExit("enough")

    with pytest.raises(SystemExit, match="enough"):
        exits.run_batch(ITEMS, max_in_flight=2, backend=bo.ScriptedBackend(echo))
    assert ends("bough-batch-exits")


# ------------------------------------------------------------------------------------------------ retries


@BOTH
def test_what_may_be_tried_again_is(program: bo.Program) -> None:
    tries: dict[str, int] = {}

    def reply(text: str, params: object) -> str:
        number = text.split()[0]
        tries[number] = tries.get(number, 0) + 1
        if tries[number] <= int(number) % 4:
            raise bo.Overloaded("too much waits", retry_after_s=0.001)
        return number

    policy = bo.Retries(times=2, backoff_s=0.001)
    states = program.run_batch(ITEMS[:16], retries=policy, backend=bo.ScriptedBackend(reply))
    # a fork of two asks twice a try, so of four failures two fall into one try
    for state in states:
        assert state.num_attempts <= 3
        if state.index % 4 < 3:
            assert state.error() is None, state.index
            assert state.ret_value == 2 * state.index
    assert any(state.num_attempts > 1 for state in states)
    tries.clear()
    (state,) = program.run_batch([(3,)], backend=bo.ScriptedBackend(reply))
    assert isinstance(state.error(), bo.Overloaded)
    assert state.num_attempts == 1


def test_other_failures_are_not_tried_again() -> None:
    calls: list[str] = []

    def reply(text: str, params: object) -> str:
        calls.append(text)
        raise bo.ContextOverflow("too long")

    (state,) = doubled.run_batch([(1,)], retries=5, backend=bo.ScriptedBackend(reply))
    assert isinstance(state.error(), bo.ContextOverflow)
    assert (state.num_attempts, len(calls)) == (1, 2)


# ------------------------------------------------------------------------------------------------ on a loop


@BOTH
def test_a_batch_can_be_awaited_or_followed_on_a_loop(program: bo.Program) -> None:
    async def main() -> None:
        before = threading.active_count()
        with Slow().working(after=300) as backend:
            states = await program.arun_batch(ITEMS, max_in_flight=300, backend=backend)
            assert [state.ret_value for state in states] == [2 * i for i in range(600)]
            assert backend.most_threads <= before + 1
            assert backend.most_open >= 300
            seen = []
            async for state in program.arun_batch(ITEMS[:50], order="completion", backend=backend):
                seen.append(state.index)
            assert sorted(seen) == list(range(50))
            batch = program.arun_batch([(1,)], backend=backend)
            await batch
            with pytest.raises(bo.InvalidRequest, match="a batch is run once"):
                await batch

    asyncio.run(main())


@BOTH
def test_a_cancelled_batch_ends_what_is_in_flight(program: bo.Program) -> None:
    async def main() -> None:
        backend = bo.ScriptedBackend(echo)
        with backend.paused():
            task = asyncio.ensure_future(asyncio.wait_for(program.arun_batch(ITEMS, backend=backend), 0.05))
            with pytest.raises(asyncio.TimeoutError):
                await task
            assert len(asyncio.all_tasks()) == 1
        assert backend.stats()["num_calls"] == 0

    asyncio.run(main())


@BOTH
def test_batches_run_inside_programs(program: bo.Program) -> None:
    @bo.function
    def outer(s: bo.State, number: int) -> int:
        return sum(state.ret_value for state in [*program.run_batch(ITEMS[:number]), program.run(0)])

    expected = [sum(2 * i for i in range(number)) for number in range(6)]
    with Slow().working() as backend:
        items = [(number,) for number in range(6)]
        assert [state.ret_value for state in outer.run_batch(items, backend=backend)] == expected

        async def main() -> None:
            states = await asyncio.gather(*[outer.arun(number, backend=backend) for number in range(6)])
            assert [state.ret_value for state in states] == expected

        asyncio.run(main())


def test_the_bar_tells_speed_and_hits(capsys: pytest.CaptureFixture[str]) -> None:
    doubled.run_batch(ITEMS[:8], backend=bo.ScriptedBackend(fails_at_five), progress_bar=True)
    shown = capsys.readouterr().err
    assert "8/8" in shown
    assert "tok/s=" in shown
    assert "hits=" in shown
    assert "failed=1" in shown
