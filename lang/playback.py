"""`ReplayBackend`: a journal played back without a model, as a test double.

::

    state = program.run(question, backend=rt, journal="run.journal")
    program.run(question, backend=bo.ReplayBackend("run.journal"))
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import msgspec

from bough.backend import Backend, Branch, Delta, Generation, OnDelta
from bough.errors import BoughError, InvalidRequest, ReplayMismatch
from bough.expected import Expected
from bough.journal import Journal, RecordedOp, RecordedRun, tokens_of
from bough.places import Place, Places
from bough.runtime.protocol import ChoiceMethod, Extended, Part, SamplingParams, Selected
from bough.seeds import Seeds


class Playback:
    """A backend that plays one recorded run back."""

    def __init__(self, run: RecordedRun) -> None:
        self._expected = Expected(run)
        self._places = Places()
        self._ids = count(1)
        self._lock = threading.Lock()

    def open(self) -> Branch:
        """Start an empty branch."""
        with self._lock:
            branch = next(self._ids)
            self._places.open(branch)
            return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        with self._lock:
            place = self._place(branch)
            children = [next(self._ids) for _ in range(count)]
            self._places.fork(place, children)
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
        self._places.forget(branches)

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
        super().__init__(self.journal.run(0))
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
