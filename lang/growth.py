"""Values while they are written: what a stream of text is known to mean so far."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from bough.calls import GenCall
from bough.partial import NOTHING, partial_json

if TYPE_CHECKING:
    from bough.state import State


class _Growth:
    """The text of a variable so far, and what of it was told."""

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._name = name
        self._text = ""
        self._told: Any = NOTHING

    def feed(self, chunk: str) -> Any:
        """Take more of the text in; return the value so far if it is news, else NOTHING."""
        self._text += chunk
        return self.news(self._value())

    def news(self, value: Any) -> Any:
        """Return the value if it is another than was told last, else NOTHING."""
        if value is NOTHING or (type(value) is type(self._told) and value == self._told):
            return NOTHING
        self._told = value
        return value

    def _value(self) -> Any:
        call = self._state._variables.get(self._name)  # there, because its text has begun to come
        if not isinstance(call, GenCall) or call.chunks is None or len(call.replies) > 1:
            return NOTHING
        shape = None if call.constraint is None else call.constraint.shape
        if shape is None or shape.type is str:
            return self._text
        return partial_json(self._text) if shape.is_json else NOTHING


def growing(state: State, name: str) -> Iterator[Any]:
    """Yield the value so far whenever there is more of it; the last is the whole value."""
    growth = _Growth(state, name)
    for chunk in state.text_iter(name):
        value = growth.feed(chunk)
        if value is not NOTHING:
            yield value
    value = growth.news(state[name])
    if value is not NOTHING:
        yield value


async def growing_async(state: State, name: str) -> AsyncIterator[Any]:
    """Yield the value so far whenever there is more of it; the last is the whole value."""
    growth = _Growth(state, name)
    async for chunk in state.text_async_iter(name):
        value = growth.feed(chunk)
        if value is not NOTHING:
            yield value
    value = growth.news(await state.get(name))
    if value is not NOTHING:
        yield value
