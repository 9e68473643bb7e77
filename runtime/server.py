"""`Server`: the loop. Receive, step, reply; who is alive; when to stop.

    while serving:
        receive()          requests -> engine.handle
        engine.step()      plan, execute, commit, settle
        flush()            one message of replies per client and step

One thread does all of it: nothing is locked, and the step counter in a pong proves that the whole loop moves.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import zmq

from bough.runtime.backlog import Backlog
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.journal import Journal
from bough.runtime.operation import failed
from bough.runtime.protocol import (
    Buffer,
    Hello,
    ProtocolError,
    RequestError,
    UnknownClient,
    Welcome,
    decode_request,
    encode_replies,
)
from bough.runtime.session import Message, Session

log = logging.getLogger(__name__)

_IDLE_S = 0.5  # how often an idle loop looks at leases, deadlines and its parent
_CHECK_S = 10.0  # how often an idle runtime checks its own bookkeeping
_COMPILING_S = 0.001  # how often an otherwise idle loop looks whether a grammar is compiled
_BLOCKED_S = 0.005  # how long to wait for messages when there is work that cannot run yet


class Endpoint(Protocol):
    """Where clients connect, and who a message comes from."""

    socket: zmq.Socket[bytes]

    def receive(self) -> tuple[bytes, str, list[bytes]]:
        """Return identity, namespace and frames of a waiting message. Raises zmq.Again if there is none."""
        ...


class Server:
    """Serves one engine on one endpoint until told to stop.

    wake_fd: becomes readable when a signal arrives, so that an idle loop notices at once.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        engine: Engine,
        endpoint: Endpoint,
        welcome: Callable[[int], Welcome],
        *,
        is_orphaned: Callable[[], bool],
        journal: Journal | None = None,
        wake_fd: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._engine = engine
        self._endpoint = endpoint
        self._welcome = welcome
        self._is_orphaned = is_orphaned
        self._journal = journal
        self._wake_fd = wake_fd
        self._poller = zmq.Poller()
        self._poller.register(endpoint.socket, zmq.POLLIN)
        if wake_fd is not None:
            self._poller.register(wake_fd, zmq.POLLIN)
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._unsent: dict[bytes, Backlog] = {}
        self._is_stopping = False
        self._drain_until: float | None = None
        self._housekeeping_at = 0.0
        self._check_at = 0.0
        self._step_s = 0.0
        self._bytes_in = 0
        self._bytes_out = 0
        self._num_bad_frames = 0

    def run(self) -> None:
        """Serve until drained, orphaned or stopped."""
        did_run = False
        while not self._is_stopping:
            self._receive(did_run)
            begin = time.monotonic()
            did_run = self._engine.step(self._tick())
            self._step_s = time.monotonic() - begin
            self._housekeep()
            self._flush()
        log.info("stopped after %d steps", self._engine.scheduler.counters.steps)

    def _tick(self) -> float:
        now = self._clock()
        if self._journal is not None and self._engine.next_deadline() is not None:
            self._journal.tick(now)
        return now

    def drain(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Take no new work, finish what runs (at most drain_s), then stop. Fits as a signal handler."""
        self._engine.is_draining = True
        if self._journal is not None:
            self._journal.drain(self._clock())

    # ------------------------------------------------------------------------------------------ in

    def _receive(self, did_run: bool) -> None:
        timeout = self._patience(did_run)
        if timeout:
            ready = dict(self._poller.poll(int(timeout * 1e3) + 1))
            if self._wake_fd is not None and self._wake_fd in ready:
                os.read(self._wake_fd, 4096)  # the signal's handler has run; its byte has done its work
            if self._endpoint.socket not in ready:
                return
        # A flood must not stop the decodes; nor may requests come in so slowly that steps run half empty.
        until = time.monotonic() + max(self._config.receive_s, self._config.receive_share * self._step_s)
        while True:
            try:
                identity, namespace, frames = self._endpoint.receive()
            except zmq.Again:
                return
            self._take(identity, namespace, frames)
            if time.monotonic() >= until:
                return

    def _patience(self, did_run: bool) -> float:
        if self._engine.has_work:
            return 0.0 if did_run else _BLOCKED_S
        if self._unsent:  # looked at after every step, too: whoever reads nothing delays nobody else
            return _BLOCKED_S
        if self._engine.num_compiling:
            return _COMPILING_S
        deadline = self._engine.next_deadline()
        return _IDLE_S if deadline is None else min(max(deadline - self._clock(), 0.0), _IDLE_S)

    def _take(self, identity: bytes, namespace: str, frames: list[bytes]) -> None:
        self._bytes_in += sum(map(len, frames))
        session = self._sessions.get(identity)
        try:
            request, buffers = decode_request(frames)
            if isinstance(request, Hello):
                self._greet(identity, namespace, request)
                return
            if session is None:
                raise UnknownClient(_op(request))
        except ProtocolError as error:
            self._num_bad_frames += 1
            self._answer(identity, session, error)
            return
        session.last_seen = self._clock()
        if self._journal is not None:
            self._journal.request(session.last_seen, identity, frames)
        self._engine.handle(session, request, buffers, session.last_seen)

    def _greet(self, identity: bytes, namespace: str, request: Hello) -> None:
        session = self._sessions.get(identity)
        if session is None:
            if len(self._sessions) >= self._config.max_sessions:
                error = RequestError("overloaded", f"{len(self._sessions)} clients are connected, which is the limit")
                self._send(identity, encode_replies([failed(request.op, error)]))
                return
            session = Session(identity, namespace, request.client, self._clock())
            self._sessions[identity] = session
            if self._journal is not None:
                self._journal.hello(session.last_seen, identity, namespace, request.client)
            log.info("client %s is here", request.client or identity.hex())
        session.last_seen = self._clock()
        session.reply(self._welcome(request.op))

    def _answer(self, identity: bytes, session: Session | None, error: ProtocolError) -> None:
        reply = failed(error.op, error)
        if session is not None and (error.op is None or error.op not in session.operations):
            session.reply(reply)
        else:
            self._send(identity, encode_replies([reply]))

    # ------------------------------------------------------------------------------------------ out

    def _flush(self) -> None:
        for identity in list(self._unsent):
            waiting = self._unsent.pop(identity)
            while waiting and self._send(identity, waiting.first):
                waiting.pop()
            if waiting and identity in self._sessions:
                self._unsent[identity] = waiting
        for session in list(self._sessions.values()):
            if session.outbox:
                self._send_messages(session, session.take_outbox())

    def _send_messages(self, session: Session, messages: list[Message]) -> None:
        for message in messages:
            frames = encode_replies(message.replies, message.buffers)
            blocked = self._unsent.get(session.identity)
            if blocked is None:
                if self._send(session.identity, frames) or session.identity not in self._sessions:
                    continue
                blocked = self._unsent[session.identity] = Backlog()
            blocked.append(frames)
            if blocked.num_bytes > self._config.unsent_bytes:
                self._drop(session.identity, f"it reads nothing, {blocked.num_bytes} bytes of replies wait for it")
                return

    def _send(self, identity: bytes, frames: list[Buffer]) -> bool:
        """Send, or say False if the client's queue is full; a client that is gone is forgotten."""
        try:
            self._endpoint.socket.send_multipart([identity, *frames], zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._drop(identity, "its connection is gone")
            return True
        self._bytes_out += sum(map(len, frames))
        return True

    def _drop(self, identity: bytes, why: str) -> None:
        session = self._sessions.pop(identity, None)
        self._unsent.pop(identity, None)
        if session is not None:
            if self._journal is not None:
                self._journal.drop(self._clock(), identity)
            log.info("client %s is dropped: %s", session.client or identity.hex(), why)
            self._engine.close(session)

    # ------------------------------------------------------------------------------------------ time

    def _housekeep(self) -> None:
        now = self._clock()
        if self._engine.is_draining:
            self._finish_draining(now)
        if now < self._housekeeping_at:
            return
        self._housekeeping_at = now + _IDLE_S
        for session in list(self._sessions.values()):
            if now - session.last_seen > self._config.lease_s:
                self._drop(session.identity, f"it was silent for {self._config.lease_s:g} s")
        if now >= self._check_at and not self._engine.has_work:
            self._check_at = now + _CHECK_S
            self._engine.check()
        if self._is_orphaned():
            log.warning("the process that started this runtime is gone")
            self._is_stopping = True

    def _finish_draining(self, now: float) -> None:
        if self._drain_until is None:
            self._drain_until = now + self._config.drain_s
        if self._engine.num_unfinished and now < self._drain_until:
            return
        self._engine.end_drains()
        self._flush()
        if self._unsent and now < self._drain_until:  # whoever is behind with reading has not got all of its replies
            return
        for session in list(self._sessions.values()):
            self._engine.close(session)
        self._flush()
        self._is_stopping = True

    def stats(self) -> dict[str, int | float | str]:
        """What the wire carried, for the engine's stats."""
        return {
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            "num_clients": len(self._sessions),
            "num_bad_frames": self._num_bad_frames,
        }


def _op(request: Any) -> int | None:
    return getattr(request, "op", None)


def parent_watch(parent_pid: int | None, stdin_closed: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that tells whether the process which started this one is gone."""
    if parent_pid is None:
        return lambda: False
    return lambda: stdin_closed() or os.getppid() != parent_pid
