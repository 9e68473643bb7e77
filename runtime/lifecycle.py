"""The lives of operations, sequences, branches and pages: their states, and every legal transition, in one place.

    operation   QUEUED ──▶ RUNNING ──▶ ENDED       one terminal transition, one terminal reply
                   └──────────────────────▲
    sequence    WAITING ◀──▶ RUNNING ──▶ FINISHED   preempted and resumed any number of times, finished once
                   └──────────────────────▲
    branch      UNBORN ──▶ LIVE ──▶ RELEASED        a fork's children are unborn until their parent gets there
                   └──────────────────▲
    page        FREE ◀──▶ HELD ◀──▶ LIMBO          free exactly when nobody holds it; in limbo while a step that may
                  ▲─────────────────────┘          still read or write it is in flight

Whoever keeps a state assigns it through `moved`, so that an illegal transition is an AssertionError where it happens.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeVar


class Progress(enum.Enum):
    """Where an operation is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Life(enum.Enum):
    """Where a branch is."""

    UNBORN = "unborn"
    LIVE = "live"
    RELEASED = "released"


class PageState(enum.Enum):
    """Where a page is; derived from its holders, kept by the allocator."""

    FREE = "free"
    HELD = "held"
    LIMBO = "limbo"


LEGAL: Final[Mapping[enum.Enum, frozenset[enum.Enum]]] = MappingProxyType(
    {
        Progress.QUEUED: frozenset({Progress.RUNNING, Progress.ENDED}),
        Progress.RUNNING: frozenset({Progress.ENDED}),
        Progress.ENDED: frozenset(),
        Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),
        Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),
        Status.FINISHED: frozenset(),
        Life.UNBORN: frozenset({Life.LIVE, Life.RELEASED}),
        Life.LIVE: frozenset({Life.RELEASED}),
        Life.RELEASED: frozenset(),
        PageState.FREE: frozenset({PageState.HELD}),
        PageState.HELD: frozenset({PageState.FREE, PageState.LIMBO}),
        PageState.LIMBO: frozenset({PageState.FREE}),
    }
)

S = TypeVar("S", bound=enum.Enum)


def moved(old: S, new: S) -> S:
    """Return `new`. Raises AssertionError if nothing may go from `old` to `new`."""
    assert new in LEGAL[old], f"{type(old).__name__.lower()} cannot go from {old.value} to {new.value}"
    return new
