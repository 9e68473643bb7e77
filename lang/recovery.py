"""A link that outlives its runtime: `Runtime(restart=True)`.

It stands where a `Link` stands and passes requests on to the link of the present life. It records what the branches are
made of (record.py); when the runtime is lost it starts the next life in a thread of its own, makes the branches again
and sends again what was in flight, so that nobody who waits is told. Meanwhile, what is sent is only recorded.

One lock orders requests, replies and restarts. It is never held while something is waited for, and futures are
completed outside it. The garbage collector may release a branch anywhere, also inside the lock: releases are queued,
and carried out by whoever holds the lock or gets it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec

from bough.backend import Delta
from bough.errors import BoughError, RuntimeLost
from bough.ledger import Ledger
from bough.link import Entry, Link, check_process, encoded
from bough.record import Record
from bough.runtime import protocol

MAX_RESTARTS: Final = 3
WINDOW_S: Final = 60.0
"""So many restarts within so many seconds are enough: a request may well be what kills the runtime."""

_SAME: Final = ("model", "architecture", "dtype", "device", "vocab_size", "context_len")


class Life(Protocol):
    """A runtime and the link to it. `end` may be called at any time, by any thread, and makes a `start` fail."""

    link: Link

    @property
    def pid(self) -> int:
        """The process id of the runtime."""

    def start(self) -> protocol.Welcome:
        """Return once the runtime serves and the link is connected."""

    def end(self) -> None:
        """Disconnect and stop the runtime."""


class Recorded(Entry):
    """An operation in flight that may be sent more than once; only text that is new is passed on."""

    __slots__ = ("_chunks", "_convert", "_expected", "_matched", "_num_ids", "_num_told", "_on_delta", "_owner",
                 "_sent_at", "buffers", "record", "reply")  # fmt: skip

    def __init__(self, owner: RecoveringLink, entry: Entry) -> None:
        super().__init__(entry.kind, self._keep, entry.future, None if entry.on_delta is None else self._deliver)
        self.record: Record[Recorded] | None = None
        self.reply: Any = None
        self.buffers: Sequence[protocol.Buffer] = ()
        self._owner = owner
        self._convert = entry.convert
        self._on_delta = entry.on_delta
        self._sent_at = time.monotonic()
        self._chunks: list[str] = []  # what was passed on
        self._expected = ""  # what was passed on in earlier lives, and must come again
        self._matched = 0  # how much of it has
        self._num_ids = 0  # token ids that came in this life
        self._num_told = 0  # token ids that were passed on, in all

    def again(self, request: Any) -> Any:
        """Return the request for a new life: the text starts anew, a deadline does not."""
        self._expected, self._matched, self.ungranted = "".join(self._chunks), 0, 0
        self._num_ids = 0
        timeout_s = getattr(request, "timeout_s", None)
        if timeout_s is None:
            return request
        left_s = max(0.001, self._sent_at + timeout_s - time.monotonic())
        return msgspec.structs.replace(request, timeout_s=left_s)

    @property
    def is_consistent(self) -> bool:
        """Whether the whole text begins with what was passed on of it before a restart."""
        return not self._expected or self.reply.text.startswith(self._expected)

    def tell(self, outcome: Any) -> None:
        """Complete the future with a value or an error."""
        self.convert = self.on_delta = None  # they refer to this entry
        self.reply, self.buffers = None, ()
        if isinstance(outcome, BoughError):
            super().failed(outcome)
        else:
            super().done(outcome)

    def done(self, value: Any) -> None:
        self._owner.ended(self, value)

    def failed(self, error: BoughError) -> None:
        self._owner.failed(self, error)

    def _keep(self, reply: Any, buffers: Sequence[protocol.Buffer]) -> Any:
        self.reply, self.buffers = reply, buffers
        return reply if self._convert is None else self._convert(reply, buffers)

    def _deliver(self, delta: Delta) -> None:
        text = delta.text
        assert self._on_delta is not None, "only a stream has deltas"
        known = self._expected[self._matched : self._matched + len(text)]
        if not text.startswith(known):
            self._owner.diverged(self)
            return
        self._matched += len(known)
        new = text[len(known) :]
        told = max(0, self._num_told - self._num_ids)
        self._num_ids += len(delta.token_ids)
        if new:
            self._chunks.append(new)
            self._num_told = max(self._num_told, self._num_ids)
            logprobs = None if delta.logprobs is None else delta.logprobs[told:]
            self._on_delta(Delta(new, delta.token_ids[told:], logprobs))


class RecoveringLink:
    """A link to one runtime after the other. `begin` makes the next life; `life` is the first, which was started."""

    def __init__(self, begin: Callable[[], Life], life: Life, seed: int) -> None:
        self.ops = life.link.ops
        self.welcome = life.link.welcome
        self.num_restarts = 0
        self._pid = os.getpid()
        self._begin = begin
        self._life = life
        self._ledger: Ledger[Recorded] = Ledger(seed)
        self._lock = threading.Lock()
        self._releases: deque[protocol.Release] = deque()
        self._outcomes: deque[tuple[Recorded, BoughError]] = deque()
        self._restarts: deque[float] = deque()
        self._losses: list[BoughError] = []  # of earlier lives
        self._past_bytes = [0, 0]
        self._is_restarting = self._is_ending = False
        self._lost: BoughError | None = None

    # ------------------------------------------------------------------------------------------ any thread

    def send(self, request: Any, entry: Entry | None, buffers: Sequence[protocol.Buffer] = ()) -> None:
        """Send a request now, or once there is a runtime again, and complete the entry with its reply.

        Raises at once if that cannot be.
        """
        check_process(self._pid)
        if isinstance(request, protocol.Release):
            self._releases.append(request)
            self._settle()
            return
        recorded = None if entry is None or entry.future is None else Recorded(self, entry)
        try:
            with self._lock:
                if self._lost is not None:
                    raise self._lost.again()
                poison = self._ledger.poison_of(request)
                if poison is None:
                    request = self._ledger.pinned(request)
                    self._pass_on(request, recorded or entry, buffers)
                    record = self._ledger.take(request, buffers, recorded)  # before its reply, which needs the lock
                    if recorded is not None:
                        recorded.record = record
        finally:
            self._settle()
        if poison is not None and recorded is not None:
            recorded.tell(poison.for_dependant())

    def stop(self, farewell: Sequence[Any] = ()) -> None:
        """Send a farewell, close the connection, and fail what is still in flight; nothing starts any more."""
        if os.getpid() != self._pid:
            return
        self._is_ending = True
        # This may be a finalizer that the garbage collector runs inside the lock.
        is_locked = self._lock.acquire(timeout=5.0)
        life = self._life
        if is_locked:
            self._lock.release()
        life.link.stop(farewell)
        if self._lock.acquire(timeout=5.0):
            self._give_up(RuntimeLost(f"this client of {self.address} was closed"))
            self._lock.release()
        self._settle()

    def end(self) -> None:
        """Stop, and stop the runtime too."""
        self.stop()
        self._life.end()

    @property
    def is_busy(self) -> bool:
        """Whether operations are in flight."""
        return bool(self._ledger.unfinished)

    @property
    def lost(self) -> BoughError | None:
        """Why there will be no runtime any more, or None."""
        return self._lost

    @property
    def address(self) -> str:
        """Where the present runtime listens."""
        return self._life.link.address

    @property
    def pid(self) -> int:
        """The process id of the present runtime."""
        return self._life.pid

    @property
    def bytes_out(self) -> int:
        """Bytes sent so far, in all lives."""
        return self._past_bytes[0] + self._life.link.bytes_out

    @property
    def bytes_in(self) -> int:
        """Bytes received so far, in all lives."""
        return self._past_bytes[1] + self._life.link.bytes_in

    def _settle(self) -> None:
        """Carry out releases that wait, and tell who has to be told. Never waits for the lock: its holder settles."""
        while self._releases and self._lock.acquire(blocking=False):
            try:
                while self._releases:
                    self._carry_out(self._releases.popleft())
            finally:
                self._lock.release()
        while self._outcomes:
            try:
                entry, error = self._outcomes.popleft()
            except IndexError:  # another thread was faster
                return
            entry.tell(error)

    # ------------------------------------------------------------------------------------------ inside the lock

    def _carry_out(self, release: protocol.Release) -> None:
        self._ledger.take(release, (), None)
        link = self._life.link
        if not self._is_restarting and self._lost is None and link.lost is None:
            try:
                link.send(release, Entry(protocol.Ok))
            except BoughError:  # lost with everything else, or too much waits already; then its lease frees it
                return

    def _pass_on(self, request: Any, entry: Entry | None, buffers: Sequence[protocol.Buffer]) -> None:
        """Send now, or check that it can be sent later. Raises if neither."""
        link = self._life.link
        if not self._is_restarting:
            try:
                link.send(request, entry, buffers)
            except BoughError:
                if link.lost is None:
                    raise
                self._lose(link.lost)
            else:
                if isinstance(request, protocol.Drain):
                    self._is_ending = True
                return
        if self._lost is not None:
            raise self._lost.again()
        encoded(request, buffers)

    def _lose(self, loss: BoughError) -> None:
        """Begin the next life, unless there is none: this is the end for a runtime that was asked to end."""
        if self._is_restarting or self._lost is not None:
            return
        if not self._may_restart(loss):
            return
        self._is_restarting = True
        try:
            threading.Thread(target=self._restart, name="bough-restart", daemon=True).start()
        except RuntimeError:  # this process is about to end
            self._give_up(loss)

    def _may_restart(self, loss: BoughError) -> bool:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > WINDOW_S:
            self._restarts.popleft()
        if self._is_ending or type(loss) is not RuntimeLost:
            self._give_up(loss)
            return False
        if len(self._restarts) >= MAX_RESTARTS:
            error = RuntimeLost(f"the runtime was restarted {MAX_RESTARTS} times within {WINDOW_S:g} s; then {loss}")
            error.__cause__ = loss
            self._give_up(error)
            return False
        self._restarts.append(now)
        return True

    def _give_up(self, error: BoughError) -> None:
        self._is_restarting = False
        if self._lost is None:
            self._lost = error
        for record in list(self._ledger.unfinished):
            if record.waiting is not None:
                self._outcomes.append((record.waiting, self._lost))
        self._ledger = Ledger(0)

    # ------------------------------------------------------------------------------------------ a link's thread

    def ended(self, entry: Recorded, value: Any) -> None:
        """Take in that an operation is done."""
        with self._lock:
            record = entry.record
            if record not in self._ledger.unfinished:
                return  # it has been told something else
            if entry.is_consistent:
                self._ledger.end(record, entry.reply, entry.buffers)
            else:
                self._fail_diverged(record)
                value = None
        if value is not None:
            entry.tell(value)
        self._settle()

    def failed(self, entry: Recorded, error: BoughError) -> None:
        """Take in that an operation failed, or was lost with its runtime."""
        with self._lock:
            record, is_over = entry.record, False
            if error is self._life.link.lost:
                self._lose(error)
            elif record in self._ledger.unfinished and error not in self._losses:
                self._ledger.fail(record, error)
                is_over = True
        if is_over:
            entry.tell(error)
        self._settle()

    def diverged(self, entry: Recorded) -> None:
        """Take in that a stream does not come again as it was."""
        with self._lock:
            if entry.record in self._ledger.unfinished:
                self._fail_diverged(entry.record)
        self._settle()

    def _fail_diverged(self, record: Record[Recorded]) -> None:
        error = RuntimeLost(
            "after a restart of the runtime this text came out different from what was streamed before "
            "(exact=True makes sure that it does not)"
        )
        self._outcomes.extend(self._ledger.fail_below(record, error))
        if record.branch is not None and self._life.link.lost is None:
            try:
                self._life.link.send(protocol.Cancel(next(self.ops), branch=record.branch), Entry(protocol.Cancelled))
            except BoughError:  # there is nothing left to cancel
                return

    # ------------------------------------------------------------------------------------------ the restart's thread

    def _restart(self) -> None:
        try:
            while not self._live_again():
                pass
        except BaseException as error:
            why = error.message if isinstance(error, BoughError) else repr(error)
            lost = RuntimeLost(f"the runtime was lost and could not be restarted: {why}")
            lost.__cause__ = error
            with self._lock:
                self._give_up(lost)
            self._life.end()
        self._settle()

    def _live_again(self) -> bool:
        """Replace the life that was lost by a new one; False if that was lost at once, and another may be tried."""
        old = self._life
        old.end()  # after which its thread has said all it had to say
        with self._lock:
            if self._lost is not None:
                return True
            if old.link.lost is not None:
                self._losses.append(old.link.lost)
            self._past_bytes[0] += old.link.bytes_out
            self._past_bytes[1] += old.link.bytes_in
            self._life = life = self._begin()
            life.link.ops = self.ops
        welcome = life.start()
        for name in _SAME:
            was, now = getattr(self.welcome, name), getattr(welcome, name)
            if was != now:
                raise RuntimeLost(f"{name} was {was!r} and would be {now!r}")
        with self._lock:
            if self._lost is not None:  # stopped meanwhile; who stopped it ends this life
                return True
            self.welcome = welcome
            self.num_restarts += 1
            if self._make_again(life.link):
                self._is_restarting = False
                return True
            assert life.link.lost is not None, "it was lost just now"
            return not self._may_restart(life.link.lost)

    def _make_again(self, link: Link) -> bool:
        """Send all branches and what is in flight to a new runtime; False if it is lost again."""
        messages, told = self._ledger.rebuilt(self.ops)
        self._outcomes.extend(told)
        for request, buffers, entry in messages:
            again = request if entry is None else entry.again(request)
            try:
                link.send(again, entry, buffers, limit=len(messages))
            except BoughError:
                if link.lost is None:
                    raise
                return False
        return True
