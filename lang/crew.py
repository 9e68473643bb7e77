"""Threads for a program's own functions, that never keep the interpreter from ending.

A `ThreadPoolExecutor` would: at exit Python waits for its threads, so a tool that hangs would hang the whole program
after the run that called it had timed out.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Crew:
    """At most `size` daemon threads that carry out calls in order; they end when there is nothing left to do."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Return the future of a call; cancelled before it began, the call is not made."""
        future: Future[T] = Future()
        self._waiting.put((future, call))
        with self._lock:
            if self._num_threads < self._size:
                self._num_threads += 1
                threading.Thread(target=self._work, name="bough-tool", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting.empty():
                    self._num_threads -= 1
                    return
                future, call = self._waiting.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
