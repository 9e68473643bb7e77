"""How recorded branches are made again in a new runtime: what to send, and in which order.

Each piece is sent once, on the branch that goes on with it, and forked where branches part. Where the branch it
belonged to is gone, a spare one takes its place and is released, so that siblings are siblings again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final, Generic, TypeAlias

import msgspec

from bough.errors import BoughError
from bough.record import Record, RecordedBranch, W
from bough.runtime import protocol

SPARE: Final = 1 << 62
"""Ids of branches that are only made on the way to others; a client counts its own from 1."""

Sent: TypeAlias = tuple[Any, Sequence[protocol.Buffer], W | None]
"""A request, its buffers, and who waits for its reply."""


class Rebuild(Generic[W]):
    """One walk over the records of some branches, from their roots on. `ops`: the ids of the operations sent."""

    def __init__(self, branches: Sequence[RecordedBranch[W]], ops: Iterator[int]) -> None:
        self.sent: list[Sent[W]] = []
        self._ops = ops
        self._spares = count(SPARE)
        self._roots: list[Record[W]] = []
        self._children: dict[Record[W], list[Record[W]]] = {}
        self._carriers: dict[Record[W], int] = {}  # the branch that each was sent on, if it is there
        self._ends: dict[Record[W], list[RecordedBranch[W]]] = {}
        linked: set[Record[W]] = set()
        for branch in branches:
            self._ends.setdefault(branch.tip, []).append(branch)
            self._carry(branch)
            self._link(branch.tip, linked)

    def _carry(self, branch: RecordedBranch[W]) -> None:
        record: Record[W] | None = branch.tip
        while record is not None and record.branch == branch.id:
            self._carriers[record] = branch.id
            record = record.parent

    def _link(self, tip: Record[W], linked: set[Record[W]]) -> None:
        record: Record[W] | None = tip
        while record is not None and record not in linked:
            linked.add(record)
            if record.parent is None:
                self._roots.append(record)
            else:
                self._children.setdefault(record.parent, []).append(record)
            record = record.parent

    def run(self) -> Iterator[tuple[Record[W], BoughError]]:
        """Collect what to send, parents first; yield unfinished operations that fail, and with what, on the way."""
        stack: list[tuple[Record[W], int, BoughError | None]] = [
            (root, self._carriers.get(root) or next(self._spares), None) for root in reversed(self._roots)
        ]
        while stack:
            record, wire, poison = stack.pop()
            if record.error is not None:
                poison = record.error
            elif isinstance(record.request, protocol.Rollback):
                poison = None
            if poison is not None and record.waiting is not None:
                yield record, poison.for_dependant()
            elif record.request is not None:
                self._send(record.request, record, branch=wire)
            heirs = self._heirs(record, wire)
            stack.extend([(child, heir, poison) for child, heir in reversed(heirs)])
            self._part(record, wire, [heir for _, heir in heirs], poison)

    def send_again(self, records: Iterable[Record[W]]) -> None:
        """Send requests that belong to no branch, as they were."""
        for record in records:
            self._send(record.request, record)

    def _send(self, request: Any, record: Record[W] | None = None, **fields: Any) -> None:
        buffers = () if record is None else record.buffers
        again = msgspec.structs.replace(request, op=next(self._ops), **fields)
        self.sent.append((again, buffers, None if record is None else record.waiting))

    def _heirs(self, record: Record[W], wire: int) -> list[tuple[Record[W], int]]:
        """Return what follows a record that is on branch `wire`, each with the branch that goes on with it."""
        heirs: list[tuple[Record[W], int]] = []
        is_free = wire >= SPARE  # a spare branch may go on with one of those whose own is gone
        for child in self._children.get(record, ()):
            heir = self._carriers.get(child)
            if heir is None:
                heir = wire if is_free else next(self._spares)
                is_free = False
            heirs.append((child, heir))
        return heirs

    def _part(self, record: Record[W], wire: int, heirs: list[int], poison: BoughError | None) -> None:
        """Fork off `wire` all that goes on from a record, and release what ends there."""
        here = self._ends.get(record, ())
        for branch in here:
            branch.poison = poison
            heirs.append(branch.id)
        forked = [heir for heir in heirs if heir != wire]
        for start in range(0, len(forked), protocol.MAX_FORK):
            self._send(protocol.Fork(0, wire, forked[start : start + protocol.MAX_FORK]))
        released = [branch.id for branch in here if branch.is_released]
        if wire not in heirs:
            released.append(wire)
        if released:
            self._send(protocol.Release(0, released))
