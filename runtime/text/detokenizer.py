"""Token ids one at a time to text, whole characters only.

A character may span tokens and a token may hold parts of two characters, so the bytes wait in an incremental UTF-8
decoder, and the places where a token ends exactly at a character's end are remembered for cutting.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Sequence

from bough.runtime.text.tokenizer import Tokenizer


class IncrementalDecoder:
    """Decodes one growing list of token ids. The texts returned, joined, are `tokenizer.decode` of all ids.

    skip_special: special tokens add no text. at_start: see `Tokenizer.decode`; generated tokens follow others.
    skip_bytes: how much of the beginning is no part of the text (healed tokens begin with what was there before).
    may_cut: whether `tokens_within` will be asked; without, many tokens are decoded at once.
    """

    __slots__ = (
        "_drop_space",
        "_edge_chars",
        "_edge_tokens",
        "_may_cut",
        "_num_chars",
        "_num_tokens",
        "_pieces",
        "_skip",
        "_skip_bytes",
        "_tokenizer",
        "_utf8",
        "_waits",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        at_start: bool = False,
        skip_bytes: int = 0,
        may_cut: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._skip_bytes = skip_bytes
        self._may_cut = may_cut
        self._drop_space = at_start and tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waits = False  # whether bytes do, for the rest of their character
        self._pieces: list[str] = []
        self._num_chars = 0
        self._num_tokens = 0
        # edges: after _edge_tokens[i] tokens the text is _edge_chars[i] whole characters and no byte waits
        self._edge_tokens = [0]
        self._edge_chars = [0]

    @property
    def text(self) -> str:
        """Everything returned so far, if it may be cut."""
        assert self._may_cut, "the text was not kept"
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def num_tokens(self) -> int:
        """How many ids were fed."""
        return self._num_tokens

    def feed(self, token_id: int) -> str:
        """Return the characters that this token completes. Raises RequestError("invalid_request") on an unknown id."""
        tokenizer = self._tokenizer
        raw = tokenizer.token_bytes(token_id)
        self._num_tokens += 1
        if self._skip and tokenizer.is_special(token_id):
            raw = b""
        elif self._drop_space and raw:
            self._drop_space = False
            raw = raw[1:] if raw.startswith(b" ") else raw
        if self._skip_bytes:
            raw, self._skip_bytes = raw[self._skip_bytes :], max(self._skip_bytes - len(raw), 0)
        return self._take(raw)

    def feed_all(self, token_ids: Sequence[int]) -> str:
        """Return what `feed` gives for each of these, joined."""
        if len(token_ids) == 1:
            return self.feed(token_ids[0])
        if self._may_cut or self._skip_bytes or self._drop_space:
            return "".join(map(self.feed, token_ids))
        self._num_tokens += len(token_ids)
        special = self._tokenizer.special_ids if self._skip else frozenset()
        raw = self._tokenizer.decode_bytes([token for token in token_ids if token not in special], at_start=False)
        return self._take(raw)

    def finish(self) -> str:
        """Return what the bytes still waiting give: U+FFFD, since they can no longer become a character."""
        rest = self._utf8.decode(b"", final=True)
        self._waits = False
        if self._may_cut:
            self._note(rest)
        return rest

    def tokens_within(self, num_chars: int) -> tuple[int, str]:
        """Return how many leading tokens lie wholly in the first `num_chars` characters, and the rest of these.

        The tokens counted end at a character's end: of one that spans tokens, all are counted or none. Joined with
        their text, the rest gives exactly the first `num_chars` characters. Cost: O(log tokens) and one join.
        """
        assert self._may_cut, "where tokens end was not kept"
        assert 0 <= num_chars <= self._num_chars, f"there are {self._num_chars} characters, asked for {num_chars}"
        edge = bisect_right(self._edge_chars, num_chars) - 1
        return self._edge_tokens[edge], self.text[self._edge_chars[edge] : num_chars]

    def _take(self, raw: bytes) -> str:
        if not self._waits and raw.isascii():  # most are: they need no decoder
            text = raw.decode("ascii")
        else:
            text = self._utf8.decode(raw)
            self._waits = bool(self._utf8.getstate()[0])
        if self._may_cut:
            self._note(text)
        return text

    def _note(self, text: str) -> None:
        """Remember what `tokens_within` needs."""
        if text:
            self._pieces.append(text)
            self._num_chars += len(text)
        if not self._waits:
            self._edge_tokens.append(self._num_tokens)
            self._edge_chars.append(self._num_chars)
