"""How much of a run's time goes to the cache's bookkeeping: its calls timed one by one, in a run that hits nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from models import FIRST_WORD, VOCAB_SIZE

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence

# match, lease, insert, evict
_CALLS: Final = ("matched_len", "has_room", "acquire", "reserve", "publish", "release", "trim")
_POOL_TOKENS: Final = 8_192  # fewer than the runs bring: what is old is evicted


class Bookkeeping:
    """One runner and one cache, in this process; the cache stays full of what earlier runs left."""

    def __init__(self, model: Path) -> None:
        self._runner: Runner = load_runner(model, dtype="bfloat16", max_total_tokens=_POOL_TOKENS)
        self._cache = PrefixCache(self._runner.num_pages, self._runner.page_size)
        self._spent_s = 0.0
        for name in _CALLS:
            setattr(self._cache, name, self._timed(getattr(self._cache, name)))
        self._scheduler = Scheduler(self._cache, token_budget=1024, max_running=64)
        self._random = np.random.default_rng(0)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self._spent_s += time.perf_counter() - begin

        return timed

    def run(self, prompts: int, prompt: int, answer: int) -> float:
        """Prefill and decode random prompts of that length; return the bookkeeping's share of the time."""
        begin, self._spent_s = time.perf_counter(), 0.0
        for _ in range(prompts):
            ids = self._random.integers(FIRST_WORD, VOCAB_SIZE - 1, prompt).astype(np.int32)
            self._scheduler.submit(Sequence(ids, params=SamplingParams(max_tokens=answer, temperature=0.0)))
        while (step := self._scheduler.plan()) is not None:
            for outcome in self._scheduler.commit(step, self._runner.execute(step.batch)):
                if len(outcome.sequence.generated) == answer:
                    self._scheduler.finish(outcome.sequence)
        return self._spent_s / (time.perf_counter() - begin)
