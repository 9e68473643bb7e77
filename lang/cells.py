"""What a joined variable holds: one cell per branch, each with its value, its failure, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from bough.errors import BoughError
from bough.variables import Gathered, read


class Cells(Sequence[Any]):
    """The values of a variable in all branches of a join, in the order of the branches.

    `cells[i]` is None where branch i did not assign the variable, and raises where it failed; the others can be read
    all the same::

        forks.join("gather")
        print(s["draft"].values, s["draft"].errors)
    """

    __slots__ = ("_cells",)

    def __init__(self, cells: Sequence[object]) -> None:
        self._cells = list(cells)

    def __len__(self) -> int:
        return len(self._cells)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Cells: ...
    def __getitem__(self, index: int | slice) -> Any:
        """Return one branch's value, or the cells of some branches. Raises what went wrong in that branch."""
        return Cells(self._cells[index]) if isinstance(index, slice) else read(self._cells[index])

    @property
    def errors(self) -> list[BoughError | None]:
        """What went wrong in each branch, None where nothing did."""
        return [_attempt(cell)[1] for cell in self._cells]

    @property
    def values(self) -> list[Any]:
        """The values of the branches that assigned the variable and did not fail."""
        read_cells = [_attempt(cell) for cell in self._cells if cell is not None]
        return [value for value, error in read_cells if error is None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [repr(value) if error is None else repr(error) for value, error in map(_attempt, self._cells)]
        return f"[{', '.join(shown)}]"


class Dense(Gathered):
    """A variable that reads as `Cells`."""

    __slots__ = ()

    def value(self) -> Cells:
        """Return the cells, which are read one by one."""
        return Cells(self.cells)


def _attempt(cell: object) -> tuple[Any, BoughError | None]:
    try:
        return read(cell), None
    except BoughError as error:
        return None, error
