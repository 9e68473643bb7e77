"""The one place where the language waits: for a future of the backend, or for news of a running program.

A plain thread sleeps. A *body*, which is a program that shares its thread with others, gives the thread up instead: it
is a greenlet, and switches to whoever runs it (onloop.py on an event loop, hub.py in a batch) until what it waits for
is there. So the same program, with the same reads, is sequential code in a thread and costs no thread elsewhere.
"""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from greenlet import getcurrent, greenlet

from bough.errors import BlockingRead

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from asyncio import Future as LoopFuture

Subscribe: TypeAlias = Callable[[Callable[[], None]], bool]
"""Takes what to call, once and from any thread, when the wait is over; returns False if it is over already."""

in_async_program: Final[ContextVar[bool]] = ContextVar("bough_in_async_program", default=False)
"""Whether this code belongs to an `async def` program: its tasks must await, and not stop the loop they run on."""


class Body(greenlet):
    """Code that shares its thread: where it waits, its parent greenlet goes on until it may continue."""

    @abstractmethod
    def suspend(self, subscribe: Subscribe) -> None:
        """Switch to who runs this body, and return when `subscribe` has called back."""


def current_body() -> Body | None:
    """Return the body that is running here, or None in a plain thread."""
    at: Any = getcurrent()
    while at is not None and not isinstance(at, Body):  # the body may run greenlets of its own
        at = at.parent
    return at


def wait(future: Future[Any]) -> None:
    """Return once the future is done, well or not."""
    if future.done():
        return
    body = current_body()
    if body is None:
        _check_may_block(None)
        future.exception()
    else:
        body.suspend(partial(when_done, future))


def until(subscribe: Subscribe, maker: AbstractEventLoop | None = None) -> None:
    """Return once `subscribe` has called back. `maker` is the loop that brings it about: it cannot be waited for on
    its own thread."""
    body = current_body()
    if body is not None:
        body.suspend(subscribe)
        return
    _check_may_block(maker)
    over = threading.Event()
    if subscribe(over.set):
        over.wait()


async def wait_async(future: Future[Any]) -> None:
    """Return once the future is done, well or not, leaving the event loop free; a cancelled wait leaves it alone."""
    if not future.done():
        await until_async(partial(when_done, future))


async def until_async(subscribe: Subscribe) -> None:
    """Return once `subscribe` has called back, leaving the event loop free."""
    import asyncio

    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    if subscribe(partial(wake, loop, ready)):
        await ready


def wake(loop: AbstractEventLoop, ready: LoopFuture[None]) -> None:
    """Complete a future of a loop, from any thread; nobody waits for it any more if the loop was closed."""
    try:
        loop.call_soon_threadsafe(_complete, ready)
    except RuntimeError:
        if not loop.is_closed():
            raise


def running_loop() -> AbstractEventLoop | None:
    """Return the event loop that runs in this thread, or None."""
    asyncio = sys.modules.get("asyncio")  # who has not imported it runs no event loop, and need not pay its 35 ms
    return None if asyncio is None else asyncio._get_running_loop()


def when_done(future: Future[Any], call: Callable[[], None]) -> bool:
    future.add_done_callback(lambda _: call())
    return True


def _complete(ready: LoopFuture[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _check_may_block(maker: AbstractEventLoop | None) -> None:
    """Raise BlockingRead where blocking this thread would stop the event loop that has to go on."""
    loop = running_loop()
    if loop is not None and (loop is maker or in_async_program.get()):
        raise BlockingRead(
            "this is not computed yet, and waiting for it here would stop the event loop: await it instead, with "
            "`await s.get(name)`, `await s.atext()`, `await s.async_()` (or another of the a... methods), "
            "`await forks.ajoin()` or `async for chunk in s.text_async_iter()`"
        )
