"""Which items of a batch wait, are in flight, wait for another try, or are over. It is told what happened, and decides.

It runs nothing: threads (batch.py) and event loops (abatch.py) take items from it, and tell it how they ended.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Iterable

from bough.errors import Overloaded
from bough.inflight import InFlight
from bough.retries import Retries

MAX_AHEAD = 1024
"""Most results that wait for a lazy reader before no further item is started."""


class Book:
    """The items of one batch, by index. Times are of one monotonic clock, in seconds."""

    def __init__(self, indices: Iterable[int], bound: InFlight, retries: Retries, *, is_lazy: bool) -> None:
        self._lock = threading.Lock()
        self._waiting = deque(indices)
        self._delayed: list[tuple[float, int]] = []  # a heap of when each may be tried again
        self._attempts: dict[int, int] = {}
        self._bound = bound
        self._retries = retries
        self._num_in_flight = 0
        self._max_ahead = MAX_AHEAD if is_lazy else None
        self._num_ahead = 0
        self._is_stopped = False

    def take(self, now: float) -> tuple[int, int] | None:
        """Return an item to start now and which try of it this is, from 1; None if none may be started now."""
        with self._lock:
            if self._is_stopped or self._num_in_flight >= self._bound.limit:
                return None
            if self._max_ahead is not None and self._num_ahead + self._num_in_flight >= self._max_ahead:
                return None
            if self._delayed and self._delayed[0][0] <= now:
                _, index = heapq.heappop(self._delayed)
            elif self._waiting:
                index = self._waiting.popleft()
            else:
                return None
            self._num_in_flight += 1
            self._attempts[index] = attempt = self._attempts.get(index, 0) + 1
            return index, attempt

    def ended(self, index: int, error: BaseException | None, num_tokens: int, now: float) -> bool:
        """Take in how a try ended; return whether the item is over, or else will be tried again."""
        with self._lock:
            self._num_in_flight -= 1
            if isinstance(error, Overloaded):
                self._bound.overloaded()
            elif error is None:
                self._bound.ended(num_tokens)
            wait_s = None if error is None else self._retries.wait_s(error, self._attempts[index])
            if wait_s is None or self._is_stopped:
                del self._attempts[index]
                self._num_ahead += 1
                return True
            heapq.heappush(self._delayed, (now + wait_s, index))
            return False

    def consumed(self) -> None:
        """Take in that a reader took one result."""
        with self._lock:
            self._num_ahead -= 1

    def stop(self) -> None:
        """Start nothing more."""
        with self._lock:
            self._is_stopped = True
            self._waiting.clear()
            self._delayed.clear()

    def patience_s(self, now: float) -> float | None:
        """Return how long until an item may be tried again, or None if nothing but an item's end changes anything."""
        with self._lock:
            return max(0.0, self._delayed[0][0] - now) if self._delayed else None

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is started any more."""
        return self._is_stopped

    @property
    def is_over(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        with self._lock:
            return not self._waiting and not self._delayed and not self._num_in_flight
