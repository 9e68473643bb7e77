"""What surrounds a program's body while it runs: the backend, the seeds, and who watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bough import seeds
from bough.backend import Backend, default_backend
from bough.errors import InvalidRequest
from bough.watch import Observer, Watch
from bough.watched import Watched, begun

if TYPE_CHECKING:
    from bough.budget import Budget
    from bough.events import EventLog
    from bough.journal import JournalFile
    from bough.sampling import Sampling
    from bough.state import State


@dataclass(frozen=True, slots=True)
class Watching:
    """Who watches a run: an event log, a journal's file, a budget, and what else observes (a replay's checks)."""

    events: bool = False
    journal: JournalFile | None = None
    budget: Budget | None = None
    check: Callable[[], Observer] | None = None

    def observers(self) -> list[Observer]:
        """Return new observers for one run, in the order in which they see a result."""
        found: list[Observer] = []
        if self.check is not None:
            found.append(self.check())
        if self.budget is not None:
            from bough.budget import Meter

            found.append(Meter(self.budget))
        if self.journal is not None:
            found.append(self.journal.writer())
        if self.events:
            from bough.events import EventLog

            found.append(EventLog())
        return found


def watching_from(given: Mapping[str, object]) -> Watching | None:
    """Return who watches a run, by the names that `run` takes; None where nobody does.

    Raises InvalidRequest for what is neither, and for a journal whose file exists.
    """
    events, path, budget = (given.get(name) for name in ("events", "journal", "budget"))
    if not (events or path is not None or budget is not None):
        return None
    if events not in (None, False, True):
        raise InvalidRequest(f"events must be True or False, got {events!r}", field="events")
    from bough.budget import Budget

    if budget is not None and not isinstance(budget, Budget):
        raise InvalidRequest(f"budget must be a bough.Budget, got {budget!r}", field="budget")
    journal = None
    if path is not None:
        from bough.journal import JournalFile

        journal = JournalFile(path)
    return Watching(bool(events), journal, budget)


def with_events(sampling: Sampling) -> Sampling:
    """Return the same, with an event log."""
    watching = replace(sampling.watching or Watching(), events=True)
    return replace(sampling, watching=watching)


def begin(backend: Backend, sampling: Sampling, title: str) -> tuple[Backend, seeds.Seeds]:
    """Return the backend that a new run uses, and its seeds."""
    own = seeds.seeds_of_run(sampling.params.seed, backend)
    backend = begun(backend, title, own)
    if sampling.watching is not None:
        backend = Watched(backend, Watch(sampling.watching.observers()), title, own.run)
    return backend, own


def log_of(backend: Backend) -> EventLog:
    """Return the event log of a watched run. Raises InvalidRequest if it keeps none."""
    from bough.events import EventLog

    if isinstance(backend, Watched):
        for observer in backend.watch.observers:
            if isinstance(observer, EventLog):
                return observer
    raise InvalidRequest("this run keeps no events: run it with events=True or stream=True", field="events")


class Running:
    """`with Running(state, program, args, kwargs):` around a body: programs that it runs belong to its run."""

    __slots__ = (
        "_args",
        "_backend",
        "_interpreter",
        "_kwargs",
        "_outer_backend",
        "_outer_seeds",
        "_program",
        "_sampling",
        "_seeds",
    )

    def __init__(self, state: State, program: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        interpreter = state._interpreter
        self._interpreter = interpreter
        self._backend = interpreter.backend
        self._seeds = interpreter.seeds
        self._sampling = interpreter.sampling
        self._program, self._args, self._kwargs = program, args, kwargs
        self._outer_backend: Token[Backend | None] | None = None
        self._outer_seeds: Token[seeds.Seeds | None] | None = None

    def __enter__(self) -> None:
        if isinstance(self._backend, Watched):
            self._backend.body_began(self._program, self._args, self._kwargs, self._sampling)
        self._outer_backend = default_backend.enter(self._backend)
        self._outer_seeds = seeds.enter(self._seeds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._outer_seeds is not None and self._outer_backend is not None, "it was entered"  # noqa: PT018
        seeds.leave(self._outer_seeds)
        default_backend.leave(self._outer_backend)
        if isinstance(self._backend, Watched):
            if error is None:
                self._interpreter.flush_if_free()  # so that what is recorded holds the end of the text as well
            self._backend.body_ended(error)
