"""`Operation`: a request in progress, from arrival to its one terminal reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bough.runtime.lifecycle import Progress, moved
from bough.runtime.protocol import MAX_ID, Buffer, Failed, Fork, ProtocolError, Reply, Request, RequestError

if TYPE_CHECKING:
    from bough.runtime.branch import Branch, Poison
    from bough.runtime.brood import Brood
    from bough.runtime.session import Session
    from bough.runtime.work import Work


class Operation:
    """A request with its session, its branch, the children it makes if it is a fork, and the work it became."""

    __slots__ = (
        "_progress",
        "arrived_at",
        "branch",
        "brood",
        "buffers",
        "deadline",
        "id",
        "poison",
        "request",
        "session",
        "work",
    )

    def __init__(
        self,
        op: int,
        session: Session,
        request: Request,
        buffers: Sequence[Buffer],
        arrived_at: float,
        timeout_s: float | None = None,
    ) -> None:
        self.id = op
        self.session = session
        self.request = request
        self.buffers = buffers
        self.arrived_at = arrived_at
        self.deadline = None if timeout_s is None else arrived_at + timeout_s
        self._progress = Progress.QUEUED
        self.branch: Branch | None = None
        self.brood: Brood | None = None
        self.work: Work | None = None
        self.poison: Poison | None = None  # what depends on it inherits, if it failed

    @property
    def progress(self) -> Progress:
        """Where the operation is; only legal transitions can be assigned."""
        return self._progress

    @progress.setter
    def progress(self, new: Progress) -> None:
        self._progress = moved(self._progress, new)

    def end(self, reply: Reply, buffers: Sequence[Buffer] = ()) -> None:
        """Send the terminal reply. The only place where an operation ends; a second end is our bug."""
        assert self.progress is not Progress.ENDED, f"operation {self.id} ended twice"
        self.progress = Progress.ENDED
        self.session.forget(self)
        self.session.reply(reply, buffers)

    def fail(self, error: RequestError, cause: int | None = None) -> None:
        """End with an error."""
        self.end(failed(self.id, error, cause))


def failed(op: int | None, error: RequestError, cause: int | None = None) -> Failed:
    """Return the reply that carries an error."""
    details = {
        key: value if isinstance(value, (int, float, str, bool)) or value is None else repr(value)
        for key, value in error.details.items()
    }
    return Failed(op=op, kind=error.kind, message=error.message, details=details, cause=cause)


def check_ids(request: Request) -> None:
    """Raise ProtocolError unless the ids a client chose are in range."""
    fields = {name: getattr(request, name, None) for name in ("op", "branch", "target")}
    for name, value in fields.items():
        if value is not None and not 0 <= value <= MAX_ID:
            raise ProtocolError(f"{name} must be between 0 and {MAX_ID}, got {value}")
    if isinstance(request, Fork) and request.children:
        for child in (min(request.children), max(request.children)):
            if not 0 <= child <= MAX_ID:
                raise ProtocolError(f"children must be between 0 and {MAX_ID}, got {child}")
