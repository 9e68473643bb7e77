"""What a program runs on: the primitives a backend carries out, and which backend is meant when none is given.

Nothing here waits. A call hands the work over and returns a future or a name, so that a program sends
`open, extend, generate, fork, generate ...` without ever waiting to learn an id. The rules every backend keeps:

*   Branches are named by the backend at once (`open`, `fork`) and made in the background.
*   The operations of one branch are carried out in the order of the calls; other branches go on beside it.
*   A failed operation poisons its branch: what comes later on it, and on branches forked from it afterwards, fails
    with the same error, chained (`BoughError.for_dependant`). Nothing else is touched and nothing hangs.
*   `on_delta` is called from whichever thread receives text, in order, before the future is done; it must not block.
*   `release` never raises and never blocks: it is called by the garbage collector too.
*   All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar, Token
from typing import Final, Protocol, TypeAlias, runtime_checkable

import msgspec

from bough.errors import InvalidRequest
from bough.runtime.protocol import (
    ChoiceMethod,
    Extended,
    FinishReason,
    Grammar,
    Part,
    SamplingParams,
    Selected,
    TokenLogprob,
    Usage,
)
from bough.waiting import running_loop

Branch: TypeAlias = int


class Delta(msgspec.Struct, frozen=True):
    """What a streaming `generate` has appended since the last one: text, the ids drawn, their log-probabilities.

    The text is whole characters and the ids whole tokens, so that one may be ahead of the other. logprobs is None where
    they were not asked for.
    """

    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None


OnDelta: TypeAlias = Callable[[Delta], None]


class Generation(msgspec.Struct, frozen=True):
    """The end of a `generate`: the text appended, its token ids, what ended it, what it cost.

    is_whole: False if a grammar was given and the text only begins to match it. captures: what the grammar's captures
    matched, by name; a list where one matched several times. start: how many tokens the branch had before.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    matched_stop: str | int | None
    length: int
    usage: Usage
    logprobs: Sequence[TokenLogprob] | None = None
    is_whole: bool = True
    captures: Mapping[str, str | list[str]] = {}
    start: int = 0


@runtime_checkable
class Backend(Protocol):
    """Carries out primitives. `name` is the variable's, for backends and journals that care; it changes nothing."""

    def open(self) -> Branch:
        """Start an empty branch."""

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles; the result holds the text each role part was rendered to."""

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds once its earlier operations are done."""

    def generate(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        name: str | None = None,
        on_delta: OnDelta | None = None,
        timeout_s: float | None = None,
        grammar: Grammar | None = None,
        heal: bool = True,
    ) -> Future[Generation]:
        """Sample tokens and append them; `grammar` and `heal` as in `protocol.Generate`."""

    def select(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Future[Selected]:
        """Score the choices as continuations and append the best; at a temperature, one drawn from the distribution."""

    def score(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
    ) -> Future[Selected]:
        """Score the choices as continuations and append nothing."""

    def rollback(self, branch: Branch, length: int) -> Future[Extended]:
        """Cut the branch back to its first `length` tokens."""

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants; the result is how many that were.

        discard: free the KV that only they have at once, rather than when it is the least recently used.
        """

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches once what was sent before has been carried out; unknown ones are ignored."""

    def stats(self) -> dict[str, int | float | str]:
        """Return the backend's counters."""

    def flush_cache(self) -> None:
        """Drop every cached prefix that is not in use."""

    def server_info(self) -> dict[str, object]:
        """Return what runs there: model, device, limits."""


class _DefaultBackend:
    """The backend used when none is given.

    A running program's own backend comes first (its nested programs use it too), then what this context set, then
    what the main thread set for the whole process. A context variable alone would not reach threads that the user
    starts; a global alone would let concurrent tasks overwrite each other's.
    """

    def __init__(self) -> None:
        self._of_context: ContextVar[Backend | None] = ContextVar("bough_backend", default=None)
        self._of_process: Backend | None = None

    def set(self, backend: Backend | None) -> None:
        self._of_context.set(backend)
        if threading.current_thread() is threading.main_thread() and running_loop() is None:
            self._of_process = backend

    def get(self) -> Backend | None:
        return self._of_context.get() or self._of_process

    def enter(self, backend: Backend) -> Token[Backend | None]:
        return self._of_context.set(backend)

    def leave(self, token: Token[Backend | None]) -> None:
        self._of_context.reset(token)


default_backend: Final = _DefaultBackend()


def set_default_backend(backend: Backend | None) -> None:
    """Set the backend of programs that are run without one.

    Called in the main thread, outside an event loop, it holds for the whole process; elsewhere for the calling
    context (thread or task) and what it starts. None takes the default away.
    """
    if backend is not None:
        checked(backend)
    default_backend.set(backend)


def checked(backend: object) -> Backend:
    """Return the backend, or raise InvalidRequest if it is not one."""
    if not isinstance(backend, Backend):
        raise InvalidRequest(f"backend must be a Runtime, RuntimeClient or ScriptedBackend, got {backend!r}")
    return backend


def chosen(backend: Backend | None) -> Backend:
    """Return the given backend or the default one. Raises InvalidRequest if there is neither."""
    if backend is not None:
        return backend if hasattr(backend, "generate") else checked(backend)
    found = default_backend.get()
    if found is None:
        raise InvalidRequest(
            "no backend: pass backend=bough.Runtime() (or RuntimeClient(address), ScriptedBackend([...])), "
            "or call bough.set_default_backend(...) first"
        )
    return found
