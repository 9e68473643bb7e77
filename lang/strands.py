"""Which pieces a state has: those of its trunk, then its own.

A state appends to its own strand only. A fork makes new strands that refer to the parent's up to the point of the
fork, so that forking copies no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from bough.calls import GenCall, SelectCall
from bough.pieces import Item

Point: TypeAlias = "tuple[Strand, int]"
"""A place in a text: after so many pieces of a strand."""


class Cut:
    """How much of a text was given up: what tells its length before and after."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: Sequence[Future[Any]], after: Sequence[Future[Any]] | int) -> None:
        self._before = before
        self._after = after

    def num_tokens(self) -> int:
        """Return how many tokens that were, as far as is known by now."""
        after = self._after if isinstance(self._after, int) else _longest(self._after)
        return max(0, _longest(self._before) - after)


def known_length(replies: Sequence[Future[Any]]) -> int | None:
    """Return how long a text is by the last of its replies; None if they are not there yet."""
    return _longest(replies) if all(reply.done() for reply in replies) else None


def _longest(replies: Sequence[Future[Any]]) -> int:
    done = [reply for reply in replies if reply.done() and not reply.cancelled() and reply.exception() is None]
    return max((reply.result().length for reply in done), default=0)


class Onward(list["Strand"]):
    """In place of the strands of a fork: the one in which a state goes on from here, how that came, and what it cut."""

    def __init__(self, strand: Strand, how: str, cut: Cut | None = None) -> None:
        super().__init__((strand,))
        self.how = how
        self.cut = cut


class Strand:
    """The pieces that one state appended, and the strands that were forked off it (for drawing the tree).

    name: what the branch was forked as. dropped: calls whose text was forgotten; they were paid for. cuts: how much
    text was forgotten, of which nothing is drawn.
    """

    __slots__ = ("cuts", "dropped", "forks", "items", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self.items: list[Item] = []
        self.dropped: tuple[GenCall | SelectCall, ...] = ()
        self.cuts: tuple[Cut, ...] = ()
        self.forks: list[tuple[int, list[Strand]]] = []


class Trunk:
    """What a forked state inherits: the first `length` pieces of its parent's strand, and the parent's own trunk.

    Strands do not refer back, so that a dropped state is freed at once, without the cycle collector.
    """

    __slots__ = ("length", "parent", "strand")

    def __init__(self, parent: Trunk | None, strand: Strand, length: int) -> None:
        self.parent = parent
        self.strand = strand
        self.length = length


def all_items(trunk: Trunk | None, strand: Strand) -> Iterator[Item]:
    """Yield the pieces from the root of the tree to the end of `strand`."""
    trunks: list[Trunk] = []
    while trunk is not None:
        trunks.append(trunk)
        trunk = trunk.parent
    for part in reversed(trunks):
        yield from part.strand.items[: part.length]
    yield from list(strand.items)


def items_after(trunk: Trunk | None, strand: Strand, point: Point) -> list[Item] | None:
    """Return the pieces from a point to the end of `strand`; None if the point does not lie on the way there."""
    begin, skip = point
    later: list[list[Item]] = []
    items = strand.items[:]
    while strand is not begin:
        later.append(items)
        if trunk is None:
            return None
        strand, items, trunk = trunk.strand, trunk.strand.items[: trunk.length], trunk.parent
    if skip > len(items):
        return None
    later.append(items[skip:])
    return [item for part in reversed(later) for item in part]
