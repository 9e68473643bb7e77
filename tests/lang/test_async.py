"""Programs on an event loop: `async def` or not, they wait without a thread and without stopping the loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

import bough as bo

T = TypeVar("T")


def script(**replies: Any) -> bo.ScriptedBackend:
    return bo.ScriptedBackend({"x": "one", "y": "two", **replies})


async def while_it_waits(backend: bo.ScriptedBackend, awaited: Coroutine[Any, Any, T]) -> T:
    """Await something on a backend that carries out its calls only while the loop is free."""
    with backend.paused():
        task = asyncio.ensure_future(awaited)
        while not task.done():
            await asyncio.sleep(0)
            backend.step()
    return await task


@bo.function
def sequential(s: bo.State, question: str = "why?") -> str:
    s += bo.user(question)
    s += bo.assistant(bo.gen("x"))
    s += bo.user(f"{s['x']}?")
    forks = s.fork(3)
    forks += bo.assistant(bo.gen("y"))
    forks.join()
    return f"{s['x']} {s['y']} {s.text().count(question)}"


@bo.function
async def awaiting(s: bo.State, question: str = "why?") -> str:
    s += bo.user(question)
    s += bo.assistant(bo.gen("x"))
    s += bo.user(f"{await s.get('x')}?")
    forks = s.fork(3)
    forks += bo.assistant(bo.gen("y"))
    await forks.ajoin()
    return f"{await s.aget('x')} {await s.get('y')} {(await s.atext()).count(question)}"


@bo.function
async def reading(s: bo.State, question: str = "why?") -> str:
    await asyncio.sleep(0)
    s += bo.user(question)
    s += bo.assistant(bo.gen("x"))
    s += bo.user(f"{s['x']}?")
    with s.copy() as c:
        c += bo.assistant(bo.gen("y"))
    forks = s.fork(3)
    forks += bo.assistant(bo.gen("y"))
    forks.join()
    return f"{s['x']} {s['y']} {s.text().count(question)}"


ALL = pytest.mark.parametrize("program", [sequential, awaiting, reading], ids=lambda program: str(program.__name__))
ANSWER = "one ['two', 'two', 'two'] 1"


@ALL
def test_a_program_waits_without_stopping_the_loop(program: bo.Program) -> None:
    async def main() -> None:
        backend = script()
        state = await while_it_waits(backend, program.arun(backend=backend))
        assert state.ret_value == ANSWER
        assert await state.atext() == state.text()

    asyncio.run(main())


@ALL
def test_a_program_runs_from_plain_code_too(program: bo.Program) -> None:
    assert program.run(backend=script()).ret_value == ANSWER
    state = program.run(backend=script(), stream=True)
    assert "".join(state.text_iter()) == state.text()
    assert state.ret_value == ANSWER


@ALL
def test_many_programs_share_one_loop_and_one_thread(program: bo.Program) -> None:
    async def main() -> None:
        backend, before = script(), threading.active_count()
        runs = [program.arun(f"question {i}", backend=backend) for i in range(50)]

        async def together() -> list[bo.State]:
            return await asyncio.gather(*runs)

        states = await while_it_waits(backend, together())
        assert [state.ret_value for state in states] == [ANSWER] * 50
        assert threading.active_count() == before
        assert states[7].messages()[0]["content"] == "question 7"

    asyncio.run(main())


def test_every_read_has_an_awaitable_form() -> None:
    async def main() -> None:
        backend = script()
        state = await sequential.arun(backend=backend)

        async def read() -> list[Any]:
            await state.async_()
            return [
                await state.get("x"), await state.aget("y"), await state.atext(), await state.amessages(),
                await state.aerror(), await state.aret_value(), await state.atree(),
                (await state.aget_meta_info("x"))["finish_reason"], [chunk async for chunk in state.text_async_iter()],
            ]  # fmt: skip

        assert await while_it_waits(backend, read()) == [
            state["x"], state["y"], state.text(), state.messages(),
            state.error(), state.ret_value, state.tree(),
            state.get_meta_info("x")["finish_reason"], [state.text()],
        ]  # fmt: skip
        with pytest.raises(bo.UnknownVariable):
            await state.get("nothing")

    asyncio.run(main())


def test_looking_ahead_and_editing_leave_the_loop_free() -> None:
    backend = bo.ScriptedBackend(lambda text, params: f"{len(text)} words")

    async def look(s: bo.State) -> str:
        with pytest.raises(bo.InvalidRequest, match="does not tell the entropy"):
            await s.aentropy()
        ((likeliest, _, _),) = await s.apeek(1)
        return likeliest

    async def edit(s: bo.State) -> str:
        await s.adrop(aside)
        await s.areplace(page, "short ")
        return await s.atext()

    s = bo.State(backend)
    s += "page: "
    with s.checkpoint() as page:
        s += "a long one "
    with s.checkpoint() as aside:
        s += "(by the way) "
    so_far = len("page: a long one (by the way) ")
    assert asyncio.run(while_it_waits(backend, look(s))) == str(so_far)
    s += bo.gen("x")
    assert asyncio.run(while_it_waits(backend, edit(s))) == f"page: short {so_far} words"


def test_failures_are_raised_where_they_are_awaited() -> None:
    def fails(text: str, params: object) -> str:
        raise bo.ContextOverflow("full")

    @bo.function
    async def tolerant(s: bo.State) -> str:
        s += "a" + bo.gen("x")
        with pytest.raises(bo.ContextOverflow):
            await s.get("x")
        with pytest.raises(bo.ContextOverflow):
            s["x"]
        with pytest.raises(bo.ContextOverflow):
            await s.atext()
        assert isinstance(await s.aerror(), bo.ContextOverflow)
        raise LookupError("mine")

    async def main() -> None:
        backend = bo.ScriptedBackend(fails)
        with pytest.raises(LookupError, match="mine"):
            await while_it_waits(backend, tolerant.arun(backend=backend))

    asyncio.run(main())


# ------------------------------------------------------------------------------------------------ what may block


def test_a_task_of_an_async_program_must_await_and_is_told_so() -> None:
    @bo.function
    async def parallel(s: bo.State) -> list[str]:
        for _ in range(9):  # the backend carries out one call a turn of the loop
            s += bo.gen("y")
        s += bo.gen("x")

        async def impatient() -> str:
            return str(s["x"])

        async def patient() -> str:
            return str(await s.get("x"))

        with pytest.raises(bo.BlockingRead, match=r"await s\.get\(name\)"):
            await asyncio.gather(impatient())
        found = await asyncio.gather(patient(), asyncio.to_thread(lambda: s["x"]))
        return [*found, *await asyncio.gather(impatient())]  # it is there now

    async def main() -> None:
        backend = script()
        state = await while_it_waits(backend, parallel.arun(backend=backend))
        assert state.ret_value == ["one"] * 3

    asyncio.run(main())


def test_plain_code_in_a_running_loop_works_as_anywhere() -> None:
    async def main() -> None:
        assert sequential.run(backend=script()).ret_value == ANSWER
        state = sequential.run(backend=script(), stream=True)
        assert "".join(state.text_iter()) == state.text()
        with pytest.raises(bo.InvalidRequest, match=r"use `await awaiting\.arun\(\.\.\.\)`, not run"):
            awaiting.run(backend=script())

    asyncio.run(main())


def test_programs_of_both_kinds_run_each_other() -> None:
    @bo.function
    async def outer_async(s: bo.State) -> tuple[Any, ...]:
        return (await sequential.arun()).ret_value, sequential.run().ret_value, awaiting.run().ret_value

    @bo.function
    def outer(s: bo.State) -> tuple[Any, ...]:
        return sequential.run().ret_value, awaiting.run().ret_value, outer_async.run().ret_value

    expected = (ANSWER, ANSWER, (ANSWER, ANSWER, ANSWER))

    async def main() -> None:
        backend = script()
        state = await while_it_waits(backend, outer.arun(backend=backend))
        assert state.ret_value == expected

    asyncio.run(main())
    assert outer.run(backend=script()).ret_value == expected


# ------------------------------------------------------------------------------------------------ streams


@ALL
def test_a_stream_on_the_loop_can_be_followed_by_many(program: bo.Program) -> None:
    async def main() -> None:
        backend, before = script(), threading.active_count()

        async def follow() -> tuple[str, str, str]:
            state = await program.arun(backend=backend, stream=True)

            async def chunks(name: str | None) -> str:
                return "".join([chunk async for chunk in state.text_async_iter(name)])

            followed = await asyncio.gather(chunks(None), chunks(None), chunks("x"))
            assert await state.aret_value() == ANSWER
            assert followed[0] == await state.atext()
            return followed

        whole, again, variable = await while_it_waits(backend, follow())
        assert whole == again
        assert variable == "one"
        assert threading.active_count() == before

    asyncio.run(main())


def test_what_a_loop_has_to_bring_about_is_not_waited_for_on_its_own_thread() -> None:
    async def main() -> None:
        backend = script()
        state = await sequential.arun(backend=backend, stream=True)
        reads: list[Any] = [
            lambda: state["x"], state.text, state.messages, state.sync, state.error, state.tree,
            lambda: state.ret_value, lambda: list(state.text_iter()), lambda: state.get_meta_info("x"),
        ]  # fmt: skip
        for read in reads:
            with pytest.raises(bo.BlockingRead):
                read()
        assert await asyncio.to_thread(lambda: state.ret_value) == ANSWER
        assert state["x"] == "one"

    asyncio.run(main())


def test_a_stream_tells_how_its_body_ended() -> None:
    @bo.function
    async def breaks(s: bo.State) -> None:
        s += "a" + bo.gen("x")
        await s.get("x")
        raise LookupError("mine")

    async def main() -> None:
        backend, read = script(), []
        state = await breaks.arun(backend=backend, stream=True)

        async def follow() -> None:
            async for chunk in state.text_async_iter():
                read.append(chunk)

        with pytest.raises(bo.ProgramError, match="the program raised LookupError: mine"):
            await follow()
        assert read == ["a", "one"]
        assert isinstance(await state.aerror(), LookupError)
        with pytest.raises(TypeError):
            await breaks.arun("too", "many", backend=backend, stream=True)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_follows_itself_gets_what_it_has_appended(stream: bool) -> None:
    @bo.function
    def follows(s: bo.State) -> str:
        s += "a " + bo.gen("x")
        return "".join(s.text_iter()) + "".join(s.text_iter("x"))

    @bo.function
    async def follows_async(s: bo.State) -> str:
        s += "a " + bo.gen("x")
        return "".join([c async for c in s.text_async_iter()]) + "".join([c async for c in s.text_async_iter("x")])

    async def main(program: bo.Program) -> None:
        backend = script()

        async def ask() -> Any:
            return await (await program.arun(backend=backend, stream=stream)).aret_value()

        assert await while_it_waits(backend, ask()) == "a oneone"

    for program in (follows, follows_async):
        asyncio.run(main(program))
        assert program.run(backend=script(), stream=stream).ret_value == "a oneone"


# ------------------------------------------------------------------------------------------------ contexts, ends


def test_each_body_has_the_context_of_its_task() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")

    @bo.function
    def asks(s: bo.State, name: str) -> list[str]:
        seen = [who.get()]
        who.set(name)
        s += bo.gen("x")
        s["x"]
        return [*seen, who.get()]

    async def main() -> None:
        backend = script()

        async def all_of_them() -> list[bo.State]:
            async def one(name: str) -> bo.State:
                state = await asks.arun(name, backend=backend)
                assert who.get() == name  # as what a coroutine sets is there once it was awaited
                return state

            return await asyncio.gather(*map(one, "abcde"))

        states = await while_it_waits(backend, all_of_them())
        assert [state.ret_value for state in states] == [["nobody", name] for name in "abcde"]
        assert who.get() == "nobody"

    asyncio.run(main())


def test_bodies_on_one_loop_keep_their_own_default_backend() -> None:
    @bo.function
    def nested(s: bo.State) -> Any:
        s += bo.gen("x")
        s["x"]
        return sequential.run().ret_value

    async def main() -> None:
        backends = [script(x=str(i)) for i in range(5)]

        async def all_of_them() -> list[bo.State]:
            return await asyncio.gather(*[nested.arun(backend=backend) for backend in backends])

        states = await all_of_them()
        assert [state.ret_value.split()[0] for state in states] == list("01234")

    asyncio.run(main())


@ALL
def test_a_cancelled_task_ends_its_program_where_it_waits(program: bo.Program) -> None:
    async def main() -> None:
        backend = script()
        with backend.paused():
            task = asyncio.ensure_future(program.arun(backend=backend))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert backend.stats()["num_calls"] == 0, "what was under way was cancelled with the task"

    asyncio.run(main())


@pytest.mark.parametrize("awaits", [True, False])
def test_a_timeout_of_the_loop_ends_a_read(awaits: bool) -> None:
    @bo.function
    async def hasty(s: bo.State) -> str:
        s += bo.gen("x")

        async def read() -> Any:
            return await s.get("x")

        try:
            await asyncio.wait_for(read(), 0.01) if awaits else await asyncio.wait_for(asyncio.sleep(9), 0.01)
        except asyncio.TimeoutError:
            return "late"
        return "soon"

    async def main() -> None:
        backend = script()
        with backend.paused():
            state = await hasty.arun(backend=backend)
            assert state.ret_value == "late"

    asyncio.run(main())


def test_a_loop_that_ends_early_leaves_nobody_waiting() -> None:
    backend = script()
    seen: list[str] = []

    @bo.function
    def interrupted(s: bo.State) -> None:
        s += bo.gen("x")
        try:
            s["x"]
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main() -> bo.State:
        state = await interrupted.arun(backend=backend, stream=True)
        await asyncio.sleep(0.01)
        return state

    with backend.paused():
        state = asyncio.run(main())
        assert seen == ["cancelled"]
        assert isinstance(state.error(), asyncio.CancelledError)
        with pytest.raises(bo.ProgramError):
            state["y"]
        with pytest.raises(bo.Cancelled):
            state["x"]


# ------------------------------------------------------------------------------------------------ how many


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


@pytest.mark.parametrize("program", [sequential, awaiting], ids=["def", "async def"])
def test_ten_thousand_live_branches_on_one_loop(program: bo.Program) -> None:
    """2,500 programs, each with a trunk and three forks, wait at once for their drafts, in one thread."""
    num_programs = 2500

    async def main() -> None:
        backend, before, memory = script(), threading.active_count(), resident_kb()
        with backend.paused():
            runs = [asyncio.ensure_future(program.arun(f"question {i}", backend=backend)) for i in range(num_programs)]
            most_branches = most_kb = 0
            while not all(run.done() for run in runs):
                await asyncio.sleep(0)
                most_branches = max(most_branches, int(backend.stats()["num_branches"]))
                most_kb = max(most_kb, resident_kb() - memory)
                assert threading.active_count() == before
                backend.step(None)
        assert most_branches == 4 * num_programs
        assert most_kb / num_programs < 100
        assert {run.result().ret_value for run in runs} == {ANSWER}

    asyncio.run(main())
