"""In which order waiting sequences are admitted: pure functions of what waits and what is cached."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TypeAlias

from bough.runtime.sequence import Sequence

Waiting: TypeAlias = dict[Sequence, None]  # in order of arrival
MatchedLen: TypeAlias = Callable[[Sequence], int]
Policy: TypeAlias = Callable[[Waiting, MatchedLen, int], list[Sequence]]

# Ranking costs a match per candidate; of a longer queue only the ends are ranked: the oldest, because they must not
# starve, and the newest, because what continues a program has just arrived and its prefix is the most likely to be hot.
WINDOW = 128
# Age is counted in turnovers: later arrivals per waiting sequence. A batch job that is served depth first, as the cache
# wants it, makes its last programs wait for several turnovers without anything being wrong; per arrival, ageing would
# turn every long queue into first come, first served (0.14 instead of 0.77 of the best hit rate in short chats).
AGEING_TOKENS = 32  # a sequence gains this many tokens of rank for every turnover
OVERDUE = 32  # after this many it comes before all that are younger, whatever they hit


def first_come(waiting: Waiting, matched_len: MatchedLen, newest: int) -> list[Sequence]:
    """Return the oldest sequences in order of arrival."""
    return list(islice(waiting, WINDOW))


def longest_prefix(waiting: Waiting, matched_len: MatchedLen, newest: int) -> list[Sequence]:
    """Return the oldest and the newest sequences, overdue ones first, then by cached prefix plus age.

    No sequence is overtaken by more than OVERDUE x (most that wait at once) later ones.
    Cache-aware order after SGLang (arXiv 2312.07104, section 3); ageing because its order starves misses.
    """
    if len(waiting) <= WINDOW:
        window = list(waiting)
    else:
        window = [*islice(waiting, WINDOW // 2), *islice(reversed(waiting), WINDOW // 2)]
    if len(window) < 2:
        return window

    def rank(sequence: Sequence) -> tuple[float, int]:
        turnovers = (newest - sequence.arrival) / len(waiting)
        if turnovers > OVERDUE:
            return -float("inf"), sequence.arrival
        return -(matched_len(sequence) + AGEING_TOKENS * turnovers), sequence.arrival

    return sorted(window, key=rank)


POLICIES: dict[str, Policy] = {"lpm": longest_prefix, "fcfs": first_come}
