"""What the live branches are made of, kept so that they can be made again in a new runtime.

Every operation is a record that refers to the one before it; a branch is where it ends. So a fork is a second branch
that begins at the same record, branches share what they have in common, and what no live branch goes through is freed::

    open <- extend <- generate <- extend                 branch 1
                               <- fork <- extend         branch 2, forked from it

While an operation is unfinished its record holds the request, to be sent again. Once it is done, it holds what has the
same effect on a branch without computing anything: for a `generate` the very token ids that were drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final, Generic, TypeVar

import msgspec

from bough.errors import BoughError
from bough.runtime import protocol

W = TypeVar("W")

SPARE: Final = 1 << 62
"""Ids of branches that are only made on the way to others; a client counts its own from 1."""


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


class _Branch(Generic[W]):
    """A branch that was not released, or has unfinished operations. The path and counts are those of the runtime."""

    __slots__ = ("id", "is_released", "num_draws", "num_forked", "num_unfinished", "path", "poison", "tip")

    def __init__(self, branch_id: int, tip: Record[W], path: tuple[int, ...]) -> None:
        self.id = branch_id
        self.tip = tip
        self.path = path
        self.num_draws = self.num_forked = self.num_unfinished = 0
        self.is_released = False
        self.poison: BoughError | None = None


class Ledger(Generic[W]):
    """The records of all live branches. Knows no sockets and no threads; its owner holds a lock."""

    def __init__(self, seed: int) -> None:
        self.unfinished: dict[Record[W], None] = {}
        self._seed = seed
        self._branches: dict[int, _Branch[W]] = {}

    def __len__(self) -> int:
        return len(self._branches)

    # ------------------------------------------------------------------------------------------ what is sent

    def poison_of(self, request: Any) -> BoughError | None:
        """Return the failure, from before a restart, that this request depends on."""
        branch = self._branches.get(getattr(request, "branch", 0) or 0)
        if branch is None or isinstance(request, (protocol.Rollback, protocol.Cancel, protocol.Fork)):
            return None
        return branch.poison

    def pinned(self, request: Any) -> Any:
        """Return the request with the seed that the runtime would derive for it: a later runtime would not."""
        if not isinstance(request, protocol.Generate) or request.params.seed is not None:
            return request
        branch = self._branches.get(request.branch)
        if branch is None:
            return request
        key = ",".join(map(str, (self._seed, *branch.path, branch.num_draws + 1)))
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") & protocol.MAX_ID
        return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, seed=seed))

    def take(self, request: Any, buffers: Sequence[protocol.Buffer], waiting: W | None) -> Record[W] | None:
        """Note a request in the order it was sent; return its record if somebody waits for it."""
        match request:
            case protocol.Open():
                opened: Record[W] = Record(None, request.branch, request)
                opened.length = 0
                self._branches[request.branch] = _Branch(request.branch, opened, (request.branch,))
            case protocol.Fork():
                self._fork(request)
            case protocol.Release():
                for branch_id in request.branches:
                    self._release(branch_id)
            case protocol.Generate() | protocol.Extend() | protocol.Select() | protocol.Score() | protocol.Rollback():
                return self._append(request, buffers, waiting)
            case _ if waiting is not None:
                return self._loose(request, buffers, waiting)
        return None

    def _fork(self, request: protocol.Fork) -> None:
        parent = self._branches.get(request.branch)
        if parent is None:
            return
        for child_id in request.children:
            mark = Record(parent.tip, child_id, None)  # has no effect, but tells whose fork it is
            child = _Branch(child_id, mark, (*parent.path, parent.num_forked))
            child.poison = parent.poison
            parent.num_forked += 1
            self._branches[child_id] = child

    def _release(self, branch_id: int) -> None:
        branch = self._branches.get(branch_id)
        if branch is not None:
            branch.is_released = True
            if not branch.num_unfinished:
                del self._branches[branch_id]

    def _append(self, request: Any, buffers: Sequence[protocol.Buffer], waiting: W | None) -> Record[W]:
        branch = self._branches.get(request.branch)
        if branch is None:  # the runtime will say that there is none
            return self._loose(request, buffers, waiting)
        tip = branch.tip
        while tip.request is None and tip.error is None and not tip.is_fork:
            assert tip.parent is not None, "an open is kept"
            tip = tip.parent  # a score that is done
        branch.tip = record = Record(tip, branch.id, request, buffers, waiting)
        branch.num_unfinished += 1
        if isinstance(request, protocol.Generate):
            branch.num_draws += 1
        elif isinstance(request, protocol.Rollback):
            branch.poison = None
        self.unfinished[record] = None
        return record

    def _loose(self, request: Any, buffers: Sequence[protocol.Buffer], waiting: W | None) -> Record[W]:
        """A request that leaves no trace on a branch; while it is unfinished it is sent again, after all others."""
        record = Record(None, None, request, buffers, waiting)
        self.unfinished[record] = None
        return record

    # ------------------------------------------------------------------------------------------ what became of it

    def end(self, record: Record[W], reply: Any, buffers: Sequence[protocol.Buffer]) -> None:
        """Keep of an operation that is done what has the same effect. `buffers` are the reply's."""
        request = record.request
        record.length = getattr(reply, "length", None)
        match request:
            case protocol.Generate():
                parts: list[protocol.Part] = [protocol.Tokens(0, reply.replaced)]
                if reply.leftover:
                    parts.append(protocol.Text(reply.leftover))
                record.request = protocol.Extend(0, request.branch, parts)
                record.buffers = (buffers[reply.buffer],)
            case protocol.Select():
                chosen = protocol.Text(request.choices[reply.index])
                record.request = protocol.Extend(0, request.branch, [chosen], commit=True)
            case protocol.Rollback():
                record.parent = _last_needed(record, request.length)
            case protocol.Extend():
                pass
            case _:
                record.request = None
        self._finish(record)

    def fail(self, record: Record[W], error: BoughError) -> None:
        """Note that an operation failed: it has no effect, and what comes after it on the branch fails too."""
        record.error = error
        record.request, record.buffers = None, ()
        self._finish(record)

    def _finish(self, record: Record[W]) -> None:
        record.waiting = None
        del self.unfinished[record]
        branch = None if record.branch is None else self._branches.get(record.branch)
        if branch is not None:
            branch.num_unfinished -= 1
            if branch.is_released and not branch.num_unfinished:
                del self._branches[branch.id]

    def fail_below(self, record: Record[W], error: BoughError) -> list[tuple[W, BoughError]]:
        """Fail an unfinished operation and all that depends on it, sent or yet to come; return who is to be told."""
        below: dict[Record[W], bool] = {record: True}

        def is_below(start: Record[W]) -> bool:
            passed: list[Record[W]] = []
            at: Record[W] | None = start
            while at is not None and at not in below:
                passed.append(at)
                at = at.parent
            found = at is not None and below[at]
            below.update(dict.fromkeys(passed, found))
            return found

        for branch in self._branches.values():
            if is_below(branch.tip):
                branch.poison = error
        doomed = [other for other in self.unfinished if is_below(other)]
        return self._fail_all(doomed, record, error)

    def _fail_all(self, doomed: list[Record[W]], first: Record[W], error: BoughError) -> list[tuple[W, BoughError]]:
        told: list[tuple[W, BoughError]] = []
        for record in doomed:
            waiting, why = record.waiting, error if record is first else error.for_dependant()
            self.fail(record, why)
            if waiting is not None:
                told.append((waiting, why))
        return told

    # ------------------------------------------------------------------------------------------ making it again

    def rebuilt(
        self, ops: Iterator[int]
    ) -> tuple[list[tuple[Any, Sequence[protocol.Buffer], W | None]], list[tuple[W, BoughError]]]:
        """Return what to send to a new runtime, in order, with who waits for it; and who is to be told of a failure.

        Each piece is sent once, on the branch that goes on with it, and forked where branches part. Where the branch
        it belonged to is gone, a spare one takes its place and is released, so that siblings are siblings again.
        """
        roots, children, carriers, ends = self._tree()
        spares = count(SPARE)
        sent: list[tuple[Any, Sequence[protocol.Buffer], W | None]] = []
        told: list[tuple[W, BoughError]] = []

        def send(request: Any, record: Record[W] | None = None, **fields: Any) -> None:
            buffers = () if record is None else record.buffers
            again = msgspec.structs.replace(request, op=next(ops), **fields)
            sent.append((again, buffers, None if record is None else record.waiting))

        stack: list[tuple[Record[W], int, BoughError | None]] = []
        for root in reversed(roots):
            stack.append((root, carriers.get(root) or next(spares), None))
        while stack:
            record, wire, poison = stack.pop()
            if record.error is not None:
                poison = record.error
            elif isinstance(record.request, protocol.Rollback):
                poison = None
            if poison is not None and record.waiting is not None:
                told += self._fail_all([record], record, poison.for_dependant())
            elif record.request is not None:
                send(record.request, record, branch=wire)
            heirs: list[int] = []
            following: list[tuple[Record[W], int, BoughError | None]] = []
            for child in children.get(record, ()):
                heir = carriers.get(child)
                if heir is None:
                    heir = wire if wire >= SPARE and wire not in heirs else next(spares)
                heirs.append(heir)
                following.append((child, heir, poison))
            stack.extend(reversed(following))
            here = ends.get(record, ())
            for branch in here:
                branch.poison = poison
                heirs.append(branch.id)
            forked = [heir for heir in heirs if heir != wire]
            for start in range(0, len(forked), protocol.MAX_FORK):
                send(protocol.Fork(0, wire, forked[start : start + protocol.MAX_FORK]))
            released = [branch.id for branch in here if branch.is_released]
            if wire not in heirs:
                released.append(wire)
            if released:
                send(protocol.Release(0, released))
        for record in self.unfinished:
            if record.branch is None:
                send(record.request, record)
        return sent, told

    def _tree(
        self,
    ) -> tuple[
        list[Record[W]], dict[Record[W], list[Record[W]]], dict[Record[W], int], dict[Record[W], list[_Branch[W]]]
    ]:
        """Return the roots, the children of each record, the branch that each was sent on, and the branches by tip."""
        roots: list[Record[W]] = []
        children: dict[Record[W], list[Record[W]]] = {}
        carriers: dict[Record[W], int] = {}
        ends: dict[Record[W], list[_Branch[W]]] = {}
        linked: set[Record[W]] = set()
        for branch in self._branches.values():
            ends.setdefault(branch.tip, []).append(branch)
            record: Record[W] | None = branch.tip
            while record is not None and record.branch == branch.id:
                carriers[record] = branch.id
                record = record.parent
            record = branch.tip
            while record is not None and record not in linked:
                linked.add(record)
                if record.parent is None:
                    roots.append(record)
                else:
                    children.setdefault(record.parent, []).append(record)
                record = record.parent
        return roots, children, carriers, ends


def _last_needed(rollback: Record[W], length: int) -> Record[W]:
    """Return the earliest record of its branch, before a rollback, at which there were `length` tokens already."""
    assert rollback.parent is not None, "a rollback follows an open or a fork"
    needed = at = rollback.parent
    while at.parent is not None and not at.is_fork:
        at = at.parent
        known: Record[W] | None = at
        while known is not None and known.length is None:
            known = known.parent
        if known is None or known.length is None or known.length < length:
            break
        needed = at
    return needed
