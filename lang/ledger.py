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
from typing import Any, Generic

import msgspec

from bough.errors import BoughError
from bough.rebuild import Rebuild, Sent
from bough.record import Record, RecordedBranch, W
from bough.runtime import protocol


class Ledger(Generic[W]):
    """The records of all live branches. Knows no sockets and no threads; its owner holds a lock."""

    def __init__(self, seed: int) -> None:
        self.unfinished: dict[Record[W], None] = {}
        self._seed = seed
        self._branches: dict[int, RecordedBranch[W]] = {}

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
                self._branches[request.branch] = RecordedBranch(request.branch, opened, (request.branch,))
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
            child = RecordedBranch(child_id, mark, (*parent.path, parent.num_forked))
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

    def rebuilt(self, ops: Iterator[int]) -> tuple[list[Sent[W]], list[tuple[W, BoughError]]]:
        """Return what to send to a new runtime, in order, with who waits for it; and who is to be told of a failure.

        ops: the ids of the operations sent.
        """
        rebuild = Rebuild(list(self._branches.values()), ops)
        told: list[tuple[W, BoughError]] = []
        for record, error in rebuild.run():
            told += self._fail_all([record], record, error)
        rebuild.send_again(record for record in self.unfinished if record.branch is None)
        return rebuild.sent, told


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
