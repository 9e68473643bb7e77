"""In which order waiting sequences are admitted: pure functions of what waits and what is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeAlias

from bough.runtime.sequence import Sequence

MatchedLen: TypeAlias = Callable[[Sequence], int]
Policy: TypeAlias = Callable[[Iterable[Sequence], MatchedLen, int], list[Sequence]]

# Ranking costs a match per candidate; a longer queue is ranked window by window, oldest first.
WINDOW = 128
# A sequence gains this many tokens of rank for every later arrival: nothing waits for ever behind better hits.
AGEING_TOKENS = 32


def first_come(waiting: Iterable[Sequence], matched_len: MatchedLen, newest: int) -> list[Sequence]:
    """Return the oldest sequences in order of arrival."""
    return list(islice(waiting, WINDOW))


def longest_prefix(waiting: Iterable[Sequence], matched_len: MatchedLen, newest: int) -> list[Sequence]:
    """Return the oldest sequences, the longest cached prefix first, aged by how many arrived since.

    Cache-aware order after SGLang (arXiv 2312.07104, section 3); ageing because its order starves misses.
    """
    window = list(islice(waiting, WINDOW))
    if len(window) < 2:
        return window
    return sorted(window, key=lambda seq: (-(matched_len(seq) + AGEING_TOKENS * (newest - seq.arrival)), seq.arrival))


POLICIES: dict[str, Policy] = {"lpm": longest_prefix, "fcfs": first_come}
