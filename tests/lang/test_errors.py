"""Errors: one tree, raised where a value is read, chained, never a hang."""

from __future__ import annotations

import pickle
from typing import Any, get_args

import pytest

import bough as bo
from bough import State, errors
from bough.runtime import protocol

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, bo.BoughError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_keeps_message_and_details_through_copies_and_pickles(kind: type[bo.BoughError]) -> None:
    error = kind("a sentence", limit=3)
    for copy in (error, error.again(), error.for_dependant(), pickle.loads(pickle.dumps(error))):
        assert (type(copy), str(copy), copy.details) == (kind, "a sentence", {"limit": 3})
    assert error.for_dependant().__cause__ is error
    assert kind.__doc__
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__name__ in bo.__all__


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(bo.InvalidRequest, ValueError)
    assert issubclass(bo.UnknownVariable, (KeyError, bo.InvalidRequest))
    assert issubclass(bo.Timeout, TimeoutError)


@pytest.mark.parametrize("kind", get_args(protocol.ErrorKind))
def test_every_kind_of_the_wire_has_a_class(kind: Any) -> None:
    error = errors.from_reply(protocol.Failed(1, kind, "why", {"n": 1}))
    assert isinstance(error, bo.BoughError)
    assert (error.message, error.details) == ("why", {"n": 1})
    expected = {"invalid_request": bo.InvalidRequest, "timeout": bo.Timeout, "cancelled": bo.Cancelled}
    assert type(error) is expected.get(kind, type(error))


def failing(text: str, params: object) -> str:
    raise bo.ContextOverflow("2000 tokens, the context holds 1024", length=2000, context_len=1024)


def test_a_failure_is_raised_at_every_read_and_never_where_the_gen_stands() -> None:
    s = State(bo.ScriptedBackend(failing))
    s += bo.user("q") + bo.assistant(bo.gen("x"))
    s += bo.user("again") + bo.assistant(bo.gen("later"))
    reads: list[Any] = [lambda: s["x"], s.text, s.messages, lambda: s.get_meta_info("x"), lambda: list(s.text_iter())]
    for read in reads * 2:
        with pytest.raises(bo.ContextOverflow, match="2000 tokens") as caught:
            read()
        assert caught.value.details["context_len"] == 1024
    s.sync()
    assert isinstance(s.error(), bo.ContextOverflow)


def test_what_depends_on_a_failure_raises_the_original_chained() -> None:
    s = State(bo.ScriptedBackend(failing))
    s += bo.gen("x") + "more" + bo.gen("y") + bo.select("z", ["a", "b"])
    for name in "yz":
        with pytest.raises(bo.ContextOverflow, match="2000 tokens") as caught:
            s[name]
        assert isinstance(caught.value.__cause__, bo.ContextOverflow)


def test_a_foreign_exception_of_a_backend_is_wrapped_and_chained() -> None:
    def broken(text: str, params: object) -> str:
        raise ZeroDivisionError("oops")

    s = State(bo.ScriptedBackend(broken))
    s += bo.gen("x")
    with pytest.raises(bo.BackendError, match="ZeroDivisionError: oops") as caught:
        s["x"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_reads_do_not_grow_the_traceback_of_the_stored_error() -> None:
    s = State(bo.ScriptedBackend(failing))
    s += bo.gen("x")
    raised = []
    for _ in range(2):
        with pytest.raises(bo.ContextOverflow) as caught:
            s["x"]
        raised.append(caught.value)
    assert raised[0] is not raised[1]


def test_a_context_that_is_full_is_told_with_both_numbers() -> None:
    s = State(bo.ScriptedBackend(["a"], context_len=3))
    s += "one two three four " + bo.gen("x")
    with pytest.raises(bo.ContextOverflow) as caught:
        s["x"]
    assert caught.value.details == {"length": 4, "context_len": 3}
