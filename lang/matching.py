"""Reads texts against grammars without a model: whether they fit, how far, and what the captures hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bough.acceptor import acceptor_of
from bough.capture_reader import read
from bough.grammar_facts import capture_names, walk
from bough.grammar_nodes import Grammar, Lark


@dataclass(frozen=True, slots=True)
class Match:
    """What a grammar's captures hold in a text that it matches."""

    text: str
    captures: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]


def match(grammar: Grammar, text: str) -> Match | None:
    """Return what the captures hold if the whole text matches, else None."""
    acceptor = acceptor_of(grammar)
    if not acceptor.accepts(text.encode()):
        return None
    return Match(text, captures_of(grammar, text))


def fitting(grammar: Grammar, text: str) -> int:
    """Return how many characters at the start of a text can begin a match."""
    data = text.encode()
    return len(data[: acceptor_of(grammar).length(data)].decode(errors="ignore"))


def captures_of(grammar: Grammar, text: str) -> dict[str, Any]:
    """Return the captures of a text that the grammar matches: by name a value, or a list where there can be several."""
    data = text.encode()
    values: dict[str, Any] = {name: [] if several else None for name, several in capture_names(grammar).items()}
    found = read(grammar, data) if values else ()
    for node, start, end in found or ():
        piece = data[start:end].decode()
        value = piece if node.read is None else node.read(piece)
        if isinstance(values[node.name], list):
            values[node.name].append(value)
        else:
            values[node.name] = value
    for name, pieces in _captures_of_source(grammar, data).items():
        values.setdefault(name, pieces[0] if len(pieces) == 1 else pieces)
    return values


def _captures_of_source(grammar: Grammar, data: bytes) -> dict[str, list[str]]:
    if not any(isinstance(node, Lark) for node in walk(grammar)):
        return {}
    return acceptor_of(grammar).captures(data)
