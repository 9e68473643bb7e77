"""A client that speaks the wire raw: whatever frames a test wants, read or not."""

from __future__ import annotations

from collections import deque
from typing import Any

import zmq

from bough.runtime import protocol


class Peer:
    """A raw DEALER that sends whatever frames it is told to; a context manager.

    queue_len: messages that it takes without being read, 0 for any number.
    """

    def __init__(self, address: str, *, queue_len: int = 0) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket: zmq.Socket[Any] = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, queue_len)
        self.socket.connect(address)
        self._replies: deque[protocol.Reply] = deque()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        self._context.term()

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def request(self, request: protocol.Request, *buffers: bytes) -> None:
        self.socket.send_multipart(protocol.encode_request(request, buffers))

    def reply(self, seconds: float = 10.0) -> Any:
        """Return the next reply."""
        if not self._replies:
            assert self.socket.poll(int(seconds * 1000)), "no answer"
            self._take()
        return self._replies.popleft()

    def _take(self) -> None:
        replies, _ = protocol.decode_replies(self.socket.recv_multipart())
        self._replies.extend(replies)

    def hello(self) -> protocol.Welcome:
        self.request(protocol.Hello(1))
        welcome = self.reply()
        assert isinstance(welcome, protocol.Welcome)
        return welcome

    def drain(self) -> int:
        """Throw away the replies that have arrived; return how many they were."""
        while self.socket.poll(0):
            self._take()
        count = len(self._replies)
        self._replies.clear()
        return count

    def arrived(self) -> list[protocol.Reply]:
        """Return the replies that have arrived and were not looked at."""
        while self.socket.poll(0):
            self._take()
        replies = list(self._replies)
        self._replies.clear()
        return replies
