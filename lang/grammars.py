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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from bough.errors import InvalidRequest

if TYPE_CHECKING:
    from bough.matching import Match

GrammarLike: TypeAlias = "Grammar | str"

MAX_REPEAT: Final = 10_000
"""The highest bound of a repeat."""


class Grammar:
    """The base of all grammars. `+` is one after the other, `|` is one of both."""

    __slots__ = ("__weakref__",)

    def __add__(self, other: GrammarLike) -> Grammar:
        return _sequence(self, as_grammar(other))

    def __radd__(self, other: GrammarLike) -> Grammar:
        return _sequence(as_grammar(other), self)

    def __or__(self, other: GrammarLike) -> Grammar:
        return _alternatives(self, as_grammar(other))

    def __ror__(self, other: GrammarLike) -> Grammar:
        return _alternatives(as_grammar(other), self)

    def children(self) -> tuple[Grammar, ...]:
        """Return the grammars that this one is made of, in order."""
        return ()

    def to_lark(self) -> str:
        """Return the grammar as llguidance's Lark source; the same grammar gives the same text.

        Raises InvalidRequest for a rule that begins with itself. Captures are not in it: see `bough.matching`.
        """
        from bough.lark_source import source_of

        return source_of(self)

    def match(self, text: str) -> Match | None:
        """Return what the captures hold if the whole text matches, else None. Needs no model.

        `partial(text)` tells how far a text fits that does not match.
        """
        from bough.matching import match

        return match(self, text)

    def partial(self, text: str) -> int:
        """Return how many characters at the start of `text` can begin a match; `len(text)` if all of them."""
        from bough.matching import fitting

        return fitting(self, text)

    def sample(self, seed: int = 0, max_chars: int = 2000) -> str:
        """Return some text that the grammar matches: the same for the same seed, and of any shape that it allows.

        Raises InvalidRequest if none of at most `max_chars` characters was found.
        """
        from bough.samples import sample

        return sample(self, seed, max_chars)


@dataclass(frozen=True, slots=True, eq=False)
class Lit(Grammar):
    """Exactly this text."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Rx(Grammar):
    """Whatever a regular expression matches as a whole."""

    pattern: str


@dataclass(frozen=True, slots=True, eq=False)
class Until(Grammar):
    """Any text, the empty one too, in which none of these occurs."""

    stops: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Substring(Grammar):
    """Neighbouring chunks of a text, or none of them."""

    text: str
    by: Literal["chars", "words"]


@dataclass(frozen=True, slots=True, eq=False)
class Seq(Grammar):
    """One after the other."""

    items: tuple[Grammar, ...]

    def children(self) -> tuple[Grammar, ...]:
        """Return the items."""
        return self.items


@dataclass(frozen=True, slots=True, eq=False)
class Alt(Grammar):
    """One of them."""

    items: tuple[Grammar, ...]

    def children(self) -> tuple[Grammar, ...]:
        """Return the alternatives."""
        return self.items


@dataclass(frozen=True, slots=True, eq=False)
class Repeat(Grammar):
    """The item `min` to `max` times; without a `max`, any number of times."""

    item: Grammar
    min: int
    max: int | None

    def children(self) -> tuple[Grammar, ...]:
        """Return the item."""
        return (self.item,)


@dataclass(frozen=True, slots=True, eq=False)
class Capture(Grammar):
    """Names what the item matched; `read` makes the variable's value of the text."""

    name: str
    item: Grammar
    read: Callable[[str], Any] | None = None

    def children(self) -> tuple[Grammar, ...]:
        """Return the item."""
        return (self.item,)


@dataclass(frozen=True, slots=True, eq=False)
class Json(Grammar):
    """A JSON text of a schema, which is kept as JSON."""

    schema: str


@dataclass(frozen=True, slots=True, eq=False)
class Lark(Grammar):
    """A grammar in llguidance's dialect of Lark, from its rule `start`."""

    source: str


class Rule(Grammar):
    """A named grammar that is made when it is first needed, so that it can refer to itself."""

    __slots__ = ("_body", "_make", "name")

    def __init__(self, name: str, make: Callable[[], GrammarLike]) -> None:
        self.name = name
        self._make: Callable[[], GrammarLike] | None = make
        self._body: Grammar | None = None

    def __repr__(self) -> str:
        return f"rule({self.name!r})"

    @property
    def body(self) -> Grammar:
        """What the rule stands for."""
        if self._body is None:
            assert self._make is not None, "dropped only once the body is there"
            self._body, self._make = as_grammar(self._make()), None
        return self._body

    def children(self) -> tuple[Grammar, ...]:
        """Return the body."""
        return (self.body,)


# ---------------------------------------------------------------------------------------------- constructors


def as_grammar(value: object) -> Grammar:
    """Return a grammar, or the one that matches exactly a given text. Raises InvalidRequest for anything else."""
    if isinstance(value, Grammar):
        return value
    if isinstance(value, str):
        return lit(value)
    raise InvalidRequest(f"a grammar is made of texts and grammars, got {value!r}", field="grammar", value=repr(value))


def lit(text: str) -> Grammar:
    """Match exactly this text."""
    if not isinstance(text, str):
        raise InvalidRequest(f"lit takes a text, got {text!r}", field="text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"lit takes text that can be written as UTF-8, got {text!r}", field="text") from None
    return Lit(text)


def rx(pattern: str) -> Grammar:
    r"""Match what a regular expression matches as a whole: `rx("[0-9]{3,5}")`.

    The dialect is Rust's `regex` without look-around, word boundaries and back-references; `.` is any character but a
    newline, `\d` and `\w` know all scripts. Raises InvalidRequest naming what is wrong with the pattern.
    """
    from bough.matching import check_regex

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
    return _alternatives(*[as_grammar(item) for item in items])


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
    from bough.matching import check_lark

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


# ---------------------------------------------------------------------------------------------- structure


def walk(grammar: Grammar) -> Iterator[Grammar]:
    """Yield every grammar inside, this one first, each object once."""
    seen: set[int] = set()
    waiting = [grammar]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(reversed(node.children()))


def recursive_rules(grammar: Grammar) -> frozenset[Rule]:
    """Return the rules inside that can reach themselves."""
    rules = [node for node in walk(grammar) if isinstance(node, Rule)]
    return frozenset(rule for rule in rules if any(node is rule for node in walk_below(rule)))


def walk_below(grammar: Grammar) -> Iterator[Grammar]:
    """Yield every grammar that is reached from this one in one step or more: itself only if it is recursive."""
    seen: set[int] = set()
    waiting = list(grammar.children())
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting.extend(node.children())


def is_regular(grammar: Grammar) -> bool:
    """Return whether a finite automaton knows the grammar: nothing in it is recursive, JSON or Lark source."""
    return not any(isinstance(node, (Json, Lark)) for node in walk(grammar)) and not recursive_rules(grammar)


def has_captures(grammar: Grammar) -> bool:
    """Return whether something inside is captured."""
    return any(isinstance(node, Capture) for node in walk(grammar))


def capture_names(grammar: Grammar) -> dict[str, bool]:
    """Return the names that are captured, each with whether it can be captured more than once."""
    counts: dict[str, int] = {}
    inside_loops = {id(node) for rule in recursive_rules(grammar) for node in walk(rule)}
    _count(grammar, 1, counts, inside_loops, frozenset())
    return {name: number > 1 for name, number in counts.items()}


def _count(
    grammar: Grammar, times: int, counts: dict[str, int], loops: set[int], open_rules: frozenset[Grammar]
) -> None:
    """Add how often each name can be captured, 2 standing for any more."""
    if isinstance(grammar, Rule):
        if grammar in open_rules:
            return
        open_rules |= {grammar}
    if isinstance(grammar, Alt):
        branches: list[dict[str, int]] = []
        for item in grammar.items:
            branches.append({})
            _count(item, times, branches[-1], loops, open_rules)
        for name in dict.fromkeys(name for branch in branches for name in branch):
            counts[name] = counts.get(name, 0) + max(branch.get(name, 0) for branch in branches)
        return
    if isinstance(grammar, Repeat) and grammar.max != 1:
        times = 2
    if isinstance(grammar, Capture):
        counts[grammar.name] = counts.get(grammar.name, 0) + (2 if id(grammar) in loops else times)
    for child in grammar.children():
        _count(child, times, counts, loops, open_rules)


def _sequence(*items: Grammar) -> Grammar:
    flat = [part for item in items for part in (item.items if isinstance(item, Seq) else (item,))]
    return Seq(tuple(flat))


def _alternatives(*items: Grammar) -> Grammar:
    flat = [part for item in items for part in (item.items if isinstance(item, Alt) else (item,))]
    return flat[0] if len(flat) == 1 else Alt(tuple(flat))


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
