"""`Watched`: a backend that shows what passes through it to observers, and is otherwise the backend that it wraps.

A run that nobody watches does not have one, and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

from bough.backend import Backend, Branch, Delta, Generation, OnDelta
from bough.errors import BoughError, of
from bough.places import Place, Places
from bough.runtime.protocol import ChoiceMethod, Extended, Part, SamplingParams, Selected
from bough.seeds import Path, Seeds
from bough.watch import Op, OpKind, Watch


class Watched:
    """A backend whose operations are shown to the observers of a `Watch`; one for each run."""

    def __init__(self, backend: Backend, watch: Watch, title: str, seed: int) -> None:
        self.watch = watch
        self.run = watch.new_run(title, seed, backend)
        self._backend = backend
        self._places = Places()

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
        place = self._places.get(branch)
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
        self._places.open(branch)
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
        return children, self._places.fork(place, children)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches."""
        self._places.forget(branches)
        self._backend.release(branches)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants."""
        for observer in self.watch.observers:
            observer.cancelled(self.run, self.path_of(branch))
        return self._backend.cancel(branch, discard=discard)

    def _place(self, branch: Branch) -> Place:
        place = self._places.get(branch)
        return self._places.put(branch, (-1, branch)) if place is None else place  # released: the backend will say so

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
