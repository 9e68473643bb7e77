"""Texts that meet a limit: read, refused, or gone on with; and typed reasons why a text ended."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest

import bough as bo
from bough.runtime import protocol

STORY = "one two three four five six seven eight nine ten"


def story(**options: Any) -> bo.Program:
    @bo.function
    def program(s: bo.State) -> None:
        s += "Count: " + bo.gen("x", **options) + " That was all."

    return program


def test_a_text_that_was_cut_is_read_or_raises_where_it_is_read() -> None:
    backend = bo.ScriptedBackend({"x": STORY})
    for options in ({}, {"on_limit": "return"}):
        state = story(max_tokens=3, **options).run(backend=backend)
        assert state["x"] == "one two three"
        assert state.get_meta_info("x")["finish_reason"] == "length"
    state = story(max_tokens=3, on_truncation="raise").run(backend=backend)
    with pytest.raises(bo.Truncated, match=r'ended by max_tokens before.*on_limit="continue"') as caught:
        state["x"]
    assert caught.value.details == {"text": "one two three", "finish_reason": "length"}
    assert state.text() == "Count: one two three That was all.", "its text goes on"
    assert state.error() is None
    assert story(max_tokens=30, on_limit="raise").run(backend=backend)["x"] == STORY


def test_each_of_n_texts_is_looked_at() -> None:
    backend = bo.ScriptedBackend({"x": ["a b", STORY]})
    with pytest.raises(bo.Truncated, match="one two three"):
        story(max_tokens=3, n=2, on_limit="raise").run(backend=backend)["x"]


def test_a_text_that_goes_on_ends_by_itself_or_by_a_stop_or_at_a_bound() -> None:
    backend = bo.ScriptedBackend({"x": STORY})
    state = story(max_tokens=3, on_limit="continue").run(backend=backend)
    assert state["x"] == STORY
    meta = state.get_meta_info("x")
    assert (meta["finish_reason"], meta["completion_tokens"]) == ("stop", 10)
    assert (
        story(max_tokens=3, on_limit="continue", stop=" nine").run(backend=backend)["x"] == STORY[: -len(" nine ten")]
    )
    endless = story(max_tokens=1, on_limit="continue").run(backend=bo.ScriptedBackend({"x": "word " * 100}))
    with pytest.raises(bo.Truncated, match=r"give more max_tokens$") as caught:
        endless["x"]
    assert len(str(caught.value.details["text"]).split()) == 16


def test_a_budget_ends_what_goes_on() -> None:
    budget = bo.Budget(max_generated=5)
    state = story(max_tokens=3, on_limit="continue").run(backend=bo.ScriptedBackend({"x": STORY}), budget=budget)
    with pytest.raises(bo.BudgetExceeded):
        state["x"]


def test_it_says_the_same_of_what_is_held_to_a_grammar() -> None:
    backend = bo.ScriptedBackend({"x": STORY})
    held = {"regex": "[a-z]+( [a-z]+){9}", "max_tokens": 3}
    with pytest.raises(bo.Truncated, match='or on_limit="close"'):
        story(**held).run(backend=backend)["x"]
    assert story(**held, on_limit="return").run(backend=backend)["x"] == "one two three"
    assert story(**held, on_limit="continue").run(backend=backend)["x"] == STORY


def test_streams_and_event_loops_see_the_same() -> None:
    backend = bo.ScriptedBackend({"x": STORY})
    state = story(max_tokens=3, on_limit="raise").run(backend=backend, stream=True)
    assert "".join(state.text_iter("x")) == "one two three"
    with pytest.raises(bo.Truncated):
        state["x"]
    assert "".join(story(max_tokens=3, on_limit="continue").run(backend=backend, stream=True).text_iter("x")) == STORY

    async def main() -> str:
        state = await story(max_tokens=3, on_limit="raise").arun(backend=backend)
        with pytest.raises(bo.Truncated):
            await state.get("x")
        return str(await (await story(max_tokens=3, on_limit="continue").arun(backend=backend)).get("x"))

    assert asyncio.run(main()) == STORY


def test_reasons_are_typed() -> None:
    assert get_args(protocol.FinishReason) == ("stop", "length", "context")


class Healing(bo.ScriptedBackend):
    """Notes whether it was to heal."""

    seen: list[bool]

    def generate(self, branch: int, params: Any, *, heal: bool = True, **more: Any) -> Any:
        self.seen.append(heal)
        return super().generate(branch, params, heal=heal, **more)


def test_healing_is_the_gens_to_switch_off() -> None:
    backend = Healing({"x": "x"})
    backend.seen = []
    for options in ({}, {"heal": True}, {"heal": False}):
        story(**options).run(backend=backend).sync()
    assert backend.seen == [True, True, False]
