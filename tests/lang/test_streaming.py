"""Streaming: every reader gets every character, in order, and the end or the error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import bough as bo
from bough.backend import Delta
from bough.runtime.protocol import SamplingParams

WAIT_S = 10.0
LONG = " ".join(f"word{i}" for i in range(400))


@bo.function
def story(s: bo.State) -> str:
    s += bo.user("Tell.") + bo.assistant("So: " + bo.gen("story", max_tokens=1000) + " The end.")
    s += bo.gen("more") + bo.select("mood", ["sad", "glad"])
    s["count"] = 3
    return "done"


def script(**more: Any) -> bo.ScriptedBackend:
    return bo.ScriptedBackend({"story": LONG, "more": "a b", "mood": "glad", **more})


def test_the_chunks_together_are_the_text() -> None:
    state = story.run(backend=script(), stream=True)
    chunks = list(state.text_iter())
    assert "".join(chunks) == state.text()
    assert len(chunks) > 400
    assert state.ret_value == "done"
    assert state["mood"] == "glad"


def test_a_variable_can_be_followed_alone() -> None:
    state = story.run(backend=script(), stream=True)
    chunks = list(state.text_iter("story"))
    assert "".join(chunks) == LONG
    assert len(chunks) == 400
    assert list(state.text_iter("mood")) == ["glad"]
    assert list(state.text_iter("count")) == ["3"]


def test_without_streaming_everything_comes_at_once() -> None:
    state = story.run(backend=script())
    assert list(state.text_iter()) == [state.text()]
    assert list(state.text_iter("story")) == [LONG]


@pytest.mark.parametrize("chunk_words", [1, 3, 1000])
def test_many_readers_lose_nothing_whatever_the_chunks(chunk_words: int) -> None:
    for _ in range(20):
        backend = bo.ScriptedBackend({"story": LONG, "more": "a b", "mood": "sad"}, chunk_words=chunk_words)
        state = story.run(backend=backend, stream=True)
        read: dict[int, str] = {}

        def follow(number: int, state: bo.State = state, read: dict[int, str] = read) -> None:
            read[number] = "".join(state.text_iter("story" if number % 2 else None))

        threads = [threading.Thread(target=follow, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert [read[i] for i in range(6)] == [state.text(), LONG] * 3


def test_readers_follow_while_the_runtime_writes() -> None:
    backend = script()
    with backend.paused():
        state = story.run(backend=backend, stream=True)
        chunks = state.text_iter()
        first: list[str] = []
        reader = threading.Thread(target=lambda: first.append(next(chunks)))
        reader.start()
        while not first:  # the body sends in its own thread: carry out what there is
            backend.step(None)
        reader.join(WAIT_S)
    assert first[0] + "".join(chunks) == state.text()


def test_async_readers_get_the_same() -> None:
    async def read() -> tuple[str, str, str]:
        state = story.run(backend=script(), stream=True)

        async def follow(name: str | None) -> str:
            return "".join([chunk async for chunk in state.text_async_iter(name)])

        text, variable = await asyncio.gather(follow(None), follow("story"))
        assert await state.aget("mood") == "glad"
        with pytest.raises(bo.UnknownVariable):
            await state.aget("nothing")
        return text, variable, state.text()

    text, variable, whole = asyncio.run(read())
    assert (text, variable) == (whole, LONG)


def test_async_readers_of_a_run_that_does_not_stream() -> None:
    async def read(name: str | None) -> list[str]:
        return [chunk async for chunk in story.run(backend=script()).text_async_iter(name)]

    assert asyncio.run(read("more")) == ["a b"]
    assert asyncio.run(read(None))[0].endswith("a bglad")


def test_a_read_of_a_running_program_waits_for_the_variable() -> None:
    go = threading.Event()

    @bo.function
    def slow(s: bo.State) -> None:
        assert go.wait(WAIT_S)
        s += bo.gen("x")

    state = slow.run(backend=bo.ScriptedBackend(["late"]), stream=True)
    threading.Timer(0.01, go.set).start()
    assert state["x"] == "late"
    with pytest.raises(bo.UnknownVariable):
        state["y"]


def test_the_body_itself_never_waits_for_what_it_has_not_assigned() -> None:
    @bo.function
    def asks(s: bo.State) -> str:
        (fork,) = s.fork()
        for state in (s, fork):
            with pytest.raises(bo.UnknownVariable):
                state["x"]
            with pytest.raises(bo.UnknownVariable):
                state.get_meta_info("x")
        return fork.text() + s.text()

    assert asks.run(backend=script(), stream=True).ret_value == ""


def test_an_exception_of_the_body_is_raised_by_reads_after_what_there_is() -> None:
    @bo.function
    def breaks(s: bo.State) -> None:
        s += "a" + bo.gen("x")
        raise LookupError("mine")

    state = breaks.run(backend=bo.ScriptedBackend(["one two"]), stream=True)
    read: list[str] = []

    def follow(chunks: Iterator[str]) -> None:
        for chunk in chunks:
            read.append(chunk)

    with pytest.raises(bo.ProgramError, match="the program raised LookupError: mine") as caught:
        follow(state.text_iter())
    assert read == ["a", "one", " two"]
    assert isinstance(caught.value.__cause__, LookupError)
    assert state["x"] == "one two"
    reads: list[Any] = [lambda: state["y"], state.text, state.messages, lambda: list(state.text_iter("y"))]
    for fails in reads:
        with pytest.raises(bo.ProgramError):
            fails()
    with pytest.raises(bo.ProgramError):
        _ = state.ret_value
    assert isinstance(state.error(), LookupError)


def test_a_backend_error_is_raised_by_the_readers() -> None:
    def reply(text: str, params: object) -> str:
        raise bo.ContextOverflow("full")

    @bo.function
    def fails(s: bo.State) -> None:
        s += "a" + bo.gen("x") + "b"

    state = fails.run(backend=bo.ScriptedBackend(reply), stream=True)
    for name in (None, "x"):
        with pytest.raises(bo.ContextOverflow):
            list(state.text_iter(name))


def test_forks_of_a_streaming_run_stream_too() -> None:
    branches: list[bo.Group] = []

    @bo.function
    def wide(s: bo.State) -> None:
        s += "p "
        forks = s.fork(3)
        branches.append(forks)
        forks += bo.gen("x")
        forks.join()

    state = wide.run(backend=bo.ScriptedBackend(lambda text, params: "a b c"), stream=True)
    assert state["x"] == ["a b c"] * 3
    assert list(branches[0][1].text_iter()) == ["p ", "a", " b", " c"]
    assert list(branches[0][1].text_iter("x")) == ["a", " b", " c"]


def test_deltas_carry_token_ids_and_log_probabilities() -> None:
    backend = bo.ScriptedBackend([LONG], chunk_words=7)
    deltas: list[Delta] = []
    branch = backend.open()
    done = backend.generate(branch, SamplingParams(max_tokens=1000, logprobs=0), on_delta=deltas.append).result()
    assert "".join(delta.text for delta in deltas) == done.text
    assert [token for delta in deltas for token in delta.token_ids] == done.token_ids
    assert [token for delta in deltas for token in delta.logprobs or ()] == done.logprobs


# ------------------------------------------------------------------------------------------------ with meta information


def test_pieces_come_with_what_is_known_by_then() -> None:
    @bo.function
    def program(s: bo.State) -> None:
        s += "Count: " + bo.gen("x", return_logprob=True) + bo.select("y", ["a", "b"])
        s["z"] = "plain"

    async def pairs(name: str, *, stream: bool) -> tuple[list[Any], Any]:
        state = await program.arun(backend=bo.ScriptedBackend({"x": "one two three", "y": "b"}), stream=stream)
        return [pair async for pair in state.text_async_iter(name, return_meta_data=True)], state

    streamed, state = asyncio.run(pairs("x", stream=True))
    assert "".join(text for text, _ in streamed) == "one two three"
    *parts, (left, last) = streamed
    assert [text for text, _ in parts] == ["one", " two", " three"]
    assert left == ""
    assert [meta["completion_tokens"] for _, meta in parts] == [1, 2, 3]
    assert {meta["finish_reason"] for _, meta in parts} == {None}
    assert [token for _, meta in parts for token in meta["token_ids"]] == last["token_ids"]
    assert [token for _, meta in parts for token in meta["output_token_logprobs"]] == last["output_token_logprobs"]
    assert last == state.get_meta_info("x")
    assert last["finish_reason"] == "stop"

    ((text, meta),), state = asyncio.run(pairs("y", stream=True))
    assert (text, meta) == (state["y"], state.get_meta_info("y"))
    ((text, meta),), state = asyncio.run(pairs("x", stream=False))
    assert (text, meta) == ("one two three", state.get_meta_info("x"))
    for stream in (True, False):
        with pytest.raises(bo.InvalidRequest, match="'z' is not the result of a gen"):
            asyncio.run(pairs("z", stream=stream))
    with pytest.raises(bo.InvalidRequest, match="return_meta_data needs the name"):
        state.text_async_iter(None, return_meta_data=True)
