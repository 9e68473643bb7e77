"""Grammars as values: what they match, what they capture, the source they become."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import bough as bo
from bough import (
    Grammar,
    capture,
    json_schema,
    lark,
    lit,
    many,
    one_of,
    optional,
    rule,
    rx,
    separated,
    substring_of,
    until,
)
from bough.capture_reader import read
from bough.grammar_facts import capture_names
from bough.grammar_nodes import GrammarLike
from bough.lark_source import JSON_STYLE


def captures(grammar: Grammar, text: str) -> dict[str, Any] | None:
    found = grammar.match(text)
    return None if found is None else dict(found.captures)


# ---------------------------------------------------------------------------------------------- matching

THREE: Any = 3  # what a type checker would refuse
digits = rx("[0-9]+")
item = capture("item", rx("[a-z]+"))
value: Grammar = rule("value", lambda: capture("number", digits) | "(" + value + many("," + value) + ")")


@pytest.mark.parametrize(
    ("grammar", "matches", "fails"),
    [
        (lit('a"b\\n\n\té🎉'), ['a"b\\n\n\té🎉'], ["", 'a"b']),
        (rx("[0-9]{2}/a"), ["12/a"], ["1/a", "12/ab", ""]),
        (rx("a\nb|c\\/d"), ["a\nb", "c/d"], ["anb"]),
        (rx("(?i)yes|no"), ["YES", "No"], ["yesno"]),
        ("a" + optional("b") + "c", ["ac", "abc"], ["abbc"]),
        (lit("a") | "b" | rx("c+"), ["a", "b", "ccc"], ["ab", ""]),
        (many("ab", 2, 3), ["abab", "ababab"], ["ab", "abababab", "aba"]),
        (many(rx("[a-z]"), 1) + "b", ["ab", "bbb"], ["b", "ba"]),  # no part takes what the rest needs
        (separated(digits, ", "), ["", "1", "1, 22"], ["1,2", "1, "]),
        (separated(digits, ";", min=2, max=3), ["1;2", "1;2;3"], ["1", "1;2;3;4"]),
        (separated("a", max=1), ["", "a"], ["a, a"]),
        (separated("a", max=0), [""], ["a"]),
        (one_of(["tea", "te", digits]), ["tea", "te", "7"], ["t"]),
        (until("\n") + "\n", ["\n", "a b\n"], ["a", "a\nb\n"]),
        (until("END", "--") + "END", ["END", "xENEND"], ["a--END", "ENDEND"]),
        (substring_of("the quick brown fox"), ["quick brown", ""], ["uick", "quick fox"]),
        (substring_of("hello", by="chars"), ["ell", "o"], ["eo"]),
        (json_schema({"type": "array", "items": {"type": "integer"}}), ["[1, 2]", "[]"], ["[1,2]", "[1, ", "{}"]),
        (lark('start: "a" b\nb: /[0-9]+/'), ["a1"], ["a", "1"]),
        ("k=" + lark("start: /[0-9]+/") + ";", ["k=12;"], ["k=;"]),
        (value, ["1", "(1,(2,3))"], ["", "(1,)", "((1)"]),
        (many(many(optional("a"))), ["", "aaa"], ["b"]),
        ("Name: " + value + ", " + rx("[a-z]+") + "x", ["Name: (1), abx"], ["Name: (1), x"]),
    ],
)
def test_what_a_grammar_matches(grammar: Grammar, matches: list[str], fails: list[str]) -> None:
    for text in matches:
        assert grammar.match(text) is not None, text
        assert grammar.partial(text) == len(text)
    for text in fails:
        assert grammar.match(text) is None, text


def test_partial_tells_how_far_a_text_fits_in_characters() -> None:
    grammar = "é: " + many(rx("[0-9]"), 2)
    assert grammar.partial("é: 1x") == 4
    assert grammar.partial("é") == 1
    assert grammar.partial("🎉") == 0


@pytest.mark.parametrize(
    ("grammar", "text", "expected"),
    [
        (capture("a", rx("[a-z]+")) + capture("b", rx("[a-z0-9]*")), "abc1", {"a": "abc", "b": "1"}),
        (capture("a", rx("[a-z ]+")) + " end", "the end end", {"a": "the end"}),
        (capture("a", "x") | capture("b", rx("[x-z]")), "x", {"a": "x", "b": None}),
        (capture("a", "x") | capture("b", rx("[x-z]")), "y", {"a": None, "b": "y"}),
        (separated(item, ","), "a,b,a", {"item": ["a", "b", "a"]}),
        (separated(item, ","), "", {"item": []}),
        (item + ";" + item, "a;b", {"item": ["a", "b"]}),
        (capture("pair", item + "=" + capture("n", type=int)), "k=7", {"pair": "k=7", "item": "k", "n": 7}),
        (value, "(1,(20,3))", {"number": ["1", "20", "3"]}),
        (many("-" + capture("j", json_schema({"type": "object"})), max=1), '-{"a": []}', {"j": '{"a": []}'}),
        (until("END") + capture("q", "END"), "xEND", {"q": "END"}),
        (capture("é", until("\n")) + "\n" + capture("z", optional("!")), "naïve\n", {"é": "naïve", "z": ""}),
        (many(many(capture("a", optional("a")))), "aa", {"a": ["a", "a"]}),
        (lark('start: y ("," y)*\ny[capture="v"]: /[0-9]+/'), "1,2", {"v": ["1", "2"]}),
        ("k=" + lark('start: y\ny[capture="v"]: /[0-9]+/') + capture("z", "!"), "k=1!", {"v": "1", "z": "!"}),
    ],
)
def test_what_captures_hold(grammar: Grammar, text: str, expected: dict[str, Any]) -> None:
    assert captures(grammar, text) == expected


def test_a_capture_is_a_list_where_it_can_be_made_more_than_once() -> None:
    x: Callable[[str], Grammar] = lambda name: capture(name, "x")  # noqa: E731
    grammar = x("one") + many(x("many")) + optional(x("maybe")) + (x("both") | x("both")) + x("twice") + x("twice")
    expected = {"one": False, "many": True, "maybe": False, "both": False, "twice": True}
    assert capture_names(grammar) == expected
    loop = rule("loop", lambda: x("deep") + optional(loop))
    assert capture_names(loop) == {"deep": True}


def test_long_lists_and_deep_nesting_do_not_recurse_in_python() -> None:
    text = ",".join(["ab"] * 3000)
    found = captures(separated(item, ","), text)
    assert found is not None
    assert found["item"] == ["ab"] * 3000
    deep = b"(" * 2000 + b"1" + b")" * 2000
    assert [data for _, *data in read(value, deep) or ()] == [[2000, 2001]]


@given(st.recursive(st.sampled_from("abc"), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8))
@settings(max_examples=50, deadline=None)
def test_a_recursive_grammar_reads_back_what_was_nested(tree: Any) -> None:
    nested = rule("nested", lambda: capture("leaf", rx("[abc]")) | "(" + separated(nested, ",") + ")")

    def text(node: Any) -> str:
        return node if isinstance(node, str) else "(" + ",".join(map(text, node)) + ")"

    def leaves(node: Any) -> list[str]:
        return [node] if isinstance(node, str) else [leaf for part in node for leaf in leaves(part)]

    assert captures(nested, text(tree)) == {"leaf": leaves(tree)}


# ---------------------------------------------------------------------------------------------- Lark source


def test_what_is_regular_becomes_one_lexeme() -> None:
    card = "Name: " + capture("name", rx("[A-Z][a-z]*")) + "\n" + separated(capture("likes", one_of(["a/b", "c"])))
    assert card.to_lark() == ('start: T1\nT1: "Name: " /[A-Z][a-z]*/ "\\n" (("a/b" | "c") (", " ("a/b" | "c"))*)?\n')


def test_what_is_recursive_json_or_lark_becomes_rules() -> None:
    grammar = "v=" + value + ";" + json_schema({"type": "null"}) + lark("start: /a/")
    assert grammar.to_lark() == (
        'start: T1 r1_value T2 %json {"type": "null", "x-guidance": STYLE} %lark {\nstart: /a/\n}\n'
        "r1_value: (T3 r1_value (T4 r1_value)* T5 | T6)\n"
        'T1: "v="\nT2: ";"\nT3: "("\nT4: ","\nT5: ")"\nT6: /[0-9]+/\n'
    ).replace("STYLE", json.dumps(JSON_STYLE))


def test_lark_source_stays_as_it_is_and_the_same_grammar_is_the_same_text() -> None:
    assert lark("start: /a/").to_lark() == "start: /a/"
    assert (value + "x").to_lark() == (value + "x").to_lark()


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rx("("), r"rx\('\('\).*unclosed group"),
        (lambda: rx("a(?=b)"), "look-around"),
        (lambda: rx("(a)\\1"), "backreferences"),
        (lambda: rx(THREE), "takes a regular expression, got 3"),
        (lambda: lit("\ud800"), "UTF-8"),
        (lambda: many("a", 3, 2), r"max must be at least min \(3\), got 2"),
        (lambda: many("a", -1), "min must be a whole number from 0 to 10000, got -1"),
        (lambda: many("a", 0, 10_001), "max must be a whole number"),
        (lambda: one_of([]), "list of texts or grammars"),
        (lambda: one_of("abc"), "list of texts or grammars"),
        (lambda: until(), "texts that are not empty"),
        (lambda: substring_of(""), "text that is not empty"),
        (lambda: capture("", "a"), "name must be a text"),
        (lambda: capture("a"), "either a grammar or type="),
        (lambda: capture("a", "b", type=int), "either a grammar or type="),
        (lambda: rule("no good", lambda: "a"), "must be an identifier"),
        (lambda: lark("start: nothing"), "nothing"),
        (lambda: json_schema("{"), "json_schema is not JSON"),
        (lambda: json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: json_schema(THREE), "must be a dict"),
        (lambda: json_schema({"x-guidance": {}}), "'x-guidance' are not supported"),
        (lambda: "a" + many(THREE), "made of texts and grammars, got 3"),
    ],
)
def test_what_is_refused_at_once(make: Callable[[], Grammar], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        make()


def test_a_rule_that_begins_with_itself_is_refused_by_name() -> None:
    left = rule("left", lambda: optional("x") + left + "a" | "b")
    with pytest.raises(bo.InvalidRequest, match="rule 'left' begins with itself"):
        left.match("ba")
    right = rule("right", lambda: "x" + optional(right))
    assert right.match("xxx") is not None


# ---------------------------------------------------------------------------------------------- sampling


def grammars() -> st.SearchStrategy[GrammarLike]:
    leaf: st.SearchStrategy[GrammarLike] = st.one_of(
        st.text(string.ascii_letters + '"\\/\n é', max_size=3),
        st.sampled_from([rx("[0-9]{1,3}"), rx("a*b?"), until("ab"), substring_of("one two"), value]),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda pair: lit("") + pair[0] + pair[1]),
            st.lists(inner, min_size=1, max_size=3).map(one_of),
            st.tuples(inner, st.integers(0, 2), st.integers(2, 3)).map(lambda args: many(*args)),
            inner.map(lambda part: capture("c", part)),
            inner.map(optional),
        ),
        max_leaves=6,
    )


@given(grammars(), st.integers(0, 100))
@settings(max_examples=120, deadline=None)
def test_a_sample_matches_and_its_captures_are_parts_of_it(given_grammar: GrammarLike, seed: int) -> None:
    grammar = lit("") + given_grammar
    try:
        text = grammar.sample(seed)
    except bo.InvalidRequest:  # next to a rule, a regular part may take what the rest needs
        reject()
    assert text == grammar.sample(seed)
    found = grammar.match(text)
    assert found is not None
    pieces = found.captures.get("c") or []
    assert all(piece in text for piece in ([pieces] if isinstance(pieces, str) else pieces))
    assert all(grammar.partial(text[:end]) == end for end in range(len(text)))


def test_samples_differ_by_seed_and_end_in_recursive_grammars() -> None:
    assert len({value.sample(seed) for seed in range(20)}) > 5
    schema = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["name", "sub"],
                "additionalProperties": False,
            }
        },
    }
    for seed in range(5):
        jsonschema.validate(json.loads(json_schema(schema).sample(seed)), schema)


def test_a_grammar_without_short_texts_says_so() -> None:
    with pytest.raises(bo.InvalidRequest, match="found no text of at most 5 characters"):
        rx("[a-z]{10}").sample(max_chars=5)
