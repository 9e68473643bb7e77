"""The event log: everything once, in one order, for every reader, to the last event."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest

import bough as bo
from bough.runtime.protocol import SamplingParams

WAIT_S = 10.0
LONG = " ".join(f"word{i}" for i in range(200))


@bo.function
def inside(s: bo.State) -> None:
    s += "inner " + bo.gen("deep")


@bo.function
def tree(s: bo.State) -> str:
    s += bo.user("Tell.") + bo.assistant("So: " + bo.gen("story", max_tokens=1000, return_logprob=True))
    forks = s.fork(2)
    forks += bo.gen("more")
    forks.join()
    s += bo.gen("two", n=2) + bo.select("mood", ["sad", "glad"])
    s["inner"] = inside.run()["deep"]
    return str(s["mood"])


def script() -> bo.ScriptedBackend:
    return bo.ScriptedBackend({"story": LONG, "more": "a b", "mood": "glad", "deep": "d", "two": "2"}, chunk_words=3)


def test_the_log_of_a_run_holds_everything_in_order() -> None:
    state = tree.run(backend=script(), events=True)
    events = list(state.events())
    assert [event.seq for event in events] == list(range(len(events)))
    assert [event.time for event in events] == sorted(event.time for event in events)
    kinds = Counter(event.kind for event in events)
    assert kinds["start"] == kinds["end"] + kinds["choice"] == 7
    assert (events[0].kind, events[-1].kind) == ("begin", "finish")
    texts = "".join(event.text for event in events if event.kind in ("text", "delta", "choice") and not event.run)
    story = next(event for event in events if event.kind == "end" and event.variable == "story")
    deltas = [event for event in events if event.kind == "delta" and event.variable == "story"]
    assert "".join(event.text for event in deltas) == story.text == LONG
    assert [token for event in deltas for token in event.token_ids] == list(story.token_ids)
    assert [token for event in deltas for token in event.logprobs or ()] == list(story.logprobs or ())
    assert texts.startswith("<|im_start|>user\nTell.<|im_end|>\n<|im_start|>assistant\nSo: word0")
    assert story.finish_reason == "stop"
    assert story.usage is not None
    assert story.usage.completion_tokens == len(deltas) * 3 - 1


def test_events_name_their_branch_and_run() -> None:
    state = tree.run(backend=script(), events=True)
    events = list(state.events())
    assert [event.children for event in events if event.kind == "fork"] == [[(0,), (1,)], [(2,), (3,)]]
    assert {event.branch for event in events if event.variable == "more"} == {(0,), (1,)}
    assert {event.branch for event in events if event.variable == "two"} == {(2,), (3,)}
    assert state.path == (2,), "after a gen with n > 1 the state goes on with the first"
    assert {event.branch for event in events if event.variable == "mood"} == {(2,)}
    assert {event.run for event in events if event.variable == "deep"} == {1}
    forks = state.fork(2)
    assert [fork.path for fork in forks] == [(2, 0), (2, 1)]


def test_many_readers_from_any_number_get_every_event_of_a_stream() -> None:
    for _ in range(10):
        state = tree.run(backend=script(), stream=True)
        read: dict[int, list[bo.Event]] = {}

        def follow(start: int, state: bo.State = state, read: dict[int, list[bo.Event]] = read) -> None:
            read[start] = list(state.events(start))

        threads = [threading.Thread(target=follow, args=(start,)) for start in (0, 1, 5, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for start, events in read.items():
            assert events == read[0][start:]
        assert read[0][-1].kind == "finish"
        assert state["mood"] == "glad"


def test_a_reader_sees_events_while_the_backend_writes() -> None:
    backend = script()
    with backend.paused():
        state = tree.run(backend=backend, stream=True)
        events = state.events()
        seen: list[bo.Event] = []
        reader = threading.Thread(target=lambda: seen.extend(event for _, event in zip(range(5), events, strict=False)))
        reader.start()
        while len(seen) < 5:
            backend.step(None)
        reader.join(WAIT_S)
    assert [event.seq for event in seen] == [0, 1, 2, 3, 4]


def test_async_readers_get_the_same() -> None:
    async def read() -> tuple[list[bo.Event], list[bo.Event]]:
        state = tree.run(backend=script(), stream=True)

        async def follow(start: int) -> list[bo.Event]:
            return [event async for event in state.aevents(start)]

        whole, tail = await asyncio.gather(follow(0), follow(7))
        return whole, tail

    whole, tail = asyncio.run(read())
    assert whole[7:] == tail
    assert whole[-1].kind == "finish"


def test_a_rewind_is_one_and_no_fork() -> None:
    @bo.function
    def back(s: bo.State) -> None:
        s += "a b " + bo.gen("x")
        s["x"]
        mark = s.checkpoint()
        s += " c " + bo.gen("y")
        s["y"]
        s.rewind(mark)
        s += " d " + bo.gen("z")
        s += bo.user("?") + bo.assistant(bo.think("t", keep=False, start="(", end=")") + bo.gen("last"))
        s.text()

    state = back.run(backend=bo.ScriptedBackend(["one", "two", "three", "so so", "four"]), events=True)
    events = list(state.events())
    rewinds = [event for event in events if event.kind == "rewind"]
    x, y, z, t, last = (event for event in events if event.kind == "end")
    first, thought = rewinds
    assert (first.branch, first.children, first.length) == (y.branch, [z.branch], x.length)
    assert t.branch == last.branch
    assert (thought.branch, thought.length) == (t.branch, (t.length or 0) - 3)
    assert list(thought.children) == [z.branch], "it goes on where it was before the thought"
    assert sum(event.kind == "fork" for event in events) == 2, "the checkpoint's, and the thought's own branch"
    assert state.usage.rewound_tokens == 2 + 4  # c, two; (, so, so, )


def test_failures_and_cancels_are_events_and_end_the_log() -> None:
    def failing(text: str, params: SamplingParams) -> str:
        raise bo.ContextOverflow("too long")

    @bo.function
    def bad(s: bo.State) -> None:
        s += bo.gen("x")
        s.cancel()
        raise ZeroDivisionError("mine")

    state = bad.run(backend=bo.ScriptedBackend(failing), stream=True)
    events = list(state.events())
    assert [event.kind for event in events] == ["begin", "start", "error", "cancel", "finish"]
    assert isinstance(events[2].error, bo.ContextOverflow)
    assert isinstance(events[-1].error, ZeroDivisionError)


def test_what_is_appended_after_the_run_can_be_read_from_there_on() -> None:
    state = tree.run(backend=script(), events=True)
    length = len(list(state.events()))
    state += bo.gen("deep")
    assert [event.kind for event in state.events(length)] == ["start", "delta", "end"]


def test_a_run_that_nobody_watches_keeps_no_events_and_wraps_nothing() -> None:
    backend = script()
    state = tree.run(backend=backend)
    with pytest.raises(bo.InvalidRequest, match="events=True or stream=True"):
        state.events()
    assert state._interpreter.backend is backend
    with pytest.raises(bo.InvalidRequest, match="events must be True or False, got 3"):
        tree.run(backend=backend, events=3)


def test_a_programs_own_parameter_of_such_a_name_is_its_own() -> None:
    @bo.function
    def plan(s: bo.State, events: str, budget: int) -> None:
        s += f"{events} {budget}"

    assert plan.run(events="party", budget=3, backend=script()).text() == "party 3"


def test_the_log_shows_what_a_read_needed_before_it_returns() -> None:
    seen: list[Any] = []

    @bo.function
    def asks(s: bo.State) -> None:
        s += bo.gen("deep")
        s["deep"]
        seen.extend(event.kind for event, _ in zip(s.events(), range(4), strict=False))

    asks.run(backend=script(), events=True)
    assert seen == ["begin", "start", "delta", "end"]
