"""Drafts from text that is there already: which tokens a sequence is likely to draw next, and whether to try.

    tree       what other sequences went on with after the very same tokens
    repeated   what followed the sequence's own last tokens when they stood there before
    siblings   what followed the same three tokens in what others of the namespace drew

A draft is verified in the step that computes it: sampling is a function of logits, seed and position, so the token
drawn at each position is the one plain decoding draws, and a draft holds as far as it says the same. Where drafts do
not come true a sequence stops trying, and looks again ever more rarely.
Prompt lookup: Saxena 2023; drafts from a suffix index of earlier outputs: SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np

from bough.runtime.vector import IntArray

MOST_DRAFT: Final = 8  # tokens of one draft
# A step of so many tokens has no room for drafts: its products are no longer bound by reading the weights.
MOST_TOKENS: Final = 32
LEAST_MATCH: Final = 3  # tokens that have to be the same before a draft
_MOST_MATCH: Final = 16
_MOST_NGRAMS: Final = 32_768  # in each of two generations
_DECAY: Final = 0.25  # weight of the newest draft in the accepted share
_PAYS: Final = 0.4  # accepted share below which a draft costs more than it gains
_LONGEST_PAUSE: Final = 256  # steps
_LONGEST_MISS: Final = 8  # steps; to look for a draft costs little
_EMPTY: Final[IntArray] = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Pace:
    """How well one sequence's drafts do, and when it tries again.

    drafted, accepted: tokens so far. share: accepted per drafted, the newest draft weighs most. wait: steps without a
    draft; pause: how many the next draft costs that does not pay, miss: the next look that finds none.
    """

    drafted: int = 0
    accepted: int = 0
    share: float = 0.5
    wait: int = 0
    pause: int = 1
    miss: int = 1

    def allowed(self) -> int:
        """Return how many tokens to draft in this step; 0 while waiting. Once per step."""
        if self.wait:
            self.wait -= 1
            return 0
        return max(1, round(self.share * MOST_DRAFT))

    def record(self, drafted: int, accepted: int) -> None:
        """Take in how a draft of at least one token came out."""
        self.drafted += drafted
        self.accepted += accepted
        self.share += _DECAY * (accepted / drafted - self.share)
        self.miss = 1
        if self.share < _PAYS and accepted < drafted:
            self.wait = self.pause
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
        else:
            self.pause = 1

    def missed(self) -> None:
        """Nothing to draft was found."""
        self.wait = self.miss
        self.miss = min(2 * self.miss, _LONGEST_MISS)


def repeated(tokens: IntArray, count: int) -> IntArray:
    """Return up to `count` tokens that followed the longest suffix of `tokens` the last time it stood there before.

    Empty if fewer than LEAST_MATCH tokens agree. Where the text repeats itself without end, so does the draft.
    """
    if len(tokens) <= LEAST_MATCH or count < 1:
        return _EMPTY
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    for back in range(1, _MOST_MATCH):
        agree = ends[ends >= back]
        agree = agree[tokens[agree - back] == tokens[len(tokens) - 1 - back]]
        if not len(agree):
            if back < LEAST_MATCH:
                return _EMPTY
            break
        ends = agree
    if not len(ends):
        return _EMPTY
    draft: IntArray = np.resize(tokens[ends[-1] + 1 :], count)
    return draft


class NgramTable:
    """The token that followed each LEAST_MATCH tokens last, per namespace; forgets what was seen long ago."""

    def __init__(self, most: int = _MOST_NGRAMS) -> None:
        self._most = most
        self._young: dict[tuple[Hashable, ...], int] = {}
        self._old: dict[tuple[Hashable, ...], int] = {}

    def learn(self, namespace: Hashable, tokens: IntArray) -> None:
        """Remember what followed what in `tokens`: each that has LEAST_MATCH before it."""
        ids = tokens.tolist()
        for end in range(LEAST_MATCH, len(ids)):
            self._young[(namespace, *ids[end - LEAST_MATCH : end])] = ids[end]
        if len(self._young) >= self._most:
            self._young, self._old = {}, self._young

    def follow(self, namespace: Hashable, tokens: IntArray, count: int) -> IntArray:
        """Return up to `count` tokens that followed one another after the last of `tokens`."""
        ids = tokens[-LEAST_MATCH:].tolist()
        if len(ids) < LEAST_MATCH:
            return _EMPTY
        while len(ids) < LEAST_MATCH + count:
            key = (namespace, *ids[-LEAST_MATCH:])
            token = self._young.get(key, self._old.get(key))
            if token is None:
                break
            ids.append(token)
        return np.array(ids[LEAST_MATCH:], dtype=np.int32)


class Speculator:
    """Makes drafts for the scheduler, its only caller. context_len: no token is drafted at or beyond it."""

    def __init__(self, context_len: int, *, most_tokens: int = MOST_TOKENS) -> None:
        self.context_len = context_len
        self.most_tokens = most_tokens
        self._siblings = NgramTable()

    def learn(self, namespace: Hashable, tokens: IntArray, num_new: int) -> None:
        """Take in what a sequence drew: the last `num_new` of its tokens."""
        self._siblings.learn(namespace, tokens[-(num_new + LEAST_MATCH) :])

    def draft(self, namespace: Hashable, tokens: IntArray, cached: IntArray, count: int) -> IntArray:
        """Return at most `count` tokens that may follow `tokens`; cached: what the tree has after them."""
        if len(cached):
            return cached[:count]
        found = repeated(tokens, count)
        return found if len(found) else self._siblings.follow(namespace, tokens, count)
