"""Replays: a run repeated from its journal on a model, every text, choice and token of it checked.

::

    state = program.run(question, backend=rt, journal="run.journal")

    bo.replay("run.journal", backend=rt)                 # runs it again; raises ReplayMismatch at the first difference
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bough.backend import Backend, Generation, chosen
from bough.errors import BoughError, InvalidRequest, ReplayMismatch
from bough.expected import ENDED_EARLY, Expected, mismatch
from bough.journal import Journal, RecordedOp, RecordedRun, tokens_of
from bough.program import Program
from bough.running import Watching
from bough.runtime.protocol import SamplingParams, Selected
from bough.sampling import Sampling
from bough.watch import Observer, Op, RunInfo

if TYPE_CHECKING:
    from bough.state import State


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
    recorded = read.run(run)
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
                raise mismatch(op.path, op.index, "operation", op.kind, None)

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
        if known is None or op.kind == "recorded" or isinstance(known.error, ENDED_EARLY):
            return None
        if known.error is not None:
            return self._noted(mismatch(op.path, op.index, "error", type(known.error).__name__, None))
        if isinstance(result, Generation):
            was, now = tokens_of(known.result["token_ids"]), list(result.token_ids)
            if was != now:
                at = next(
                    (i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now))
                )
                then, here = (ids[at] if at < len(ids) else None for ids in (was, now))
                return self._noted(mismatch(op.path, op.index, "token", then, here, at))
            if known.result["text"] != result.text:
                return self._noted(mismatch(op.path, op.index, "text", known.result["text"], result.text))
        elif isinstance(result, Selected) and known.result["index"] != result.index:
            choices = op.request["choices"]
            return self._noted(
                mismatch(op.path, op.index, "choice", choices[known.result["index"]], choices[result.index])
            )
        return None

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """Check that it failed then, too."""
        known = self._known.pop(op, None)
        ended_early = isinstance(error, (*ENDED_EARLY, ReplayMismatch))
        if known is None or known.error is not None or ended_early:
            return None
        return self._noted(mismatch(op.path, op.index, "error", None, type(error).__name__))

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
