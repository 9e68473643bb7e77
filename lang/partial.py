"""Values of texts that are still being written.

A prefix of a JSON text becomes a value as soon as anything of it is sure: open strings, lists and objects count with
what they hold so far; a number, a word or a key counts once it is whole, because `1` may become `12`.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

NOTHING: Final = object()
"""In place of a value of which nothing is known yet."""

_LITERALS: Final = {"true": True, "false": False, "null": None}
_WORD: Final = re.compile(r"[^\s,\]}:\[{\"]+")
_BLANK: Final = re.compile(r"\s*")


def partial_json(text: str) -> Any:
    """Return the value of a JSON text of which only the beginning is known; NOTHING if that says nothing yet.

    >>> partial_json('{"name": "Ad')
    {'name': 'Ad'}
    >>> partial_json('{"name": "Ada", "scores": [1, 2')
    {'name': 'Ada', 'scores': [1]}
    """
    return _Reader(text).value()


class _Reader:
    """Reads one text once, without recursion: what is open lies on a stack."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._open: list[Any] = []  # lists and dicts, the innermost last
        self._keys: list[str | None] = []  # for each the key whose value comes next
        self._root: Any = NOTHING

    def value(self) -> Any:
        """Return what is known."""
        while self._step():
            pass
        return self._root

    def _step(self) -> bool:
        """Read one thing; False at the end of what can be read."""
        match = _BLANK.match(self._text, self._at)
        assert match is not None, "blanks may be none"
        self._at = match.end()
        if self._at == len(self._text):
            return False
        char = self._text[self._at]
        if char in "{[":
            self._at += 1
            self._begin({} if char == "{" else [])
        elif char in "}]":
            self._at += 1
            if not self._open:
                return False
            self._open.pop()
            self._keys.pop()
        elif char in ",:":
            self._at += 1
        elif char == '"':
            return self._string()
        else:
            return self._word()
        return True

    def _begin(self, container: Any) -> None:
        self._put(container)
        self._open.append(container)
        self._keys.append(None)

    def _put(self, value: Any) -> None:
        if not self._open:
            self._root = value
        elif isinstance(self._open[-1], list):
            self._open[-1].append(value)
        elif (key := self._keys[-1]) is not None:
            self._open[-1][key] = value
            self._keys[-1] = None

    def _string(self) -> bool:
        start, at = self._at, self._at + 1
        while at < len(self._text) and self._text[at] != '"':
            at += 2 if self._text[at] == "\\" else 1
        is_whole = at < len(self._text)
        body = self._text[start + 1 : min(at, len(self._text))]
        is_key = bool(self._open) and isinstance(self._open[-1], dict) and self._keys[-1] is None
        if is_key:
            if is_whole:
                self._keys[-1] = _unescaped(body)
        else:
            self._put(_unescaped(body))
        self._at = at + 1
        return is_whole

    def _word(self) -> bool:
        match = _WORD.match(self._text, self._at)
        if match is None or match.end() == len(self._text):
            return False
        self._at = match.end()
        word = match.group()
        self._put(_LITERALS[word] if word in _LITERALS else json.loads(word))
        return True


def _unescaped(body: str) -> str:
    """Return the text of a string's inside, without an escape that has only begun."""
    for cut in range(min(len(body), 12) + 1):  # two escapes of six characters make one character
        try:
            text: str = json.loads(f'"{body[: len(body) - cut]}"', strict=False)
        except ValueError:
            continue
        if not text or not "\ud800" <= text[-1] <= "\udbff":
            return text
    return ""
