"""How a select decides: the named methods' arithmetic, and methods that a program brings itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest

import bough as bo
from bough import State
from bough.runtime.protocol import CHOICE_METHODS

NAMED = (
    bo.token_length_normalized,
    bo.greedy_token_selection,
    bo.unconditional_likelihood_normalized,
    bo.total_likelihood,
    bo.byte_length_normalized,
    bo.pmi,
)


class Decide(bo.ChoicesSamplingMethod):
    """Takes the choice that a function of what it is given names."""

    def __init__(self, decide: Any, needs_unconditional: bool = False) -> None:
        self.decide = decide
        self.needs_unconditional = needs_unconditional
        self.given: list[Mapping[str, Any]] = []

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return self.needs_unconditional

    def __call__(self, **given: Any) -> bo.ChoicesDecision:
        self.given.append(given)
        return bo.ChoicesDecision(self.decide(given), {"why": "it said so"})


def test_named_methods_are_their_names_and_can_be_called() -> None:
    assert NAMED == CHOICE_METHODS
    rows = [[(-1.0, 1, "a")], [(-0.5, 2, "b"), (-0.6, 3, "c")]]
    for method in NAMED:
        decision = method(
            choices=["a", "bc"],
            normalized_prompt_logprobs=[-1.0, -0.55],
            input_token_logprobs=rows,
            output_token_logprobs=[[], []],
            unconditional_token_logprobs=[[(0.0, 1, "a")], [(0.0, 2, "b"), (0.0, 3, "c")]],
        )
        likelier = method not in ("sum", "pmi")
        assert decision.decision == ("bc" if likelier else "a"), method
    needs = [method for method in NAMED if method.requires_unconditional_logprobs]
    assert needs == [bo.unconditional_likelihood_normalized, bo.pmi]


def test_a_select_takes_a_method_by_name_or_as_an_object() -> None:
    for method in (*NAMED, *CHOICE_METHODS):
        piece = bo.select("x", ["a", "b"], choices_method=method)  # type: ignore[arg-type]
        assert type(piece.method) is str
        assert bo.gen("x", choices=["a", "b"], choices_method=method) == piece
    with pytest.raises(bo.InvalidRequest, match="or a ChoicesSamplingMethod, got 'likeliest'"):
        bo.select("x", ["a"], choices_method="likeliest")  # type: ignore[arg-type]


@pytest.mark.parametrize("needs_unconditional", [False, True])
def test_a_method_of_ones_own_decides_and_the_text_goes_on_with_its_choice(needs_unconditional: bool) -> None:
    method = Decide(lambda given: given["choices"][-1], needs_unconditional)
    backend = bo.ScriptedBackend(lambda text, params: f"[{text}]")
    s = State(backend)
    s += "pick " + bo.select("x", ["a", "bb"], choices_method=method) + ", " + bo.gen("then")
    assert s["x"] == "bb"
    assert s["then"] == "[pick bb, ]"
    assert s.text() == "pick bb, [pick bb, ]"
    (given,) = method.given
    assert given["choices"] == ["a", "bb"]
    assert [row[0][2] for row in given["input_token_logprobs"]] == ["a", "bb"]
    assert given["normalized_prompt_logprobs"] == [0.0, -1.0]
    assert given["output_token_logprobs"] == [[], []]
    assert (given["unconditional_token_logprobs"] is not None) is needs_unconditional
    meta = s.get_meta_info("x")
    assert (meta["index"], meta["choice"], meta["why"]) == (1, "bb", "it said so")
    assert "select x" in s.tree()


def test_a_fork_after_ones_own_choice_has_its_text() -> None:
    s = State(bo.ScriptedBackend(lambda text, params: text))
    s += "pick " + bo.select("x", ["a", "b"], choices_method=Decide(lambda given: "b"))
    (child,) = s.fork()
    child += bo.gen("seen")
    assert child["seen"] == "pick b"
    assert child["x"] == "b"


def test_a_method_that_fails_is_told_where_its_choice_is_read_and_to_all_that_follows() -> None:
    s = State(bo.ScriptedBackend(["never"]))
    s += bo.select("x", ["a", "b"], choices_method=Decide(lambda given: 1 / 0))
    with pytest.raises(bo.ProgramError, match="choices_method raised ZeroDivisionError") as caught:
        s["x"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(bo.ProgramError):
        s += bo.gen("y")
    with pytest.raises(bo.ProgramError):
        s.text()
    assert isinstance(s.error(), bo.ProgramError)
    assert "failed: ProgramError" in s.tree()


def test_a_method_may_only_choose_what_was_offered() -> None:
    s = State(bo.ScriptedBackend())
    s += bo.select("x", ["a", "b"], choices_method=Decide(lambda given: "c"))
    with pytest.raises(bo.ProgramError, match="chose 'c', not one of"):
        s["x"]


def test_a_scoring_that_fails_is_the_backends_error_and_poisons_what_follows() -> None:
    s = State(bo.ScriptedBackend({"x": lambda text, choices: str(1 / 0), "y": "never"}))
    s += bo.select("x", ["a", "b"], choices_method=Decide(lambda given: "a")) + bo.gen("y")
    for name in ("x", "y"):
        with pytest.raises(bo.BackendError, match="ZeroDivisionError"):
            s[name]


def test_appending_waits_only_when_something_needs_the_choice() -> None:
    backend = bo.ScriptedBackend(["said"])
    s = State(backend)
    with backend.paused():
        s += bo.select("x", ["a", "b"], choices_method=Decide(lambda given: "b")) + " and more text"
        appended = threading.Event()

        def append_more() -> None:
            state = s
            state += bo.gen("y")
            appended.set()

        more = threading.Thread(target=append_more)
        more.start()
        backend.step(None)
        assert appended.wait(10)
        more.join(10)
    assert s["y"] == "said"
    assert s.text() == "b and more textsaid"
