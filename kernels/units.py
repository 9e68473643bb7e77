"""Which rows read which keys together: the units of work of the native CPU attention, from the pages of a step.

Keys are cut into chunks of `CHUNK` absolute positions. Sequences whose pages are the same for a run of whole chunks
read that run as one unit; where they part, units of a deeper level go on. So the plan is the radix tree of the step's
sequences, cut at chunks, whatever tree the cache keeps::

    level 0      chunks 0..7 of a, b, c            chunks 0..2 of d
    level 1      8..9 of a     8 of b, c
    level 2                    9 of b, 9..10 of c

Tree decode after the idea of Hydragen (arXiv:2402.05099) and FastTree; the fixed chunks keep the order of every sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bough.kernels.layout import Int32Array, PagedLayout

CHUNK = 128
ROWS_PER_UNIT = 64
"""Most query tokens of a unit: enough to pay for reading a chunk, few enough to spread a prefill over threads."""

_Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a step; all arrays int32.

    rows: query tokens, one unit's after another's. fields: (num_units, 7), each (index into kv_indices of the pages,
    first chunk, end chunk, begin and end in `rows`, 1 if its rows have no state yet, 1 if what it leaves is the
    result). levels: (num_levels + 1,), the units of level i are levels[i]:levels[i + 1]; a row is in at most one unit
    of a level, and in one that is last.
    """

    rows: Int32Array
    fields: Int32Array
    levels: Int32Array

    @property
    def num_shared(self) -> int:
        """How many units end where their rows part."""
        return int((self.fields[:, 6] == 0).sum())

    def of(self, tokens: npt.NDArray[np.int64], num_tokens: int) -> Units:
        """Return the units with some of the `num_tokens` queries alone, `tokens` ascending, which are 0, 1, ... there.

        What a row reads, and in which order, stays what it is.
        """
        place = np.full(num_tokens, -1, dtype=np.int32)
        place[tokens] = np.arange(len(tokens), dtype=np.int32)
        rows = place[self.rows]
        is_kept = rows >= 0
        kept_before = np.concatenate([[0], np.cumsum(is_kept)]).astype(np.int32)
        fields = self.fields.copy()
        fields[:, 3:5] = kept_before[fields[:, 3:5]]
        is_used = fields[:, 3] < fields[:, 4]
        used_before = np.concatenate([[0], np.cumsum(is_used)]).astype(np.int32)
        return Units(rows[is_kept], fields[is_used], used_before[self.levels])


def plan_units(layout: PagedLayout, *, share: bool = True) -> Units:
    """Return the units of a step. share: let sequences read the chunks they have in common together."""
    builder = _Builder(layout)
    seqs = np.arange(len(layout.kv_lens))
    if share and len(seqs) > 1 and can_share(layout.page_size):
        _share(builder, layout, seqs)
    else:
        builder.end(seqs, 0, 0)
    return builder.units()


def can_share(page_size: int) -> bool:
    """Whether sequences in such pages can share chunks: each is whole pages, or lies in one."""
    return CHUNK % page_size == 0 or page_size % CHUNK == 0


def _share(builder: _Builder, layout: PagedLayout, seqs: npt.NDArray[np.intp]) -> None:
    names = _names(layout)
    todo = [(seqs, 0, 0)]
    while todo:
        members, begin, level = todo.pop()
        _, group, sizes = np.unique(names[members, begin], return_inverse=True, return_counts=True)
        builder.end(members[sizes[group] == 1], begin, level)
        for index in np.flatnonzero(sizes > 1):
            together = members[group == index]
            same = (names[together, begin:] == names[together[0], begin:]).all(0)
            end = begin + (int(same.argmin()) if not same.all() else len(same))
            builder.share(together, begin, end, level)
            todo.append((together, end, level + 1))


def _names(layout: PagedLayout) -> _Int64Array:
    """Return (num_seqs, chunks + 1): a number for the pages of each whole chunk, and one of its own for every other.

    Two chunks of one column have the same number if and, but for one chance in 2^62, only if their pages are the same.
    """
    complete = layout.kv_lens // CHUNK
    width = int(complete.max())
    names = np.repeat(-1 - np.arange(len(complete), dtype=np.int64)[:, None], width + 1, axis=1)
    if width:
        seq = np.repeat(np.arange(len(complete)), complete)
        chunk = np.arange(len(seq)) - np.repeat(np.cumsum(complete) - complete, complete)
        pages_per_chunk = max(1, CHUNK // layout.page_size)
        at = layout.kv_indptr[seq] + chunk * CHUNK // layout.page_size
        pages = layout.kv_indices[at[:, None] + np.arange(pages_per_chunk)].astype(np.int64)
        names[seq, chunk] = _hashed(pages) & np.iinfo(np.int64).max
    return names


def _hashed(pages: _Int64Array) -> _Int64Array:
    """Return a 64-bit number for each row, by multiplication and addition modulo 2^64."""
    hashed = np.zeros(len(pages), dtype=np.uint64)
    for column in pages.astype(np.uint64).T:
        hashed = (hashed ^ (column + np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
        hashed ^= hashed >> np.uint64(32)
    return hashed.view(np.int64)


class _Builder:
    """Collects units level by level."""

    def __init__(self, layout: PagedLayout) -> None:
        self._layout = layout
        self._levels: list[list[tuple[Int32Array, Int32Array]]] = []  # (rows, fields with positions among these rows)

    def share(self, seqs: npt.NDArray[np.intp], begin: int, end: int, level: int) -> None:
        """Let all queries of some sequences read the chunks [begin, end), which they have in common."""
        rows = np.concatenate([self._queries(b) for b in seqs])
        self._add(level, rows, int(self._layout.kv_indptr[seqs[0]]), begin, end, is_last=False)

    def end(self, seqs: npt.NDArray[np.intp], begin: int, level: int) -> None:
        """Let some sequences read what is left from chunk `begin` on, each its own."""
        layout = self._layout
        num_new = np.diff(layout.qo_indptr)[seqs]
        single = seqs[num_new == 1]
        if len(single):
            fields = np.zeros((len(single), 7), dtype=np.int32)
            fields[:, 0] = layout.kv_indptr[single]
            fields[:, 1] = begin
            fields[:, 2] = -(-layout.kv_lens[single] // CHUNK)
            fields[:, 3] = np.arange(len(single))
            fields[:, 4] = fields[:, 3] + 1
            fields[:, 5], fields[:, 6] = begin == 0, 1
            self._level(level).append((layout.qo_indptr[single], fields))
        for b in seqs[num_new > 1]:
            self._end_prefill(int(b), begin, level)

    def _end_prefill(self, seq: int, begin: int, level: int) -> None:
        """Cut a sequence's queries into units; the later ones see more, and begin first."""
        layout = self._layout
        rows, page = self._queries(seq), int(layout.kv_indptr[seq])
        past = int(layout.kv_lens[seq]) - len(rows)
        cuts = range(0, len(rows), ROWS_PER_UNIT)
        for at in reversed(cuts):
            part = rows[at : at + ROWS_PER_UNIT]
            self._add(level, part, page, begin, -(-(past + at + len(part)) // CHUNK), is_last=True)

    def _queries(self, seq: int) -> Int32Array:
        indptr = self._layout.qo_indptr
        return np.arange(indptr[seq], indptr[seq + 1], dtype=np.int32)

    def _add(self, level: int, rows: Int32Array, page: int, begin: int, end: int, *, is_last: bool) -> None:
        begins = np.arange(0, len(rows), ROWS_PER_UNIT, dtype=np.int32)
        fields = np.empty((len(begins), 7), dtype=np.int32)
        fields[:, :3] = page, begin, max(begin, end)
        fields[:, 3], fields[:, 4] = begins, np.minimum(begins + ROWS_PER_UNIT, len(rows))
        fields[:, 5:] = begin == 0, is_last
        self._level(level).append((rows, fields))

    def _level(self, level: int) -> list[tuple[Int32Array, Int32Array]]:
        while len(self._levels) <= level:
            self._levels.append([])
        return self._levels[level]

    def units(self) -> Units:
        """Return what was collected."""
        parts = [part for level in self._levels for part in level]
        starts = np.cumsum([0, *(len(rows) for rows, _ in parts[:-1])]).astype(np.int32)
        for (_, fields), start in zip(parts, starts, strict=True):
            fields[:, 3:5] += start
        counts = [sum(len(fields) for _, fields in level) for level in self._levels]
        return Units(
            np.concatenate([rows for rows, _ in parts]).astype(np.int32),
            np.concatenate([fields for _, fields in parts]),
            np.cumsum([0, *counts]).astype(np.int32),
        )
