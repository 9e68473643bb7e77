"""A thread with an event loop, for `async def` programs that code on other threads waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from bough.errors import Cancelled
from bough.waiting import wait

T = TypeVar("T")


class LoopThread:
    """One event loop in a daemon thread, until it is stopped."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._is_stopped = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there and wait for its result; if the wait is ended, so is the coroutine."""
        with self._lock:
            if self._is_stopped:
                raise Cancelled("the event loop of this program was stopped")
            future = asyncio.run_coroutine_threadsafe(make(), self._loop)
        try:
            wait(future)
        except BaseException:
            future.cancel()
            raise
        return future.result()

    def stop(self) -> None:
        """Cancel what runs, and end the thread; does not wait for it."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                self._loop.call_soon_threadsafe(self._loop.stop)

    def _work(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            while left := asyncio.all_tasks(loop):
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(left))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
