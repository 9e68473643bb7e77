"""Which runs of keys the sequences of a step share, found from their pages: the part of the radix tree in use.

Sequences share a run exactly where their page ids are equal. So nothing of the cache has to be known here, and a split
of a tree node in use, or a page that was copied on write, shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Int32Array = npt.NDArray[np.int32]
_FIRST_COMPARED = 64  # pages; the span doubles as long as all agree


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [begin, end) whose slots the sequences `seqs` have in common.

    parent: index of the segment that ends where this one begins, -1 for a root. A sequence's segments, from root to
    leaf, cover its positions; it may end inside its last one where longer sequences go on in the same pages.
    """

    begin: int
    end: int
    seqs: tuple[int, ...]
    parent: int


def find_segments(
    kv_indptr: _Int32Array, kv_indices: _Int32Array, kv_lens: _Int32Array, page_size: int, seqs: Sequence[int]
) -> list[Segment]:
    """Return the segments of `seqs`, parents before children. Arguments as in `attention.PagedLayout`.

    Costs one comparison of every page id that is shared, and a dictionary entry for each sequence and fork.
    """
    segments: list[Segment] = []
    pending: list[tuple[list[int], int, int]] = [(list(seqs), 0, -1)]  # (sequences, begin, parent)
    while pending:
        group, begin, parent = pending.pop()
        for members in _by_page(group, begin, kv_indptr, kv_indices, kv_lens, page_size):
            longest = max(int(kv_lens[seq]) for seq in members)
            end = longest
            if len(members) > 1:
                num_pages = _num_common_pages(members, begin // page_size, kv_indptr, kv_indices, kv_lens, page_size)
                end = min(longest, num_pages * page_size)
                pending.append((members, end, len(segments)))
            segments.append(Segment(begin, end, tuple(members), parent))
    return segments


def _by_page(
    group: list[int],
    begin: int,
    kv_indptr: _Int32Array,
    kv_indices: _Int32Array,
    kv_lens: _Int32Array,
    page_size: int,
) -> list[list[int]]:
    """Return the sequences that reach beyond `begin`, put together by the page they hold there."""
    by_page: dict[int, list[int]] = {}
    for seq in group:
        if kv_lens[seq] > begin:
            page = int(kv_indices[kv_indptr[seq] + begin // page_size])
            by_page.setdefault(page, []).append(seq)
    return list(by_page.values())


def _num_common_pages(
    members: list[int],
    first: int,
    kv_indptr: _Int32Array,
    kv_indices: _Int32Array,
    kv_lens: _Int32Array,
    page_size: int,
) -> int:
    """Return how many pages from the start all members have in common, given that pages 0..first are."""
    common = min(-(-int(kv_lens[seq]) // page_size) for seq in members)
    base = int(kv_indptr[members[0]])
    for seq in members[1:]:
        other = int(kv_indptr[seq])
        done, span = first + 1, _FIRST_COMPARED
        while done < common:
            stop = min(done + span, common)
            differs = kv_indices[base + done : base + stop] != kv_indices[other + done : other + stop]
            if differs.any():
                common = done + int(differs.argmax())
            done, span = stop, 2 * span
    return common
