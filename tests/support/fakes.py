"""Fakes for tests without a model: a runner whose KV is the token ids themselves, and a clock that stands still."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bough.runtime.batch import Batch, Row, RowResult

FREED = -1  # what a slot holds that nobody wrote


def next_token(ids: Sequence[int], vocab_size: int) -> int:
    """The fake model: the next token is a pure function of all tokens before it, never 0."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % (vocab_size - 1)


def logprob(ids: Sequence[int], token: int) -> float:
    """The fake model's log-probability of `token` after `ids`."""
    return -1.0 - next_token([*ids, token], 1000) / 1000


class FakeRunner:
    """Executes batches on fake pages that hold token ids, so that a wrong page shows up as wrong content at once.

    A row's context is read back from the pages it names; `prompts_computed` counts tokens written.
    """

    def __init__(self, num_pages: int, page_size: int, *, vocab_size: int = 100, context_len: int = 10_000) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.context_len = context_len
        self.kv = np.full((num_pages, page_size), FREED, dtype=np.int64)
        self.num_computed = 0
        self.batches: list[Batch] = []

    def execute(self, batch: Batch) -> list[RowResult]:
        self.batches.append(batch)
        for copy in batch.copies:
            self.kv[copy.target, : copy.num_slots] = self.kv[copy.source, : copy.num_slots]
            self.kv[copy.target, copy.num_slots :] = FREED
        for row in batch.rows:  # all writes before all reads, as in a forward pass
            for offset, token in enumerate(row.token_ids.tolist()):
                page, slot = divmod(row.start + offset, self.page_size)
                self.kv[row.pages[page], slot] = token
                self.num_computed += 1
        return [self._result(row) for row in batch.rows]

    def _result(self, row: Row) -> RowResult:
        stop = row.start + len(row.token_ids)
        ids = self.kv[row.pages].reshape(-1)[:stop].tolist()
        assert FREED not in ids, "a row reads a slot that nobody wrote"
        scores = None
        if row.score_ids is not None:
            first = row.start + row.score_from + 1
            scores = np.array([logprob(ids[: first + j], token) for j, token in enumerate(row.score_ids.tolist())])
        if row.sample is None:
            return RowResult(score_logprobs=scores)
        assert row.sample.position == stop
        token = next_token(ids, self.vocab_size)
        if token in row.sample.forbidden:
            token = next_token([*ids, token], self.vocab_size)
        has_logprob = row.sample.params.logprobs is not None
        return RowResult(token=token, logprob=-0.5 if has_logprob else None, score_logprobs=scores)


class FakeClock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
