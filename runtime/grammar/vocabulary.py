"""`Vocabulary`: the tokens of a model as grammars and healing see them, by their bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from typing import TYPE_CHECKING

import llguidance
import numpy as np

from bough.runtime.grammar.constraint import Words

if TYPE_CHECKING:  # a runner needs masks, and no tokenizer's library
    from bough.runtime.text.tokenizer import Tokenizer

_CACHED_PREFIXES = 1024
# Backing off further than this many tokens has no use: a word that spans more of them is no token.
MOST_BACK = 4


class _Encoder:
    """What llguidance needs of a tokenizer: bytes of all tokens, and how forced bytes become tokens."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.eos_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else 0
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_ids, *tokenizer.eos_ids})

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, at_start=False)


class Vocabulary:
    """Token bytes, sorted for prefixes, and llguidance's own view of them. Immutable but for a cache of masks.

    vocab_size: the number of logits, at least the tokenizer's. for_grammars: made at first use (0.2 s for 128k tokens).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = max(vocab_size, tokenizer.vocab_size)
        self.num_words = -(-self.vocab_size // 32)
        self.eos_ids = tokenizer.eos_ids
        self.special_ids: frozenset[int] = frozenset((*tokenizer.special_ids, *tokenizer.eos_ids))
        self._llguidance: llguidance.LLTokenizer | None = None
        self._sorted: list[tuple[bytes, int]] | None = None
        self._prefixes: OrderedDict[tuple[bytes, int | None], Words] = OrderedDict()

    def token_table(self) -> list[bytes]:
        """Return the bytes of every id below vocab_size, b"" where there is no token."""
        padding = [b""] * (self.vocab_size - self.tokenizer.vocab_size)
        return [*map(self.tokenizer.token_bytes, range(self.tokenizer.vocab_size)), *padding]

    @property
    def for_grammars(self) -> llguidance.LLTokenizer:
        if self._llguidance is None:
            encoder = llguidance.TokenizerWrapper(_Encoder(self.tokenizer, self.token_table()))
            eos = list(self.eos_ids) or None
            self._llguidance = llguidance.LLTokenizer(encoder, n_vocab=self.vocab_size, eos_token=eos)
        return self._llguidance

    # ------------------------------------------------------------------------------------------ prefixes

    def begins_longer(self, prefix: bytes) -> bool:
        """Whether some ordinary token begins with `prefix` and goes on."""
        table = self._by_bytes()
        first = bisect_left(table, (prefix, self.vocab_size))
        return first < len(table) and table[first][0].startswith(prefix)

    def beginning_with(self, prefix: bytes, canonical: int | None) -> Words:
        """Return the mask of the ordinary tokens that begin with `prefix`, and of the token `canonical`. Read-only."""
        key = (prefix, canonical)
        found = self._prefixes.get(key)
        if found is None:
            found = self._prefixes[key] = self._mask(prefix, canonical)
            if len(self._prefixes) > _CACHED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return found

    def back_off(self, ids: list[int], num_free: int) -> int:
        """Return how many tokens at the end of `ids` a longer one might take in: those to draw again.

        num_free: how many at the end may be drawn again at all. The first token of `ids` stays, and so does one that
        some tokenizers write otherwise at the start of a text.
        """
        best, suffix = 0, b""
        for count in range(1, min(MOST_BACK, len(ids) - 1, num_free) + 1):
            token, before = ids[-count], ids[-count - 1]
            if token in self.special_ids or (self.tokenizer.drops_first_space and before in self.special_ids):
                break
            suffix = self.tokenizer.token_bytes(token) + suffix
            if suffix and self.begins_longer(suffix):
                best = count
        return best

    def _mask(self, prefix: bytes, canonical: int | None) -> Words:
        table = self._by_bytes()
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        at = bisect_left(table, (prefix, -1))
        while at < len(table) and table[at][0].startswith(prefix):
            bits[table[at][1]] = 1
            at += 1
        if canonical is not None:
            bits[canonical] = 1
        words: Words = np.packbits(bits, bitorder="little").view(np.uint32)
        words.flags.writeable = False
        return words

    def _by_bytes(self) -> list[tuple[bytes, int]]:
        if self._sorted is None:
            table = enumerate(self.token_table())
            self._sorted = sorted((piece, token) for token, piece in table if piece and token not in self.special_ids)
        return self._sorted
