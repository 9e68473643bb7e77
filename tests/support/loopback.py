"""A peer for client tests: a ROUTER in a thread that speaks the protocol from a script, or breaks it on request."""

from __future__ import annotations

import socket as sockets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from bough.runtime import protocol

Answer = tuple[list[protocol.Reply], list[protocol.Buffer]]
WAIT_S = 10.0

WELCOME = protocol.Welcome(
    op=0,
    epoch=7,
    version="test",
    model="loopback",
    architecture="none",
    dtype="float32",
    device="cpu",
    pid=1,
    vocab_size=256,
    context_len=1024,
    page_size=16,
    total_pages=64,
    has_chat_template=True,
    credit=8,
    heartbeat_s=0.05,
    lease_s=5.0,
)


def plain_answer(request: protocol.Request) -> Answer:
    """The answer of a runtime whose model always says `one two three`."""
    match request:
        case protocol.Hello(op):
            return [msgspec.structs.replace(WELCOME, op=op)], []
        case protocol.Ping(op):
            return [protocol.Pong(op, WELCOME.epoch, 1, 0, 0, "serving")], []
        case protocol.Open(op) | protocol.Fork(op) | protocol.Release(op) | protocol.Flush(op) | protocol.Drain(op):
            return [protocol.Ok(op)], []
        case protocol.Extend(op, _, parts):
            rendered = [f"<{part.role}>" if isinstance(part, protocol.RoleBegin) else "</>" for part in _roles(parts)]
            return [protocol.Extended(op, 3, rendered)], []
        case protocol.Generate(op):
            deltas: list[protocol.Reply] = []
            if request.stream:
                texts = enumerate(("one ", "two ", "three"), start=1)
                deltas = [protocol.Delta(op, text, protocol.encode_tokens([token])) for token, text in texts]
            usage = protocol.Usage(prompt_tokens=5, cached_tokens=2, computed_tokens=3, completion_tokens=3)
            ids = protocol.encode_tokens([1, 2, 3])
            return [*deltas, protocol.Generated(op, "one two three", 0, "stop", 8, usage)], [ids]
        case protocol.Select(op) | protocol.Score(op):
            share = [1.0 / len(request.choices)] * len(request.choices)
            tokens = [[protocol.TokenLogprob(-1.0, 1, choice)] for choice in request.choices]
            return [protocol.Selected(op, 0, [-1.0] * len(share), share, tokens, 4, protocol.Usage())], []
        case protocol.Rollback(op, _, length):
            return [protocol.Extended(op, length)], []
        case protocol.Cancel(op):
            return [protocol.Cancelled(op, 1)], []
        case protocol.Stat(op):
            return [protocol.Stats(op, {"steps": 3, "model": "loopback"})], []
    return [], []


def _roles(parts: Sequence[protocol.Part]) -> Iterator[Any]:
    return (part for part in parts if isinstance(part, (protocol.RoleBegin, protocol.RoleEnd)))


class Loopback:
    """Answers each request with `answer(request)`; `requests` holds what came, heartbeats and credit aside.

    While `held()`, requests are only collected; what `release()` lets go is answered in order.
    """

    def __init__(self, address: str, answer: Callable[[protocol.Request], Answer] = plain_answer) -> None:
        self.address = address
        self.requests: list[protocol.Request] = []
        self.credits: list[protocol.Credit] = []
        self.pings = 0
        self._answer = answer
        self._holding = False
        self._mute = False
        self._held: deque[tuple[bytes, protocol.Request]] = deque()
        self._clients: list[bytes] = []
        self._todo: deque[Callable[[zmq.Socket[bytes]], object]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._bell, self._ear = sockets.socketpair()
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(address)
        self._thread = threading.Thread(target=self._run, name="loopback")
        self._thread.start()

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *exc: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the socket without a word."""
        if self._thread.is_alive():
            self._do(lambda router: setattr(self, "_ended", True))
            self._thread.join(WAIT_S)

    def leave(self) -> None:
        """Close the socket once what was sent is delivered."""
        self._do(lambda router: router.setsockopt(zmq.LINGER, int(1e3 * WAIT_S)))
        self.die()

    def mute(self) -> None:
        """Answer nothing from now on, heartbeats included."""
        self._mute = True

    def hold(self) -> None:
        """Collect requests without answering."""
        self._holding = True

    def release(self) -> None:
        """Answer what was held, and what comes."""

        def go(router: zmq.Socket[bytes]) -> None:
            self._holding = False
            while self._held:
                self._reply(router, *self._held.popleft())

        self._do(go)

    def send(self, replies: Sequence[protocol.Reply], buffers: Sequence[protocol.Buffer] = ()) -> None:
        """Send replies that nobody asked for to the first client."""
        self.send_raw(protocol.encode_replies(replies, buffers))

    def send_raw(self, frames: Sequence[protocol.Buffer]) -> None:
        """Send any frames to the first client."""
        self._do(lambda router: router.send_multipart([self._clients[0], *frames]))

    def expect(self, number: int, kind: type[Any] | None = None) -> list[Any]:
        """Wait for that many requests (of a kind) and return them."""

        def found() -> list[Any]:
            return [request for request in self.requests if kind is None or isinstance(request, kind)]

        self.wait_for(lambda: len(found()) >= number)
        return found()

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait until something holds that a request changes."""
        with self._changed:
            assert self._changed.wait_for(is_so, WAIT_S), f"not in {WAIT_S} s; received {self.requests}"

    def _do(self, action: Callable[[zmq.Socket[bytes]], object]) -> None:
        self._todo.append(action)
        self._bell.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._ear.fileno(), zmq.POLLIN)
        while not self._ended:
            ready = dict(poller.poll())
            if self._router in ready:
                self._receive(self._router)
            if self._ear.fileno() in ready:
                self._ear.recv(4096)
                while self._todo:
                    self._todo.popleft()(self._router)
        self._router.close()
        self._context.term()
        self._bell.close()
        self._ear.close()

    def _receive(self, router: zmq.Socket[bytes]) -> None:
        client, *frames = router.recv_multipart()
        request, _ = protocol.decode_request(frames)
        with self._changed:
            if client not in self._clients:
                self._clients.append(client)
            if isinstance(request, protocol.Credit):
                self.credits.append(request)
            elif isinstance(request, protocol.Ping):
                self.pings += 1
            else:
                self.requests.append(request)
            self._changed.notify_all()
        if self._mute or isinstance(request, protocol.Credit):
            return
        if self._holding and not isinstance(request, protocol.Ping):
            self._held.append((client, request))
            return
        self._reply(router, client, request)

    def _reply(self, router: zmq.Socket[bytes], client: bytes, request: protocol.Request) -> None:
        replies, buffers = self._answer(request)
        if replies:
            router.send_multipart([client, *protocol.encode_replies(replies, buffers)])
