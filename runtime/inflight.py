"""`InFlight`: the work that runs: from operations to the scheduler's sequences, and from a step's outcomes back.

step = scheduler.plan()            which tokens of which sequences
results = pipeline.take()          the only slow part, on a device beside the rest
outcomes = scheduler.commit(...)   advance, publish
settle                             text, stops, deltas; what is complete, what failed

Where steps overlap, step k + 1 is planned and launched before step k is taken back, so text, stops, cancels and
deadlines take effect one step late: what has ended by then has computed one token for nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from bough.runtime.lifecycle import Status
from bough.runtime.pipeline import Executor, Launcher, Pipeline
from bough.runtime.protocol import RequestError
from bough.runtime.scheduler import Outcome, Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.work import Generation, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """Work that left the scheduler: complete, or failed with `error`."""

    work: Work
    error: RequestError | None = None


class InFlight:
    """Which work each running sequence belongs to. The engine is the only caller.

    executor: the runner; launcher: the same, if steps shall overlap.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        launcher: Launcher[Any] | None = None,
        credit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = Pipeline(executor, launcher)
        self._credit = credit
        self._clock = clock
        self._work: dict[Sequence, Work] = {}
        self._failed_plans = 0  # in a row

    def __len__(self) -> int:
        return len(self._work)

    @property
    def has_work(self) -> bool:
        """Whether a step could do something now, or one is to be taken back."""
        return len(self._pipeline) > 0 or self._scheduler.has_work

    def start(self, work: Work) -> bool:
        """Hand the work's sequences to the scheduler; False if it is complete without. Raises what `submit` raises."""
        if isinstance(work, Generation) and work.begin():
            if work.is_streaming:
                self._send_delta(work)
            return False
        for sequence in work.sequences:
            self._work[sequence] = work
            self._scheduler.submit(sequence)
        return True

    def stop(self, work: Work) -> None:
        """Take the work's sequences from the scheduler, wherever they are."""
        for sequence in work.sequences:
            if self._work.pop(sequence, None) is not None and sequence.status is not Status.FINISHED:
                self._scheduler.finish(sequence)

    def grant(self, work: Generation, tokens: int) -> None:
        """Let a stream be `tokens` further ahead of its reader."""
        work.credit = min(work.credit + tokens, self._credit)
        if work.credit > 0:
            self._scheduler.resume(work.sequences[0])

    def step(self) -> tuple[bool, list[Ended]]:
        """Take back one step, with the next one launched before where it can be; if there is work.

        Returns whether something ran, and what ended.
        """
        try:
            self._pipeline.fill(self._scheduler)
        except Exception as error:
            self._heal("a plan could not be made")
            # Once may be broken bookkeeping, which is mended now; twice running, it is the work itself.
            self._failed_plans += 1
            return True, self._lose(list(self._work), error) if self._failed_plans > 1 else []
        self._failed_plans = 0
        ended = [self._stopped(self._work[s], self._exhausted(s)) for s in self._scheduler.take_exhausted()]
        if not self._pipeline:
            return False, ended
        step, results = self._pipeline.take()
        if isinstance(results, Exception):
            log.error("a step failed; its operations fail with it", exc_info=results)
            self._scheduler.retire()
            return True, ended + self._lose(step.sequences, results)
        try:
            outcomes = self._scheduler.commit(step, results)
        except Exception as error:
            self._heal("a step could not be committed")
            return True, ended + self._lose(step.sequences, error)
        now = self._clock()
        ended += [end for outcome in outcomes if (end := self._settle(outcome, now)) is not None]
        return True, ended

    def check(self) -> None:
        """Look whether tree, pages and leases still agree; if not, start the cache anew. O(everything): when idle."""
        try:
            self._scheduler.check_invariants()
        except AssertionError:
            self._heal("an invariant is broken")

    def _heal(self, what: str) -> None:
        """Go on after a bug of ours in the bookkeeping: the cache is rebuilt, what ran is computed again."""
        log.exception("%s: the cache is rebuilt", what)
        self._pipeline.abandon()  # what it computes belongs to the old cache
        self._scheduler.rebuild()

    def _lose(self, sequences: Items[Sequence], error: Exception) -> list[Ended]:
        """Stop all work of a step that raised; nothing the step computed was published."""
        failure = RequestError("internal", f"the step failed: {type(error).__name__}: {error}")
        works = {id(work): work for s in sequences if (work := self._work.get(s)) is not None}
        return [self._stopped(work, failure) for work in works.values()]

    def _exhausted(self, sequence: Sequence) -> RequestError:
        pool = self._scheduler.cache.num_pages * self._scheduler.cache.page_size
        return RequestError(
            "resource_exhausted",
            f"{sequence.num_slots} tokens fill the KV pool of {pool} tokens: raise max_total_tokens",
            num_tokens=sequence.num_slots,
            pool_tokens=pool,
        )

    def _settle(self, outcome: Outcome, now: float) -> Ended | None:
        """Take an outcome in; what ended with it, if anything did."""
        work = self._work.get(outcome.sequence)
        if work is None:
            return None  # another sequence of the same work ended it in this step
        try:
            is_complete = self._take(work, outcome, now)
        except RequestError as error:
            return self._stopped(work, error)
        except Exception as error:  # a bug of ours costs this operation, not the loop
            log.exception("the outcome of a step could not be taken in")
            return self._stopped(work, RequestError("internal", f"{type(error).__name__}: {error}"))
        return self._stopped(work, None) if is_complete else None

    def _take(self, work: Work, outcome: Outcome, now: float) -> bool:
        """Take an outcome in; True if the work is complete."""
        if outcome.error is not None:
            raise outcome.error
        if isinstance(work, Generation):
            is_complete = work.take(outcome.result, outcome.tokens, now)
            if is_complete:
                self._scheduler.cut(outcome.sequence, work.num_taken)
            if work.is_streaming:
                self._send_delta(work)
            return is_complete
        if work.take_scores(outcome.sequence, outcome.result, now):
            del self._work[outcome.sequence]
            self._scheduler.finish(outcome.sequence)
        return not any(sequence in self._work for sequence in work.sequences)

    def _send_delta(self, work: Generation) -> None:
        delta = work.delta()
        if delta is not None:
            work.operation.session.reply(delta)
        if work.credit <= 0 and work.finish_reason is None:
            self._scheduler.pause(work.sequences[0])

    def _stopped(self, work: Work, error: RequestError | None) -> Ended:
        self.stop(work)
        return Ended(work, error)
