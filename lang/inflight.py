"""How many items of a batch may be in flight: as many as the backend's KV cache holds, by what items so far needed.

With more, their prefixes push each other out of the cache, and every turn of every item computes its history again.
"""

from __future__ import annotations

from typing import Final

from bough.errors import InvalidRequest

MAX_AUTO: Final = 256
"""Most items in flight where nobody says how many. An item costs its client some 20 KB."""
GUESS: Final = 2048
"""Tokens that an item is taken to need before the first has ended."""
FIRST: Final = 4
"""Least in flight until then."""
SHARE: Final = 0.9
"""Of the cache that items may fill; the rest is for what they have in common, and for those larger than the mean."""
WEIGHT: Final = 0.1
"""Of the newest item in the moving mean."""


class InFlight:
    """The bound, from the most that is wanted and the number of tokens that the KV cache holds (None: unknown)."""

    def __init__(self, most: int, capacity: int | None) -> None:
        self._most = most
        self._capacity = capacity
        self._mean: float | None = None
        self._relief = 1.0

    @property
    def limit(self) -> int:
        """How many may be in flight now; at least one."""
        fits = self._most
        if self._capacity is not None:
            fits = int(self._capacity * SHARE / max(1.0, GUESS if self._mean is None else self._mean))
            fits = max(fits, FIRST) if self._mean is None else fits
        return max(1, int(min(fits, self._most) * self._relief))

    def ended(self, num_tokens: int) -> None:
        """Take in that an item ended which wrote so many tokens of KV (computed and generated, not found cached)."""
        self._mean = num_tokens if self._mean is None else self._mean + WEIGHT * (num_tokens - self._mean)
        self._relief = min(1.0, self._relief + 1.0 / self._most)

    def overloaded(self) -> None:
        """Take in that the backend refused work: halve the bound; it comes back slowly."""
        self._relief = max(1.0 / self._most, self._relief / 2)


def most_in_flight(num_threads: int | str, max_in_flight: int | None) -> int:
    """Return the most items in flight that the caller wants. Raises InvalidRequest for what is no number of items."""
    if max_in_flight is not None:
        if num_threads != "auto":
            raise InvalidRequest("num_threads is another name of max_in_flight: give one of them")
        return _checked("max_in_flight must be", max_in_flight, "max_in_flight")
    return MAX_AUTO if num_threads == "auto" else _checked('num_threads must be "auto" or', num_threads, "num_threads")


def capacity_of(info: dict[str, object]) -> int | None:
    """Return how many tokens the KV cache holds, from what a backend says of itself; None if it does not say."""
    pages, page_size = info.get("total_pages"), info.get("page_size")
    return pages * page_size if isinstance(pages, int) and isinstance(page_size, int) else None


def _checked(what: str, value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(f"{what} at least 1, got {value!r}", field=field)
    return value
