"""Branches: what they inherit, how they are joined, cancelled and told apart."""

from __future__ import annotations

from typing import Any

import pytest

import bough as bo
from bough import Group, State


def say(*replies: str) -> bo.ScriptedBackend:
    return bo.ScriptedBackend(list(replies))


def test_children_inherit_text_variables_messages_roles_and_meta_info() -> None:
    s = State(say("a"))
    s += bo.user("q") + bo.assistant_begin() + bo.gen("x")
    (child,) = s.fork()
    assert child["x"] == "a"
    assert child.get_meta_info("x") == s.get_meta_info("x")
    assert child.messages() == s.messages()
    child += bo.assistant_end()
    assert [m["content"] for m in child.messages()] == ["q", "a"]
    assert [m["content"] for m in s.messages()] == ["q"]
    with pytest.raises(bo.InvalidRequest, match="inside the open assistant message"):
        s += bo.user("x")


def test_branches_do_not_see_each_other() -> None:
    s = State(say("1", "2", "3"))
    s += "p"
    forks = s.fork(2)
    forks += "-" + bo.gen("x")
    s += "+" + bo.gen("x")
    assert [f.text() for f in forks] == ["p-1", "p-2"]
    assert (s.text(), s["x"]) == ("p+3", "3")
    forks[0]["y"] = 1
    assert "y" not in s
    assert "y" not in forks[1]


def test_a_fork_of_a_fork_of_a_fork_keeps_each_ones_past() -> None:
    s = State(say())
    s += "a"
    (b,) = s.fork()
    s += "A"
    b += "b"
    (c,) = b.fork()
    b += "B"
    c += "c"
    assert (s.text(), b.text(), c.text()) == ("aA", "abB", "abc")


@pytest.mark.parametrize("size", [0, -1, 4097, 1.5, "2", None, True])
def test_a_fork_has_a_sensible_size(size: Any) -> None:
    s = State(say())
    with pytest.raises(bo.InvalidRequest, match="fork's size must be a whole number"):
        s.fork(size)


def test_a_group_is_a_sequence() -> None:
    s = State(say())
    forks = s.fork(4)
    assert isinstance(forks, Group)
    assert len(forks) == 4
    assert list(forks) == [forks[i] for i in range(4)]
    assert forks[-1] is forks[3]
    assert list(forks[1:3]) == [forks[1], forks[2]]
    with pytest.raises(IndexError):
        forks[4]
    with pytest.raises(bo.InvalidRequest, match="cannot be replaced"):
        forks[0] = s


def test_appending_to_a_group_takes_one_for_all_one_each_or_a_function() -> None:
    s = State(say())
    forks = s.fork(2)
    forks += "a"
    forks += bo.user("b")
    forks += ["0", bo.system("1")]
    forks += lambda i: f"[{i}]"
    forks[0] += "!"
    assert forks[0].text().endswith("0[0]!")
    assert forks[1].messages()[-1] == {"role": "system", "content": "1"}
    with pytest.raises(bo.InvalidRequest, match="one item per state, 2, got 3"):
        forks += ["a", "b", "c"]
    with pytest.raises(bo.InvalidRequest, match="a group takes text"):
        forks += 3  # type: ignore[arg-type]


def test_join_gathers_dense_lists_in_branch_order() -> None:
    s = State(say("0", "1", "2", "deep"))
    s["old"] = "kept"
    forks = s.fork(3)
    forks += bo.gen("x")
    forks[1] += bo.gen("only")
    forks[2]["set"] = 7
    forks.join()
    assert s["x"] == ["0", "1", "2"]
    assert s["only"] == [None, "deep", None]
    assert s["set"] == [None, None, 7]
    assert s["old"] == "kept"
    assert [meta["completion_tokens"] for meta in s.get_meta_info("x")] == [1, 1, 1]
    assert s.get_meta_info("only")[0] is None
    assert s.text() == ""


def test_a_second_round_of_forks_gives_the_second_rounds_values() -> None:
    s = State(say("a", "b", "c", "d"))
    for expected in (["a", "b"], ["c", "d"]):
        forks = s.fork(2)
        forks += bo.gen("draft")
        forks.join()
        assert s["draft"] == expected


def test_nested_joins_give_nested_lists() -> None:
    s = State(say(*"abcd"))
    forks = s.fork(2)
    for fork in forks:
        inner = fork.fork(2)
        inner += bo.gen("x")
        inner.join()
    forks.join()
    assert s["x"] == [["a", "b"], ["c", "d"]]


def test_joined_branches_can_be_read_but_not_continued_and_are_released() -> None:
    backend = say("a", "b")
    s = State(backend)
    s += "p"
    forks = s.fork(2)
    forks += bo.assistant(bo.gen("x"))
    forks.join()
    assert backend.stats()["num_branches"] == 1
    assert forks[1]["x"] == "b"
    assert forks[0].text() == "p<|im_start|>assistant\na<|im_end|>\n"
    with pytest.raises(bo.InvalidRequest, match="this branch was joined"):
        forks[0] += "more"
    with pytest.raises(bo.InvalidRequest, match="this branch was joined"):
        forks[0].fork()
    forks.join()
    assert s["x"] == ["a", "b"]


def test_join_can_append_the_childrens_text_exactly() -> None:
    s = State(say("A", "B"))
    s += bo.assistant_begin() + "Tips:"
    forks = s.fork(2)
    forks += lambda i: f"\n {i}. " + bo.gen("tip")
    forks.join("concate_and_append")
    s += bo.assistant_end()
    assert s.messages()[-1]["content"] == "Tips:\n 0. A\n 1. B"
    assert "tip" not in s


def test_join_appends_whole_messages_as_messages_and_refuses_half_ones() -> None:
    s = State(say("A", "B"))
    forks = s.fork(2)
    forks += bo.user("q") + bo.assistant(bo.gen("x"))
    forks.join("concate_and_append")
    assert [m["content"] for m in s.messages()] == ["q", "A", "q", "B"]
    forks = s.fork(2)
    forks[1] += bo.user_begin()
    with pytest.raises(bo.InvalidRequest, match="branch 1 begins or ends a message across the fork"):
        forks.join("concate_and_append")


def test_a_join_mode_is_one_of_those_there_are() -> None:
    with pytest.raises(bo.InvalidRequest, match="mode must be one of gather_variable, concate_and_append, gather"):
        State(say()).fork(1).join("median")  # type: ignore[arg-type]


def test_a_failed_branch_costs_only_itself() -> None:
    def reply(text: str, params: object) -> str:
        if "bad" in text:
            raise bo.ResourceExhausted("no room", pages=3)
        return text[-1]

    s = State(bo.ScriptedBackend(reply))
    forks = s.fork(3)
    forks += ["a", "bad", "c"]
    forks += bo.gen("x")
    forks[1] += bo.gen("later")
    forks.join()
    with pytest.raises(bo.ResourceExhausted, match="no room") as caught:
        s["x"]
    assert caught.value.details == {"pages": 3}
    with pytest.raises(bo.ResourceExhausted):
        s["later"]
    assert [type(f.error()) for f in forks] == [type(None), bo.ResourceExhausted, type(None)]
    assert (forks[0]["x"], forks[2]["x"]) == ("a", "c")
    s += "the parent goes on " + bo.gen("y")
    assert s.text().endswith("on  ")
    assert s.error() is None

    forks = s.fork(2)
    forks += ["a", "bad"]
    forks += bo.gen("x")
    with pytest.raises(bo.ResourceExhausted):
        forks.join("concate_and_append")


def test_an_error_of_the_parent_is_inherited_by_later_forks_only() -> None:
    def reply(text: str, params: object) -> str:
        if text == "ab":
            raise bo.ContextOverflow("too long")
        return "ok"

    s = State(bo.ScriptedBackend(reply))
    s += "a"
    (before,) = s.fork()
    s += "b" + bo.gen("x")
    (after,) = s.fork()
    before += bo.gen("y")
    after += bo.gen("y")
    assert before["y"] == "ok"
    with pytest.raises(bo.ContextOverflow) as caught:
        after["y"]
    assert isinstance(caught.value.__cause__, bo.ContextOverflow)
    with pytest.raises(bo.ContextOverflow):
        after["x"]
    assert before.error() is None
    assert isinstance(after.error(), bo.ContextOverflow)


def test_copy_is_one_branch_and_with_joins_it() -> None:
    s = State(say("1", "2"))
    s += "a"
    with s.copy() as c:
        c += "b" + bo.gen("x")
    assert s["x"] == ["1"]
    assert s.text() == "a"
    other = s.copy()
    other += bo.gen("y")
    assert other.text() == "a2"
    assert "y" not in s
    with pytest.raises(KeyError, match="mine"), s.copy() as c:
        raise KeyError("mine")


def test_cancel_ends_a_branch_and_its_forks_and_nothing_else() -> None:
    backend = bo.ScriptedBackend(lambda text, params: "ok")
    s = State(backend)
    with backend.paused():
        forks = s.fork(2)
        forks += "a" + bo.gen("x")
        (grandchild,) = forks[0].fork()
        grandchild += bo.gen("y")
        forks[0] += bo.gen("many", n=3)
        forks[0].cancel()
        for name in ("x", "many"):
            with pytest.raises(bo.Cancelled):
                forks[0][name]
    with pytest.raises(bo.Cancelled):
        grandchild["y"]
    with pytest.raises(bo.Cancelled, match="this branch was cancelled"):
        forks[0] += "more"
    assert isinstance(forks[0].error(), bo.Cancelled)
    forks[0].cancel()
    assert forks[1]["x"] == "ok"
    forks.join()
    assert s.error() is None
    with pytest.raises(bo.Cancelled):
        s["x"]


def test_what_was_done_before_a_cancel_can_still_be_read() -> None:
    s = State(say("a"))
    s += "p" + bo.gen("x")
    s.cancel()
    assert s["x"] == "a"
    assert s.text() == "pa"


def test_a_state_with_nothing_sent_can_be_cancelled_and_says_so() -> None:
    s = State(say())
    s += bo.user("x")
    s.cancel()
    with pytest.raises(bo.Cancelled):
        s.text()
