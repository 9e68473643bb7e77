"""The kinds of grammar: a tree of immutable nodes, of which `grammars.py` builds any and others walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bough.errors import InvalidRequest

if TYPE_CHECKING:
    from bough.matching import Match


GrammarLike: TypeAlias = "Grammar | str"


class Grammar:
    """The base of all grammars. `+` is one after the other, `|` is one of both."""

    __slots__ = ("__weakref__",)

    def __add__(self, other: GrammarLike) -> Grammar:
        return _sequence(self, as_grammar(other))

    def __radd__(self, other: GrammarLike) -> Grammar:
        return _sequence(as_grammar(other), self)

    def __or__(self, other: GrammarLike) -> Grammar:
        return alternatives(self, as_grammar(other))

    def __ror__(self, other: GrammarLike) -> Grammar:
        return alternatives(as_grammar(other), self)

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


def _sequence(*items: Grammar) -> Grammar:
    flat = [part for item in items for part in (item.items if isinstance(item, Seq) else (item,))]
    return Seq(tuple(flat))


def alternatives(*items: Grammar) -> Grammar:
    """Match one of the grammars; where one is alternatives itself, one of those."""
    flat = [part for item in items for part in (item.items if isinstance(item, Alt) else (item,))]
    return flat[0] if len(flat) == 1 else Alt(tuple(flat))
