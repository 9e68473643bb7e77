"""Every exception that a user of bough can see.

::

    BoughError
    ├── InvalidRequest (ValueError)     the program asked for something that cannot be; raised at once where it can
    │   ├── UnknownVariable (KeyError)  a variable that was never assigned
    │   └── BlockingRead                a read that would stop the event loop it waits for; await it instead
    ├── Truncated                       a gen ended before its text was whole; `details` holds what there is
    ├── InvalidValue (ValueError)       a text of the right form that a type's own checks refuse
    ├── UnsupportedByBackend            the backend cannot do what was asked; `details["capability"]` says what
    ├── UnsupportedModel                the model folder is broken, unknown, or lacks what was asked of it
    ├── ContextOverflow                 the text is longer than the model's context; `details` holds both numbers
    ├── ResourceExhausted               the runtime has no memory left for this branch, and nothing to evict
    ├── Overloaded                      too much is waiting already; try again later
    ├── Timeout (TimeoutError)          the operation's own deadline passed
    ├── BudgetExceeded                  the run's own budget is spent; `details` holds limit and value
    ├── ReplayMismatch                  a replayed run differs from its journal; `details` names the first token
    ├── Cancelled                       the operation, its branch or an ancestor was cancelled
    ├── RuntimeLost                     the runtime died, went silent or was shut down; nothing of it is valid any more
    │   └── ProtocolMismatch            what answers is no runtime of this version of the protocol
    ├── BackendError                    the backend failed in a way that has no name of its own
    ├── ToolError                       a model's call of a tool failed: no such tool, bad arguments, or it raised
    ├── CheckFailed                     `check` found no attempt good enough; `details` holds the last value
    └── ProgramError                    the program's own code raised; the exception is the `__cause__`

A failure of the runtime is raised where the variable is read, not where the `gen` was written::

    try:
        print(state["answer"])
    except bo.ContextOverflow as error:
        print(error.details)
    except bo.BoughError as error:
        print("no answer:", error)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bough.runtime.protocol import Failed, RequestError


class BoughError(Exception):
    """The root of bough's errors. `message` is a sentence; `details` has its numbers, for programs that act on them."""

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, object] = details

    def __str__(self) -> str:  # KeyError would show its repr
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.details)

    def again(self) -> BoughError:
        """Return an equal error to raise: one failure is raised at many reads, and a traceback belongs to one raise."""
        fresh = _rebuild(type(self), self.message, self.details)
        fresh.__cause__ = self.__cause__
        return fresh

    def for_dependant(self) -> BoughError:
        """Return the error of an operation that could not run because of this one: equal to it, and chained to it."""
        fresh = _rebuild(type(self), self.message, self.details)
        fresh.__cause__ = self
        return fresh


def _rebuild(kind: type[BoughError], message: str, details: Mapping[str, object]) -> BoughError:
    error = kind(message)
    error.details = dict(details)
    return error


class InvalidRequest(BoughError, ValueError):
    """A parameter, an expression or a call that cannot be carried out; the message names field, limit and value."""


class UnknownVariable(InvalidRequest, KeyError):
    """A variable was read that no `gen`, `select` or `set_var` ever assigned."""


class BlockingRead(InvalidRequest):
    """A read, in a task of an event loop, that would block the loop which has to go on; await it instead."""


class Truncated(BoughError):
    """A gen ended before its text was whole: `details["text"]` is what there is, `finish_reason` says why.

    Raised for what is held to a grammar, and where `on_limit` asks for it. More `max_tokens`, `on_limit="continue"` or
    `on_limit="close"` prevents it. The text stays in the state.
    """


class InvalidValue(BoughError, ValueError):
    """A text that has the form of a type, which the type's own checks (a validator, a `__post_init__`) refuse."""


class UnsupportedModel(BoughError):
    """The model cannot be loaded, or cannot do what was asked (no chat template, no such role)."""


class UnsupportedByBackend(BoughError):
    """The backend cannot do what was asked, and does not pretend to; `details["capability"]` names what it lacks."""


class ContextOverflow(BoughError):
    """The text and what was to be generated do not fit the model's context."""


class ResourceExhausted(BoughError):
    """The KV cache is full of branches in use."""


class Overloaded(BoughError):
    """The runtime, or the queue to it, has more waiting than it accepts."""


class Timeout(BoughError, TimeoutError):
    """The deadline given with the operation passed before it ended."""


class BudgetExceeded(BoughError):
    """The run has spent its budget. `details`: field, limit, value, and `partial_text` of a gen that it cut short."""


class ReplayMismatch(BoughError):
    """A replayed run differs from its journal.

    `details`: path (of the branch), index (of the operation on it), field, expected, got; position, for a token.
    """


class Cancelled(BoughError):
    """The operation was cancelled, by itself or with its branch."""


class RuntimeLost(BoughError):
    """The runtime is gone: it died, was shut down, hangs, or the connection broke."""


class ProtocolMismatch(RuntimeLost):
    """What answers does not speak this version of the protocol."""


class BackendError(BoughError):
    """The backend failed inside, or in a way that has no class of its own."""


class ToolError(BoughError):
    """A call that a model made of a tool failed; if the tool's function raised, the exception is the `__cause__`."""


class CheckFailed(BoughError):
    """No attempt of a gen passed a `check`; `details` has name, attempts and the last value."""


class ProgramError(BoughError):
    """A program's own code raised before it produced what is read; the exception is the `__cause__`."""


_BY_KIND: Final[Mapping[str, type[BoughError]]] = {
    "invalid_request": InvalidRequest,
    "context_overflow": ContextOverflow,
    "resource_exhausted": ResourceExhausted,
    "overloaded": Overloaded,
    "unsupported_model": UnsupportedModel,
    "timeout": Timeout,
    "cancelled": Cancelled,
    "dependency_failed": BackendError,
    "protocol": BackendError,
    "unknown_client": RuntimeLost,
    "internal": BackendError,
}


def from_kind(kind: str, message: str, details: Mapping[str, object] | None = None) -> BoughError:
    """Return the error of a kind of the protocol; an unknown kind gives BackendError."""
    return _rebuild(_BY_KIND.get(kind, BackendError), message, details or {})


def from_reply(reply: Failed) -> BoughError:
    """Return the error that a failed operation's reply stands for."""
    return from_kind(reply.kind, reply.message, reply.details)


def from_request(error: RequestError) -> BoughError:
    """Return the error of a request that the protocol's own checks refuse, before it is sent."""
    return from_kind(error.kind, error.message, error.details)


def of(exception: BaseException) -> BoughError:
    """Return the exception as one of bough's: itself, or a BackendError chained to it."""
    if isinstance(exception, BoughError):
        return exception
    if isinstance(exception, RequestError):
        return from_request(exception)
    error = BackendError(f"{type(exception).__name__}: {exception}")
    error.__cause__ = exception
    return error
