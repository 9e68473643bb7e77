"""What a turn with tools may say: anything but calls that cannot be carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import bough as bo
from bough.tool_formats import template_calls, text_calls
from bough.toolbox import Toolbox


def calculator(expression: str) -> int:
    """Computes a number."""
    return 3


def wait(days: int) -> str:
    """Waits."""
    return "done"


def now() -> str:
    """Tells the time."""
    return "noon"


def weather(city: str, days: int = 1) -> str:
    """Tells the weather."""
    return "sun"


TOOLS: list[Callable[..., Any]] = [calculator, wait, now, weather]


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "48",
        "Thought: I add.\nAction: calculator[1 + 2]",
        "Action: calculator[list[0]]",
        "Action: wait[3]",
        "Action: now[]\nAction: wait[2]",
        'Well.\nAction: weather[{"city": "Oslo", "days": 2}]',
        'Action: now[]\nAction: weather[{"city": "Oslo"}]\nAction: weather[{"city": "Rome"}]\nAction: wait[1]',
        "Answer: All of it\n\nAnd more. Actors act.",
    ],
)
def test_text_and_calls_that_fit_may_be_written(turn: str) -> None:
    box = Toolbox(TOOLS, "text")
    assert box.grammar().match(turn) is not None
    assert all(result.error is None for result in box.call(text_calls(turn)))


@pytest.mark.parametrize(
    ("turn", "good"),
    [
        ("Action: fly[away]", "Action: "),
        ("Thought: x\nAction: wait[soon]", "Thought: x\nAction: wait["),
        ("Action: now[now]", "Action: now["),
        ('Action: weather[{"town": "Oslo"}]', 'Action: weather[{"'),
        ("Action: weather[Oslo]", "Action: weather["),
        ("Action : now[]", "Action"),
    ],
)
def test_calls_that_do_not_fit_are_stopped_where_they_stop_to_fit(turn: str, good: str) -> None:
    grammar = Toolbox(TOOLS, "text").grammar()
    assert grammar.match(turn) is None
    assert turn[: grammar.partial(turn)] == good


def test_calls_in_tags() -> None:
    box = Toolbox(TOOLS, "template")
    grammar = box.grammar()
    for turn in (
        "Just words.",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "wait", "arguments": {"days": 2}}</tool_call>',
    ):
        assert grammar.match(turn) is not None, turn
        assert all(result.error is None for result in box.call(template_calls(turn)))
    for turn in (
        '<tool_call>{"name": "fly"',
        "<tool_call>weather",
        '<tool_call>{"name": "now", "arguments": {"x": 1}}',
    ):
        assert grammar.partial(turn) < len(turn), turn


class Noting(bo.ScriptedBackend):
    """Notes the grammars, and says that it has them."""

    def __init__(self, replies: Any) -> None:
        super().__init__(replies)
        self.seen: list[Any] = []

    def generate(self, branch: int, params: Any, *, grammar: Any = None, **more: Any) -> Any:
        self.seen.append(grammar)
        return super().generate(branch, params, grammar=grammar, **more)

    def server_info(self) -> dict[str, object]:
        return {**super().server_info(), "has_grammars": True}


def agent(backend: bo.ScriptedBackend, **options: Any) -> Any:
    s = bo.State(backend)
    s.tools(TOOLS)
    s += bo.user("?")
    return s.run_tools(name="answer", **options)


def test_turns_are_held_to_it_where_the_backend_can_unless_told_otherwise() -> None:
    turns = {"answer": ["Action: now[]", "Answer: noon"]}
    backend = Noting(turns)
    assert agent(backend).answer == "noon"
    assert [grammar.kind for grammar in backend.seen] == ["lark", "lark"]
    for options in ({"constrain": False}, {"regex": "(?s:.*)"}):
        backend = Noting(turns)
        assert agent(backend, **options).answer == "noon"
        assert {grammar and grammar.kind for grammar in backend.seen} <= {None, "regex"}
    script = bo.ScriptedBackend({"answer": ["Action: fly[]", "Answer: no"]})
    assert agent(script).answer == "no", "a script says what it says"
    with pytest.raises(bo.BackendError, match="from 'fly"):
        agent(bo.ScriptedBackend({"answer": ["Action: fly[]"]}), constrain=True)
    with pytest.raises(bo.InvalidRequest, match="constrain must be"):
        agent(script, constrain="yes")


def test_a_call_that_is_cut_is_no_answer() -> None:
    with pytest.raises(bo.Truncated, match="ended by max_tokens"):
        agent(Noting({"answer": ["Action: calculator[1 + 2]"]}), max_tokens=3)
