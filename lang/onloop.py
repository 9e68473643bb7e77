"""Programs on an event loop, without a thread: each is a greenlet that gives the loop back where it waits.

`on_loop` makes an awaitable of any function, with all the reads in it::

    text = await on_loop(state.text)

`in_body` does the same for a coroutine, so that an `async def` program may also read without `await`.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent

from bough.errors import InvalidRequest
from bough.hub import HubBody
from bough.waiting import Body, Subscribe, current_body, in_async_program, running_loop, wake

T = TypeVar("T")


class LoopBody(Body):
    """A body on an event loop. It runs in the context of the task that awaits it, as a coroutine would."""

    def __init__(self, run: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(run)
        self.loop = loop
        self.gr_context = getcurrent().gr_context or copy_context()

    def suspend(self, subscribe: Subscribe) -> None:
        """Let the loop go on until `subscribe` has called back."""
        ready = self.loop.create_future()
        if subscribe(partial(wake, self.loop, ready)):
            self.await_(ready)

    def await_(self, awaitable: Awaitable[T]) -> T:
        """Let the loop go on until the awaitable is done; return its result or raise its error."""
        steps = awaitable.__await__()
        advance: Callable[[], Any] = partial(next, steps)
        while True:
            assert self.parent is not None, "who drives a body is its parent"
            try:
                asked = advance()
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value = self.parent.switch((getcurrent(), asked))
            except BaseException as error:  # the task was cancelled, or what it waited for failed
                advance = partial(steps.throw, error)
            else:
                advance = partial(steps.send, value)


async def on_loop(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function on the running loop; what it waits for, as a program's reads do, leaves the loop free."""
    result: T = await _driven(LoopBody(partial(function, *args, **kwargs), asyncio.get_running_loop()))
    return result


async def in_body(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await the coroutine that `make` returns; its own code may also read without awaiting."""
    body = LoopBody(lambda: body.await_(make()), asyncio.get_running_loop())
    token = in_async_program.set(True)
    try:
        result: T = await _driven(body)
        return result
    finally:
        in_async_program.reset(token)


def block_on(make: Callable[[], Coroutine[Any, Any, T]], name: str) -> T:
    """Run an `async def` program to its end, from code that is not async.

    Raises InvalidRequest in an event loop, which it would stop; a program that runs on that loop itself may.
    """
    body = current_body()
    if isinstance(body, LoopBody):
        return body.await_(in_body(make))
    if isinstance(body, HubBody):
        return body.run_coroutine(lambda: in_body(make))
    if running_loop() is not None:
        raise InvalidRequest(
            f"{name} is an async program: in a running event loop use `await {name}.arun(...)`, not run()"
        )
    return asyncio.run(in_body(make))


@types.coroutine
def _driven(body: LoopBody) -> Generator[Any, Any, Any]:
    """Run a body to its end; what it asks its loop for is asked by the task that awaits this."""
    body.parent = getcurrent()
    asked = body.switch()
    while not body.dead:
        waiting, future = asked  # the body, or a greenlet of its own
        try:
            value = yield future
        except BaseException as error:
            body.parent = getcurrent()
            asked = waiting.throw(error)
        else:
            body.parent = getcurrent()
            asked = waiting.switch(value)
    return asked
