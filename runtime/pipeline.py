"""`Pipeline`: the steps that were launched and not yet taken back, oldest first; at most two.

    one after another   launch k, take k, launch k + 1, ...
    overlapped          launch k, launch k + 1, take k, launch k + 2, take k + 1, ...

Overlapped, the host plans a step and deals with the results of another while the device computes a third: its time
costs nothing as long as it is shorter than a step. Steps run in the order in which they were launched.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence as Items
from typing import Generic, Protocol, TypeVar, runtime_checkable

from bough.runtime.batch import Batch, RowResult
from bough.runtime.scheduler import Scheduler, Step

log = logging.getLogger(__name__)

S = TypeVar("S", bound="LaunchedStep")


class Executor(Protocol):
    """What is needed of a runner."""

    def execute(self, batch: Batch) -> Items[RowResult]:
        """Compute a step; one result per row."""
        ...


class LaunchedStep(Protocol):
    """A step that a device computes, or will."""

    def result(self) -> Items[RowResult]:
        """Wait until it is computed; one result per row. Raises what was wrong with it."""
        ...


@runtime_checkable
class Launcher(Protocol[S]):
    """What is needed of a runner beside, for steps to overlap."""

    def launch(self, batch: Batch, previous: S | None) -> S:
        """Have a step computed after all that were launched before; does not wait for it.

        previous: the step launched last, if it was not taken back yet: rows may go on from tokens that it draws
        (`Row.drawn_by`). The batch's arrays are not read after the call.
        """
        ...


class _Done:
    """A step that was computed at once, or could not be launched."""

    def __init__(self, results: Items[RowResult] = (), error: Exception | None = None) -> None:
        self._results = results
        self._error = error

    def result(self) -> Items[RowResult]:
        if self._error is not None:
            raise self._error
        return self._results


class Pipeline(Generic[S]):
    """Runs planned steps. launcher: the same runner where steps shall overlap, or None."""

    def __init__(self, executor: Executor, launcher: Launcher[S] | None = None) -> None:
        self._executor = executor
        self._launcher = launcher
        self._flying: deque[tuple[Step, S | _Done]] = deque()

    def __len__(self) -> int:
        return len(self._flying)

    def fill(self, scheduler: Scheduler) -> None:
        """Plan and launch a step if none is in flight; where steps overlap, one more. Raises what planning raises."""
        if not self._flying:
            self._launch(scheduler.plan())
        if len(self._flying) == 1 and not isinstance(self._flying[0][1], _Done):
            self._launch(scheduler.plan(ahead_of=self._flying[0][0]))

    def _launch(self, step: Step | None) -> None:
        """Have a step computed. Raises nothing: what goes wrong is the step's result."""
        if step is not None:
            self._flying.append((step, self._launched(step.batch)))

    def _launched(self, batch: Batch) -> S | _Done:
        try:
            if self._launcher is None:
                return _Done(self._executor.execute(batch))
            previous = self._flying[-1][1] if self._flying else None
            assert not isinstance(previous, _Done), "nothing is launched behind a step that could not be"
            return self._launcher.launch(batch, previous)
        except Exception as error:
            return _Done(error=error)

    def take(self) -> tuple[Step, Items[RowResult] | Exception]:
        """Wait for the oldest step; return it and its results, or what went wrong."""
        step, launched = self._flying.popleft()
        try:
            return step, launched.result()
        except Exception as error:
            return step, error

    def abandon(self) -> None:
        """Wait until nothing runs, whatever comes out."""
        while self._flying:
            _, results = self.take()
            if isinstance(results, Exception):
                log.error("a step that was given up failed too: %s", results)
