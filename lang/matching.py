"""Reads texts against grammars without a model: whether they fit, how far, and what the captures hold.

Whether a text fits is asked of llguidance with a vocabulary of single bytes, so that the answer is the runtime's. What
the captures hold is read off a text that fits, by a backtracking machine over the grammar: a stack of what may still be
tried, a set of what has failed (so no place is tried twice for the same rest), and llguidance again for the parts
without captures. Nothing recurses, so a list of ten thousand items is as good as one of three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from bough.errors import InvalidRequest
from bough.grammar_facts import capture_names, has_captures, is_regular, walk
from bough.grammar_nodes import Alt, Capture, Grammar, Json, Lark, Lit, Repeat, Rule, Seq
from bough.grammars import one_of
from bough.lark_source import JSON_STYLE
from bough.runtime import protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_END: Final = 256  # the token after the bytes


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


# ---------------------------------------------------------------------------------------------- llguidance


@cache
def _bytes_tokenizer() -> LLTokenizer:
    """Return the vocabulary of the 256 bytes and an end; a constant, made on first use (2 ms)."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        eos_token_id = _END
        bos_token_id = None
        tokens = [*(bytes([value]) for value in range(256)), b"<end>"]  # noqa: RUF012
        special_token_ids = [_END]  # noqa: RUF012

        def __call__(self, text: str | bytes) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=_END + 1)


class Acceptor:
    """llguidance's reading of bytes against one grammar."""

    __slots__ = ("_matcher",)

    def __init__(self, source: str, what: str) -> None:
        """Compile llguidance's own form of a grammar; `what` names it in the InvalidRequest raised if it is wrong."""
        from llguidance import LLMatcher

        self._matcher: LLMatcher = LLMatcher(_bytes_tokenizer(), source, log_level=0)
        if self._matcher.is_error():
            raise InvalidRequest(f"{what}: {_reason(self._matcher.get_error())}", field="grammar")

    def length(self, data: bytes) -> int:
        """Return how many bytes at the start of `data` can begin a match."""
        self._matcher.reset()
        taken = self._matcher.try_consume_tokens(list(data))
        if self._matcher.is_error():  # a limit of llguidance's, as on very deep nesting
            raise InvalidRequest(f"grammar: {_reason(self._matcher.get_error())}", field="grammar")
        return taken

    def accepts(self, data: bytes) -> bool:
        """Return whether the whole of `data` matches."""
        return self.length(data) == len(data) and self._matcher.is_accepting()

    def accepts_nothing(self) -> bool:
        """Return whether the empty text matches."""
        return self.accepts(b"")

    def ends(self, data: bytes, start: int) -> list[int]:
        """Return every position up to which `data[start:]` matches, in rising order."""
        matcher = self._matcher
        matcher.reset()
        found = [start] if matcher.is_accepting() else []
        for position in range(start, len(data)):
            if not matcher.try_consume_tokens([data[position]]):
                break
            if matcher.is_accepting():
                found.append(position + 1)
        return found

    def captures(self, data: bytes) -> dict[str, list[str]]:
        """Return what the captures marked in Lark source hold once the whole of `data` was read."""
        if not self.accepts(data):
            return {}
        self._matcher.consume_token(_END)  # the last lexeme may have been open
        found: dict[str, list[str]] = {}
        for name, piece in self._matcher.get_captures():
            found.setdefault(name, []).append(piece.decode(errors="replace"))
        return found

    def start(self) -> LLMatcher:
        """Return a matcher at the start, of the caller's own."""
        self._matcher.reset()
        return self._matcher.deep_copy()


def acceptor_of(grammar: Grammar) -> Acceptor:
    """Return the acceptor of a grammar. Raises InvalidRequest if llguidance refuses it."""
    if isinstance(grammar, Json):
        return Acceptor(_compiled("json_schema", grammar.schema), "json_schema")
    return Acceptor(_compiled("lark", grammar.to_lark()), "grammar")


def acceptor_of_wire(grammar: protocol.Grammar) -> Acceptor:
    """Return the acceptor of a grammar as it is sent. Raises InvalidRequest if llguidance refuses it."""
    if grammar.kind == "choices":
        return acceptor_of(one_of(json.loads(grammar.source)))
    return Acceptor(_compiled(grammar.kind, grammar.source), grammar.kind)


def check_regex(pattern: object, what: str) -> None:
    """Raise InvalidRequest if a pattern is not one."""
    if not isinstance(pattern, str):
        raise InvalidRequest(f"{what} takes a regular expression, got {pattern!r}", field="regex")
    _check("regex", pattern, f"{what}({pattern!r})")


def check_lark(source: object) -> None:
    """Raise InvalidRequest if a source is no grammar."""
    if not isinstance(source, str) or not source.strip():
        raise InvalidRequest(f"lark takes the source of a grammar, got {source!r}", field="grammar")
    _check("lark", source, "lark")


def check_schema(schema: str) -> None:
    """Raise InvalidRequest naming what in a JSON schema cannot be kept to."""
    _check("json_schema", schema, "json_schema")


@lru_cache(maxsize=256)
def _check(kind: Literal["regex", "lark", "json_schema"], source: str, what: str) -> None:
    """Raise InvalidRequest if llguidance refuses a source; what passed once (0.3 to 5 ms) passes at once again."""
    Acceptor(_compiled(kind, source), what)


def _compiled(kind: Literal["regex", "lark", "json_schema"], source: str) -> str:
    """Return llguidance's own form of a grammar."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(source)
    return LLMatcher.grammar_from_json_schema(source, overrides=JSON_STYLE)


def _reason(message: str) -> str:
    """Return llguidance's reason without its listing of the source."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and " | " not in line]
    kept = [line for line in lines if set(line) != {"^"}]
    return " ".join(kept)


def _captures_of_source(grammar: Grammar, data: bytes) -> dict[str, list[str]]:
    if not any(isinstance(node, Lark) for node in walk(grammar)):
        return {}
    return acceptor_of(grammar).captures(data)


# ---------------------------------------------------------------------------------------------- captures

Captured: TypeAlias = "tuple[Capture, int, int]"
_Trail: TypeAlias = "tuple[Captured, _Trail] | None"
_Task: TypeAlias = "Grammar | _Close | _Again"
_Rest: TypeAlias = "_Node | None"


@dataclass(frozen=True, slots=True)
class _Close:
    """The end of a capture that began at `start`."""

    capture: Capture
    start: int


@dataclass(frozen=True, slots=True)
class _Again:
    """A repeat after `count` items, the last of which began at `start`, and was wanted or only tried."""

    repeat: Repeat
    count: int
    start: int
    is_wanted: bool


class _Node:
    """What is to be read next, and the rest after it; equal ones are the same object."""

    __slots__ = ("rest", "task")

    def __init__(self, task: _Task, rest: _Rest) -> None:
        self.task = task
        self.rest = rest


class _Reader:
    """One reading of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._nodes: dict[tuple[object, int], _Node] = {}
        self._acceptors: dict[int, Acceptor] = {}
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._is_leaf: dict[int, bool] = {}

    def read(self, grammar: Grammar) -> list[Captured] | None:
        """Return the captures of the first reading that takes all bytes, in order of their ends."""
        tried: set[tuple[int, int]] = set()
        stack: list[Iterator[tuple[_Rest, int, _Trail]]] = [iter([(self._then(grammar, None), 0, None)])]
        while stack:
            for rest, position, trail in stack[-1]:
                if rest is None:
                    if position == len(self._data):
                        return _in_order(trail)
                    continue
                if (id(rest), position) in tried:
                    continue
                tried.add((id(rest), position))
                stack.append(iter(self._steps(rest, position, trail)))
                break
            else:
                stack.pop()
        return None

    def _then(self, task: _Task, rest: _Rest) -> _Node:
        key = (id(task) if isinstance(task, Grammar) else task, id(rest))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(task, rest)
        return node

    def _steps(self, node: _Node, position: int, trail: _Trail) -> Iterable[tuple[_Rest, int, _Trail]]:
        """Yield where reading the node's task can lead, the preferred way first."""
        task, rest = node.task, node.rest
        if isinstance(task, _Close):
            yield rest, position, ((task.capture, task.start, position), trail)
        elif isinstance(task, _Again):
            yield from self._repeat(task, rest, position, trail)
        elif self._leaf(task):
            for end in reversed(self._ends_of(task, position)):
                yield rest, end, trail
        elif isinstance(task, Seq):
            for item in reversed(task.items):
                rest = self._then(item, rest)
            yield rest, position, trail
        elif isinstance(task, Alt):
            for item in task.items:
                yield self._then(item, rest), position, trail
        elif isinstance(task, Repeat):
            yield from self._repeat(_Again(task, 0, -1, True), rest, position, trail)
        elif isinstance(task, Capture):
            yield self._then(task.item, self._then(_Close(task, position), rest)), position, trail
        else:
            assert isinstance(task, Rule), "all the others are leaves"
            yield self._then(task.body, rest), position, trail

    def _repeat(self, again: _Again, rest: _Rest, position: int, trail: _Trail) -> Iterable[tuple[_Rest, int, _Trail]]:
        repeat = again.repeat
        is_stuck = position == again.start
        if is_stuck and not again.is_wanted:
            return  # an item that takes nothing would come for ever; the way without it was offered as well
        if not is_stuck and (repeat.max is None or again.count < repeat.max):
            count = again.count + 1 if repeat.max is not None else min(again.count + 1, repeat.min)
            after = self._then(_Again(repeat, count, position, again.count < repeat.min), rest)
            yield self._then(repeat.item, after), position, trail
        if is_stuck or again.count >= repeat.min:  # what took nothing once stands for all that are still wanted
            yield rest, position, trail

    def _leaf(self, grammar: Grammar) -> bool:
        known = self._is_leaf.get(id(grammar))
        if known is None:
            opaque = isinstance(grammar, (Json, Lark)) or (not has_captures(grammar) and is_regular(grammar))
            known = self._is_leaf[id(grammar)] = opaque
        return known

    def _ends_of(self, grammar: Grammar, position: int) -> list[int]:
        if isinstance(grammar, Lit):
            text = grammar.text.encode()
            return [position + len(text)] if self._data.startswith(text, position) else []
        found = self._ends.get((id(grammar), position))
        if found is None:
            acceptor = self._acceptors.get(id(grammar))
            if acceptor is None:
                acceptor = self._acceptors[id(grammar)] = acceptor_of(grammar)
            found = self._ends[id(grammar), position] = acceptor.ends(self._data, position)
        return found


def read(grammar: Grammar, data: bytes) -> list[Captured] | None:
    """Return what was captured where in bytes that the grammar matches; None if it does not."""
    return _Reader(data).read(grammar)


def _in_order(trail: _Trail) -> list[Captured]:
    captured: list[Captured] = []
    while trail is not None:
        captured.append(trail[0])
        trail = trail[1]
    return captured[::-1]
