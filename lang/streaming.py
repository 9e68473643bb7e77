"""Reading a state's text while it grows.

The program's body runs in one thread (or on an event loop), deltas arrive in another, and any number of readers follow.
Readers hold their own position in what there is so far, so no chunk can be lost or taken by another reader; a feed only
tells them that there is more. The walk over the text is written once, as a generator that yields None where it would
have to wait, and is driven by a waiting loop or by an awaiting one.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bough.backend import Delta
from bough.calls import GenCall, triples_of
from bough.errors import Cancelled, ProgramError
from bough.pieces import Item, Mark
from bough.strands import Strand, all_items
from bough.variables import LAZY, written
from bough.waiting import until, until_async

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

    from bough.state import State

T = TypeVar("T")

_body_of: Final[ContextVar[Run | None]] = ContextVar("bough_body_of", default=None)


class Feed:
    """Tells readers that a state has more to read. `maker` is the event loop that the body runs on, while it does."""

    __slots__ = ("_calls", "_lock", "maker", "version")

    def __init__(self, maker: AbstractEventLoop | None = None) -> None:
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self.maker = maker
        self.version = 0

    def notify(self) -> None:
        """Wake every reader."""
        with self._lock:
            self.version += 1
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def call_once(self, seen: int, call: Callable[[], None]) -> bool:
        """Call back at the next news. Returns False, and never calls, if there is something newer than `seen`."""
        with self._lock:
            if self.version != seen:
                return False
            self._calls.append(call)
            return True

    def wait(self, seen: int) -> None:
        """Return once there is something newer than `seen`."""
        until(partial(self.call_once, seen), self.maker)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return once the condition holds; whoever makes it hold notifies."""
        while True:
            seen = self.version  # read before the condition: what makes it hold in between is news
            if is_so():
                return
            self.wait(seen)

    async def wait_async(self, seen: int) -> None:
        """Return once there is something newer than `seen`, leaving the event loop free."""
        await until_async(partial(self.call_once, seen))


class Run:
    """A program's body that runs beside its readers, in a thread or on an event loop, and how it ended."""

    __slots__ = ("_feeds", "_lock", "_maker", "error", "finished", "task")

    def __init__(self, maker: AbstractEventLoop | None = None) -> None:
        self._lock = threading.Lock()
        self._feeds: list[Feed] = []
        self._maker = maker
        self.finished = False
        self.error: BaseException | None = None
        self.task: Task[None] | None = None
        """What runs the body on an event loop, which itself keeps only weak references."""

    def new_feed(self) -> Feed:
        """Return a feed that also tells when the body ends."""
        with self._lock:
            feed = Feed(None if self.finished else self._maker)
            self._feeds.append(feed)
        return feed

    def begin(self) -> None:
        """Note that the context this is called in, with what it starts, is the body: it never waits for itself."""
        _body_of.set(self)

    @property
    def is_here(self) -> bool:
        """Whether the caller is the body."""
        return _body_of.get() is self

    def finish(self, error: BaseException | None) -> None:
        """Record how the body ended, and tell all readers."""
        with self._lock:
            self.error = error
            self.finished = True
            feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.maker = None
            feed.notify()

    def reached(self, what: str) -> None:
        """Raise ProgramError if the body raised before it produced `what`."""
        if self.error is not None:
            error = self.error
            raise ProgramError(f"the program raised {type(error).__name__}: {error}, before {what}") from error


def iterate(state: State, feed: Feed, name: str | None) -> Iterator[str]:
    """Yield the text, or one variable's, as it comes."""
    steps = _steps(state, name)
    while True:
        seen = feed.version
        try:
            chunk = next(steps)
        except StopIteration:
            return
        if chunk is None:
            feed.wait(seen)
        elif chunk:
            yield chunk


def iterate_async(state: State, feed: Feed, name: str | None) -> AsyncIterator[str]:
    """Yield the text, or one variable's, as it comes, leaving the event loop free."""
    return _awaiting(_steps(state, name), feed)


def iterate_with_meta(state: State, feed: Feed, name: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield pieces of a variable's text with what is known by then; the last time with its whole meta information."""
    return _awaiting(_meta_steps(state, name), feed)


async def _awaiting(steps: Iterator[T | None], feed: Feed) -> AsyncIterator[T]:
    while True:
        seen = feed.version
        try:
            step = next(steps)
        except StopIteration:
            return
        if step is None:
            await feed.wait_async(seen)
        elif step:
            yield step


def _steps(state: State, name: str | None) -> Iterator[str | None]:
    return _text_steps(state) if name is None else _variable_steps(state, name)


def _text_steps(state: State) -> Iterator[str | None]:
    interpreter = state._interpreter
    for item in all_items(interpreter.trunk, Strand()):
        yield from _item_steps(state, item)
    position, strand = 0, interpreter.strand
    while True:
        if interpreter.strand is not strand:  # rewound: the stream goes on with what was appended since
            position, strand = 0, interpreter.strand
        finished = state._body_finished()  # read before the pieces: what is appended in between is seen
        items, before = strand.items, position
        while position < len(items):
            yield from _unless_rewound(state, strand, items[position])
            position += 1
        if finished:
            break
        if position == before:  # a turn that yielded read `finished` before a wait: look again rather than wait
            yield None
    state._raise_if_body_failed("its text was complete")


def _unless_rewound(state: State, strand: Strand, item: Item) -> Iterator[str | None]:
    try:
        yield from _item_steps(state, item)
    except Cancelled:
        if state._interpreter.strand is strand:
            raise


def _until_assigned(state: State, name: str) -> Iterator[None]:
    while name not in state:
        if state._body_finished() and name not in state:
            state._raise_unknown(name)
        yield None


def _variable_steps(state: State, name: str) -> Iterator[str | None]:
    yield from _until_assigned(state, name)
    value = state._variables[name]
    if isinstance(value, GenCall) and value.chunks is not None:
        yield from _item_steps(state, value)
        return
    if isinstance(value, LAZY):
        while not all(future.done() for future in value.futures()):
            yield None
    yield written(value)


def _meta_steps(state: State, name: str) -> Iterator[tuple[str, dict[str, Any]] | None]:
    yield from _until_assigned(state, name)
    value, length, num_tokens = state._variables[name], 0, 0
    if isinstance(value, GenCall) and value.chunks is not None:
        for delta in _delta_steps(value, value.chunks):
            if delta is None:
                yield None
                continue
            length += len(delta.text)
            num_tokens += len(delta.token_ids)
            yield delta.text, _meta_so_far(delta, num_tokens)
        yield value.text()[length:], state.get_meta_info(name)
        return
    if isinstance(value, LAZY):
        while not all(future.done() for future in value.futures()):
            yield None
    meta = state.get_meta_info(name)  # first: what has none is refused
    yield written(value), meta


def _meta_so_far(delta: Delta, num_tokens: int) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": None,
        "completion_tokens": num_tokens,
        "token_ids": list(delta.token_ids),
    }
    if delta.logprobs is not None:
        meta["output_token_logprobs"] = triples_of(delta.logprobs)
    return meta


def _item_steps(state: State, item: Item) -> Iterator[str | None]:
    if isinstance(item, str):
        yield item
        return
    if isinstance(item, Mark) and item.reply is None:
        state._interpreter.flush()
    if isinstance(item, GenCall) and item.chunks is not None:
        yield from _chunk_steps(item, item.chunks)
        return
    futures = (item.reply,) if isinstance(item, Mark) else item.futures()
    while not all(future is None or future.done() for future in futures):
        yield None
    yield item.text()


def _chunk_steps(call: GenCall, chunks: list[Delta]) -> Iterator[str | None]:
    length = 0
    for delta in _delta_steps(call, chunks):
        if delta is None:
            yield None
        else:
            length += len(delta.text)
            yield delta.text
    yield call.text()[length:]


def _delta_steps(call: GenCall, chunks: list[Delta]) -> Iterator[Delta | None]:
    position = 0
    while True:
        done = call.replies[0].done()  # read before the chunks: deltas arrive before the end
        before = position
        while position < len(chunks):
            yield chunks[position]
            position += 1
        if done:
            return
        if position == before:  # else the reader may have taken its time, and `done` be out of date
            yield None
