"""Replays: a run repeated from its journal, on a model to check every token, or without one.

::

    state = program.run(question, backend=rt, journal="run.journal")

    bo.replay("run.journal", backend=rt)                 # runs it again; raises ReplayMismatch at the first difference
    program.run(question, backend=bo.ReplayBackend("run.journal"))      # plays it back: a test double, no model
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bough.backend import Backend, Branch, Delta, Generation, OnDelta, chosen
from bough.errors import BoughError, BudgetExceeded, Cancelled, InvalidRequest, ReplayMismatch, Timeout
from bough.journal import Journal, RecordedOp, RecordedRun, plain, tokens_of
from bough.program import Program
from bough.running import Watching
from bough.runtime import protocol
from bough.runtime.protocol import ChoiceMethod, Extended, Part, SamplingParams, Selected
from bough.sampling import Sampling
from bough.seeds import Path, Seeds
from bough.watch import Observer, Op, Place, RunInfo

if TYPE_CHECKING:
    from bough.state import State

_DEFAULTS: Final = SamplingParams()
_ENDED_EARLY: Final = (Cancelled, Timeout, BudgetExceeded)
"""How an operation ends when something from outside ends it: nothing that a replay has to repeat."""


def replay(
    journal: str | os.PathLike[str] | Journal,
    program: Program | None = None,
    *,
    backend: Backend | None = None,
    run: int = 0,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> State:
    """Run a journal's program again, with its seed and arguments, and check that everything comes out the same.

    program: by default the one that the journal names. backend: by default the default one. run: which of the journal's
    runs, for one of a batch. args, kwargs: instead of the recorded ones, needed if those could not be recorded.
    Values of `State.recorded` are taken from the journal. Operations that were cancelled or timed out, then or now, are
    not compared.

    Returns the finished state. Raises ReplayMismatch naming branch, operation and the first token that differs, and
    InvalidRequest for a journal that cannot be replayed::

        state = bo.replay("run.journal", backend=rt)
    """
    read = journal if isinstance(journal, Journal) else Journal(journal)
    recorded = _run_of(read, run)
    program = program or _program_of(recorded)
    args = recorded.args if args is None else args
    kwargs = recorded.kwargs if kwargs is None else kwargs
    if recorded.lacks and args is recorded.args and kwargs is recorded.kwargs:
        raise InvalidRequest(
            f"the journal could not record the arguments {', '.join(recorded.lacks)}: pass args= and kwargs=",
            field="args",
        )
    checker = Checker(read, recorded)
    params = msgspec.convert({**recorded.params, "seed": recorded.seed}, SamplingParams)
    sampling = Sampling(params, recorded.n, recorded.timeout_s, Watching(check=lambda: checker))
    try:
        state = program.start(chosen(backend), sampling, args, dict(kwargs))
        state.sync()
    except BaseException:
        checker.raise_mismatch()
        raise
    checker.finish()
    return state


def _run_of(journal: Journal, run: int) -> RecordedRun:
    if not 0 <= run < len(journal.runs):
        raise InvalidRequest(f"{journal.path} has {len(journal.runs)} runs, there is no number {run}", field="run")
    return journal.runs[run]


def _program_of(run: RecordedRun) -> Program:
    """Return the program that a journal names. Raises InvalidRequest if it is not there any more."""
    found: Any = None
    try:
        found = importlib.import_module(run.module)
        for name in run.name.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        found = None
    if not isinstance(found, Program):
        raise InvalidRequest(f"there is no program {run.module}.{run.name}: pass program=", field="program")
    return found


# --------------------------------------------------------------------------------------------- what a journal expects


class Expected:
    """What one recorded run says about each place: the text appended there, and the operation that follows."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run
        self._ops: dict[tuple[Path, int], RecordedOp] = {}
        self._texts: dict[tuple[Path, int], deque[tuple[str | None, str]]] = {}  # (None, text) or (role, rendered)
        self._lengths: dict[tuple[Path, int], int] = {}
        self._rewinds: dict[tuple[Path, int], deque[RecordedOp]] = {}
        self._failures: dict[tuple[Path, int], BoughError] = {}
        self._lock = threading.Lock()
        self._ends: dict[Path, int] = {}
        self._last: dict[Path, int] = {}
        for op in run.ops:
            self._take(op)
            self._ends[op.path] = max(op.index, self._ends.get(op.path, 0))
            if op.kind not in ("extend", "rewind"):  # those have the index of what follows them
                self._last[op.path] = max(op.index, self._last.get(op.path, 0))

    def _take(self, op: RecordedOp) -> None:
        where = (op.path, op.index)
        if op.kind == "rewind":
            self._rewinds.setdefault(where, deque()).append(op)
        elif op.kind != "extend":
            self._ops[where] = op
        elif op.error is not None:
            self._failures[where] = op.error
        else:
            marks = iter(op.result.get("rendered", ()))
            texts = self._texts.setdefault(where, deque())
            for part in op.request["parts"]:
                if part["t"] == "text":
                    before = texts.pop()[1] if texts and texts[-1][0] is None else ""
                    texts.append((None, before + part["text"]))
                elif part["t"] != "tokens":
                    texts.append((part.get("role", ""), next(marks, "")))
            self._lengths[where] = op.result["length"]

    def text(self, path: Path, index: int, parts: Sequence[Part]) -> Extended:
        """Return what the backend answered to these parts. Raises ReplayMismatch if others were appended here."""
        where = (path, index)
        with self._lock:
            if where in self._failures:
                raise self._failures[where].again()
            texts = self._texts.get(where, deque())
            rendered: list[str] = []
            for part in parts:
                if isinstance(part, protocol.Text):
                    self._consume(path, index, texts, part.text)
                elif not isinstance(part, protocol.Tokens):
                    role = part.role if isinstance(part, protocol.RoleBegin) else ""
                    if not texts:
                        self._check_recorded(path, index, f"a message of {role!r}" if role else "the end of a message")
                    known, text = texts.popleft() if texts else (None, "")
                    if known != role:
                        raise _mismatch(path, index, "role", known if known is not None else text, role)
                    rendered.append(text)
            return Extended(0, self._lengths.get(where, 0), rendered)

    def is_beyond(self, path: Path, index: int) -> bool:
        """Whether the branch's record ends before this: text after the last gen is sent when somebody asks for it."""
        return path in self._ends and index > self._ends[path]

    def _check_recorded(self, path: Path, index: int, asked: str) -> None:
        """Raise ReplayMismatch if the branch's record ends before this operation."""
        if index > self._last.get(path, -1):
            raise ReplayMismatch(
                f"branch {_named(path)}, operation {index}: {asked} is asked for, the journal holds no such operation "
                "yet: it was read before its run was done (wait with `state.sync()`), or the program does more now",
                path=path, index=index, field="operation", expected=None, got=asked,
            )  # fmt: skip

    def _consume(self, path: Path, index: int, texts: deque[tuple[str | None, str]], text: str) -> None:
        if not texts:
            self._check_recorded(path, index, f"the text {_short(text)}")
        role, known = texts.popleft() if texts else (None, "")
        if role is not None or not known.startswith(text):
            raise _mismatch(path, index, "text", known, text)
        if len(known) > len(text):
            texts.appendleft((None, known[len(text) :]))

    def operation(self, path: Path, index: int, kind: str, name: str | None, request: Mapping[str, Any]) -> RecordedOp:
        """Return the recorded operation of a place. Raises ReplayMismatch if another one is asked for now."""
        with self._lock:
            op = self._ops.pop((path, index), None)
            left = self._texts.get((path, index))
        if op is None:
            self._check_recorded(path, index, f"{kind} {name or '(unnamed)'}")
            raise _mismatch(path, index, "operation", None, kind)
        if left:
            raise _mismatch(path, index, "text", left[0][1], "")
        for field, known, now in ((("kind"), op.kind, kind), ("name", op.name, name)):
            if known != now:
                raise _mismatch(path, index, field, known, now)
        for field in ("params", "choices", "method", "temperature", "seed", "grammar"):
            known, now = op.request.get(field), plain(request.get(field))
            if known != now:
                raise _mismatch(path, index, *_first_difference(field, known, now))
        return op

    def rewind(self, path: Path, index: int, length: int) -> Extended:
        """Return what the backend answered to a rewind. Raises ReplayMismatch if there was none, or another."""
        with self._lock:
            waiting = self._rewinds.get((path, index))
            op = waiting.popleft() if waiting else None
        if op is None or op.request["length"] != length:
            raise _mismatch(path, index, "length", op and op.request["length"], length)
        if op.error is not None:
            raise op.error.again()
        return msgspec.convert(op.result, Extended)

    def left(self) -> RecordedOp | None:
        """Return an operation that was recorded and never asked for."""
        ended = (op for op in self._ops.values() if not isinstance(op.error, _ENDED_EARLY))
        return min(ended, key=lambda op: (op.path, op.index), default=None)


def _first_difference(field: str, known: Any, now: Any) -> tuple[str, Any, Any]:
    if isinstance(known, dict) and isinstance(now, dict):
        for key in sorted({*known, *now}):
            default = getattr(_DEFAULTS, key, None) if field == "params" else None  # those are not written
            if known.get(key, default) != now.get(key, default):
                return f"{field}.{key}", known.get(key, default), now.get(key, default)
    return field, known, now


def _named(path: Path) -> str:
    return ".".join(map(str, path)) or "root"


def _mismatch(path: Path, index: int, field: str, expected: Any, got: Any, position: int | None = None) -> BoughError:
    where = _named(path)
    token = "" if position is None else f", token {position}"
    return ReplayMismatch(
        f"branch {where}, operation {index}{token}: {field} was {_short(expected)} in the journal and is {_short(got)}",
        path=path, index=index, field=field, expected=expected, got=got,
        **({} if position is None else {"position": position}),
    )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --------------------------------------------------------------------------------------------- on a model


class Checker(Observer):
    """Compares a run with a journal; an operation that differs fails with ReplayMismatch, and ends the replay."""

    def __init__(self, journal: Journal, run: RecordedRun) -> None:
        family = [other for other in journal.all_runs if other is run or other.outer == run.id]
        self._waiting = {other.seed: deque(o for o in family if o.seed == other.seed) for other in family}
        self._expected: dict[int, Expected] = {}
        self._known: dict[Op, RecordedOp] = {}
        self._lock = threading.Lock()
        self._first: BoughError | None = None

    def raise_mismatch(self) -> None:
        """Raise the first mismatch, if there was one."""
        if self._first is not None:
            raise self._first.again()

    def finish(self) -> None:
        """Raise the first mismatch, also if the run did less than the journal says."""
        self.raise_mismatch()
        for expected in self._expected.values():
            op = expected.left()
            if op is not None:
                raise _mismatch(op.path, op.index, "operation", op.kind, None)

    def sending(self, op: Op) -> BoughError | None:
        """Check what is asked, before it is sent."""
        try:
            expected = self._expected_of(op.run)
            if op.kind == "extend":
                if expected.is_beyond(op.path, op.index):
                    return None
                expected.text(op.path, op.index, op.request["parts"])
            elif op.kind == "rewind":
                expected.rewind(op.path, op.index, op.request["length"])
            else:
                known = expected.operation(op.path, op.index, op.kind, op.name, op.request)
                with self._lock:
                    self._known[op] = known
        except ReplayMismatch as error:
            return self._noted(error)
        except BoughError:  # it failed then; whether it does now is seen later
            return None
        return None

    def known(self, op: Op) -> tuple[Any] | None:
        """Return a recorded value."""
        refusal = self.sending(op)
        if refusal is not None:
            raise refusal
        recorded = self._known[op]
        if recorded.error is not None:
            raise recorded.error.again()
        return (recorded.result,)

    def done(self, op: Op, result: Any) -> BoughError | None:
        """Check what came out."""
        known = self._known.pop(op, None)
        if known is None or op.kind == "recorded" or isinstance(known.error, _ENDED_EARLY):
            return None
        if known.error is not None:
            return self._noted(_mismatch(op.path, op.index, "error", type(known.error).__name__, None))
        if isinstance(result, Generation):
            was, now = tokens_of(known.result["token_ids"]), list(result.token_ids)
            if was != now:
                at = next(
                    (i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now))
                )
                then, here = (ids[at] if at < len(ids) else None for ids in (was, now))
                return self._noted(_mismatch(op.path, op.index, "token", then, here, at))
            if known.result["text"] != result.text:
                return self._noted(_mismatch(op.path, op.index, "text", known.result["text"], result.text))
        elif isinstance(result, Selected) and known.result["index"] != result.index:
            choices = op.request["choices"]
            return self._noted(
                _mismatch(op.path, op.index, "choice", choices[known.result["index"]], choices[result.index])
            )
        return None

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """Check that it failed then, too."""
        known = self._known.pop(op, None)
        ended_early = isinstance(error, (*_ENDED_EARLY, ReplayMismatch))
        if known is None or known.error is not None or ended_early:
            return None
        return self._noted(_mismatch(op.path, op.index, "error", None, type(error).__name__))

    def _expected_of(self, run: RunInfo) -> Expected:
        with self._lock:
            found = self._expected.get(run.number)
            if found is None:
                waiting = self._waiting.get(run.seed)
                if not waiting:
                    raise ReplayMismatch(f"the journal has no run with seed {run.seed}", field="seed", got=run.seed)
                found = self._expected[run.number] = Expected(waiting.popleft())
            return found

    def _noted(self, error: BoughError) -> BoughError:
        with self._lock:
            self._first = self._first or error
        return error


# --------------------------------------------------------------------------------------------- without a model


class Playback:
    """A backend that plays one recorded run back."""

    def __init__(self, run: RecordedRun) -> None:
        self._expected = Expected(run)
        self._places: dict[Branch, Place] = {}
        self._ids = count(1)
        self._num_roots = 0
        self._lock = threading.Lock()

    def open(self) -> Branch:
        """Start an empty branch."""
        with self._lock:
            branch = next(self._ids)
            self._places[branch] = Place(() if not self._num_roots else (-self._num_roots,))
            self._num_roots += 1
            return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        with self._lock:
            place = self._place(branch)
            children = [next(self._ids) for _ in range(count)]
            for child in children:
                self._places[child] = Place((*place.path, place.num_children))
                place.num_children += 1
            return children

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Return how the text and roles were rendered."""

        def work() -> Extended:
            place = self._place(branch)
            return self._expected.text(place.path, place.num_ops, parts)

        return _done(work)

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
        """Return what was generated."""

        def work() -> Generation:
            op = self._next(branch, "gen", name, {"params": params, **more})
            result = {**op.result, "token_ids": tokens_of(op.result["token_ids"])}
            generation = msgspec.convert(result, Generation)
            if on_delta is not None and generation.text:
                on_delta(Delta(generation.text, generation.token_ids, generation.logprobs))
            return generation

        return _done(work)

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
        """Return what was chosen."""
        request = {"choices": choices, "method": method, **more}
        return _done(lambda: msgspec.convert(self._next(branch, "select", name, request).result, Selected))

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
        """Return what was scored."""
        request = {"choices": choices, "method": method, **more}
        return _done(lambda: msgspec.convert(self._next(branch, "score", name, request).result, Selected))

    def rollback(self, branch: Branch, length: int, **more: Any) -> Future[Extended]:
        """Return how the branch was cut back."""

        def work() -> Extended:
            place = self._place(branch)
            return self._expected.rewind(place.path, place.num_ops, length)

        return _done(work)

    def recorded(self, branch: Branch, name: str, call: Callable[[], Any]) -> Any:
        """Return the recorded value; nothing is called."""
        return self._next(branch, "recorded", name, {}).result

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """Do nothing: what was cancelled fails as it did."""
        return _done(lambda: 0)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches."""
        for branch in branches:
            self._places.pop(branch, None)

    def stats(self) -> dict[str, int | float | str]:
        """Return nothing: there is no model."""
        return {}

    def flush_cache(self) -> None:
        """Do nothing: there is no cache."""

    def server_info(self) -> dict[str, object]:
        """Return what ran there when the journal was written."""
        return dict(self._expected.run.backend)

    def _next(self, branch: Branch, kind: str, name: str | None, request: Mapping[str, Any]) -> RecordedOp:
        with self._lock:
            place = self._place(branch)
            index, place.num_ops = place.num_ops, place.num_ops + 1
        op = self._expected.operation(place.path, index, kind, name, request)
        if op.error is not None:
            raise op.error.again()
        return op

    def _place(self, branch: Branch) -> Place:
        place = self._places.get(branch)
        if place is None:
            raise InvalidRequest(f"branch {branch} is not open", branch=branch)
        return place


class ReplayBackend(Playback):
    """Plays a journal back, without a model: the double of a backend in tests of the program around it.

    A run takes its seed from the journal, in the order of the recorded runs, unless it has one; the items of a batch
    are matched by their index, in whatever order they begin. What a run asks for must be what was asked for then, else
    the read of it raises ReplayMismatch. Texts, log-probabilities, usage and failures are the recorded ones. Raises
    InvalidRequest for a file that is no journal, or an empty one::

        state = program.run("What is 17 + 25?", backend=bo.ReplayBackend("run.journal"))
    """

    def __init__(self, journal: str | os.PathLike[str] | Journal) -> None:
        self.journal = journal if isinstance(journal, Journal) else Journal(journal)
        super().__init__(_run_of(self.journal, 0))
        self._unused = list(self.journal.all_runs)
        self._seeds = iter([run.seed for run in self.journal.runs])

    def next_seed(self) -> int | None:
        """Return the seed of the next recorded run."""
        with self._lock:
            return next(self._seeds, None)

    def batch_seed(self) -> int | None:
        """Return the seed of the recorded batch; None if no batch was recorded."""
        return self.journal.runs[0].batch_seed

    def begin_run(self, title: str, seeds: Seeds) -> Backend:
        """Return what plays the run with this seed back. Raises ReplayMismatch if the journal has none."""
        with self._lock:
            run = next((run for run in self._unused if run.seed == seeds.run), None)
            if run is None:
                raise ReplayMismatch(
                    f"the journal has no further run with seed {seeds.run}, for {title}", field="seed", got=seeds.run
                )
            self._unused.remove(run)
        return _PlaybackOf(self, run)


class _PlaybackOf(Playback):
    """One run of a ReplayBackend; runs inside it are played back from the same journal."""

    def __init__(self, owner: ReplayBackend, run: RecordedRun) -> None:
        super().__init__(run)
        self._owner = owner

    def begin_run(self, title: str, seeds: Seeds) -> Backend:
        """Return what plays a run inside this one back."""
        return self._owner.begin_run(title, seeds)


def _done(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except BoughError as error:
        future.set_exception(error)
    return future
