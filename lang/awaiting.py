"""The reads of a state for code that awaits: each waits as its namesake without the `a`, and leaves the loop free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bough.variables import LAZY, Span, read
from bough.waiting import wait_async


class AsyncReads:
    """What a `State` can be awaited for.

    ::

        @bo.function
        async def compare(s, question):
            s += bo.user(question)
            forks = s.fork(2)
            forks += bo.assistant(bo.gen("draft"))
            await forks.ajoin()
            first, second = await s.get("draft")
            return len(first) - len(second)

        state = await compare.arun("Why is the sky blue?", backend=backend)
        print(state.ret_value, await state.atext())
    """

    __slots__ = ()

    if TYPE_CHECKING:  # the state's own
        _variables: dict[str, Any]

        def __getitem__(self, name: str) -> Any: ...
        def get_meta_info(self, name: str) -> Any: ...
        def text(self) -> str: ...
        def messages(self) -> list[dict[str, str]]: ...
        def sync(self) -> None: ...
        def error(self) -> BaseException | None: ...
        def tree(self) -> str: ...
        @property
        def ret_value(self) -> Any: ...

    async def get(self, name: str) -> Any:
        """Wait for a variable and return its value, as `s[name]` does. Raises there what went wrong."""
        value = self._variables.get(name)
        if isinstance(value, LAZY) and not isinstance(value, Span):  # the most common wait needs no greenlet
            for future in value.futures():
                await wait_async(future)
            return read(value)
        return await _on_loop(self.__getitem__, name)

    async def aget(self, name: str) -> Any:
        """Wait for a variable and return its value; the same as `get`."""
        return await self.get(name)

    async def aget_meta_info(self, name: str) -> Any:
        """Wait for a gen or select, and return what it cost and why it ended; see `get_meta_info`."""
        return await _on_loop(self.get_meta_info, name)

    async def atext(self) -> str:
        """Wait for the whole text; see `text`."""
        text: str = await _on_loop(self.text)
        return text

    async def amessages(self) -> list[dict[str, str]]:
        """Wait for the closed messages; see `messages`."""
        messages: list[dict[str, str]] = await _on_loop(self.messages)
        return messages

    async def async_(self) -> None:
        """Wait until everything appended so far is done, well or not; see `sync`."""
        await _on_loop(self.sync)

    async def aerror(self) -> BaseException | None:
        """Wait until everything appended so far is done; return what went wrong first, or None; see `error`."""
        error: BaseException | None = await _on_loop(self.error)
        return error

    async def aret_value(self) -> Any:
        """Wait until the program's body has ended, if it runs beside this; return what it returned."""
        return await _on_loop(lambda: self.ret_value)

    async def atree(self) -> str:
        """Wait for the run and draw it as text; see `tree`."""
        drawn: str = await _on_loop(self.tree)
        return drawn


async def _on_loop(function: Any, *args: Any) -> Any:
    from bough.onloop import on_loop  # asyncio is not imported before somebody awaits

    return await on_loop(function, *args)
