"""`PageAllocator`: the free pages, and how many holders each other page has.

A page is held by every tree node that names it and by the row (a running sequence's page table) that writes it. It is
free exactly when nobody holds it: freeing happens in one place, `release`, and cannot happen while anybody still reads
the page.

Counts are Python integers in a list. A step of the model leaves nothing of numpy in the processor's caches, and its
first call there costs 25 us; so long a loop over 500 pages takes, and most calls name one page or ten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt

from bough.runtime.lifecycle import PageState


class PageAllocator:
    """Hands out pages 0 .. num_pages - 1 and counts their holders.

    A page released while steps are in flight, which may still read or write it, waits in limbo until the newest of
    them is retired; steps end in the order in which they began. So whoever gets a page writes it in a step that is
    launched after all that touched it before have ended.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._limbo: deque[list[int]] = deque()  # one list for each step in flight, oldest first
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_steps(self) -> int:
        """How many steps are in flight."""
        return len(self._limbo)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages, each with one holder; None, and nothing taken, if there are not that many."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        holders = self._holders
        for page in pages:
            holders[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Add a holder to each page."""
        holders = self._holders
        for page in pages:
            assert holders[page] > 0, "a free page cannot get a second holder"
            holders[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """Take a holder from each page; return those that became free."""
        holders = self._holders
        freed: list[int] = []
        for page in pages:
            count = holders[page] = holders[page] - 1
            assert count >= 0, "a page was released more often than it was held"
            if not count:
                freed.append(page)
        (self._limbo[-1] if self._limbo else self._free).extend(freed)
        return freed

    def begin_step(self) -> None:
        """One more step is in flight: what is released from now on is not free before it is retired."""
        self._limbo.append([])

    def retire_step(self) -> None:
        """The oldest step in flight, if there is one, will not touch pages any more."""
        if self._limbo:
            self._free.extend(self._limbo.popleft())

    def state(self, page: int) -> PageState:
        """Return where a page is."""
        if self._holders[page]:
            return PageState.HELD
        return PageState.LIMBO if any(page in pages for pages in self._limbo) else PageState.FREE

    def holders(self) -> npt.NDArray[np.int32]:
        """Return a copy of the holder counts, (num_pages,), for checks."""
        return np.array(self._holders, dtype=np.int32)

    def check(self) -> None:
        """Raise AssertionError unless the free list is exactly the pages without a holder, each once."""
        free = np.sort(np.asarray([*self._free, *chain(*self._limbo)], dtype=np.int64))
        assert np.array_equal(free, np.flatnonzero(self.holders() == 0)), "free list and holder counts disagree"
