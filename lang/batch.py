"""Runs many items with a bounded number in flight; the results come in the order of the items."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Final

from bough.errors import InvalidRequest
from bough.state import State

MAX_AUTO_THREADS: Final = 128
"""Most items in flight with num_threads="auto". A thread only waits here; 128 keep a GPU runtime busy."""


def run_batch(jobs: Sequence[Callable[[], State]], num_threads: int | str, progress_bar: bool) -> list[State]:
    """Run the jobs, each in the context of the caller; return their states in order."""
    threads = _threads(num_threads, len(jobs))
    if not jobs:
        return []
    with ThreadPoolExecutor(threads, thread_name_prefix="bough-batch") as pool:
        futures = [pool.submit(contextvars.copy_context().run, job) for job in jobs]
        try:
            if progress_bar:
                _show_progress(futures)
            return [future.result() for future in futures]
        except BaseException:  # an interrupt: start nothing more, then let it pass
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _threads(num_threads: int | str, size: int) -> int:
    if num_threads == "auto":
        return max(1, min(size, MAX_AUTO_THREADS))
    if not isinstance(num_threads, int) or isinstance(num_threads, bool) or num_threads < 1:
        raise InvalidRequest(f'num_threads must be "auto" or at least 1, got {num_threads!r}', field="num_threads")
    return max(1, min(size, num_threads))


def _show_progress(futures: Sequence[Future[State]]) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    for _ in tqdm(as_completed(futures), total=len(futures)):
        pass
