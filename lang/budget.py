"""Budgets: what a run may cost before it is stopped.

::

    state = program.run(question, budget=bo.Budget(max_generated=2000, max_seconds=30))
    try:
        print(state["answer"])
    except bo.BudgetExceeded as error:
        print(error.details["partial_text"])
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from bough.backend import Delta, Generation
from bough.errors import BoughError, BudgetExceeded, Cancelled, InvalidRequest, Timeout
from bough.runtime.protocol import MAX_ID, Selected, Usage
from bough.sampling import seconds
from bough.usage import spent_by
from bough.watch import Observer, Op


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one run, with all its branches and the runs inside it. None sets no limit.

    max_tokens: tokens that the model computes, prompt and generated; what comes from the cache is free.
    max_generated: generated tokens. max_seconds: time since the run began.

    When one is reached, what is in flight is cancelled, nothing more is sent, and reads of what is missing raise
    BudgetExceeded. A gen is cut where the budget ends, `partial_text` is then in the error's details; several branches
    that decode at once may be a few tokens over. Raises InvalidRequest for limits that are not positive numbers.
    """

    max_tokens: int | None = None
    max_generated: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_generated"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidRequest(f"{name} must be a whole number of at least 1, got {value!r}", field=name)
        seconds("max_seconds", self.max_seconds)


class Meter(Observer):
    """Adds up what a run costs, and stops it at its budget."""

    def __init__(self, budget: Budget) -> None:
        self.wants_deltas = budget.max_tokens is not None or budget.max_generated is not None
        self._budget = budget
        self._lock = threading.Lock()
        self._computed = self._generated = 0  # by operations that are done
        self._streamed = 0  # by those that are not
        self._clamped: set[Op] = set()
        self._exceeded: BudgetExceeded | None = None

    def sending(self, op: Op) -> BoughError | None:
        """Refuse what the budget has nothing left for, and bound the rest."""
        if op.kind not in ("gen", "select", "score"):
            return None
        with self._lock:
            refusal = self._check()
            if refusal is None and op.params is not None and (left := self._tokens_left()) < op.params.max_tokens:
                least = min(op.params.min_tokens, left)
                op.params = msgspec.structs.replace(op.params, max_tokens=left, min_tokens=least)
                self._clamped.add(op)
        if refusal is None and self._budget.max_seconds is not None:
            left_s = max(0.001, self._budget.max_seconds - self.watch.now())
            op.request["timeout_s"] = min(op.request["timeout_s"] or math.inf, left_s)
        return refusal

    def streamed(self, op: Op, delta: Delta) -> None:
        """Count what is drawn while it is drawn: branches that decode at once see each other's."""
        with self._lock:
            op.num_streamed += len(delta.token_ids)
            self._streamed += len(delta.token_ids)
            is_over = self._tokens_left() < 0 and self._check() is not None  # at 0 it may be about to end by itself
        if is_over:
            self.watch.cancel_all()

    def done(self, op: Op, result: Any) -> BoughError | None:
        """Count what it cost; a gen that the budget cut short is no result."""
        if isinstance(result, (Generation, Selected)):
            self._spend(op, result.usage)
        was_clamped = op in self._clamped
        self._clamped.discard(op)
        if was_clamped and isinstance(result, Generation) and result.finish_reason == "length":
            with self._lock:
                self._check()
            return self._error(partial_text=result.text, **msgspec.structs.asdict(result.usage))
        return None

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """Count what it cost; the budget is the reason if it is what cancelled it."""
        self._clamped.discard(op)
        self._spend(op, spent_by(error))
        with self._lock:
            self._check()
        if self._exceeded is None or not isinstance(error, (Cancelled, Timeout)):
            return None
        mine = self._error(**error.details)
        mine.__cause__ = error
        return mine

    def _spend(self, op: Op, usage: Usage) -> None:
        with self._lock:
            self._streamed -= op.num_streamed
            op.num_streamed = 0
            self._computed += usage.computed_tokens
            self._generated += usage.completion_tokens

    def _tokens_left(self) -> int:
        """Return how many tokens may still be generated."""
        generated, budget = self._generated + self._streamed, self._budget
        most = MAX_ID if budget.max_generated is None else budget.max_generated - generated
        total = MAX_ID if budget.max_tokens is None else budget.max_tokens - generated - self._computed
        return min(most, total)

    def _check(self) -> BudgetExceeded | None:
        """Return the error if a limit is reached; the first one stays. Called with the lock held."""
        if self._exceeded is None:
            generated, budget = self._generated + self._streamed, self._budget
            spent = {
                "max_tokens": generated + self._computed,
                "max_generated": generated,
                "max_seconds": self.watch.now(),
            }
            for name, value in spent.items():
                limit = getattr(budget, name)
                if limit is not None and value >= limit:
                    what = (
                        f"{value:.3g} of {limit:g} seconds" if name == "max_seconds" else f"{value} of {limit} tokens"
                    )
                    self._exceeded = BudgetExceeded(
                        f"the run's budget is spent: {name}, {what}", field=name, limit=limit, value=value
                    )
                    break
        return None if self._exceeded is None else self._error()

    def _error(self, **details: object) -> BudgetExceeded:
        reached = self._exceeded or BudgetExceeded("the run's budget is spent")
        return BudgetExceeded(reached.message, **{**details, **reached.details})
