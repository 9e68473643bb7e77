"""`PageAllocator`: the free pages, and how many holders each other page has.

A page is held by every row (a running sequence's page table) and every tree node that names it. It is free exactly
when nobody holds it: freeing happens in one place, `release`, and cannot happen while anybody still reads the page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bough.runtime.lifecycle import PageState
from bough.runtime.vector import IntArray


class PageAllocator:
    """Hands out pages 0 .. num_pages - 1 and counts their holders.

    A page released while a step is in flight, which may still read or write it, waits in limbo until that step is
    retired. (One step at a time for now: nothing is released in between, and the fence costs nothing.)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._limbo: list[int] = []
        self._is_step_in_flight = False
        self._holders: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages, each with one holder; None, and nothing taken, if there are not that many."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        self._holders[pages] = 1
        return pages

    def hold(self, pages: Sequence[int] | IntArray) -> None:
        """Add a holder to each page (each named once)."""
        if len(pages):
            index = np.asarray(pages, dtype=np.int32)
            assert (self._holders[index] > 0).all(), "a free page cannot get a second holder"
            self._holders[index] += 1

    def release(self, pages: Sequence[int] | IntArray) -> IntArray:
        """Take a holder from each page (each named once); return those that became free."""
        index = np.asarray(pages, dtype=np.int32)
        if not len(index):
            return index
        counts = self._holders[index] - 1
        assert (counts >= 0).all(), "a page was released more often than it was held"
        self._holders[index] = counts
        freed: IntArray = index[counts == 0]
        (self._limbo if self._is_step_in_flight else self._free).extend(freed.tolist())
        return freed

    def begin_step(self) -> None:
        """From now on, what is released is not free before `retire_step`."""
        self._is_step_in_flight = True

    def retire_step(self) -> None:
        """The step in flight will not touch pages any more; idempotent."""
        self._is_step_in_flight = False
        self._free.extend(self._limbo)
        self._limbo.clear()

    def state(self, page: int) -> PageState:
        """Return where a page is."""
        if self._holders[page]:
            return PageState.HELD
        return PageState.LIMBO if page in self._limbo else PageState.FREE

    def holders(self) -> npt.NDArray[np.int32]:
        """Return a copy of the holder counts, (num_pages,), for checks."""
        return self._holders.copy()

    def check(self) -> None:
        """Raise AssertionError unless the free list is exactly the pages without a holder, each once."""
        free = np.sort(np.asarray(self._free + self._limbo, dtype=np.int64))
        assert np.array_equal(free, np.flatnonzero(self._holders == 0)), "free list and holder counts disagree"
