"""Reasoning spans: a budget and a variable of their own, and, if asked, no place in later context."""

from __future__ import annotations

from typing import Any

import pytest

import bough as bo
from bough import State

SAID = ["17 + 25 is 42", "42", "84"]


def ask(keep: bool) -> tuple[State, bo.ScriptedBackend, list[str]]:
    seen: list[str] = []

    def reply(text: str, params: Any) -> str:
        seen.append(text)
        return SAID[len(seen) - 1]

    backend = bo.ScriptedBackend(reply)
    s = State(backend)
    s += bo.user("17 + 25?")
    s += bo.assistant(bo.think("thought", max_tokens=50, keep=keep) + "It is " + bo.gen("answer", type=int))
    s += bo.user("Twice?") + bo.assistant(bo.gen("twice", type=int))
    return s, backend, seen


def test_a_thought_is_a_variable_without_its_delimiters() -> None:
    s, _, seen = ask(keep=True)
    assert (s["thought"], s["answer"], s["twice"]) == ("17 + 25 is 42", 42, 84)
    assert "<think>17 + 25 is 42</think>It is 42" in s.text()
    assert "17 + 25 is 42" in seen[2]


def test_a_thought_that_is_not_kept_is_there_for_the_answer_and_gone_after_its_message() -> None:
    s, _, seen = ask(keep=False)
    assert (s["thought"], s["answer"], s["twice"]) == ("17 + 25 is 42", 42, 84)
    assert seen[1].endswith("assistant\n<think>17 + 25 is 42</think>It is ")
    assert "think" not in seen[2]
    assert seen[2] == s.text().removesuffix("84<|im_end|>\n")
    assert s.messages() == [
        {"role": "user", "content": "17 + 25?"},
        {"role": "assistant", "content": "It is 42"},
        {"role": "user", "content": "Twice?"},
        {"role": "assistant", "content": "84"},
    ]


def test_nothing_before_the_thought_is_computed_again() -> None:
    s, _, _ = ask(keep=False)
    s.sync()
    before = len(["<|im_start|>user", "17", "+", "25?<|im_end|>", "<|im_start|>assistant"])
    meta = s.get_meta_info("twice")
    assert meta["cached_tokens"] >= before


def test_a_budget_that_ends_closes_the_thought() -> None:
    s = State(bo.ScriptedBackend(["a b c d", "x"]))
    s += bo.think("t", max_tokens=2) + bo.gen("x")
    assert (s["t"], s.text()) == ("a b", "<think>a b</think>x")
    assert s.get_meta_info("t")["finish_reason"] == "length"


def test_outside_of_messages_a_thought_is_forgotten_with_the_end_of_its_expression() -> None:
    s = State(bo.ScriptedBackend(["a\n", "b", "c", "d", "e", "f"]))
    plain: dict[str, Any] = {"keep": False, "start": "Thoughts: ", "end": "\n"}
    s += "Q. " + bo.think("one", **plain) + bo.gen("x") + "; "
    s += bo.think("two", **plain) + bo.think("three", **plain) + bo.gen("y") + "."
    assert s.text() == "Q. b; e."
    assert [s[name] for name in ("one", "two", "three", "x", "y")] == ["a", "c", "d", "b", "e"]
    forks = s.fork(1)
    forks[0] += bo.gen("z")
    assert forks[0].text() == "Q. b; e.f"


def test_what_fails_after_a_thought_is_raised_where_it_is_read() -> None:
    s = State(bo.ScriptedBackend({"t": SAID[0]}))
    s += bo.assistant(bo.think("t", keep=False) + bo.gen("x"))
    s += "more"
    assert s["t"] == "17 + 25 is 42"
    with pytest.raises(bo.BackendError, match="no reply for 'x'"):
        s["x"]
    with pytest.raises(bo.BackendError, match="no reply for 'x'"):
        s.text()
    assert isinstance(s.error(), bo.BackendError)


def test_a_fork_inside_the_message_is_refused_while_a_thought_is_to_be_forgotten() -> None:
    s = State(bo.ScriptedBackend([SAID[0], "x"]))
    s += bo.assistant_begin() + bo.think("t", keep=False)
    with pytest.raises(bo.InvalidRequest, match="fork inside a message"):
        s.fork(2)
    s += bo.gen("x") + bo.assistant_end()
    assert s.fork(2)[0].messages() == [{"role": "assistant", "content": "x"}]


def test_cancel_reaches_a_thought() -> None:
    backend = bo.ScriptedBackend([SAID[0], "x"])
    with backend.paused():
        s = State(backend)
        s += bo.gen("first") + bo.assistant(bo.think("t", keep=False) + bo.gen("x"))
        s.cancel()
        for name in ("first", "t", "x"):
            with pytest.raises(bo.Cancelled):
                s[name]


def test_branches_are_given_back() -> None:
    s, backend, _ = ask(keep=False)
    s.sync()
    assert backend.stats()["num_branches"] == 1
    del s
    assert backend.stats()["num_branches"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"end": ""}, "end not empty"),
        ({"keep": 1}, "keep must be True or False"),
        ({"n": 2}, "n cannot go with think"),
        ({"stop": "x"}, "stop cannot go with think"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_go_with_think_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((bo.InvalidRequest, TypeError), match=words):
        bo.think("t", **options)


def test_a_thought_streams_on_its_own_without_its_delimiters() -> None:
    @bo.function
    def program(s: State) -> None:
        s += bo.assistant(bo.think("t", keep=False) + bo.gen("x"))

    state = program.run(stream=True, backend=bo.ScriptedBackend(["one two three</think> and", "four"]))
    chunks = list(state.text_iter("t"))
    assert "".join(chunks) == "one two three"
    assert len(chunks) > 1
    assert list(state.text_iter("x")) == ["four"]
