"""Seeds: where a run gets its own, and how every draw gets one by its place in the program.

A draw's seed follows from the run's seed, the path of its branch, and how many draws the branch made before. Nothing
else enters: neither time nor what else runs, so that a run with the same seed says the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextvars import ContextVar, Token
from itertools import count
from typing import Final, TypeAlias

Path: TypeAlias = tuple[int, ...]
"""A branch's place in its run: the number of each child on the way down; children count on over a branch's forks."""


class Seeds:
    """The seed of one run, and of the runs inside it."""

    __slots__ = ("_nested", "run")

    def __init__(self, run: int) -> None:
        self.run = run
        self._nested: Iterator[int] = count(1)

    def of_draw(self, path: Path, number: int) -> int:
        """Return the seed of a branch's draw of that number."""
        return derived(self.run, path, number)

    def next_nested(self) -> int:
        """Return the seed of the next run that is started inside this one."""
        return derived(self.run, "run", next(self._nested))


_OUTER: Final[ContextVar[Seeds | None]] = ContextVar("bough_seeds", default=None)


def seeds_of_run(given: int | None, backend: object) -> Seeds:
    """Return a run's seeds: the given one, one derived from the run around it, the backend's next, or a random one.

    A backend's `next_seed()`, where it has one, returns None or the next of those that somebody fixed for all its runs.
    """
    if given is not None:
        return Seeds(given)
    outer = _OUTER.get()
    if outer is not None:
        return Seeds(outer.next_nested())
    next_seed = getattr(backend, "next_seed", None)
    seed = None if next_seed is None else next_seed()
    return Seeds(int.from_bytes(os.urandom(8), "little") >> 1 if seed is None else seed)


def seed_of_batch(given: int | None, backend: object) -> int:
    """Return the seed of a batch, from which each item has its own: found as a run's is.

    A backend's `batch_seed()`, where it has one, returns None or the one that somebody fixed for its next batch.
    """
    if given is None and _OUTER.get() is None:
        batch_seed = getattr(backend, "batch_seed", None)
        found: int | None = None if batch_seed is None else batch_seed()
        if found is not None:
            return found
    return seeds_of_run(given, backend).run


def of_item(batch_seed: int, index: int) -> int:
    """Return the seed of a batch's item, the same whenever it begins and however often it is tried."""
    return derived(batch_seed, "item", index)


def enter(seeds: Seeds) -> Token[Seeds | None]:
    """Make a run the one around those that this context starts from now on."""
    return _OUTER.set(seeds)


def leave(token: Token[Seeds | None]) -> None:
    """Take back an `enter`."""
    _OUTER.reset(token)


def derived(*parts: object) -> int:
    """Return a seed (63 bits) that depends on all the parts, and is the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
