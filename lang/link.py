"""The connection to a runtime: one DEALER socket and the one thread that owns it.

Callers encode their request, put it in the outbox and ring a bell; the thread sends, receives and completes futures.
Nothing takes a lock: the outbox is a deque, the table of what is in flight a dict, and both are used with single
operations that Python makes atomic. So a send is allowed anywhere, the garbage collector included.

A connection is lost once and for ever: by the runtime's end, a disconnect, silence, another epoch, or an unreadable
frame. Then everything in flight fails with the reason, and so does every later call. There is no reconnecting, because
what the runtime held for this client is gone; `recovery` begins anew on another link.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # its own class before Python 3.11
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, TypeAlias

import zmq
import zmq.utils.monitor

from bough.backend import Delta, OnDelta
from bough.errors import BackendError, BoughError, InvalidRequest, Overloaded, ProtocolMismatch, RuntimeLost, from_reply
from bough.liveness import Liveness
from bough.runtime import protocol

log = logging.getLogger(__name__)

Convert: TypeAlias = Callable[[Any, Sequence[protocol.Buffer]], Any]

HIGH_WATER_MARK: Final = 1000  # messages in ZeroMQ's own queue for sending; what exceeds it waits in the outbox
MAX_OUTBOX: Final = 100_000
MAX_FAILURES: Final = 4096  # failed operations remembered, to name the cause of what fails after them
LINGER_MS: Final = 200
_GONE: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True)
class Keys:
    """CURVE keys (Z85) for tcp: the runtime's public key, and this client's own pair."""

    server_public: str
    public: str
    secret: str


class Entry:
    """An operation in flight: the future to complete (None if nobody waits), and how to read its reply."""

    __slots__ = ("convert", "future", "kind", "on_delta", "ungranted")

    def __init__(
        self,
        kind: type[Any],
        convert: Convert | None = None,
        future: Future[Any] | None = None,
        on_delta: OnDelta | None = None,
    ) -> None:
        self.kind = kind
        self.convert = convert
        self.future = future
        self.on_delta = on_delta
        self.ungranted = 0

    def done(self, value: Any) -> None:
        """Tell who waits."""
        if self.future is not None:
            self.future.set_result(value)

    def failed(self, error: BoughError) -> None:
        """Tell who waits that it came to nothing."""
        if self.future is not None:
            self.future.set_exception(error)


class Link:
    """A connection to one runtime. `start` it once; `stop` is idempotent."""

    def __init__(
        self,
        address: str,
        *,
        silence_s: float = 10.0,
        watch: Callable[[], str | None] | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.address = address
        self.bytes_out = 0
        self.bytes_in = 0
        self.welcome: protocol.Welcome | None = None
        self.ops = count(1)
        self._liveness = Liveness(address, silence_s, watch, time.monotonic())
        self._keys = keys
        self._pid = os.getpid()
        self._outbox: deque[list[protocol.Buffer]] = deque()
        self._inflight: dict[int, Entry] = {}
        self._failures: dict[int, BoughError] = {}
        self._lost: BoughError | None = None
        self._stopping = False
        self._rung = False
        self._bell, self._ear = sockets.socketpair()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------ any thread

    def start(self, timeout_s: float, *, waited_s: float = 0.0, tell_after_s: float | None = None) -> protocol.Welcome:
        """Connect and say hello. Raises RuntimeLost if nothing answers in time, ProtocolMismatch if no runtime does.

        waited_s: how much of timeout_s is over already. tell_after_s: when to log what is waited for.
        """
        if self._stopping:
            raise self._closed()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        context = zmq.Context()
        try:
            dealer = self._connect(context)
        except BaseException:
            context.destroy(linger=0)
            self._bell.close()
            self._ear.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(context, dealer), name="bough-client", daemon=True)
        self._thread.start()
        hello: Future[protocol.Welcome] = Future()
        self.send(protocol.Hello(next(self.ops), f"bough pid {self._pid}"), Entry(protocol.Welcome, None, hello))
        left_s = max(timeout_s - waited_s, 0.001)
        try:
            if tell_after_s is None or tell_after_s >= left_s:
                return hello.result(left_s)
            with contextlib.suppress(FutureTimeout):
                return hello.result(tell_after_s)
            log.warning("waiting for a runtime to answer at %s, for %.3g s at most", self.address, left_s)
            return hello.result(left_s - tell_after_s)
        except BoughError as error:
            self.stop()
            raise error.again() from error.__cause__
        except FutureTimeout:
            self.stop()
            raise RuntimeLost(
                f"no runtime answered at {self.address} within {timeout_s:.3g} s: is one listening there?"
            ) from None

    def send(
        self, request: Any, entry: Entry | None, buffers: Sequence[protocol.Buffer] = (), *, limit: int = MAX_OUTBOX
    ) -> None:
        """Send a request, and complete the entry with its reply. Raises at once if that cannot be."""
        check_process(self._pid)
        if self._lost is not None:
            raise self._lost.again()
        if len(self._outbox) > limit:
            raise Overloaded(f"more than {limit} requests wait to be sent to {self.address}")
        frames = encoded(request, buffers)
        if entry is not None:
            self._inflight[request.op] = entry
        self._outbox.append(frames)
        self._ring()
        if self._lost is not None and entry is not None and self._inflight.pop(request.op, None) is not None:
            raise self._lost.again()  # lost in between, and the thread has not seen the entry

    def stop(self, farewell: Sequence[Any] = ()) -> None:
        """Send what is left and a farewell, close the connection, and fail what is still in flight."""
        if os.getpid() != self._pid:
            return
        if self._lost is None:
            self._outbox.extend(encoded(request, ()) for request in farewell)
        self._stopping = True
        self._ring()
        thread = self._thread
        if thread is None:  # never started
            self._lose(self._closed())
            self._bell.close()
            self._ear.close()
        elif thread is not threading.current_thread():
            thread.join(5.0)

    def _closed(self) -> RuntimeLost:
        return RuntimeLost(f"this client of {self.address} was closed")

    @property
    def is_busy(self) -> bool:
        """Whether operations are in flight."""
        return bool(self._inflight)

    @property
    def lost(self) -> BoughError | None:
        """Why the connection is gone, or None."""
        return self._lost

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):  # full: the thread looks anyway; closed: `send` sees that it has gone
                self._bell.send(b"\0")

    # ------------------------------------------------------------------------------------------ set-up

    def _connect(self, context: zmq.Context[Any]) -> zmq.Socket[Any]:
        dealer: zmq.Socket[Any] = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, LINGER_MS)
        dealer.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        # What has arrived must be readable after the other end has closed the connection, as a runtime does that was
        # told to end. So ZeroMQ's queue for reading has no bound (the runtime's credit is one), for while it is full
        # ZeroMQ reads no further; and IMMEDIATE stays 0, with which a lost connection takes all its unread messages
        # along, and fails an assertion if it does so between two frames of one.
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
        if self._keys is not None:
            dealer.curve_serverkey = self._keys.server_public.encode()
            dealer.curve_publickey = self._keys.public.encode()
            dealer.curve_secretkey = self._keys.secret.encode()
        dealer.get_monitor_socket(_GONE)  # made before connecting: a refusal may come before the thread looks
        try:
            dealer.connect(self.address)
        except zmq.ZMQError as error:
            raise InvalidRequest(f"cannot connect to {self.address!r}: {error}", address=self.address) from None
        return dealer

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self, context: zmq.Context[Any], dealer: zmq.Socket[Any]) -> None:
        monitor = dealer.get_monitor_socket(_GONE)
        try:
            self._serve(dealer, monitor)
        except Exception as error:  # a bug of ours must not leave anybody waiting
            log.exception("the connection to %s failed", self.address)
            self._lose(BackendError(f"the client's connection thread failed: {error!r}"))
        finally:
            self._lose(self._closed())
            self._ear.close()
            self._bell.close()
            dealer.disable_monitor()
            monitor.close(0)
            dealer.close()
            context.term()

    def _serve(self, dealer: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
        poller = zmq.Poller()
        poller.register(self._ear.fileno(), zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while self._lost is None:
            sent_all = self._send_outbox(dealer)
            if self._stopping:
                return
            poller.register(dealer, zmq.POLLIN if sent_all else zmq.POLLIN | zmq.POLLOUT)
            ready = dict(poller.poll(int(self._liveness.patience_s(time.monotonic()) * 1000) + 1))
            if self._ear.fileno() in ready:
                self._listen()
            self._receive_all(dealer)
            if monitor in ready:
                self._check_monitor(monitor)
            self._check_life()

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)
        self._rung = False  # before the outbox is read: what comes later rings again

    def _send_outbox(self, dealer: zmq.Socket[Any]) -> bool:
        """Send as much as ZeroMQ takes; return whether that was all."""
        while self._outbox:
            frames = self._outbox[0]
            try:
                dealer.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._outbox.popleft()
            self.bytes_out += sum(map(len, frames))
        return True

    def _receive_all(self, dealer: zmq.Socket[Any]) -> None:
        while self._lost is None:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._liveness.heard(time.monotonic())
            self.bytes_in += sum(map(len, frames))
            try:
                replies, buffers = protocol.decode_replies(frames)
                for reply in replies:
                    self._handle(reply, buffers)
            except protocol.ProtocolError as error:
                # Nobody can tell which operation it was to answer, so none may wait for it.
                self._lose(ProtocolMismatch(f"{self.address} sent what is not of this protocol: {error.message}"))

    def _handle(self, reply: protocol.Reply, buffers: Sequence[protocol.Buffer]) -> None:
        if isinstance(reply, protocol.Delta):
            return self._handle_delta(reply)
        if isinstance(reply, protocol.Failed):
            return self._handle_failed(reply)
        entry = self._inflight.get(reply.op)
        if entry is None:
            return log.debug("a reply to operation %d, which nobody waits for", reply.op)
        if not isinstance(reply, entry.kind):
            raise protocol.ProtocolError(f"a {type(reply).__name__} in answer to operation {reply.op}")
        value = reply if entry.convert is None else entry.convert(reply, buffers)
        del self._inflight[reply.op]  # not before it is known to be good: a bad reply loses the link and all in flight
        if isinstance(reply, protocol.Welcome):
            self.welcome = reply
            self._liveness.welcomed(reply.heartbeat_s, reply.epoch)
        elif isinstance(reply, protocol.Pong):
            loss = self._liveness.ponged(reply.epoch)
            if loss is not None:
                self._lose(loss)
        entry.done(value)
        return None

    def _handle_delta(self, delta: protocol.Delta) -> None:
        token_ids = protocol.delta_tokens(delta)
        entry = self._inflight.get(delta.op)
        if entry is None:
            return
        # Granted on arrival, not when a reader has read: a slow reader costs this process memory, and nobody else time.
        entry.ungranted += len(token_ids)
        if self.welcome is None or entry.ungranted >= max(1, self.welcome.credit // 4):
            self._outbox.append(encoded(protocol.Credit(delta.op, entry.ungranted), ()))
            entry.ungranted = 0
        if entry.on_delta is not None:
            try:
                entry.on_delta(Delta(delta.text, token_ids, delta.logprobs))
            except Exception:  # a reader's bug is not the connection's
                log.exception("a reader of operation %d failed", delta.op)

    def _handle_failed(self, failed: protocol.Failed) -> None:
        error = from_reply(failed)
        if failed.op is None:
            kind = ProtocolMismatch if self.welcome is None else RuntimeLost
            return self._lose(kind(f"{self.address} could not read a request: {failed.message}"))
        if failed.kind == "unknown_client":  # as after a stop of this process that outlasted its lease
            return self._lose(RuntimeLost(f"the runtime at {self.address} forgot this client: {failed.message}"))
        cause = None if failed.cause is None else self._failures.get(failed.cause)
        self._failures[failed.op] = error if cause is None else cause
        while len(self._failures) > MAX_FAILURES:
            del self._failures[next(iter(self._failures))]
        entry = self._inflight.pop(failed.op, None)
        if entry is not None:
            entry.failed(error if cause is None else cause.for_dependant())
        return None

    # ------------------------------------------------------------------------------------------ life and death

    def _check_life(self) -> None:
        now = time.monotonic()
        loss = self._liveness.loss(now)
        if loss is not None:
            self._lose(loss)
        elif self._liveness.must_ping(now):
            op = next(self.ops)
            self._inflight[op] = Entry(protocol.Pong)
            self._outbox.append(encoded(protocol.Ping(op), ()))
            self._liveness.pinged(op, now)

    def _check_monitor(self, monitor: zmq.Socket[Any]) -> None:
        event = zmq.utils.monitor.recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
        # A client without keys is refused in words or just cut off: a runtime on tcp always wants some.
        if self._keys is None and self.welcome is None and self.address.startswith("tcp://"):
            return self._lose(RuntimeLost(f"{self.address} wants CURVE keys, and this client has none"))
        if event != zmq.EVENT_DISCONNECTED:
            return self._lose(RuntimeLost(f"{self.address} refused this client's keys"))
        reason = self._reason_of_death()
        return self._lose(RuntimeLost(reason or f"the runtime at {self.address} closed the connection"))

    def _reason_of_death(self) -> str | None:
        """Give the process a moment to be reaped, so that the error can tell its exit status."""
        deadline = time.monotonic() + 0.5
        watch = self._liveness.watch
        while watch is not None and time.monotonic() < deadline:
            reason = watch()
            if reason is not None:
                return reason
            time.sleep(0.01)
        return None

    def _lose(self, error: BoughError) -> None:
        """End the connection with this reason, the first one counts; everybody who waits is told."""
        if self._lost is None:
            self._lost = error
        while self._inflight:
            _, entry = self._inflight.popitem()
            entry.failed(self._lost)


def check_process(pid: int) -> None:
    """Raise InvalidRequest in another process than `pid`: a fork has no threads, and shares the socket."""
    if os.getpid() != pid:
        raise InvalidRequest(f"this client belongs to process {pid}: after a fork, make a new one")


def encoded(request: Any, buffers: Sequence[protocol.Buffer]) -> list[protocol.Buffer]:
    """Return the frames of a request. Raises InvalidRequest for what cannot go over the wire."""
    try:
        frames = protocol.encode_request(request, buffers)
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds half of a character (a lone surrogate), which is not Unicode") from None
    largest = max(map(len, frames))
    if largest > protocol.MAX_FRAME_BYTES:
        raise InvalidRequest(
            f"one append may have {protocol.MAX_FRAME_BYTES} bytes, got {largest}", limit=protocol.MAX_FRAME_BYTES
        )
    return frames
