"""Drafts from text that is there already, and whether they are worth making; pure, one sequence at a time.

    tree       what other sequences went on with after the very same tokens (`RadixTree.continuation`)
    siblings   what followed the same three tokens in what the namespace drew, if the last two times agree
    repeated   what followed the sequence's own last tokens when they stood there before

Prompt lookup: Saxena 2023; drafts from a suffix index of earlier outputs: SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from bough.runtime.vector import IntArray

MOST_DRAFT: Final = 8  # tokens of one draft
FIRST_DRAFT: Final = 2  # tokens of a sequence's first: nothing is known of it yet
LEAST_MATCH: Final = 3  # tokens that have to be the same before a draft
MOST_LOSS: Final = 0.005  # of a sequence's time: what drafts and looks that win nothing may take on
MOST_SAVED: Final = 2.0  # tokens: how much of what drafts won may be lost again before they stop
FIRST_CREDIT: Final = 0.15  # tokens: a text begins with looks that can find nothing yet
_LONGER: Final = 4  # times the first pause, at most
_MOST_MATCH: Final = 16
_MOST_COMPARED: Final = 64  # places where those stand, the latest
_MOST_SEARCHED: Final = 16_384  # tokens: one comparison with each, 5 us in all
_MOST_NGRAMS: Final = 32_768  # in each of two generations
_DECAY: Final = 0.25  # weight of the newest token in the accepted share
_LEAST_SHARE: Final = 0.01
_BACK: Final = np.arange(LEAST_MATCH, _MOST_MATCH + 1)
_EMPTY: Final[IntArray] = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What drafting costs on this machine, in units of what a step takes beside its tokens.

    row: the time that one more token of a step takes. draft: of the host for a draft, however long: looked for, given
    slots, taken in. look: of the host for a look that finds nothing.
    """

    row: float = 0.1  # 30M parameters in bfloat16 on two cores
    draft: float = 0.01
    look: float = 0.001


@dataclass(slots=True)
class Pace:
    """How well one sequence's drafts do, and when it tries again: an account of what they win and cost.

    drafted, accepted: tokens so far. share: how probably a drafted token comes true if those before it did, the newest
    weigh most. balance: what drafts won less what they cost, in tokens of plain decoding. Below zero the sequence
    stops, for as many steps as make the debt MOST_LOSS of them; each time in a row that nothing is won twice as long.
    wakes_at: the turn before which it stops; turn, value: of the last look. pause, miss: how many times as long the
    next stop is, after a draft and after a look for one. num_learned: how many of its tokens its siblings know of.
    """

    drafted: int = 0
    accepted: int = 0
    share: float = 0.5
    balance: float = FIRST_CREDIT
    wakes_at: int = 0
    turn: int = 0
    value: float = 1.0
    pause: int = 1
    miss: int = 1
    num_learned: int = 0

    def allowed(self, turn: int, value: float, costs: DraftCosts) -> int:
        """Return how many tokens to draft in this turn; 0 while it stops.

        value: what a token that comes true saves, in units of costs. The j-th of a draft does with probability
        share ** j, so the last is the one that still wins as much as its row costs. A sequence all of whose tokens are
        expected to cost more tries with one, for texts change.
        """
        if turn < self.wakes_at:
            return 0
        self.turn, self.value = turn, value
        least = min(costs.row / value, 1.0)
        paying = MOST_DRAFT if self.share**MOST_DRAFT >= least else int(math.log(least) / math.log(self.share))
        return max(1, min(paying, MOST_DRAFT if self.drafted else FIRST_DRAFT))

    def record(self, drafted: int, accepted: int, costs: DraftCosts) -> None:
        """Take in how a draft of at least one token came out."""
        self.drafted += drafted
        self.accepted += accepted
        for _ in range(accepted):
            self.share += _DECAY * (1 - self.share)
        if accepted < drafted:
            self.share = max(self.share - _DECAY * self.share, _LEAST_SHARE)
        won = accepted - (costs.draft + costs.row * drafted) / self.value
        self.miss = 1
        if won > 0:
            self.pause = 1
        if self._book(won, self.pause):
            self.pause = min(2 * self.pause, _LONGER)

    def missed(self, costs: DraftCosts) -> None:
        """Nothing to draft was found."""
        if self._book(-costs.look / self.value, self.miss):
            self.miss = min(2 * self.miss, _LONGER)

    def _book(self, won: float, longer: int) -> bool:
        """Add to the balance, in tokens; True if it stops now, until the debt has been small change."""
        self.balance = min(self.balance + won, MOST_SAVED)
        if self.balance >= 0:
            return False
        self.wakes_at = self.turn + 1 + math.ceil(-self.balance / MOST_LOSS * longer)
        self.balance = 0.0
        return True


def repeated(tokens: IntArray, count: int) -> IntArray:
    """Return up to `count` tokens that followed the longest suffix of `tokens` the last time it stood there before.

    Empty if fewer than LEAST_MATCH tokens agree. Where the text repeats itself without end, so does the draft. Only the
    last 16,384 tokens are looked at: the time is bounded, and an index would cost every prompt more than it saves.
    """
    tokens = tokens[-_MOST_SEARCHED:]
    if len(tokens) <= LEAST_MATCH or count < 1:
        return _EMPTY
    # Token by token: most last tokens stand nowhere else, or behind another one.
    (ends,) = (tokens[LEAST_MATCH - 1 : -1] == tokens[-1]).nonzero()
    if not len(ends):
        return _EMPTY
    ends += LEAST_MATCH - 1
    for back in range(1, LEAST_MATCH):
        ends = ends[tokens[ends - back] == tokens[-1 - back]]
    if not len(ends):
        return _EMPTY
    first = 1 + int(ends[0] if len(ends) == 1 else _longest(tokens, ends[-_MOST_COMPARED:]))
    if first + count <= len(tokens):
        return tokens[first : first + count]
    draft: IntArray = np.resize(tokens[first:], count)
    return draft


def _longest(tokens: IntArray, ends: npt.NDArray[np.intp]) -> int:
    """Return the one of `ends` where most tokens before it are those at the end of the text; the latest of several."""
    at = ends[:, None] - _BACK[: len(tokens) - LEAST_MATCH]
    differs = tokens[at] != tokens[-1 - _BACK[: at.shape[1]]]
    differs |= at < 0
    differs[:, -1] = True  # more is not looked at
    return int(ends[len(ends) - 1 - int(differs.argmax(axis=1)[::-1].argmax())])


_Followed: TypeAlias = dict[Hashable, dict[tuple[int, ...], int]]  # of each namespace, by the tokens before


class NgramTable:
    """The token that followed each LEAST_MATCH tokens last, per namespace; forgets what was seen long ago.

    Where the last two were not the same, what follows is doubtful, and no draft: ~token is kept. So a record's keys are
    drafted and its values are not.
    """

    def __init__(self, most: int = _MOST_NGRAMS) -> None:
        self._most = most
        self._num_young = 0
        self._young: _Followed = {}
        self._old: _Followed = {}

    def learn(self, namespace: Hashable, tokens: IntArray) -> None:
        """Remember what followed what in `tokens`: each that has LEAST_MATCH before it."""
        ids = tokens.tolist()
        if len(ids) <= LEAST_MATCH:
            return
        followed = self._young.setdefault(namespace, {})
        before = zip(*(ids[first:] for first in range(LEAST_MATCH)), strict=False)
        for key, token in zip(before, ids[LEAST_MATCH:], strict=False):
            known = followed.get(key, token)
            followed[key] = token if known in (token, ~token) else ~token
        self._num_young += len(ids) - LEAST_MATCH
        if self._num_young >= self._most:
            self._num_young, self._young, self._old = 0, {}, self._young

    def follow(self, namespace: Hashable, tokens: IntArray, count: int) -> IntArray:
        """Return up to `count` tokens that followed one another after the last of `tokens`."""
        young, old = self._young.get(namespace, _NOTHING), self._old.get(namespace, _NOTHING)
        before = tuple(tokens[-LEAST_MATCH:].tolist())
        found: list[int] = []
        while len(found) < count:
            token = young.get(before)
            if token is None:
                token = old.get(before)
            if token is None or token < 0:
                break
            found.append(token)
            before = (*before[1:], token)
        return np.array(found, dtype=np.int32) if found else _EMPTY


_NOTHING: Final[Mapping[tuple[int, ...], int]] = MappingProxyType({})
