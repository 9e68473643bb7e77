"""Grammars as values: what a constrained `gen` may write, built in Python and checked without a model.

::

    card = (
        "Name: " + capture("name", rx("[A-Z][a-z]+")) + "\\n"
        "Age: " + capture("age", type=int) + "\\n"
        "Likes: " + separated(capture("likes", one_of(["tea", "chess", "rain"])), ", ", min=1, max=3)
    )
    card.match("Name: Ada\\nAge: 36\\nLikes: tea").captures   # {"name": "Ada", "age": 36, "likes": ["tea"]}
    card.sample(seed=1)                                       # some text that it matches
    s += gen("card", grammar=card)                            # one decode; then s["name"], s["age"], s["likes"]

A grammar is immutable, and may be used in any number of others. Texts stand for themselves: `"a" + rx("b")`. What a
grammar matches is what the expression says, as in regular expressions: no part of it takes text that the rest needs.
Only next to a part that is not regular (a rule that refers to itself, JSON, Lark source) does a regular part take the
longest text that it can. Where a text can be read in two ways, the first alternative and the longest earlier part win.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from bough.errors import InvalidRequest
from bough.grammar_nodes import (
    Capture,
    Grammar,
    GrammarLike,
    Json,
    Lark,
    Lit,
    Repeat,
    Rule,
    Rx,
    Substring,
    Until,
    alternatives,
    as_grammar,
    lit,
)

MAX_REPEAT: Final = 10_000
"""The highest bound of a repeat."""


def rx(pattern: str) -> Grammar:
    r"""Match what a regular expression matches as a whole: `rx("[0-9]{3,5}")`.

    The dialect is Rust's `regex` without look-around, word boundaries and back-references; `.` is any character but a
    newline, `\d` and `\w` know all scripts. Raises InvalidRequest naming what is wrong with the pattern.
    """
    from bough.acceptor import check_regex

    check_regex(pattern, "rx")
    return Rx(pattern)


def many(item: GrammarLike, min: int = 0, max: int | None = None) -> Grammar:
    """Match the item `min` to `max` times, one after the other; without `max` as often as it comes."""
    _check_bounds(min, max)
    return Repeat(as_grammar(item), min, max)


def optional(item: GrammarLike) -> Grammar:
    """Match the item or nothing."""
    return Repeat(as_grammar(item), 0, 1)


def separated(item: GrammarLike, separator: GrammarLike = ", ", min: int = 0, max: int | None = None) -> Grammar:
    """Match `min` to `max` items with a separator between neighbours: `separated(rx("[a-z]+"), ", ")`."""
    _check_bounds(min, max)
    one, between = as_grammar(item), as_grammar(separator)
    if max == 0:
        return Lit("")
    rest = one if max == 1 else one + Repeat(between + one, _less(min), None if max is None else max - 1)
    return rest if min else Repeat(rest, 0, 1)


def one_of(items: Sequence[GrammarLike]) -> Grammar:
    """Match one of the texts or grammars."""
    if isinstance(items, str) or not isinstance(items, Sequence) or not items:
        raise InvalidRequest(f"one_of takes a list of texts or grammars that is not empty, got {items!r}")
    return alternatives(*[as_grammar(item) for item in items])


def until(*stops: str) -> Grammar:
    r"""Match any text in which none of the stops occurs: `capture("line", until("\n")) + "\n"`. Empty text counts."""
    if not stops or not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidRequest(f"until takes texts that are not empty, got {stops!r}", field="stops")
    for stop in stops:
        lit(stop)
    return Until(stops)


def substring_of(text: str, by: Literal["chars", "words"] = "words") -> Grammar:
    """Match a part of a text, word for word, so that a quotation is one: `substring_of(article)`.

    by: whether it may begin and end at any character, or only at words. The empty text counts.
    """
    if by not in ("chars", "words"):
        raise InvalidRequest(f"by must be 'chars' or 'words', got {by!r}", field="by")
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"substring_of takes a text that is not empty, got {text!r}", field="text")
    return Substring(text, by)


def json_schema(schema: str | Mapping[str, Any] | type[Any]) -> Grammar:
    """Match the JSON texts of a schema, given as JSON text, a dict or a pydantic model.

    They are written as `{"a": 1, "b": [2, 3]}`, without any other blanks. Raises InvalidRequest naming the keyword that
    cannot be kept to.
    """
    from bough.schemas import schema_text

    return Json(schema_text(schema))


def json_type(type: Any) -> Grammar:
    """Match a JSON text that can be read as a type: `json_type(list[int])`. Raises InvalidRequest if there is none."""
    from bough.schemas import Reading

    return Json(Reading(type).schema)


def of_type(type: Any) -> Grammar:
    """Match what `gen(type=...)` lets the model write for a type: 42 for an int, JSON for a dataclass."""
    from bough.typed import shape_of

    return shape_of(type).grammar


def lark(source: str) -> Grammar:
    """Match llguidance's dialect of Lark, from the rule `start`. Captures marked there become variables as well.

    Raises InvalidRequest naming line and reason.
    """
    from bough.acceptor import check_lark

    check_lark(source)
    return Lark(source)


def capture(name: str, item: GrammarLike | None = None, *, type: Any = None) -> Grammar:
    """Match the item, and make what it matched the variable `name`; with a type, that type's grammar and values.

    In a repeat, in a rule that refers to itself, or where it stands twice, the variable is the list of all; otherwise
    it is None where the text went another way.
    """
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"a variable's name must be a text that is not empty, got {name!r}", field="name")
    if (item is None) == (type is None):
        raise InvalidRequest(f"capture({name!r}) takes either a grammar or type=", field="type")
    if type is None:
        return Capture(name, as_grammar(item))
    from bough.typed import shape_of

    shape = shape_of(type)
    return Capture(name, shape.grammar, shape.read)


def rule(name: str, body: Callable[[], GrammarLike]) -> Grammar:
    """Name a grammar so that it can refer to itself; `body` is called when the grammar is first used.

    ::

        value = rule("value", lambda: rx("[0-9]+") | "(" + value + many("," + value) + ")")
        value.match("(1,(2,3))")
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidRequest(f"a rule's name must be an identifier, got {name!r}", field="name")
    if not callable(body):
        raise InvalidRequest(f"rule({name!r}) takes a function that returns its grammar, got {body!r}", field="body")
    return Rule(name, body)


def _check_bounds(least: object, most: object) -> None:
    for field, value in (("min", least), ("max", most)):
        if (value is None and field == "max") or (
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_REPEAT
        ):
            continue
        raise InvalidRequest(f"{field} must be a whole number from 0 to {MAX_REPEAT}, got {value!r}", field=field)
    assert isinstance(least, int)
    if isinstance(most, int) and most < least:
        raise InvalidRequest(f"max must be at least min ({least}), got {most}", field="max")


def _less(number: int) -> int:
    return max(number - 1, 0)
