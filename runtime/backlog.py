"""`Backlog`: the replies that wait for a client which does not read."""

from __future__ import annotations

from collections import deque

from bough.runtime.protocol import Buffer


class Backlog:
    """Replies, in order, for a client whose queue is full, and how much memory they take."""

    # What a message costs beside its frames, about: an interpreter's list and bytes objects.
    _OVERHEAD_BYTES = 256

    def __init__(self) -> None:
        self._messages: deque[list[Buffer]] = deque()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def first(self) -> list[Buffer]:
        """The message to be sent next."""
        return self._messages[0]

    def append(self, frames: list[Buffer]) -> None:
        """Take a message in."""
        self._messages.append(frames)
        self.num_bytes += self._size(frames)

    def pop(self) -> None:
        """Forget the first message, which was sent."""
        self.num_bytes -= self._size(self._messages.popleft())

    def _size(self, frames: list[Buffer]) -> int:
        return self._OVERHEAD_BYTES + sum(map(len, frames))
