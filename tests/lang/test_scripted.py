"""The scripted backend keeps the rules of every backend."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import bough as bo
from bough import State
from bough.runtime import protocol

WAIT_S = 10.0


def test_replies_come_from_a_list_a_dict_or_a_function() -> None:
    expression = bo.gen("a") + bo.gen("b") + bo.gen("a")
    replies: list[Any] = [
        ["1", lambda text, params: text + "!", "3"],
        {"a": ["1", "3"], "b": lambda text, params: text + "!"},
        lambda text, params: {"": "1", "1": "1!", "11!": "3"}[text],
    ]
    for script in replies:
        s = State(bo.ScriptedBackend(script))
        s += expression
        assert s.text() == "11!3"


@pytest.mark.parametrize("script", [[], {}, {"x": []}, [3]])
def test_a_script_that_ran_out_says_so(script: Any) -> None:
    s = State(bo.ScriptedBackend(script))
    s += bo.gen("x")
    with pytest.raises(bo.BackendError, match=r"the script has no reply|must be text"):
        s["x"]


def test_select_follows_the_script_the_function_or_takes_the_first() -> None:
    by_name = bo.ScriptedBackend({"x": "b", "y": lambda text, choices: choices[-1]})
    by_function = bo.ScriptedBackend(choose=lambda text, choices: max(choices))
    for backend, expected in ((by_name, "bc"), (by_function, "cc"), (bo.ScriptedBackend(), "aa")):
        s = State(backend)
        s += bo.select("x", ["a", "b", "c"]) + bo.select("y", ["a", "b", "c"])
        assert s["x"] + s["y"] == expected
        meta = s.get_meta_info("x")
        assert sum(meta["distribution"]) == 1.0
        assert meta["choice"] == s["x"] == ["a", "b", "c"][meta["index"]]
        assert meta["scores"][meta["index"]] == max(meta["scores"])
        assert len(meta["choice_token_logprobs"]) == 3
    s = State(bo.ScriptedBackend({"x": "other"}))
    s += bo.select("x", ["a"])
    with pytest.raises(bo.BackendError, match="which is not one of"):
        s["x"]


@pytest.mark.parametrize(
    ("given", "text", "reason", "stop"),
    [
        ({}, "one two. three", "stop", None),
        ({"stop": "."}, "one two", "stop", "."),
        ({"stop": ["three", "two"]}, "one ", "stop", "two"),
        ({"stop_regex": "t[h]"}, "one two. ", "stop", "th"),
        ({"max_tokens": 2}, "one two.", "length", None),
        ({"max_tokens": 2, "stop": "."}, "one two", "stop", "."),
    ],
)
def test_stops_and_lengths_are_honoured(given: dict[str, Any], text: str, reason: str, stop: str | None) -> None:
    s = State(bo.ScriptedBackend(["one two. three"]))
    s += bo.gen("x", **given)
    meta = s.get_meta_info("x")
    assert (s["x"], meta["finish_reason"], meta["matched_stop"]) == (text, reason, stop)


def test_cached_words_are_those_that_the_tree_has_read() -> None:
    backend = bo.ScriptedBackend(lambda text, params: "a b")
    s = State(backend)
    s += "one two three "
    forks = s.fork(2)
    forks += "four " + bo.gen("x")
    costs = [(f.get_meta_info("x")["cached_tokens"], f.get_meta_info("x")["computed_tokens"]) for f in forks]
    assert costs == [(0, 4), (3, 1)]
    s += bo.gen("y")
    assert s.get_meta_info("y")["cached_tokens"] == 3
    backend.flush_cache()
    s += bo.gen("y")
    assert s.get_meta_info("y")["cached_tokens"] == 0
    assert backend.stats()["generated_tokens"] == 8


def test_paused_calls_wait_in_order_and_step_by_step() -> None:
    backend = bo.ScriptedBackend(["1", "2"])
    with backend.paused():
        s = State(backend)
        s += bo.gen("x") + bo.gen("y")
        first, second = (item.replies[0] for item in s._interpreter.strand.items)  # type: ignore[union-attr]
        assert (first.done(), second.done()) == (False, False)
        backend.step()
        assert (first.done(), second.done()) == (True, False)
    assert (s["x"], s["y"]) == ("1", "2")


def test_rollback_and_score_and_unknown_branches() -> None:
    backend = bo.ScriptedBackend(["x"])
    branch = backend.open()
    backend.extend(branch, [protocol.Text("one two three")])
    assert backend.rollback(branch, 2).result(WAIT_S).length == 2
    assert backend.score(branch, ["a", "b"], "token_length_normalized").result(WAIT_S).length == 2
    with pytest.raises(bo.InvalidRequest, match="between 0 and 2, got 5"):
        backend.rollback(branch, 5).result(WAIT_S)
    child = backend.fork(99, 1)[0]
    for wrong in (99, child):
        with pytest.raises(bo.InvalidRequest, match="branch 99 is not open"):
            backend.rollback(wrong, 0).result(WAIT_S)
    with pytest.raises(bo.InvalidRequest, match="no tokens"):
        backend.extend(backend.open(), [protocol.Tokens(0)]).result(WAIT_S)


def test_it_is_a_backend_like_the_others() -> None:
    assert isinstance(bo.ScriptedBackend(), bo.Backend)
    assert issubclass(bo.RuntimeClient, bo.Backend)
    assert issubclass(bo.Runtime, bo.Backend)


def test_two_threads_on_one_state_lose_nothing() -> None:
    s = State(bo.ScriptedBackend(lambda text, params: "."))

    def work(name: str) -> None:
        for i in range(100):
            s.__iadd__(f"{name}{i}" + bo.gen(f"{name}{i}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert s.text().count(".") == 200
    assert all(s[f"{name}{i}"] == "." for name in "ab" for i in range(100))


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("choices", '["yes", "no"]', "yes", "ye"),
        ("json_schema", '{"type": "object"}', '{"a": [1]}', '{"a": [1]'),
        ("regex", "[0-9]+", "42", "42 "),
        ("regex", r"\p{L}+ß", "Straß", "Straße"),
        ("lark", 'start: "(" start? ")"', "(())", "(()"),
    ],
)
def test_a_reply_that_a_grammar_excludes_is_an_error_of_the_script(
    kind: protocol.GrammarKind, source: str, good: str, bad: str
) -> None:
    grammar = protocol.Grammar(kind=kind, source=source)
    backend = bo.ScriptedBackend([good, good, bad])
    whole = backend.generate(backend.open(), protocol.SamplingParams(), grammar=grammar).result(WAIT_S)
    assert (whole.text, whole.is_whole) == (good, True)
    cut = backend.generate(backend.open(), protocol.SamplingParams(stop=(good[0],)), grammar=grammar).result(WAIT_S)
    assert not cut.is_whole
    with pytest.raises(bo.BackendError, match=r"does not match|ends too early for"):
        backend.generate(backend.open(), protocol.SamplingParams(), grammar=grammar).result(WAIT_S)
