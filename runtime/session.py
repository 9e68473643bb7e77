"""`Session`: one client process: its branches, its operations in flight, its replies of this step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from bough.runtime.branch import Branch
from bough.runtime.brood import Branches
from bough.runtime.operation import Operation
from bough.runtime.protocol import MAX_FRAMES, Buffer, Generated, Reply, RequestError

_MAX_BUFFERS = MAX_FRAMES - 2
# Ids of ended operations that are remembered, so that a repeated request is told from a new one.
_REMEMBERED = 65_536


@dataclass(slots=True)
class Message:
    """Replies that travel together, and the buffers they refer to."""

    replies: list[Reply] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)


class Session:
    """Everything the runtime keeps for one client; its namespace in the cache is bound by the server, never sent."""

    __slots__ = (
        "_ended",
        "_ended_ids",
        "branches",
        "client",
        "identity",
        "last_seen",
        "namespace",
        "operations",
        "outbox",
    )

    def __init__(self, identity: bytes, namespace: str, client: str, now: float) -> None:
        self.identity = identity
        self.namespace = namespace
        self.client = client
        self.last_seen = now
        self.branches = Branches()
        self.operations: dict[int, Operation] = {}
        self.outbox: list[Message] = []
        self._ended: deque[int] = deque()
        self._ended_ids: set[int] = set()

    def register(self, operation: Operation) -> None:
        """Take an operation in. Raises RequestError("protocol") if its id is in flight or was used lately."""
        if operation.id in self.operations or operation.id in self._ended_ids:
            raise RequestError("protocol", f"operation id {operation.id} was used before", op=operation.id)
        self.operations[operation.id] = operation

    def forget(self, operation: Operation) -> None:
        """Move an operation that ends from those in flight to those remembered."""
        if self.operations.pop(operation.id, None) is None:
            return
        self._ended.append(operation.id)
        self._ended_ids.add(operation.id)
        if len(self._ended) > _REMEMBERED:
            self._ended_ids.discard(self._ended.popleft())

    def reply(self, reply: Reply, buffers: Sequence[Buffer] = ()) -> None:
        """Put a reply, whose buffer indices count from 0 over `buffers`, into this step's message."""
        if not self.outbox or len(self.outbox[-1].buffers) + len(buffers) > _MAX_BUFFERS:
            self.outbox.append(Message())
        message = self.outbox[-1]
        if isinstance(reply, Generated):
            reply = msgspec.structs.replace(reply, buffer=reply.buffer + len(message.buffers))
        message.buffers.extend(buffers)
        message.replies.append(reply)

    def take_outbox(self) -> list[Message]:
        """Return what is to be sent, mostly one message, and start anew."""
        taken, self.outbox = self.outbox, []
        return taken

    def branch(self, branch_id: int) -> Branch:
        """Return a branch. Raises RequestError("invalid_request") if there is none of this id."""
        branch = self.branches.get(branch_id)
        if branch is None:
            raise RequestError("invalid_request", f"branch {branch_id} is not open", branch=branch_id)
        return branch
