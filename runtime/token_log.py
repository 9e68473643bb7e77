"""`TokenLog`: the token ids of a branch, shared with its forks.

The text of a branch is the truth; cached KV is only a copy of what it implies. So a branch holds ids, never pages: it
can be idle, forked, cut or forgotten without touching the cache, and resumed after its KV was evicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bough.runtime.vector import IntArray, IntVector

_MAX_SEGMENTS = 32


class TokenLog:
    """Token ids in sealed segments that forks share, followed by own ones. Fork is O(own tail), flat in length."""

    __slots__ = ("_own", "_sealed", "_sealed_len")

    def __init__(self, sealed: tuple[IntArray, ...] = (), sealed_len: int = 0) -> None:
        self._sealed = sealed
        self._sealed_len = sealed_len
        self._own: IntVector | None = None

    def __len__(self) -> int:
        return self._sealed_len + (len(self._own) if self._own is not None else 0)

    def extend(self, token_ids: Sequence[int] | IntArray) -> None:
        """Append ids."""
        if len(token_ids):
            if self._own is None:
                self._own = IntVector()
            self._own.extend(token_ids)

    def fork(self) -> TokenLog:
        """Return a log with the same ids that goes its own way from here."""
        if self._own is not None and len(self._own):
            self._sealed = (*self._sealed, self._own.view().copy())
            self._sealed_len += len(self._own)
            self._own = None
            if len(self._sealed) > _MAX_SEGMENTS:
                self._sealed = (np.concatenate(self._sealed),)
        return TokenLog(self._sealed, self._sealed_len)

    def truncate(self, length: int) -> None:
        """Keep the first `length` ids."""
        assert 0 <= length <= len(self), f"cannot truncate {len(self)} tokens to {length}"
        if self._own is not None and length >= self._sealed_len:
            self._own.truncate(length - self._sealed_len)
            return
        self._own = None
        kept: list[IntArray] = []
        self._sealed_len = 0
        for segment in self._sealed:
            if self._sealed_len < length:
                kept.append(segment[: length - self._sealed_len])
                self._sealed_len += len(kept[-1])
        self._sealed = tuple(kept)

    def last(self, count: int) -> IntArray:
        """Return the last `count` ids, or all if there are fewer. O(count)."""
        parts: list[IntArray] = []
        for segment in (*((self._own.view(),) if self._own is not None else ()), *reversed(self._sealed)):
            if count <= 0:
                break
            parts.insert(0, segment[max(len(segment) - count, 0) :])
            count -= len(parts[0])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def at(self, index: int) -> int:
        """Return one id."""
        for segment in self._sealed:
            if index < len(segment):
                return int(segment[index])
            index -= len(segment)
        assert self._own is not None, "the index is below the length"
        return int(self._own.view()[index])

    def since(self, start: int) -> IntArray:
        """Return the ids from position `start` on; O(1) in what comes before them."""
        parts, position = [], 0
        for segment in (*self._sealed, *((self._own.view(),) if self._own is not None else ())):
            if position + len(segment) > start:
                parts.append(segment[max(0, start - position) :])
            position += len(segment)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def array(self, *more: Sequence[int] | IntArray) -> IntArray:
        """Return all ids, followed by `more`, as a new int32 array."""
        own = (self._own.view(),) if self._own is not None else ()
        parts = [*self._sealed, *own, *(np.asarray(ids, dtype=np.int32) for ids in more)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
