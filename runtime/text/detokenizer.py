"""Token ids one at a time to text, whole characters only.

A character may span tokens and a token may hold parts of two characters, so the bytes wait in an incremental UTF-8
decoder, and the places where a token ends exactly at a character's end are remembered for cutting.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right

from bough.runtime.text.tokenizer import Tokenizer


class IncrementalDecoder:
    """Decodes one growing list of token ids. The texts returned, joined, are `tokenizer.decode` of all ids.

    skip_special: special tokens add no text. at_start: see `Tokenizer.decode`; generated tokens follow others.
    skip_bytes: how much of the beginning is no part of the text (healed tokens begin with what was there before).
    """

    __slots__ = (
        "_drop_space",
        "_edge_chars",
        "_edge_tokens",
        "_num_chars",
        "_num_tokens",
        "_pieces",
        "_skip",
        "_skip_bytes",
        "_tokenizer",
        "_utf8",
    )

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, at_start: bool = False, skip_bytes: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._skip_bytes = skip_bytes
        self._drop_space = at_start and tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []
        self._num_chars = 0
        self._num_tokens = 0
        # edges: after _edge_tokens[i] tokens the text is _edge_chars[i] whole characters and no byte waits
        self._edge_tokens = [0]
        self._edge_chars = [0]

    @property
    def text(self) -> str:
        """Everything returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def num_tokens(self) -> int:
        """How many ids were fed."""
        return self._num_tokens

    def feed(self, token_id: int) -> str:
        """Return the characters that this token completes. Raises RequestError("invalid_request") on an unknown id."""
        raw = self._tokenizer.token_bytes(token_id)
        self._num_tokens += 1
        if self._skip and self._tokenizer.is_special(token_id):
            raw = b""
        elif self._drop_space and raw:
            self._drop_space = False
            raw = raw[1:] if raw.startswith(b" ") else raw
        if self._skip_bytes:
            raw, self._skip_bytes = raw[self._skip_bytes :], max(self._skip_bytes - len(raw), 0)
        return self._take(self._utf8.decode(raw))

    def finish(self) -> str:
        """Return what the bytes still waiting give: U+FFFD, since they can no longer become a character."""
        return self._take(self._utf8.decode(b"", final=True))

    def tokens_within(self, num_chars: int) -> tuple[int, str]:
        """Return how many leading tokens lie wholly in the first `num_chars` characters, and the rest of these.

        The tokens counted end at a character's end: of one that spans tokens, all are counted or none. Joined with
        their text, the rest gives exactly the first `num_chars` characters. Cost: O(log tokens) and one join.
        """
        assert 0 <= num_chars <= self._num_chars, f"there are {self._num_chars} characters, asked for {num_chars}"
        edge = bisect_right(self._edge_chars, num_chars) - 1
        return self._edge_tokens[edge], self.text[self._edge_chars[edge] : num_chars]

    def _take(self, text: str) -> str:
        if text:
            self._pieces.append(text)
            self._num_chars += len(text)
        if not self._utf8.getstate()[0]:
            self._edge_tokens.append(self._num_tokens)
            self._edge_chars.append(self._num_chars)
        return text
