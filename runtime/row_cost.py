"""What one more token of a step costs on this machine, measured when the runtime starts."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from bough.runtime.batch import Batch, Row, SampleRequest
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner

_DRAFT: Final = 32  # tokens: beyond the few that come nearly free while weights are read
_SECONDS: Final = 0.25
_ROUNDS: Final = 3, 6  # at least, at most
_RANGE: Final = 0.01, 2.0  # what a busy machine may have measured is not believed beyond


def measure_row_cost(runner: Runner) -> float:
    """Return the time that one more token of a step takes, in units of what a step takes beside its tokens.

    From a decode step without and with a draft of 32 tokens: a line through both, the fastest of a few of each. Writes
    the slots of the first pages; call it before any page is in use.
    """
    count = min(_DRAFT, runner.context_len - 2, runner.num_pages * runner.page_size - 2)
    if count < 1:
        return _RANGE[1]
    plain, drafted = _step(runner, 0), _step(runner, count)
    seconds: list[tuple[float, float]] = []
    begin = time.perf_counter()
    _timed(runner, drafted)  # what is prepared at the first call for this many tokens does not count
    while len(seconds) < _ROUNDS[0] or (len(seconds) < _ROUNDS[1] and time.perf_counter() - begin < _SECONDS):
        seconds.append((_timed(runner, plain), _timed(runner, drafted)))
    one, many = (min(times) for times in zip(*seconds, strict=True))
    row = max(many - one, 0.0) / count
    return min(max(row / max(one - row, row / _RANGE[1]), _RANGE[0]), _RANGE[1]) if row else _RANGE[0]


def _step(runner: Runner, num_draft: int) -> Batch:
    """Return a decode step of one sequence, its second token, with a draft."""
    tokens, none = np.zeros(1 + num_draft, dtype=np.int32), np.zeros(0, dtype=np.int32)
    pages = np.arange(-(-(len(tokens) + 1) // runner.page_size), dtype=np.int32)
    request = SampleRequest(SamplingParams(), 0, 2, generated=tokens[:1], prompt=none, forbidden=())
    return Batch((Row(tokens, 1, pages, request, draft=num_draft),))


def _timed(runner: Runner, batch: Batch) -> float:
    begin = time.perf_counter()
    runner.execute(batch)
    return time.perf_counter() - begin
