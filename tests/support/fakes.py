"""Fakes for tests without a model: a runner whose KV is the token ids themselves, and a clock that stands still."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from bough.runtime.batch import Batch, Row, RowResult, SampleRequest

FREED = -1  # what a slot holds that nobody wrote


def next_token(ids: Sequence[int], vocab_size: int) -> int:
    """The fake model: the next token is a pure function of all tokens before it, never 0."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % (vocab_size - 1)


def logprob(ids: Sequence[int], token: int) -> float:
    """The fake model's log-probability of `token` after `ids`."""
    return -1.0 - next_token([*ids, token], 1000) / 1000


def allowed_ids(request: SampleRequest, vocab_size: int) -> list[int]:
    """The ids that a row's constraint lets through."""
    assert request.constraint is not None
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    request.constraint.fill(words, request.forbidden)
    allowed: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    assert allowed, "a constraint that lets nothing through is an end"
    return allowed


class LateLaunches:
    """Lets steps overlap on what can only execute them; see `FakeStep`.

    num_launched: steps; num_ahead: those launched while another was in flight; pending: those in flight.
    """

    def __init__(self) -> None:
        self.num_launched = 0
        self.num_ahead = 0
        self.pending: list[FakeStep] = []

    def execute(self, batch: Batch) -> list[RowResult]:
        raise NotImplementedError

    def launch(self, batch: Batch, previous: FakeStep | None) -> FakeStep:
        """The seam for steps that overlap, as a device keeps it."""
        self.num_launched += 1
        self.num_ahead += previous is not None
        step = FakeStep(self, batch, previous)
        self.pending.append(step)
        return step


class LateRunner(LateLaunches):
    """A runner of a real model whose steps overlap."""

    def __init__(self, execute: Callable[[Batch], list[RowResult]]) -> None:
        super().__init__()
        self._execute = execute

    def execute(self, batch: Batch) -> list[RowResult]:
        return self._execute(batch)


class FakeRunner(LateLaunches):
    """Executes batches on fake pages that hold token ids, so that a wrong page shows up as wrong content at once.

    A row's context is read back from the pages it names; `prompts_computed` counts tokens written.
    """

    def __init__(self, num_pages: int, page_size: int, *, vocab_size: int = 100, context_len: int = 10_000) -> None:
        super().__init__()
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
            self.kv.reshape(-1)[self._written(row)] = row.token_ids
            self.num_computed += len(row.token_ids)
        return [self._result(row) for row in batch.rows]

    def _slots_of(self, row: Row) -> list[int]:
        """The slots of the pool behind each slot of a row."""
        return [page * self.page_size + slot for page in row.pages.tolist() for slot in range(self.page_size)]

    def _written(self, row: Row) -> list[int]:
        """Where the KV of a row's tokens goes."""
        num_nodes = 0 if row.trie is None else len(row.trie.slots)
        linear = range(row.start, row.start + len(row.token_ids) - num_nodes)
        all_slots = self._slots_of(row)
        return [all_slots[i] for i in (*linear, *([] if row.trie is None else row.trie.slots.tolist()))]

    def paths(self, row: Row) -> list[list[int]]:
        """For each new token of a row, the slots of the pool that it attends to, its own last."""
        num_nodes = 0 if row.trie is None else len(row.trie.slots)
        all_slots = self._slots_of(row)
        stop = row.start + len(row.token_ids) - num_nodes
        paths = [all_slots[: i + 1] for i in range(row.start, stop)]
        if row.trie is None:
            return paths
        trie = row.trie
        for segment, (first, last) in enumerate(zip(trie.bounds.tolist(), trie.bounds[1:].tolist(), strict=False)):
            own = trie.path_slots[trie.path_indptr[segment] : trie.path_indptr[segment + 1]].tolist()
            path = [*all_slots[: trie.context_len], *(all_slots[i] for i in own)]
            assert len(own) == trie.depths[last - 1] + 1, "a path is as long as its last node is deep"
            assert own[len(own) - (last - first) :] == trie.slots[first:last].tolist()
            assert not trie.is_decode[segment] or last - first == 1, "a decode has one query"
            paths += [path[: len(path) - (last - 1 - i)] for i in range(first, last)]
        return paths

    def _result(self, row: Row) -> RowResult:
        stop = row.start + len(row.token_ids)
        flat, paths = self.kv.reshape(-1), self.paths(row)
        ids = flat[paths[-1]].tolist()
        scores = None
        if row.score_ids is not None:
            assert row.score_at is not None
            pairs = zip(row.score_ids.tolist(), row.score_at.tolist(), strict=True)
            before = {at: flat[paths[at]].tolist() for at in set(row.score_at.tolist())}
            scores = np.array([logprob(before[at], token) for token, at in pairs])
            ids += [token for known in before.values() for token in known]
        assert FREED not in ids, "a row reads a slot that nobody wrote"
        if row.sample is None:
            return RowResult(score_logprobs=scores)
        context = flat[paths[-1]].tolist()
        drawn: list[RowResult] = []
        for left, request in zip(range(row.draft, -1, -1), row.draws(), strict=True):
            assert request.position == stop - left
            known = context[: len(context) - left]
            if drawn and drawn[-1].token != known[-1]:
                break
            token = self.draw(known, request)
            drawn.append(RowResult(token, -0.5 if request.params.logprobs is not None else None))
        return RowResult(drawn[0].token, drawn[0].logprob, (), scores, None, tuple(drawn[1:]))

    def draw(self, ids: list[int], request: SampleRequest) -> int:
        """The token that follows `ids`."""
        token = next_token(ids, self.vocab_size)
        if request.constraint is not None:
            allowed = allowed_ids(request, self.vocab_size)
            return allowed[token % len(allowed)]
        return next_token([*ids, token], self.vocab_size) if token in request.forbidden else token


class FakeStep:
    """A step in flight on a device that is as slow as can be: it computes when the host waits for it, in order.

    So what the host does to pages between launch and result, and to the arrays of the batch, would show.
    """

    def __init__(self, runner: LateLaunches, batch: Batch, previous: FakeStep | None) -> None:
        self._runner = runner
        self.batch = Batch(tuple(map(_frozen, batch.rows)), batch.copies)
        self._previous = previous
        self.tokens: list[int | None] | None = None

    def result(self) -> list[RowResult]:
        """Compute it now."""
        assert self._runner.pending.pop(0) is self, "steps are taken back once, in the order of their launches"
        rows = tuple(map(self._known, self.batch.rows))
        self._previous = None
        self.tokens = []
        results = self._runner.execute(Batch(rows, self.batch.copies))
        self.tokens = [result.token for result in results]
        return results

    def _known(self, row: Row) -> Row:
        if row.drawn_by is None:
            return row
        assert self._previous is not None, "a row goes on from a step that is not in flight"
        assert self._previous.tokens is not None, "steps end in the order in which they were launched"
        token = self._previous.tokens[row.drawn_by] if self._previous.tokens else 0  # 0: that step failed
        assert token is not None, "a row goes on from one that draws nothing"
        return msgspec.structs.replace(row, token_ids=np.array([token], dtype=np.int32))


def _frozen(row: Row) -> Row:
    """The row as it is now, whatever becomes of the arrays it looks at."""
    sample = row.sample
    if sample is not None:
        sample = msgspec.structs.replace(sample, generated=sample.generated.copy(), prompt=sample.prompt.copy())
    return msgspec.structs.replace(row, token_ids=row.token_ids.copy(), pages=row.pages.copy(), sample=sample)


class FakeClock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
