"""`IntVector`: int32 values that grow at the end, read as a numpy view without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class IntVector:
    """A growing int32 array; appending is amortised O(1), `view()` is O(1) and valid until the next growth."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, values: Sequence[int] | IntArray = (), capacity: int = 0) -> None:
        self._length = len(values)
        self._buffer: IntArray = np.empty(max(capacity, self._length), dtype=np.int32)
        if self._length:
            self._buffer[: self._length] = values

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return int(self._buffer[index])

    def __setitem__(self, index: int, value: int) -> None:
        if not 0 <= index < self._length:
            raise IndexError(index)
        self._buffer[index] = value

    def view(self, start: int = 0, stop: int | None = None) -> IntArray:
        """Return values [start, stop) as a view: do not keep it across an append."""
        return self._buffer[start : self._length if stop is None else min(stop, self._length)]

    def append(self, value: int) -> None:
        if self._length == len(self._buffer):
            self._grow(1)
        self._buffer[self._length] = value
        self._length += 1

    def extend(self, values: Sequence[int] | IntArray) -> None:
        count = len(values)
        self._grow(count)
        self._buffer[self._length : self._length + count] = values
        self._length += count

    def truncate(self, length: int) -> None:
        """Keep the first `length` values."""
        assert 0 <= length <= self._length, f"cannot truncate {self._length} values to {length}"
        self._length = length

    def _grow(self, count: int) -> None:
        need = self._length + count
        if need > len(self._buffer):
            grown = np.empty(max(need, 2 * len(self._buffer), 16), dtype=np.int32)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown


def common_prefix(left: IntArray, right: IntArray) -> int:
    """Return the number of leading values that agree."""
    length = min(len(left), len(right))
    if not length:
        return 0
    differ = left[:length] != right[:length]
    first = int(differ.argmax())
    return first if differ[first] else length
