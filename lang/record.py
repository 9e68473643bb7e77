"""One operation as it is remembered: what was sent, or what has the same effect, and what was before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from bough.errors import BoughError
from bough.runtime import protocol

W = TypeVar("W")


class Record(Generic[W]):
    """One operation, sent on `branch` (None: on none that is known).

    `waiting` is who waits for it, None once it is done; `request` is None if it has no effect. `length` is how many
    tokens the branch then had, where that is known.
    """

    __slots__ = ("branch", "buffers", "error", "length", "parent", "request", "waiting")

    def __init__(
        self,
        parent: Record[W] | None,
        branch: int | None,
        request: Any,
        buffers: Sequence[protocol.Buffer] = (),
        waiting: W | None = None,
    ) -> None:
        self.parent = parent
        self.branch = branch
        self.request = request
        self.buffers = buffers
        self.waiting = waiting
        self.error: BoughError | None = None
        self.length: int | None = None

    @property
    def is_fork(self) -> bool:
        """Whether this is only where a fork begins."""
        return self.parent is not None and self.parent.branch != self.branch


class RecordedBranch(Generic[W]):
    """A branch that was not released, or has unfinished operations. The path and counts are those of the runtime."""

    __slots__ = ("id", "is_released", "num_draws", "num_forked", "num_unfinished", "path", "poison", "tip")

    def __init__(self, branch_id: int, tip: Record[W], path: tuple[int, ...]) -> None:
        self.id = branch_id
        self.tip = tip
        self.path = path
        self.num_draws = self.num_forked = self.num_unfinished = 0
        self.is_released = False
        self.poison: BoughError | None = None
