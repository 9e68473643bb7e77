"""Expressions are values; what is wrong with one is said where it is written."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

import bough as bo
from bough.expressions import Concat, Gen, RoleBegin, RoleEnd, Select


def test_plus_joins_text_and_expressions_in_order() -> None:
    joined = "a" + bo.gen("x") + "b" + bo.select("y", ["p", "q"])
    assert [type(piece) for piece in joined] == [str, Gen, str, Select]


def test_a_role_is_its_expression_between_two_marks() -> None:
    assert bo.user("hi" + bo.gen("x")).pieces()[0] == RoleBegin("user")
    assert bo.user("hi").pieces() == (RoleBegin("user"), "hi", RoleEnd("user"))
    assert bo.role("tool", "42").pieces() == (RoleBegin("tool"), "42", RoleEnd("tool"))
    assert (bo.system_begin(), bo.user_begin(), bo.assistant_begin()) == tuple(
        map(RoleBegin, ("system", "user", "assistant"))
    )
    assert (bo.system_end(), bo.user_end(), bo.assistant_end()) == tuple(map(RoleEnd, ("system", "user", "assistant")))
    assert (bo.role_begin("tool"), bo.role_end()) == (RoleBegin("tool"), RoleEnd())
    assert bo.assistant() == Concat((RoleBegin("assistant"), RoleEnd("assistant")))


def test_an_expression_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        bo.gen("x").name = "y"  # type: ignore[misc]


def test_gen_keeps_only_what_was_given_in_exact_types() -> None:
    piece = bo.gen("x", max_tokens=5, stop="\n", stop_regex=["a+"], temperature=0, top_logprobs_num=3, seed=None)
    assert isinstance(piece, Gen)
    assert piece.overrides == {
        "max_tokens": 5, "stop": ("\n",), "stop_regex": ("a+",), "temperature": 0.0, "logprobs": 3,
    }  # fmt: skip
    assert isinstance(piece.overrides["temperature"], float)


def test_gen_never_touches_the_stop_list_it_is_given() -> None:
    stop = ["\n"]
    bo.gen("x", stop=stop)
    assert stop == ["\n"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": "5"}, "max_tokens must be int"),
        ({"max_tokens": True}, "max_tokens must be int"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens"),
        ({"temperature": -0.1}, "temperature must be between 0"),
        ({"temperature": math.nan}, "temperature must be between 0"),
        ({"top_p": 0}, "top_p must be greater than 0"),
        ({"top_k": 0}, "top_k must be -1"),
        ({"min_p": 2}, "min_p must be between 0 and 1"),
        ({"frequency_penalty": 3}, "frequency_penalty must be between -2 and 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must be token ids from 0"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias must map token ids"),
        ({"logit_bias": {"300": 1.0}}, r"logit_bias must map token ids \(int\) to numbers, got the key '300'"),
        ({"stop": [1]}, r"stop\[0\] must be str"),
        ({"stop": ""}, "stop must be non-empty"),
        ({"stop": {"a": 1}}, "stop must be one value or a list"),
        ({"stop_token_ids": [1 << 40]}, "stop_token_ids must be token ids"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"n": 0}, "n must be a whole number from 1 to 4096, got 0"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"timeout": math.inf}, "timeout must be a positive number"),
        ({"top_logprobs_num": 65}, "logprobs must be at most 64"),
        ({"return_logprob": False, "top_logprobs_num": 2}, "top_logprobs_num needs return_logprob"),
        ({"return_logprob": 1}, "return_logprob must be True or False"),
        ({"choices_method": bo.greedy_token_selection}, "choices_method needs choices"),
        ({"choices": ["a"], "max_tokens": 3}, "max_tokens has no effect on a choice"),
        ({"choices": ["a"], "temperature": 101}, "temperature must be between 0 and 100, got 101"),
        ({"ebnf": "root ::= x"}, "ebnf is not supported yet"),
    ],
)
def test_gen_names_field_limit_and_value_of_what_it_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words) as caught:
        bo.gen("x", **given)
    assert isinstance(caught.value, ValueError)


def test_none_is_unset_also_for_what_is_not_supported() -> None:
    assert bo.gen("x", regex=None, dtype=None) == bo.gen("x")
    with pytest.raises(TypeError, match="maximum_tokens"):
        bo.gen("x", maximum_tokens=3)


def test_the_likelihood_of_the_whole_goes_by_both_its_names() -> None:
    named = bo.select("x", ["a", "b"], choices_method="total_likelihood")  # type: ignore[arg-type]
    assert named == bo.select("x", ["a", "b"], choices_method=bo.total_likelihood)


def test_gen_with_choices_is_select() -> None:
    assert bo.gen("x", choices=["a", "b"], temperature=0) == bo.select("x", ["a", "b"])
    assert bo.gen("x", choices=["a"], choices_method=bo.greedy_token_selection) == bo.select(
        "x", ["a"], choices_method=bo.greedy_token_selection
    )


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ([], "choices must hold 1 to 65536 texts, got 0"),
        (None, "choices must be a list of texts, got None"),
        ("yes", "choices must be a list of texts, got 'yes'"),
        (["a", 1], r"choices\[1\] must be a text that is not empty, got 1"),
        (["a", ""], r"choices\[1\] must be a text that is not empty"),
        (["a", "b", "a"], r"choices\[2\] repeats choices\[0\]: 'a'"),
    ],
)
def test_select_says_which_choice_is_wrong(choices: Any, words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.select("x", choices)


def test_select_knows_its_methods_and_their_limits() -> None:
    for method in (
        bo.token_length_normalized,
        bo.greedy_token_selection,
        bo.unconditional_likelihood_normalized,
        bo.total_likelihood,
        bo.byte_length_normalized,
        bo.pmi,
    ):
        assert bo.select("x", ["a"], choices_method=method).method == method
    with pytest.raises(bo.InvalidRequest, match="choices_method must be one of token_length_normalized"):
        bo.select("x", ["a"], choices_method="best")  # type: ignore[arg-type]
    with pytest.raises(bo.InvalidRequest, match="temperature must be between 0 and 100, got -1"):
        bo.select("x", ["a"], temperature=-1)
    with pytest.raises(bo.InvalidRequest, match="temperature must be a number, got 'hot'"):
        bo.select("x", ["a"], temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(bo.InvalidRequest, match="choices_method has no effect at temperature 1"):
        bo.select("x", ["a"], temperature=1, choices_method=bo.pmi)
    assert bo.select("x", ["a"], temperature=1, choices_method="sum").temperature == 1.0


@pytest.mark.parametrize("name", ["", 3, b"x"])
def test_a_variable_has_a_name_or_none(name: Any) -> None:
    with pytest.raises(bo.InvalidRequest, match="variable's name"):
        bo.gen(name)
    with pytest.raises(bo.InvalidRequest, match="role must be"):
        bo.role(name)


def test_only_text_and_expressions_join() -> None:
    with pytest.raises(bo.InvalidRequest, match="only text and expressions"):
        bo.gen("x") + None
    for wrong in (3, ["a"], b"a"):
        with pytest.raises(bo.InvalidRequest, match="only text and expressions"):
            bo.gen("x") + wrong
        with pytest.raises(bo.InvalidRequest, match="only text and expressions"):
            bo.user(wrong)  # type: ignore[arg-type]


def test_an_expression_in_an_f_string_is_refused() -> None:
    with pytest.raises(bo.InvalidRequest, match="cannot be part of an f-string"):
        f"The answer is {bo.gen('x')}."
    assert "Gen" in f"{bo.gen('x')!r}"


def test_a_long_sum_of_expressions_is_no_deep_nest() -> None:
    whole = bo.user("x")
    for _ in range(sys.getrecursionlimit() * 2):
        whole = whole + "y"
    assert len(whole.pieces()) == 3 + 2 * sys.getrecursionlimit()
