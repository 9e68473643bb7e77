"""The parts of a batch that only decide: which item is next, how many fit, what is worth another try."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import bough as bo
from bough.book import Book
from bough.inflight import FIRST, InFlight, capacity_of

# ------------------------------------------------------------------------------------------------ how many fit


def test_without_a_known_cache_the_bound_is_what_is_wanted() -> None:
    bound = InFlight(50, None)
    bound.ended(10**9)
    assert bound.limit == 50


def test_the_bound_follows_what_items_need() -> None:
    bound = InFlight(1000, 100_000)
    assert bound.limit == 43, "a guess"
    assert InFlight(1000, 100).limit == FIRST
    bound.ended(1000)
    assert bound.limit == 90
    for _ in range(100):
        bound.ended(100)
    assert 880 <= bound.limit <= 900
    for _ in range(100):
        bound.ended(10**7)
    assert bound.limit == 1
    assert InFlight(5, 100_000).limit == 5


def test_overload_halves_the_bound_and_success_brings_it_back() -> None:
    bound = InFlight(64, None)
    for expected in (32, 16, 8, 4, 2, 1, 1):
        bound.overloaded()
        assert bound.limit == expected
    for _ in range(64):
        bound.ended(1)
    assert bound.limit == 64


@pytest.mark.parametrize(
    ("info", "tokens"),
    [({"total_pages": 10, "page_size": 16}, 160), ({"total_pages": None, "page_size": 16}, None), ({}, None)],
)
def test_the_capacity_is_what_the_backend_says(info: dict[str, object], tokens: int | None) -> None:
    assert capacity_of(info) == tokens


# ------------------------------------------------------------------------------------------------ another try


def test_the_wait_doubles_up_to_a_bound_and_honours_the_hint() -> None:
    policy = bo.Retries(times=10, backoff_s=1, max_backoff_s=5)
    for tried, most in ((1, 1), (2, 2), (3, 4), (4, 5), (10, 5)):
        waits = [policy.wait_s(bo.Overloaded("full"), tried) for _ in range(50)]
        assert all(wait is not None and most / 2 <= wait <= most for wait in waits)
        assert len(set(waits)) > 1, "items do not come back together"
    assert policy.wait_s(bo.Overloaded("full", retry_after_s=60), 1) == 60
    assert policy.wait_s(bo.Overloaded("full"), 11) is None
    for never in (bo.ContextOverflow("long"), bo.InvalidRequest("no"), LookupError("mine")):
        assert policy.wait_s(never, 1) is None
    assert bo.Retries(on=(LookupError,)).wait_s(KeyError("a kind of it"), 1) is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"times": -1}, "times must be"),
        ({"times": True}, "times must be"),
        ({"on": [bo.Overloaded]}, "on must be a tuple"),
        ({"on": (KeyboardInterrupt,)}, "on must be a tuple of exception classes"),
        ({"backoff_s": -1}, "backoff_s must be"),
        ({"max_backoff_s": math.inf}, "max_backoff_s must be"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.Retries(**given)


# ------------------------------------------------------------------------------------------------ which is next


class Batches(RuleBasedStateMachine):
    """Every item is over once, in flight once at a time, and never more are in flight than fit."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = InFlight(4, None)
        self.book = Book(range(12), self.bound, bo.Retries(times=2, backoff_s=1), is_lazy=False)
        self.now = 0.0
        self.running: dict[int, int] = {}
        self.over: dict[int, int] = {}
        self.tries: dict[int, int] = {}
        self.is_stopped = False

    @rule()
    def take(self) -> None:
        limit = self.bound.limit
        taken = self.book.take(self.now)
        if taken is not None:
            index, attempt = taken
            assert len(self.running) < limit
            assert not self.is_stopped
            assert index not in self.running
            assert index not in self.over
            assert attempt == self.tries.get(index, 0) + 1 <= 3
            self.running[index] = self.tries[index] = attempt

    @precondition(lambda self: self.running)
    @rule(data=st.data(), error=st.sampled_from([None, bo.Overloaded("full"), LookupError("mine")]))
    def end(self, data: st.DataObject, error: Exception | None) -> None:
        index = data.draw(st.sampled_from(sorted(self.running)))
        attempt = self.running.pop(index)
        is_over = self.book.ended(index, error, 10, self.now)
        may_retry = isinstance(error, bo.Overloaded) and attempt <= 2 and not self.is_stopped
        assert is_over == (not may_retry)
        if is_over:
            self.over[index] = attempt

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.over) > 6)
    @rule()
    def stop(self) -> None:
        self.book.stop()
        self.is_stopped = True

    @invariant()
    def it_ends_when_all_are_over(self) -> None:
        if self.is_stopped:
            assert self.book.is_over == (not self.running)
        else:
            assert self.book.is_over == (len(self.over) == 12)

    def teardown(self) -> None:
        for _ in range(200):
            self.take()
            for index in list(self.running):
                del self.running[index]
                self.over[index] = self.book.ended(index, None, 1, self.now)
            self.now += self.book.patience_s(self.now) or 0.0
        assert self.book.is_over


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_a_lazy_reader_bounds_what_is_ahead_of_it() -> None:
    book = Book(range(5000), InFlight(10, None), bo.Retries(), is_lazy=True)
    started = 0
    while (taken := book.take(0.0)) is not None:
        started += 1
        assert book.ended(taken[0], None, 1, 0.0)
    assert started == 1024
    book.consumed()
    assert book.take(0.0) is not None
    assert book.take(0.0) is None
