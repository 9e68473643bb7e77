"""Batches on an event loop: `arun_batch`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import Any

from bough.batch import Batch
from bough.errors import InvalidRequest
from bough.items import ItemState
from bough.onloop import on_loop


class AsyncBatch:
    """What `arun_batch` returns: await it for the list of states, or iterate over them with `async for`, once."""

    def __init__(self, batch: Batch) -> None:
        self._batch: Batch | None = batch

    def __await__(self) -> Generator[Any, None, list[ItemState]]:
        return self._all().__await__()

    def __aiter__(self) -> AsyncIterator[ItemState]:
        return self._states()

    async def _all(self) -> list[ItemState]:
        async with contextlib.aclosing(self._states()) as states:
            return [state async for state in states]

    async def _states(self) -> AsyncGenerator[ItemState, None]:
        batch, self._batch = self._batch, None
        if batch is None:
            raise InvalidRequest("a batch is run once: this one was awaited or iterated before")
        runner = asyncio.get_running_loop().create_task(run_on_loop(batch))
        ordered: dict[int, ItemState] = {}
        try:
            for num_given in range(len(batch)):
                while True:
                    seen = batch.news.version  # read before looking: what comes in between is news
                    state = batch.ready(ordered, num_given)
                    if state is not None:
                        break
                    await batch.news.wait_async(seen)
                yield state
                batch.news.notify()  # what was started may have been bounded by this reader
        finally:
            batch.stop()
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)


async def run_on_loop(batch: Batch) -> None:
    """Run the items of a batch as tasks of this loop, until all are over or this is cancelled."""
    tasks: set[asyncio.Task[None]] = set()
    try:
        while not batch.book.is_over:
            seen = batch.news.version
            taken = batch.book.take(time.monotonic())
            if taken is None:
                with contextlib.suppress(asyncio.TimeoutError):  # then an item may be tried again
                    await asyncio.wait_for(batch.news.wait_async(seen), batch.book.patience_s(time.monotonic()))
                continue
            task = asyncio.get_running_loop().create_task(_run(batch, *taken))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except Exception as error:  # nothing of an item's own
        batch.failed(error)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(batch: Batch, index: int, attempt: int) -> None:
    try:
        state, (args, kwargs) = batch.call_of(index, attempt)
        await batch.program._attempt_on_loop(state, args, kwargs)
        await on_loop(batch.ended, state)
    except asyncio.CancelledError as error:
        batch.failed(error)
        raise
    except BaseException as error:  # nothing of the item's own: that is its result
        batch.failed(error)
        if not isinstance(error, Exception):
            raise
