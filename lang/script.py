"""The script of a `ScriptedBackend`: what it says to a `gen`, and what a `select` chooses."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bough.errors import BackendError
from bough.runtime.protocol import FinishReason, Grammar, SamplingParams

if TYPE_CHECKING:
    from bough.acceptor import Acceptor

Reply: TypeAlias = "str | Callable[[str, Any], str]"
Replies: TypeAlias = "Sequence[Reply] | Mapping[str, Reply | Sequence[Reply]] | Callable[[str, SamplingParams], str]"
Choose: TypeAlias = Callable[[str, Sequence[str]], str]

_WORD: Final = re.compile(r"\s*\S+|\s+\Z")


def words_of(text: str) -> list[str]:
    """Return the words with the blanks before them; together they are the text."""
    return _WORD.findall(text)


class Script:
    """Replies in the order of the calls, by the variable's name, or from a callable."""

    def __init__(self, replies: Replies, choose: Choose | None) -> None:
        self._replies = replies
        self._queue = deque(replies) if isinstance(replies, Sequence) and not isinstance(replies, str) else None
        self._named: dict[str, deque[Reply]] = {}
        self._choose = choose

    def reply(self, name: str | None, text: Callable[[], str], params: SamplingParams) -> str:
        """Return what is said next; `text` gives what it may depend on."""
        reply = self._next(name)
        said = reply(text(), params) if callable(reply) else reply
        if not isinstance(said, str):
            raise BackendError(f"a reply of the script must be text, got {said!r}")
        return said

    def choice(self, name: str | None, text: Callable[[], str], choices: Sequence[str]) -> int:
        """Return the index of what is chosen."""
        if isinstance(self._replies, Mapping) and name in self._replies:
            reply = self._next(name)
            choice = reply(text(), choices) if callable(reply) else reply
        else:
            choice = choices[0] if self._choose is None else self._choose(text(), choices)
        if choice not in choices:
            raise BackendError(f"the script chose {choice!r}, which is not one of {list(choices)}")
        return list(choices).index(choice)

    def _next(self, name: str | None) -> Reply:
        if self._queue is not None:
            if not self._queue:
                raise BackendError(f"the script has no reply left for {name!r}")
            return self._queue.popleft()
        if isinstance(self._replies, Mapping):
            if name is None or name not in self._replies:
                raise BackendError(f"the script has no reply for {name!r}")
            found = self._replies[name]
            if isinstance(found, str) or callable(found):
                return found
            left = self._named.setdefault(name, deque(found))
            if not left:
                raise BackendError(f"the script has no reply left for {name!r}")
            return left.popleft()
        assert callable(self._replies), "replies are a list, a dict or a callable"
        return self._replies


def cut(reply: str, params: SamplingParams) -> tuple[str, FinishReason, str | None]:
    """Return the reply up to the first stop and `max_tokens` words, why it ended, and the stop that did it."""
    found = [(reply.find(stop), stop) for stop in params.stop if stop in reply]
    for pattern in params.stop_regex:
        match = re.search(pattern, reply)
        if match is not None:
            found.append((match.start(), match.group()))
    end, stop = min(found, default=(len(reply), None))
    text = reply[:end]
    if len(text) > params.max_tokens:  # a text has at most as many words as characters
        words = words_of(text)
        if len(words) > params.max_tokens:
            return "".join(words[: params.max_tokens]), "length", None
    return text, "stop", stop


def check_reply(text: str, grammar: Grammar) -> Acceptor:
    """Return what reads the grammar. Raises BackendError if it excludes this reply, saying from where on."""
    from bough.acceptor import acceptor_of_wire

    grammar.check()
    acceptor = acceptor_of_wire(grammar)
    data = text.encode()
    if acceptor.accepts(data):
        return acceptor
    fits = len(data[: acceptor.length(data)].decode(errors="ignore"))
    what = "ends too early for" if fits == len(text) else f"from {text[fits : fits + 20]!r} on does not match"
    raise BackendError(f"the script says {text!r}, which {what} the {grammar.kind} {grammar.source[:200]!r}")


def only_text(grammar: Grammar | None) -> str | None:
    """Return the text that a grammar leaves no choice about; None if it does."""
    if grammar is None or grammar.kind != "choices":
        return None
    choices = json.loads(grammar.source)
    return str(choices[0]) if len(choices) == 1 else None
