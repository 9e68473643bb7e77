"""Whether a text fits a grammar, and where it may end, as llguidance says with a vocabulary of single bytes.

So the answer is the runtime's, and needs no model.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Final, Literal

from bough.errors import InvalidRequest
from bough.grammar_nodes import Grammar, Json
from bough.grammars import one_of
from bough.lark_source import JSON_STYLE
from bough.runtime import protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


_END: Final = 256  # the token after the bytes


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
