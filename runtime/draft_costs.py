"""What drafting costs on this machine, measured when the runtime starts: rows of a step, and time of the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import numpy as np

from bough.runtime.batch import Batch, Row, RowResult, SampleRequest
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.drafts import DraftCosts
from bough.runtime.protocol import SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.vector import IntArray

_DRAFT: Final = 32  # tokens: beyond the few that come nearly free while weights are read
_SECONDS: Final = 0.25
_ROUNDS: Final = 3, 6  # at least, at most
_RANGE: Final = 0.01, 2.0  # what a busy machine may have measured of a row is not believed beyond
_HOST_STEPS: Final = 16
_HOST_WIDTH: Final = 4  # sequences: the first finds the processor's caches cold, the others do not
_LONG_STEP: Final = 0.005  # seconds: of a longer step the host's time for a draft is next to nothing
_PERIOD: Final = 48  # tokens after which a text that repeats itself does
_PAGE_SIZE: Final = 16


class Measured(Protocol):
    """What of a runner is needed: a pool's sizes, the most tokens of a sequence, and steps that take their time."""

    context_len: int
    num_pages: int
    page_size: int

    def execute(self, batch: Batch) -> object:
        """Compute a step."""


def measure_draft_costs(runner: Measured, clock: Callable[[], float] = time.perf_counter) -> DraftCosts:
    """Return what one more token of a step takes, a draft and a look, in units of what a step takes beside its tokens.

    Rows from a decode step without and with a draft of 32 tokens: a line through both, the fastest of a few of each.
    The host's time from steps planned and committed for a text that is known, with and without drafts, each after a
    step of the runner: it leaves the processor's caches as it does later, which makes a look twice as long. Writes the
    slots of the first pages; call it before any page is in use. About a third of a second.
    """
    one, row = _seconds(runner, clock)
    step = max(one - row, row / _RANGE[1])
    compute = partial(runner.execute, _step(runner, 0)) if one < _LONG_STEP else lambda: None
    plain, drafting, looking = _host_seconds(clock, compute)
    return DraftCosts(
        row=min(max(row / step, _RANGE[0]), _RANGE[1]),
        draft=min(max(drafting - plain, 0.0) / step, _RANGE[1]),
        look=min(max(looking - plain, 0.0) / step, _RANGE[1]),
    )


def _seconds(runner: Measured, clock: Callable[[], float]) -> tuple[float, float]:
    """Return what a decode step of one sequence takes, and each token more."""
    count = min(_DRAFT, runner.context_len - 2, runner.num_pages * runner.page_size - 2)
    plain, drafted = _step(runner, 0), _step(runner, max(count, 0))
    seconds: list[tuple[float, float]] = []
    begin = clock()
    _timed(runner, drafted, clock)  # what is prepared at the first call for this many tokens does not count
    while len(seconds) < _ROUNDS[0] or (len(seconds) < _ROUNDS[1] and clock() - begin < _SECONDS):
        seconds.append((_timed(runner, plain, clock), _timed(runner, drafted, clock)))
    one, many = (min(times) for times in zip(*seconds, strict=True))
    return one, max(many - one, 0.0) / count if count > 0 else one * _RANGE[1]


def _step(runner: Measured, num_draft: int) -> Batch:
    """Return a decode step of one sequence, its second token, with a draft."""
    tokens, none = np.zeros(1 + num_draft, dtype=np.int32), np.zeros(0, dtype=np.int32)
    pages = np.arange(-(-(len(tokens) + 1) // runner.page_size), dtype=np.int32)
    request = SampleRequest(SamplingParams(), 0, 2, generated=tokens[:1], prompt=none, forbidden=())
    return Batch((Row(tokens, 1, pages, request, draft=num_draft),))


def _timed(runner: Measured, batch: Batch, clock: Callable[[], float]) -> float:
    begin = clock()
    runner.execute(batch)
    return clock() - begin


def _host_seconds(clock: Callable[[], float], compute: Callable[[], object]) -> list[float]:
    """Return what planning and committing a decode step takes for each of four sequences: the median of some, in turns.

    Without drafts; with a draft in every step, none of which comes true, for what does is taken in like any drawn
    token; and with a look in every step that finds none. compute: called between planning and committing.
    """
    hosts = [_Host(is_drafting=False), _Host(is_drafting=True, period=_PERIOD), _Host(is_drafting=True)]
    seconds = [[host.step(clock, compute) for host in hosts] for _ in range(2 + _HOST_STEPS)]
    return [statistics.median(times[2:]) for times in zip(*seconds, strict=True)]


class _Host:
    """A scheduler with texts that are known in the place of a model; after `period` tokens they repeat themselves."""

    def __init__(self, *, is_drafting: bool, period: int | None = None) -> None:
        length = _PERIOD * 6
        text = np.arange(length * 2, dtype=np.int32) % (period or length * 2)
        self._texts = [text + i * len(text) for i in range(_HOST_WIDTH)]
        free = DraftCosts(row=0.0, draft=0.0, look=0.0)
        speculator = Speculator(len(text), costs=free) if is_drafting else None
        cache = PrefixCache(2 * _HOST_WIDTH * len(text) // _PAGE_SIZE, _PAGE_SIZE)
        size = _HOST_WIDTH * length
        self._scheduler = Scheduler(cache, token_budget=size, max_running=_HOST_WIDTH, speculator=speculator)
        for seed, text in enumerate(self._texts):
            params = SamplingParams(max_tokens=length)
            self._scheduler.submit(Sequence(text[:length], params=params, seed=seed))

    def step(self, clock: Callable[[], float], compute: Callable[[], object]) -> float:
        """Return the seconds of a step that the host takes for each sequence."""
        begin = clock()
        step = self._scheduler.plan()
        planned = clock()
        assert step is not None, "a generation goes on"
        compute()
        results = [_result(row, self._texts) for row in step.batch.rows]
        assert len(results) == _HOST_WIDTH, "all of them go on"
        resumed = clock()
        self._scheduler.commit(step, results)
        return (clock() - resumed + planned - begin) / _HOST_WIDTH


def _result(row: Row, texts: list[IntArray]) -> RowResult:
    """Return what draws a token of the text that the row is of."""
    assert row.sample is not None, "a prompt is computed in one step"
    text = texts[row.sample.seed]
    return RowResult(int(text[row.start + len(row.token_ids) - row.draft]))
