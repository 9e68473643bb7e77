"""A state: text, variables, roles, scopes, and when what is sent."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bough as bo
from bough import State
from bough.runtime import protocol


class Recorder(bo.ScriptedBackend):
    """A script that remembers every extend."""

    def __init__(self, replies: Any = "ok") -> None:
        super().__init__((lambda text, params: replies) if isinstance(replies, str) else replies)
        self.extends: list[list[protocol.Part]] = []
        self.released: list[int] = []

    def extend(self, branch: int, parts: Any, *, commit: bool = False) -> Any:
        self.extends.append(list(parts))
        return super().extend(branch, parts, commit=commit)

    def release(self, branches: Any) -> None:
        self.released += branches
        super().release(branches)


def fail_after(s: State, appended: Any, error: Exception) -> None:
    s += appended
    raise error


def test_text_is_what_was_appended_rendered_and_generated() -> None:
    s = State(Recorder("42"))
    s += bo.system("Be brief.")
    s += bo.user("6 * 7?")
    s += bo.assistant("It is " + bo.gen("n") + ".")
    assert s["n"] == "42"
    assert s.text() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6 * 7?<|im_end|>\n"
        "<|im_start|>assistant\nIt is 42.<|im_end|>\n"
    )
    assert s.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "It is 42."},
    ]


def test_neighbouring_text_and_roles_are_sent_once_and_only_when_needed() -> None:
    backend = Recorder()
    s = State(backend)
    for word in ("a", "", "b", "c"):
        s += word
    s += bo.user("hi" + " there")
    assert backend.extends == []
    s += bo.gen("x") + "tail"
    assert backend.extends == [
        [protocol.Text("abc"), protocol.RoleBegin("user"), protocol.Text("hi there"), protocol.RoleEnd()]
    ]
    assert s["x"] == "ok"
    assert len(backend.extends) == 1  # reading a variable needs no more
    assert s.text().endswith("oktail")
    assert backend.extends[1:] == [[protocol.Text("tail")]]
    s.text()
    assert len(backend.extends) == 2  # nothing is sent twice


def test_an_unused_state_opens_no_branch() -> None:
    backend = Recorder()
    s = State(backend)
    s += "never needed"
    del s
    assert backend.stats()["num_branches"] == 0


def test_fifty_gens_send_each_character_once() -> None:
    backend = Recorder("reply")
    s = State(backend)
    for turn in range(50):
        s += bo.user(f"question {turn} " + "x" * 100)
        s += bo.assistant(bo.gen(f"a{turn}"))
    s.sync()
    sent = sum(len(part.text) for parts in backend.extends for part in parts if isinstance(part, protocol.Text))
    assert sent == sum(len(f"question {turn} ") + 100 for turn in range(50))


@given(st.lists(st.sampled_from(["a", " b", "\n", "", "xyz"]), max_size=12), st.integers(0, 12))
def test_text_does_not_depend_on_how_it_is_split(words: list[str], at: int) -> None:
    split, whole = Recorder(), Recorder()
    one, other = State(split), State(whole)
    for word in words:
        one += word
    other += "".join(words[:at]) + "".join(words[at:])
    one += bo.gen("x")
    other += bo.gen("x")
    assert one.text() == other.text() == "".join(words) + "ok"
    assert split.extends == whole.extends


def test_variables_are_assigned_read_and_asked_for() -> None:
    s = State(Recorder())
    s += bo.gen("x")
    s["y"] = 3
    s.set_var("z", None)
    assert ("x" in s, "y" in s, "w" in s) == (True, True, False)
    assert (s["x"], s.get_var("y"), s["z"]) == ("ok", 3, None)
    with pytest.raises(bo.InvalidRequest, match="variable's name"):
        s[""] = 1


def test_an_unknown_variable_is_told_at_once_with_those_that_are_known() -> None:
    s = State(Recorder())
    s += bo.gen("x")
    with pytest.raises(bo.UnknownVariable, match=r"no variable 'y' .* assigned: x") as caught:
        s["y"]
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, bo.InvalidRequest)
    with pytest.raises(bo.UnknownVariable):
        s.get_meta_info("y")


def test_of_two_gens_with_one_name_the_last_wins_and_an_unnamed_one_only_adds_text() -> None:
    s = State(bo.ScriptedBackend(["1", "2", "3"]))
    s += bo.gen("x") + bo.gen("x") + bo.gen()
    assert s["x"] == "2"
    assert s.text() == "123"


@pytest.mark.parametrize("wrong", [None, 3, b"x", ["a"], object()])
def test_what_cannot_be_appended_is_refused_at_once(wrong: Any) -> None:
    s = State(Recorder())
    with pytest.raises(bo.InvalidRequest, match="only text and expressions"):
        s += wrong
    assert s.text() == ""


def test_n_gives_a_list_and_the_text_goes_on_with_the_first() -> None:
    backend = Recorder(["a", "b", "c", "next"])
    s = State(backend)
    s += "draft: " + bo.gen("x", n=3, seed=5) + " then " + bo.gen("y")
    assert s["x"] == ["a", "b", "c"]
    assert s["y"] == "next"
    assert s.text() == "draft: a then next"
    assert [meta["finish_reason"] for meta in s.get_meta_info("x")] == ["stop"] * 3
    del s
    assert backend.stats()["num_branches"] == 0


def test_each_of_n_draws_with_a_seed_of_its_own() -> None:
    seeds: list[int | None] = []

    def reply(text: str, params: protocol.SamplingParams) -> str:
        seeds.append(params.seed)
        return "ok"

    s = State(bo.ScriptedBackend(reply))
    s += bo.gen("x", n=3, seed=7)
    s.sync()
    assert seeds == [7, 8, 9]


def test_meta_info_tells_cost_end_and_logprobs() -> None:
    s = State(bo.ScriptedBackend(["one two three\nfour", "a b c d"]))
    s += "some prompt " + bo.gen("x", stop="\n", return_logprob=True, top_logprobs_num=1)
    s += bo.gen("y", max_tokens=2)
    meta = s.get_meta_info("x")
    assert meta["prompt_tokens"] == meta["cached_tokens"] + meta["computed_tokens"] == 2
    assert meta["completion_tokens"] == 3
    assert (meta["finish_reason"], meta["matched_stop"]) == ("stop", "\n")
    assert {"ttft_ms", "queue_ms", "latency_ms"} <= meta.keys()
    assert [text for _, _, text in meta["output_token_logprobs"]] == ["one", " two", " three"]
    assert len(meta["output_top_logprobs"]) == 3
    assert s.get_meta_info("y")["finish_reason"] == "length"
    assert s.get_meta_info("y")["cached_tokens"] == 5
    assert "output_token_logprobs" not in s.get_meta_info("y")
    s["z"] = 1
    with pytest.raises(bo.InvalidRequest, match="'z' is not the result of a gen"):
        s.get_meta_info("z")


def test_roles_have_a_call_form_and_a_with_form() -> None:
    s = State(Recorder())
    s.system("sys")
    with s.user() as same:
        assert same is s
        s += "hi"
    with s.role("tool"):
        s += "42"
    s.assistant("so " + bo.gen("x"))
    assert [(m["role"], m["content"]) for m in s.messages()] == [
        ("system", "sys"), ("user", "hi"), ("tool", "42"), ("assistant", "so ok"),
    ]  # fmt: skip


def test_an_exception_inside_a_role_closes_it_and_the_state_goes_on() -> None:
    s = State(Recorder())
    with pytest.raises(RuntimeError, match="mine"), s.user():
        fail_after(s, "half", RuntimeError("mine"))
    s += bo.user("whole")
    assert [m["content"] for m in s.messages()] == ["half", "whole"]


def test_a_role_closed_inside_its_block_is_told_and_an_exception_passes_unharmed() -> None:
    s = State(Recorder())
    with pytest.raises(bo.InvalidRequest, match="user_end without a message"), s.user():
        s += bo.user_end()
    with pytest.raises(KeyError), s.user():
        fail_after(s, bo.user_end(), KeyError())
    assert len(s.messages()) == 2


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (bo.user("a" + bo.system("b")), "a message of role 'system' cannot begin inside the open user message"),
        (bo.user_end(), "user_end without a message to end"),
        (bo.role_end(), "role_end without a message to end"),
        (bo.user_begin() + "a" + bo.assistant_end(), "assistant_end cannot end the open user message"),
        ("text" + bo.user(bo.user_begin()), "a message of role 'user' cannot begin inside the open user message"),
    ],
)
def test_roles_out_of_order_are_refused_before_anything_is_appended(expression: Any, words: str) -> None:
    s = State(Recorder())
    with pytest.raises(bo.InvalidRequest, match=words):
        s += expression
    assert s.text() == ""
    s += bo.user("fine")
    assert len(s.messages()) == 1


def test_var_scope_names_the_text_inside_also_what_comes_later() -> None:
    s = State(Recorder())
    s += "before "
    with s.var_scope("inside"):
        s += "a" + bo.gen("x") + "b"
        s += bo.user("c")
        assert "inside" not in s
    s += " after"
    assert s["inside"] == "aokb<|im_start|>user\nc<|im_end|>\n"
    with pytest.raises(ValueError, match="mine"), s.var_scope("broken"):
        fail_after(s, "part", ValueError("mine"))
    assert s["broken"] == "part"


def test_a_dropped_state_gives_its_branch_back() -> None:
    backend = Recorder()
    s = State(backend)
    s += "a" + bo.gen("x")
    forks = s.fork(2)
    forks += bo.gen("y")
    assert backend.stats()["num_branches"] == 3
    one = forks[1]
    del forks
    assert backend.stats()["num_branches"] == 2
    del one, s
    assert backend.stats()["num_branches"] == 0
    assert len(backend.released) == len(set(backend.released)) == 3


def test_a_dropped_state_needs_no_cycle_collector_to_give_its_branch_back() -> None:
    backend = Recorder()
    gc.disable()
    try:
        for _ in range(3):
            s = State(backend)
            s += "a" + bo.gen("x")
            s.fork(4).join()
            del s
        assert backend.stats()["num_branches"] == 0
    finally:
        gc.enable()


def test_a_million_characters_in_many_pieces_are_no_deep_structure() -> None:
    s = State(Recorder())
    for _ in range(300):
        for _ in range(20):
            s += "0123456789"
        (s,) = s.fork(1)
    assert len(s.text()) == 60_000
    del s


async def _aget(s: State) -> Any:
    return await s.aget("x"), await s.aget("y"), await s.aget("z")


def test_variables_can_be_awaited() -> None:
    import asyncio

    s = State(Recorder())
    s += bo.gen("x")
    s["y"] = 5
    with s.var_scope("z"):
        s += bo.user("q")
    assert asyncio.run(_aget(s)) == ("ok", 5, "<|im_start|>user\nq<|im_end|>\n")


# ---------------------------------------------------------------------------------------------- looked at


def test_a_state_shows_itself_without_waiting() -> None:
    backend = bo.ScriptedBackend(["one", "two"])
    with backend.paused():
        s = State(backend, title="talk")
        assert repr(s) == "<State talk: no variables>"
        s["given"] = 3
        s += bo.gen("a")
        forks = s.fork(2)
        assert repr(s) == "<State talk: given, a (pending)>"
        assert repr(forks) == "<Group of 2: <State talk[0]: given, a (pending)>, <State talk[1]: given, a (pending)>>"
    s.sync()
    assert repr(s) == "<State talk: given, a>"


def test_a_state_is_read_whole_as_a_dict() -> None:
    s = State(bo.ScriptedBackend(["one"]))
    assert list(s) == s.keys() == []
    s += bo.gen("a")
    s["b"] = 2
    assert list(s) == s.keys() == ["a", "b"]
    assert dict(s) == {"a": "one", "b": 2}


def test_a_state_says_why_it_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match=r"State cannot be pickled.* dict\(state\)"):
        pickle.dumps(State(bo.ScriptedBackend()))
