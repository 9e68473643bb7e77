"""Which waiting sequence comes first: pure functions, so that the order and the bound on a wait can be stated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from bough.runtime.policies import AGEING_TOKENS, OVERDUE, WINDOW, first_come, longest_prefix
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie


def waiting(arrivals: Iterable[int]) -> dict[Sequence, None]:
    queue: dict[Sequence, None] = {}
    for arrival in arrivals:
        sequence = Sequence(np.ones(1, dtype=np.int32), trie=TokenTrie([[1]]))
        sequence.arrival = arrival
        queue[sequence] = None
    return queue


def arrivals_of(sequences: Iterable[Sequence]) -> list[int]:
    return [sequence.arrival for sequence in sequences]


def test_first_come_is_the_order_of_arrival() -> None:
    queue = waiting([3, 5, 6])
    assert arrivals_of(first_come(queue, lambda seq: seq.arrival, 6)) == [3, 5, 6]


def test_the_longest_cached_prefix_comes_first_and_the_older_of_equals() -> None:
    hits = {1: 0, 2: 500, 3: 900, 4: 500}
    order = longest_prefix(waiting(hits), lambda seq: hits[seq.arrival], 4)
    assert arrivals_of(order) == [3, 2, 4, 1]


def test_a_short_hit_gives_way_after_a_turnover_of_the_queue_and_a_long_one_does_not() -> None:
    queue = waiting([1, 11])
    assert arrivals_of(longest_prefix(queue, lambda seq: AGEING_TOKENS if seq.arrival == 11 else 0, 11)) == [1, 11]
    assert arrivals_of(longest_prefix(queue, lambda seq: 6 * AGEING_TOKENS if seq.arrival == 11 else 0, 11)) == [11, 1]


def test_what_is_overdue_comes_first_whatever_the_others_hit() -> None:
    queue = waiting([1, 2, OVERDUE * 3 + 2])
    newest = OVERDUE * 3 + 2
    order = longest_prefix(queue, lambda seq: 0 if seq.arrival == 1 else 10**9, newest)
    assert order[0].arrival == 1


def test_of_a_long_queue_both_ends_are_ranked() -> None:
    order = longest_prefix(waiting(range(1, 1001)), lambda seq: 10**6 if seq.arrival == 1000 else 0, 1000)
    assert len(order) == WINDOW
    assert order[0].arrival == 1000
    assert {1, WINDOW // 2} <= set(arrivals_of(order))


@pytest.mark.parametrize("num_waiting", [2, 7, 64])
def test_nothing_is_overtaken_more_often_than_the_bound(num_waiting: int) -> None:
    queue = waiting(range(1, num_waiting + 1))
    miss = next(iter(queue))
    newest, overtaken = num_waiting, 0
    while miss in queue:
        first = longest_prefix(queue, lambda seq: 0 if seq is miss else 10**9, newest)[0]
        del queue[first]
        overtaken += first is not miss
        newest += 1
        queue |= waiting([newest])
    assert 0 < overtaken <= OVERDUE * num_waiting
