"""Who watches runs, and what they are told: observers of operations, bodies and branches.

What an observer is told of an operation has happened before anybody can read the operation's result; so an event log or
a journal is complete wherever a value was read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final, Literal, TypeAlias

from bough.backend import Backend, Branch, Delta
from bough.errors import BoughError
from bough.runtime.protocol import SamplingParams
from bough.seeds import Path

OpKind: TypeAlias = Literal["extend", "gen", "select", "score", "rewind", "recorded"]


class RunInfo:
    """One run among those watched together: 0 is the one that was asked for, others were started inside it.

    program, args, kwargs and sampling are those of the body, once it began.
    """

    __slots__ = ("args", "backend", "kwargs", "number", "program", "sampling", "seed", "title")

    def __init__(self, number: int, title: str, seed: int, backend: Backend) -> None:
        self.number = number
        self.title = title
        self.seed = seed
        self.backend = backend
        self.program: Any = None
        self.args: Sequence[Any] = ()
        self.kwargs: dict[str, Any] = {}
        self.sampling: Any = None


class Op:
    """An operation on its way: what was asked, and where in the run.

    index: how many gens, selects, scores and recorded values the branch had before; an extend or a rewind has that of
    what follows it, because how text is cut into messages says nothing about the program.
    """

    __slots__ = ("branch", "index", "is_done", "kind", "name", "num_streamed", "params", "path", "request", "run")

    def __init__(
        self, run: RunInfo, path: Path, index: int, kind: OpKind, branch: Branch, name: str | None, **request: Any
    ) -> None:
        self.run = run
        self.path = path
        self.index = index
        self.kind: OpKind = kind
        self.branch = branch
        self.name = name
        self.request = request
        self.params: SamplingParams | None = request.get("params")
        self.num_streamed = 0
        self.is_done = False

    def __str__(self) -> str:
        where = ".".join(map(str, self.path)) or "root"
        inside = f" of run {self.run.number}" if self.run.number else ""
        return f"{self.kind} {self.name or '(unnamed)'} (branch {where}, operation {self.index}{inside})"


class Observer:
    """Is told what happens; every method may be left out. Called from any thread, in the order of each branch."""

    wants_deltas = False
    watch: Watch
    """What it observes; set before anything happens."""

    def run_began(self, run: RunInfo) -> None:
        """A program's body begins."""

    def run_ended(self, run: RunInfo, error: BaseException | None) -> None:
        """A program's body ended; operations of it may still run."""

    def forked(self, run: RunInfo, path: Path, children: Sequence[Path]) -> None:
        """Branches were forked."""

    def rewound(self, run: RunInfo, path: Path, onward: Path, length: int | None) -> None:
        """The text of a branch was cut back to `length` tokens, if that is known, and goes on as another branch."""

    def sending(self, op: Op) -> BoughError | None:
        """An operation is about to be sent; an error ends it here. `op.params` and `op.request` may be changed."""

    def streamed(self, op: Op, delta: Delta) -> None:
        """A gen said more."""

    def done(self, op: Op, result: Any) -> BoughError | None:
        """An operation is done; an error takes the place of its result, for those who read and the next observers."""

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """An operation failed; another error may take the error's place."""

    def cancelled(self, run: RunInfo, path: Path) -> None:
        """A branch was cancelled with all that was forked from it."""

    def known(self, op: Op) -> tuple[Any] | None:
        """Return the value, in a tuple, that a `recorded` takes instead of making one."""

    def settled(self) -> None:
        """No operation is in flight, for now."""


class Watch:
    """What the runs that are watched together share: the observers, the clock, and what is in flight."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers: Final = tuple(observers)
        self.wants_deltas: Final = any(observer.wants_deltas for observer in observers)
        self.began: Final = time.monotonic()
        for observer in observers:
            observer.watch = self
        self._lock = threading.Lock()
        self._runs = count()
        self._num_open = 0
        self._in_flight: dict[Op, Callable[[], object]] = {}

    def now(self) -> float:
        """Return the seconds since the watch began."""
        return time.monotonic() - self.began

    def new_run(self, title: str, seed: int, backend: Backend) -> RunInfo:
        """Number a run."""
        return RunInfo(next(self._runs), title, seed, backend)

    def entered(self, op: Op | None = None, cancel: Callable[[], object] = lambda: None) -> None:
        """Count a body, or an operation with the way to cancel it, as running."""
        with self._lock:
            self._num_open += 1
            if op is not None:
                self._in_flight[op] = cancel

    def left(self, op: Op | None = None) -> None:
        """Take back an `entered`, and tell the observers if nothing is in flight any more."""
        with self._lock:
            self._num_open -= 1
            if op is not None:
                del self._in_flight[op]
            is_settled = not self._in_flight
        if is_settled:
            for observer in self.observers:
                observer.settled()

    @property
    def is_settled(self) -> bool:
        """Whether no body runs and no operation is in flight."""
        return self._num_open == 0

    @property
    def is_idle(self) -> bool:
        """Whether no operation is in flight."""
        return not self._in_flight

    def cancel_all(self) -> None:
        """Cancel every operation in flight."""
        with self._lock:
            cancels = list(self._in_flight.values())
        for cancel in cancels:
            cancel()
