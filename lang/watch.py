"""`Watched`: a backend that shows what passes through it to observers, and is otherwise the backend that it wraps.

A run that nobody watches does not have one, and pays nothing. What an observer is told of an operation has happened
before anybody can read the operation's result; so an event log or a journal is complete wherever a value was read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from typing import Any, Final, Literal, TypeAlias

from bough.backend import Backend, Branch, Delta, Generation, OnDelta
from bough.errors import BoughError, of
from bough.runtime.protocol import ChoiceMethod, Extended, Part, SamplingParams, Selected
from bough.seeds import Path, Seeds

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


class Place:
    """Where a branch is in its run, and what was counted on it."""

    __slots__ = ("num_children", "num_ops", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_children = self.num_ops = 0


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


class Watched:
    """A backend whose operations are shown to the observers of a `Watch`; one for each run."""

    def __init__(self, backend: Backend, watch: Watch, title: str, seed: int) -> None:
        self.watch = watch
        self.run = watch.new_run(title, seed, backend)
        self._backend = backend
        self._places: dict[Branch, Place] = {}
        self._num_roots = 0

    def __getattr__(self, name: str) -> Any:
        """Pass on what the wrapped backend can do beside; observers are not told."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._backend, name)

    def begin_run(self, title: str, seeds: Seeds) -> Watched:
        """Return the backend of a run inside this one."""
        return Watched(begun(self._backend, title, seeds), self.watch, title, seeds.run)

    def path_of(self, branch: Branch | None) -> Path:
        """Return a branch's place in its run."""
        place = None if branch is None else self._places.get(branch)
        return () if place is None else place.path

    # ------------------------------------------------------------------------------------------ bodies

    def body_began(self, program: Any, args: Sequence[Any], kwargs: dict[str, Any], sampling: Any) -> None:
        """A program's body begins on this backend."""
        run = self.run
        run.program, run.args, run.kwargs, run.sampling = program, args, kwargs, sampling
        self.watch.entered()
        for observer in self.watch.observers:
            observer.run_began(run)

    def body_ended(self, error: BaseException | None) -> None:
        """The body ended."""
        for observer in self.watch.observers:
            observer.run_ended(self.run, error)
        self.watch.left()

    # ------------------------------------------------------------------------------------------ branches

    def open(self) -> Branch:
        """Start an empty branch."""
        branch = self._backend.open()
        self._places[branch] = Place(() if not self._num_roots else (-self._num_roots,))
        self._num_roots += 1
        return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        children, paths = self._fork(branch, count)
        for observer in self.watch.observers:
            observer.forked(self.run, self.path_of(branch), paths)
        return children

    def go_back(self, branch: Branch, mark: Branch, length: int | None) -> Branch:
        """Start the branch in which the text of `branch` goes on from where `mark` stands, after `length` tokens."""
        (child,), _ = self._fork(mark, 1)
        self.went_back(branch, child, length)
        return child

    def went_back(self, branch: Branch, onward: Branch, length: int | None) -> None:
        """Tell that the text of `branch` goes on as `onward`, an earlier state of it."""
        for observer in self.watch.observers:
            observer.rewound(self.run, self.path_of(branch), self.path_of(onward), length)

    def _fork(self, branch: Branch, count: int) -> tuple[list[Branch], list[Path]]:
        place = self._place(branch)
        children = self._backend.fork(branch, count)
        paths = [(*place.path, place.num_children + number) for number in range(count)]
        place.num_children += count
        for child, path in zip(children, paths, strict=True):
            self._places[child] = Place(path)
        return children, paths

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches."""
        for branch in branches:
            self._places.pop(branch, None)
        self._backend.release(branches)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants."""
        for observer in self.watch.observers:
            observer.cancelled(self.run, self.path_of(branch))
        return self._backend.cancel(branch, discard=discard)

    def _place(self, branch: Branch) -> Place:
        place = self._places.get(branch)
        if place is None:  # released already: the backend will say so
            place = self._places[branch] = Place((-1, branch))
        return place

    # ------------------------------------------------------------------------------------------ operations

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles."""
        op = self._op("extend", branch, None, parts=parts, commit=commit)
        return self._send(op, lambda: self._backend.extend(branch, parts, commit=commit))

    def generate(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        name: str | None = None,
        on_delta: OnDelta | None = None,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Future[Generation]:
        """Sample tokens and append them."""
        op = self._op("gen", branch, name, params=params, timeout_s=timeout_s, **more)
        told = partial(self._streamed, op, on_delta) if self.watch.wants_deltas else on_delta

        def send() -> Future[Generation]:
            assert op.params is not None, "it was given"
            timeout_s = op.request["timeout_s"]
            return self._backend.generate(branch, op.params, name=name, on_delta=told, timeout_s=timeout_s, **more)

        return self._send(op, send)

    def _streamed(self, op: Op, on_delta: OnDelta | None, delta: Delta) -> None:
        for observer in self.watch.observers:
            observer.streamed(op, delta)
        if on_delta is not None:
            on_delta(delta)

    def select(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Future[Selected]:
        """Score the choices and append the best."""
        return self._choose("select", branch, choices, method, name, timeout_s, more)

    def score(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        **more: Any,
    ) -> Future[Selected]:
        """Score the choices and append nothing."""
        return self._choose("score", branch, choices, method, name, timeout_s, more)

    def _choose(
        self,
        kind: Literal["select", "score"],
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        name: str | None,
        timeout_s: float | None,
        more: dict[str, Any],
    ) -> Future[Selected]:
        op = self._op(kind, branch, name, choices=choices, method=method, timeout_s=timeout_s, **more)
        act = self._backend.select if kind == "select" else self._backend.score

        def send() -> Future[Selected]:
            return act(branch, choices, method, name=name, timeout_s=op.request["timeout_s"], **more)

        return self._send(op, send)

    def rollback(self, branch: Branch, length: int, **more: Any) -> Future[Extended]:
        """Cut the branch back to its first `length` tokens."""
        op = self._op("rewind", branch, None, length=length)
        return self._send(op, lambda: self._backend.rollback(branch, length, **more))

    def recorded(self, branch: Branch, name: str, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, and show it to the observers; a backend that replays returns it without a call.

        Raises what `call` raises.
        """
        op = self._op("recorded", branch, name)
        inner = getattr(self._backend, "recorded", None)
        self.watch.entered(op)
        try:
            known = next((found for observer in self.watch.observers if (found := observer.known(op))), None)
            if known is not None:
                (value,) = known
            else:
                value = call() if inner is None else inner(branch, name, call)
        except Exception as error:
            for observer in self.watch.observers:
                observer.failed(op, of(error))
            raise
        else:
            for observer in self.watch.observers:
                mismatch = observer.done(op, value)
                if mismatch is not None:
                    raise mismatch
            return value
        finally:
            self.watch.left(op)

    def stats(self) -> dict[str, int | float | str]:
        """Return the backend's counters."""
        return self._backend.stats()

    def flush_cache(self) -> None:
        """Drop every cached prefix that is not in use."""
        self._backend.flush_cache()

    def server_info(self) -> dict[str, object]:
        """Return what runs there."""
        return self._backend.server_info()

    # ------------------------------------------------------------------------------------------ on their way

    def _op(self, kind: OpKind, branch: Branch, name: str | None, **request: Any) -> Op:
        place = self._place(branch)
        op = Op(self.run, place.path, place.num_ops, kind, branch, name, **request)
        if kind not in ("extend", "rewind"):
            place.num_ops += 1
        return op

    def _send(self, op: Op, send: Callable[[], Future[Any]]) -> Future[Any]:
        """Send an operation unless an observer refuses; the future returned is done after all observers were told."""
        told: Future[Any] = Future()
        self.watch.entered(op, partial(self._backend.cancel, op.branch))
        for observer in self.watch.observers:
            refusal = observer.sending(op)
            if refusal is not None:
                self._ended(op, told, None, refusal)
                return told
        try:
            future = send()
        except BaseException:
            self.watch.left(op)
            raise
        future.add_done_callback(partial(self._arrived, op, told))
        return told

    def _arrived(self, op: Op, told: Future[Any], future: Future[Any]) -> None:
        failure = future.exception()
        if failure is None:
            self._ended(op, told, future.result(), None)
        else:
            self._ended(op, told, None, of(failure))

    def _ended(self, op: Op, told: Future[Any], result: Any, error: BoughError | None) -> None:
        op.is_done = True
        try:
            for observer in self.watch.observers:
                error = (observer.done(op, result) if error is None else observer.failed(op, error)) or error
        except Exception as broken:  # a disk that is full: told to who reads, and nobody waits for ever
            error = of(broken)
        if error is None:
            told.set_result(result)
        else:
            told.set_exception(error)
        self.watch.left(op)


def begun(backend: Backend, title: str, seeds: Seeds) -> Backend:
    """Return the backend for a new run: the same one, or what a watched or replaying backend gives each run."""
    begin: Callable[[str, Seeds], Backend] | None = getattr(backend, "begin_run", None)
    return backend if begin is None else begin(title, seeds)
