"""Writes a grammar as Lark source in llguidance's dialect.

llguidance splits a text into lexemes (its upper-case names) as it comes, and a lexeme takes the longest text it can:
`A "b"` with `A: /[a-z]*/` never ends. So everything regular is written as one lexeme, which is a regular expression
and means what it says: neighbours in a sequence and alternatives are joined, and only what is recursive, JSON or Lark
source becomes a rule.

Captures are not written. llguidance reports one for every rule that it completes on some reading of the text, also on
readings it gives up later, and none for the last lexeme of a text that ends at a limit; `bough.matching` reads them off
the finished text instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from bough.errors import InvalidRequest
from bough.grammar_facts import is_regular, recursive_rules, walk
from bough.grammar_nodes import Alt, Capture, Grammar, Json, Lark, Lit, Repeat, Rule, Rx, Seq, Substring, Until

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_STYLE: Final[JsonCompileOptions] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # Without \u: half of a surrogate pair is no text. Every character can be written as itself.
    "json_allowed_escapes": '"\\nrbtf',
}
"""How JSON is written: as Python writes it. Free blanks would let a model indent for ever."""

_ANY: Final = "/(?s:.*)/"


def source_of(grammar: Grammar) -> str:
    """Return the Lark source of a grammar. Raises InvalidRequest for a rule that begins with itself."""
    if isinstance(grammar, Lark):
        return grammar.source
    check_left_recursion(grammar)
    return _Writer(grammar).source()


class _Writer:
    """One source: its lexemes and rules, each written once."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._recursive = recursive_rules(grammar)
        self._regular: dict[int, bool] = {}
        self._lexemes: dict[str, str] = {}  # definition → name
        self._rules: dict[Rule, str] = {}
        self._lines: dict[str, str] = {}  # name → definition

    def source(self) -> str:
        """Return the whole source."""
        start = self._expression(self._grammar)
        todo = True
        while todo:  # a rule's body may name rules that were not met before
            todo = False
            for rule, name in list(self._rules.items()):
                if name not in self._lines:
                    self._lines[name] = ""
                    self._lines[name] = self._expression(rule.body)
                    todo = True
        lines = [f"start: {start}", *(f"{name}: {body}" for name, body in self._lines.items())]
        lines += [f"{name}: {body}" for body, name in self._lexemes.items()]
        return "\n".join(lines) + "\n"

    def _is_regular(self, grammar: Grammar) -> bool:
        known = self._regular.get(id(grammar))
        if known is None:
            known = self._regular[id(grammar)] = is_regular(grammar)
        return known

    def _expression(self, grammar: Grammar) -> str:
        """Return the expression of a grammar inside a rule."""
        if self._is_regular(grammar):
            return self._lexeme(terminal(grammar))
        if isinstance(grammar, Seq):
            return " ".join(self._grouped(grammar.items, Seq))
        if isinstance(grammar, Alt):
            return "(" + " | ".join(self._grouped(grammar.items, Alt)) + ")"
        if isinstance(grammar, Repeat):
            return f"({self._expression(grammar.item)}){_times(grammar)}"
        if isinstance(grammar, Capture):
            return self._expression(grammar.item)
        if isinstance(grammar, Rule):
            return self._rule(grammar) if grammar in self._recursive else self._expression(grammar.body)
        if isinstance(grammar, Json):
            schema = json.loads(grammar.schema)
            return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE}, ensure_ascii=False)
        assert isinstance(grammar, Lark), "all the others are regular"
        return "%lark {\n" + grammar.source + "\n}"

    def _grouped(self, items: tuple[Grammar, ...], kind: type[Seq] | type[Alt]) -> Iterator[str]:
        """Yield the expressions of items, neighbours that are regular (all, of alternatives) as one lexeme."""
        held: list[Grammar] = []
        for item in items:
            if self._is_regular(item):
                held.append(item)
                continue
            if held and kind is Seq:
                yield self._lexeme(terminal(Seq(tuple(held))))
                held = []
            yield self._expression(item)
        if held:
            yield self._lexeme(terminal(kind(tuple(held))))

    def _lexeme(self, definition: str) -> str:
        return self._lexemes.setdefault(definition, f"T{len(self._lexemes) + 1}")

    def _rule(self, rule: Rule) -> str:
        if rule not in self._rules:
            # Lark's rules are lower case, and the name "start" is taken.
            self._rules[rule] = (
                f"r{len(self._rules) + 1}_{rule.name.lower()}" if rule.name.isascii() else (f"r{len(self._rules) + 1}")
            )
        return self._rules[rule]


# ---------------------------------------------------------------------------------------------- lexemes


def terminal(grammar: Grammar) -> str:
    """Return a regular grammar as the definition of one lexeme."""
    if isinstance(grammar, Lit):
        return quoted(grammar.text)
    if isinstance(grammar, Rx):
        return slashed(grammar.pattern)
    if isinstance(grammar, Until):
        return _until(grammar.stops)
    if isinstance(grammar, Substring):
        return "%regex " + json.dumps({f"substring_{grammar.by}": grammar.text}, ensure_ascii=False)
    if isinstance(grammar, Seq):
        return " ".join([_atom(item) for item in grammar.items]) or '""'
    if isinstance(grammar, Alt):
        return " | ".join([_atom(item) for item in grammar.items])
    if isinstance(grammar, Repeat):
        return f"({terminal(grammar.item)}){_times(grammar)}"
    assert isinstance(grammar, (Capture, Rule)), "the rest is not regular"
    return terminal(grammar.item if isinstance(grammar, Capture) else grammar.body)


def _atom(grammar: Grammar) -> str:
    while isinstance(grammar, (Capture, Rule)):
        grammar = grammar.children()[0]
    text = terminal(grammar)
    return text if isinstance(grammar, (Lit, Rx, Repeat, Substring)) else f"({text})"


def _times(repeat: Repeat) -> str:
    bounds = (repeat.min, repeat.max)
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get(bounds)
    return short or f"{{{repeat.min},{'' if repeat.max is None else repeat.max}}}"


def _until(stops: tuple[str, ...]) -> str:
    if all(len(stop) == 1 for stop in stops):
        inside = "".join(f"\\x{{{ord(stop):x}}}" for stop in stops)
        return f"/[^{inside}]*/"
    choices = " | ".join(quoted(stop) for stop in stops)
    return f"{_ANY} & ~({_ANY} ({choices}) {_ANY})"


def quoted(text: str) -> str:
    """Return a text as a string of Lark, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def slashed(pattern: str) -> str:
    """Return a regular expression between slashes, on one line."""
    if not pattern:
        return '""'
    out: list[str] = []
    escaped = False
    for char in pattern:
        if char == "\n":
            out.append("n" if escaped else "\\n")
        else:
            out.append("\\/" if char == "/" and not escaped else char)
        escaped = char == "\\" and not escaped
    return "/" + "".join(out) + "/"


# ---------------------------------------------------------------------------------------------- left recursion


def check_left_recursion(grammar: Grammar) -> None:
    """Raise InvalidRequest if a rule can begin with itself, which nothing could read from left to right."""
    for rule in recursive_rules(grammar):
        if any(node is rule for node in _first(rule.body)):
            raise InvalidRequest(
                f"rule {rule.name!r} begins with itself; write what it begins with first, as in item + many(more)",
                field="grammar",
                value=rule.name,
            )


def _first(grammar: Grammar) -> Iterator[Grammar]:
    """Yield what a match can begin with, rules opened once."""
    seen: set[int] = set()
    waiting = [grammar]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, Seq):
            for item in node.items:
                waiting.append(item)
                if not is_nullable(item):
                    break
        else:
            waiting.extend(node.children())


def is_nullable(grammar: Grammar) -> bool:
    """Return whether the empty text may match; of JSON and Lark source, and of most patterns, it is said no."""
    nodes = list(walk(grammar))
    empty: set[int] = set()
    grew = True
    while grew:  # a least fixed point, because rules refer to themselves
        found = {id(node) for node in nodes if _is_empty(node, empty)}
        grew, empty = found != empty, found
    return id(grammar) in empty


def _is_empty(node: Grammar, empty: set[int]) -> bool:
    if isinstance(node, Lit):
        return not node.text
    if isinstance(node, Rx):
        from bough.acceptor import acceptor_of

        return acceptor_of(node).accepts_nothing()
    if isinstance(node, (Until, Substring)):
        return True
    if isinstance(node, Alt):
        return any(id(item) in empty for item in node.items)
    if isinstance(node, Repeat):
        return node.min == 0 or id(node.item) in empty
    if isinstance(node, (Seq, Capture, Rule)):
        return all(id(item) in empty for item in node.children())
    return False
