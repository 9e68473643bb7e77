"""How a request fails."""

from __future__ import annotations

from typing import Literal

ErrorKind = Literal[
    "invalid_request",
    "context_overflow",
    "resource_exhausted",
    "overloaded",
    "unsupported_model",
    "timeout",
    "cancelled",
    "dependency_failed",
    "protocol",
    "unknown_client",
    "internal",
]


class RequestError(Exception):
    """A request that cannot be carried out; crosses the wire as `Failed`.

    `details` holds the numbers of the message (field, limit, value ...) for programs that want to act on them.
    """

    def __init__(self, kind: ErrorKind, message: str, **details: object) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.details = details


class ProtocolError(RequestError):
    """A frame that is not a message of this protocol. `op` is the operation it named, when that could be read."""

    def __init__(self, message: str, op: int | None = None) -> None:
        super().__init__("protocol", message)
        self.op = op


class UnknownClient(ProtocolError):
    """A request of a client that did not say hello, or whose lease ran out: all that it had here is gone."""

    def __init__(self, op: int | None) -> None:
        super().__init__("say hello first: this runtime does not know you, or no longer", op)
        self.kind = "unknown_client"


def invalid(field: str, limit: str, value: object) -> RequestError:
    """Return the error of a value that is out of range; `limit` follows "must be"."""
    return RequestError(
        "invalid_request", f"{field} must be {limit}, got {value!r}", field=field, limit=limit, value=repr(value)
    )
