"""The tool loop on the bundled model, which was trained on calculator and lookup lines."""

from __future__ import annotations

from typing import Any

import pytest
from processes import within

import bough as bo

FACTS = {"price of the lamp": "36", "city of Mara": "Oslo"}


def calculator(expression: str) -> int:
    """computes a number"""
    left, sign, right = expression.split()
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


def lookup(key: str) -> str:
    """finds a fact"""
    return FACTS.get(key.strip(), "not found")


@bo.function
def agent(s: bo.State, question: str) -> Any:
    s.tools([calculator, lookup])
    s += bo.user(question)
    return s.run_tools(name="answer", max_rounds=4, max_tokens=48)


@pytest.mark.parametrize(
    ("question", "calls", "answer"),
    [
        ("What is 17 + 25?", ["calculator"], "42"),
        ("Where does Mara live?", ["lookup"], "Oslo"),
        ("What is the price of the lamp plus 12?", ["lookup", "calculator"], "48"),
        ("What is the job of Tom?", ["lookup"], "I do not know"),
    ],
)
def test_the_bundled_model_uses_its_tools(pocket: bo.Runtime, question: str, calls: list[str], answer: str) -> None:
    state = within(30, lambda: agent.run(question, temperature=0, backend=pocket))
    assert [result.call.name for result in state.ret_value.results] == calls
    assert state["answer"] == answer
