"""Thoughts and answers are parted in variables; the text stays what was generated."""

from __future__ import annotations

from typing import Any

import pytest

import bough as bo
from bough import State
from bough.reasoning import FORMATS


@pytest.mark.parametrize(
    ("model_type", "text", "reasoning", "answer"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\n42", "hm", "42"),
        ("qwen3", "<think></think>42", "", "42"),
        ("qwen3", "42", "", "42"),
        ("qwen3", "<think>cut off", "cut off", ""),
        ("qwen3", "hm</think>42", "hm", "42"),  # the template may have opened it
        ("deepseek-r1", "hm</think>42", "hm", "42"),
        ("deepseek-r1", "<think>hm</think>42", "hm", "42"),
        ("deepseek-r1", "cut off", "cut off", ""),
        ("kimi", "◁think▷hm◁/think▷42 <think>", "hm", "42 <think>"),
        (bo.ReasoningFormat("(", ")"), "(hm)42", "hm", "42"),
        (bo.ReasoningFormat("(", ")"), "So (hm) 42", "hm", "So 42"),
    ],
)
def test_a_text_is_parted(model_type: Any, text: str, reasoning: str, answer: str) -> None:
    s = State(bo.ScriptedBackend([text]))
    s += bo.user("?") + bo.assistant(bo.separate_reasoning(bo.gen("x"), model_type=model_type))
    assert (s["x_reasoning_content"], s["x"]) == (reasoning, answer)
    assert s.messages()[-1]["content"] == text
    assert s.get_meta_info("x") == s.get_meta_info("x_reasoning_content")


def test_all_gens_of_the_expression_are_parted_and_none_besides() -> None:
    s = State(bo.ScriptedBackend(["<think>1</think>a", "<think>2</think>b", "<think>3</think>c"]))
    s += bo.separate_reasoning(bo.gen("a") + " then " + bo.gen("b"), "qwen3") + bo.gen("c")
    assert [s[name] for name in ("a", "a_reasoning_content", "b", "b_reasoning_content")] == ["a", "1", "b", "2"]
    assert s["c"] == "<think>3</think>c"
    assert "c_reasoning_content" not in s


def test_samples_and_branches_are_parted_each() -> None:
    s = State(bo.ScriptedBackend(["<think>1</think>a", "b", "c", "<think>4</think>d"]))
    s += "q" + bo.separate_reasoning(bo.gen("x", n=2), "qwen3")
    assert (s["x"], s["x_reasoning_content"]) == (["a", "b"], ["1", ""])
    forks = s.fork(2)
    forks += bo.separate_reasoning(bo.gen("y"), "qwen3")
    forks.join()
    assert (s["y"], s["y_reasoning_content"]) == (["c", "d"], ["", "4"])


def test_a_stream_of_the_variable_is_its_answer() -> None:
    @bo.function
    def ask(s: State) -> None:
        s += bo.separate_reasoning(bo.gen("x"), "qwen3")

    state = ask.run(backend=bo.ScriptedBackend(["<think>hm</think>4 2"]), stream=True)
    assert "".join(state.text_iter("x")) == "4 2"
    assert "".join(state.text_iter()) == "<think>hm</think>4 2"


@pytest.mark.parametrize("expr", [None, "text", bo.gen(), bo.gen("x") + bo.gen()])
def test_each_gen_needs_a_name(expr: Any) -> None:
    with pytest.raises(bo.InvalidRequest, match="a name for each gen"):
        bo.separate_reasoning(expr, "qwen3")


def test_an_unknown_kind_of_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(bo.InvalidRequest, match=r"model_type must be one of .*qwen3.* got 'gpt-2'"):
        bo.separate_reasoning(bo.gen("x"), "gpt-2")
    with pytest.raises(bo.InvalidRequest, match="not empty"):
        bo.separate_reasoning(bo.gen("x"), bo.ReasoningFormat("", "x"))
    assert FORMATS["deepseek-r1"].is_forced


def test_a_failed_gen_fails_both_variables() -> None:
    s = State(bo.ScriptedBackend([]))
    s += bo.separate_reasoning(bo.gen("x"), "qwen3")
    for name in ("x", "x_reasoning_content"):
        with pytest.raises(bo.BackendError, match="no reply left"):
            s[name]
