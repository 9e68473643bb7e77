"""`Var[T]`: a variable of which a type checker knows the type."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from bough.calls import GenCall
from bough.waiting import wait_async

T = TypeVar("T")


class Var(Generic[T]):
    """The result of one `s.gen(T, ...)`, there once it is computed."""

    __slots__ = ("_call",)

    def __init__(self, call: GenCall) -> None:
        self._call = call

    def __repr__(self) -> str:
        done = all(future.done() for future in self._call.futures())
        return f"<variable {self._call.name!r}, {'computed' if done else 'not computed yet'}>"

    @property
    def value(self) -> T:
        """Wait for the value. Raises there what went wrong: Truncated, InvalidValue, or what the backend reports."""
        return cast(T, self._call.value())

    async def get(self) -> T:
        """Wait for the value, leaving the event loop free."""
        for future in self._call.futures():
            await wait_async(future)
        return self.value

    @property
    def text(self) -> str:
        """Wait for the text that the value was read from."""
        return self._call.text()

    @property
    def meta(self) -> Any:
        """Wait for what the gen cost and why it ended; see `State.get_meta_info`."""
        return self._call.meta()
