"""Drafts from text that is there already, and whether they are worth making; pure, one sequence at a time.

    tree       what other sequences went on with after the very same tokens (`RadixTree.continuation`)
    repeated   what followed the sequence's own last tokens when they stood there before
    siblings   what followed the same three tokens in what others of the namespace drew

Prompt lookup: Saxena 2023; drafts from a suffix index of earlier outputs: SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np

from bough.runtime.vector import IntArray

MOST_DRAFT: Final = 8  # tokens of one draft
FIRST_DRAFT: Final = 2  # tokens of a sequence's first: nothing is known of it yet
LEAST_MATCH: Final = 3  # tokens that have to be the same before a draft
_MOST_MATCH: Final = 16
_MOST_COMPARED: Final = 64  # places where those stand, the latest
_MOST_SEARCHED: Final = 16_384  # tokens: one comparison with each, 10 us in all
_MOST_NGRAMS: Final = 32_768  # in each of two generations
_DECAY: Final = 0.25  # weight of the newest token in the accepted share
_LONGEST_PAUSE: Final = 64  # steps
_LONGEST_MISS: Final = 8  # steps; to look for a draft costs little
_EMPTY: Final[IntArray] = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Pace:
    """How well one sequence's drafts do, and when it tries again.

    drafted, accepted: tokens so far. share: how probably a drafted token comes true if those before it did, the newest
    weigh most. least: the share at which a token more costs what it gains, when the last draft was made. wait: steps
    without a draft; pause: how many the next draft costs that does not pay, miss: the next look that finds none.
    num_learned: how many of the sequence's tokens its siblings know of.
    """

    drafted: int = 0
    accepted: int = 0
    share: float = 0.5
    least: float = 0.0
    wait: int = 0
    pause: int = 1
    miss: int = 1
    num_learned: int = 0

    def allowed(self, least: float) -> int:
        """Return how many tokens to draft in this step; 0 while waiting. Once per step.

        least: between 0 and 1, what a token more costs of what it gains if it comes true. The j-th of a draft does with
        probability share ** j. A sequence whose share is below tries with one token now and then, for texts change.
        """
        if self.wait:
            self.wait -= 1
            return 0
        self.least = least
        paying = MOST_DRAFT if self.share**MOST_DRAFT >= least else int(math.log(least) / math.log(self.share))
        return max(1, min(paying, MOST_DRAFT if self.drafted else FIRST_DRAFT))

    def record(self, drafted: int, accepted: int) -> None:
        """Take in how a draft of at least one token came out."""
        self.drafted += drafted
        self.accepted += accepted
        for _ in range(accepted):
            self.share += _DECAY * (1 - self.share)
        if accepted < drafted:
            self.share -= _DECAY * self.share
        self.miss = 1
        if not accepted or self.share < self.least:
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

    Empty if fewer than LEAST_MATCH tokens agree. Where the text repeats itself without end, so does the draft. Only the
    last 16,384 tokens are looked at: the time is bounded, and an index would cost every prompt more than it saves.
    """
    tokens = tokens[-_MOST_SEARCHED:]
    if len(tokens) <= LEAST_MATCH or count < 1:
        return _EMPTY
    last, middle, first = tokens[-1], tokens[-2], tokens[-3]
    ends = LEAST_MATCH - 1 + np.flatnonzero((tokens[2:-1] == last) & (tokens[1:-2] == middle) & (tokens[:-3] == first))
    if not len(ends):
        return _EMPTY
    back = np.arange(LEAST_MATCH, min(_MOST_MATCH, len(tokens)))
    at = ends[-_MOST_COMPARED:, None] - back
    agrees = (at >= 0) & (tokens[np.maximum(at, 0)] == tokens[len(tokens) - 1 - back])
    lengths = np.logical_and.accumulate(agrees, axis=1).sum(axis=1)
    best = ends[len(ends) - 1 - int(lengths[::-1].argmax())]  # the latest of the longest
    draft: IntArray = np.resize(tokens[best + 1 :], count)
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
