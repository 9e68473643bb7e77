"""How a `State` is followed while it grows: its text, its variables, what happens in its run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from bough.errors import InvalidRequest
from bough.running import log_of
from bough.streaming import iterate, iterate_async, iterate_with_meta
from bough.variables import written

if TYPE_CHECKING:
    from bough.events import Event
    from bough.state import State


class Following:
    """The part of a state that is about those who read along."""

    __slots__ = ()

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Yield the text (or one variable's) as it comes, if the run streams; all at once if it does not.

        Any number of readers may follow, each from the beginning; together the chunks are the whole text.
        """
        state = cast("State", self)
        if state._feed is not None:
            return iterate(state, state._feed, var_name)
        return iter([state.text() if var_name is None else written(state._find(var_name))])

    @overload
    def text_async_iter(
        self, var_name: str | None = None, return_meta_data: Literal[False] = False
    ) -> AsyncIterator[str]: ...
    @overload
    def text_async_iter(
        self, var_name: str, return_meta_data: Literal[True]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]: ...
    def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """Yield the text (or one variable's) as it comes, leaving the event loop free.

        return_meta_data: yield pairs of a variable's text and what is known by then: a dict with the token_ids (and
        output_token_logprobs, where asked for) of this piece, completion_tokens so far, and finish_reason None. The
        last pair has what is left of the text, if anything, and all of `get_meta_info`.
        """
        if return_meta_data and var_name is None:
            raise InvalidRequest("return_meta_data needs the name of a variable", field="return_meta_data")
        state = cast("State", self)
        if state._feed is None:
            return _text_once(state, var_name, return_meta_data)
        if var_name is not None and return_meta_data:
            return iterate_with_meta(state, state._feed, var_name)
        return iterate_async(state, state._feed, var_name)

    def value_iter(self, name: str) -> Iterator[Any]:
        """Yield what a variable's value is known to be so far, while it is written; the last is the whole value.

        For a `gen` with a type that is written as JSON, plain lists, dicts, texts and numbers that grow (a number or a
        word once it is whole), then the value of the type: `[]`, `[{"name": "Ad"}]`, ..., `[Person("Ada")]`. For other
        types only the value; without a type the text as it grows. Raises Truncated at the end as `s[name]` does.
        """
        from bough.growth import growing

        return growing(cast("State", self), name)

    def value_async_iter(self, name: str) -> AsyncIterator[Any]:
        """Yield what a variable's value is known to be so far, leaving the event loop free; as `value_iter`."""
        from bough.growth import growing_async

        return growing_async(cast("State", self), name)

    def events(self, start: int = 0) -> Iterator[Event]:
        """Yield what happens in the whole run, on all branches, as it happens; from event number `start` on.

        Ends when nothing runs any more; in the body of the run itself, when nothing is in flight. Any number of readers
        may follow, each on its own. Raises InvalidRequest unless the run has `events=True` or `stream=True`::

            for event in program.run(question, stream=True).events():
                print(event.seq, event.kind, event.branch, event.text)
        """
        return log_of(cast("State", self)._interpreter.backend).read(start)

    def aevents(self, start: int = 0) -> AsyncIterator[Event]:
        """Yield the same as `events`, leaving the event loop free."""
        return log_of(cast("State", self)._interpreter.backend).aread(start)


async def _text_once(state: State, name: str | None, with_meta: bool) -> AsyncIterator[Any]:
    if name is None:
        yield await state.atext()
        return
    await state.get(name)
    text = written(state._find(name))
    yield (text, state.get_meta_info(name)) if with_meta else text
