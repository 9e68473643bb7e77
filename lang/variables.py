"""What a state's variables hold until they are read: calls, what is computed of calls, and stretches of its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from bough.calls import Call, GenCall, SelectCall
from bough.pieces import Item, futures_of, text_of


class Derived:
    """A variable computed from the text of a call when it is read."""

    __slots__ = ("_call", "_make")

    def __init__(self, call: Call, make: Callable[[str], str]) -> None:
        self._call = call
        self._make = make

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return self._call.futures()

    def value(self) -> Any:
        """Wait for the call, and compute; a list for n > 1."""
        value = self._call.value()
        return [self._make(text) for text in value] if isinstance(value, list) else self._make(value)

    def meta(self) -> Any:
        """Return the call's meta information."""
        return self._call.meta()


class Captured:
    """A variable that a capture in a gen's grammar names."""

    __slots__ = ("_call", "_name")

    def __init__(self, call: GenCall, name: str) -> None:
        self._call = call
        self._name = name

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return self._call.futures()

    def value(self) -> Any:
        """Wait for the gen, and return what was captured."""
        return self._call.captured(self._name)

    def meta(self) -> Any:
        """Return the gen's meta information."""
        return self._call.meta()


class Gathered:
    """A variable that a join collected: one value per branch, None where a branch did not assign it."""

    __slots__ = ("cells",)

    def __init__(self, cells: Sequence[object]) -> None:
        self.cells = cells

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return [future for cell in self.cells if isinstance(cell, LAZY) for future in cell.futures()]

    def value(self) -> Sequence[Any]:
        """Return the list. Raises the failure of the first branch that failed."""
        return [read(cell) for cell in self.cells]

    def meta(self) -> list[Any]:
        """Return each branch's meta information, None where there is none."""
        return [
            cell.meta() if isinstance(cell, (GenCall, SelectCall, Derived, Captured, Gathered)) else None
            for cell in self.cells
        ]


class Span:
    """A variable that names a stretch of a state's own text."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: Sequence[Item]) -> None:
        self.pieces = pieces

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return [future for item in self.pieces for future in futures_of(item)]

    def value(self) -> str:
        """Wait for the text."""
        return text_of(self.pieces)


LAZY = (GenCall, SelectCall, Derived, Captured, Gathered, Span)


def variables_of(call: Call) -> Iterator[tuple[str, GenCall | SelectCall | Captured]]:
    """Yield the variables that a call assigns: its own name, and the captures of its grammar."""
    if call.name is not None:
        yield call.name, call
    if isinstance(call, GenCall) and call.constraint is not None:
        for name in call.constraint.names or ():
            yield name, Captured(call, name)


def read(value: object) -> Any:
    """Return a variable's value, waiting for it if need be."""
    return value.value() if isinstance(value, LAZY) else value


def written(value: object) -> str:
    """Return a variable's value as text: of a gen what the model wrote, waiting for it if need be."""
    if isinstance(value, GenCall) and len(value.replies) == 1:
        return value.text()
    return str(read(value))


def pending(value: object) -> bool:
    """Return whether reading the value of a variable would wait."""
    return isinstance(value, LAZY) and any(not future.done() for future in value.futures())
