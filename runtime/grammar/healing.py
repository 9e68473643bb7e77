"""Token healing without a grammar: a mask over the first tokens, and nothing after them."""

from __future__ import annotations

from collections import deque

from bough.runtime.grammar.constraint import Words, leave_out
from bough.runtime.grammar.vocabulary import Vocabulary


class PrefixConstraint:
    """Token healing without a grammar: the text of the tokens that were taken off comes first, then anything.

    The next token is the one that was there before, or one that holds all that is left of the text and more.
    """

    def __init__(self, vocabulary: Vocabulary, taken: list[int]) -> None:
        self._vocabulary = vocabulary
        self._canonical = deque(taken)
        self._left = b"".join(map(vocabulary.tokenizer.token_bytes, taken))
        self.is_ended = False
        self.is_free = not taken
        self.num_forced = 0

    def begin(self) -> list[int]:
        return []

    def fill(self, words: Words, forbidden: tuple[int, ...] = ()) -> None:
        words[:] = self._vocabulary.beginning_with(self._left, self._canonical[0])
        leave_out(words, forbidden)

    def advance(self, token: int) -> list[int]:
        if not self.is_free:
            raw = self._vocabulary.tokenizer.token_bytes(token)
            if len(raw) >= len(self._left):
                self._canonical.clear()
            else:
                self._canonical.popleft()
            self._left = self._left[len(raw) :]
            self.is_free = not self._canonical
        return [token]
