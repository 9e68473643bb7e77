"""`Journal`: an opt-in log of everything that decides what the runtime does, from which `replay` repeats every plan.

A stream of MessagePack arrays, one per event, in the order they took effect::

    ["start", {version, model, seed, epoch, page_size, num_pages, vocab_size, context_len, config}]
    ["hello", t, identity, namespace, client]      ["drop", t, identity]      ["drain", t]
    ["request", t, identity, [frames]]             as received, without the identity frame
    ["tick", t]                                    deadlines were looked at
    ["compiled", [kind, source, before], error]    a grammar was compiled, or refused: null or [kind, message]
    ["step", plan digest, [result of each row]]    token, logprob, top, scores, and the results after a draft, if any

It holds prompts and results: it is written only when asked for, with mode 0600, and appended to, never rewritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import numpy as np

from bough.runtime.batch import Batch, RowResult
from bough.runtime.config import RuntimeConfig
from bough.runtime.grammar.compiler import GrammarKey
from bough.runtime.pipeline import Executor
from bough.runtime.protocol import RequestError


class Journal:
    """Writes events to a new file of mode 0600. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError("invalid_request") if the file exists or cannot be made."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise RequestError("invalid_request", f"journal {path} cannot be made: {error}") from None
        self._file = os.fdopen(fd, "wb", buffering=1 << 16)
        self._packer = msgpack.Packer()

    def start(self, config: RuntimeConfig, **facts: Any) -> None:
        """Write the first event: what a replay has to be built like."""
        self._write(["start", {**facts, "config": dataclasses.asdict(config)}])

    def hello(self, now: float, identity: bytes, namespace: str, client: str) -> None:
        self._write(["hello", now, identity, namespace, client])

    def drop(self, now: float, identity: bytes) -> None:
        self._write(["drop", now, identity])

    def drain(self, now: float) -> None:
        self._write(["drain", now])

    def request(self, now: float, identity: bytes, frames: Sequence[bytes]) -> None:
        self._write(["request", now, identity, list(frames)])

    def tick(self, now: float) -> None:
        self._write(["tick", now])

    def compiled(self, key: GrammarKey, error: RequestError | None) -> None:
        refusal = None if error is None else [error.kind, error.message]
        self._write(["compiled", [key.kind, key.source, key.before], refusal])

    def step(self, batch: Batch, results: Sequence[RowResult]) -> None:
        self._write(["step", plan_digest(batch), [_packed(result) for result in results]])

    def _write(self, event: list[Any]) -> None:
        self._file.write(self._packer.pack(event))

    def close(self) -> None:
        """Flush and close; idempotent."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RecordingExecutor:
    """A runner that writes what it was asked and what came out."""

    def __init__(self, executor: Executor, journal: Journal) -> None:
        self._executor = executor
        self._journal = journal

    def execute(self, batch: Batch) -> Sequence[RowResult]:
        """Compute a step and record it."""
        results = self._executor.execute(batch)
        self._journal.step(batch, results)
        return results


def read_events(path: Path) -> Iterator[list[Any]]:
    """Yield the events of a journal; one that breaks off (the runtime was killed) ends with its last whole event."""
    with path.open("rb") as file:
        yield from msgpack.Unpacker(file, use_list=True, max_buffer_size=1 << 30)


def plan_digest(batch: Batch) -> bytes:
    """Return 16 bytes that tell any two plans apart: every row's tokens, pages and parameters, every copy."""
    digest = hashlib.blake2b(digest_size=16)
    for copy in batch.copies:
        digest.update(f"copy {copy.source} {copy.target} {copy.num_slots};".encode())
    for row in batch.rows:
        digest.update(f"row {row.start} {len(row.token_ids)} {row.draft} {len(row.pages)};".encode())
        digest.update(np.ascontiguousarray(row.token_ids).tobytes())
        digest.update(np.ascontiguousarray(row.pages).tobytes())
        for array in (
            row.score_ids,
            row.score_at,
            *(() if row.trie is None else (row.trie.slots, row.trie.path_slots)),
        ):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        if row.sample is not None:
            digest.update(f"{row.sample.seed} {row.sample.position} {row.sample.forbidden}".encode())
        assert row.drawn_by is None, "with a journal no step is planned before the results of the last are known"
    return digest.digest()


def _packed(result: RowResult) -> list[Any]:
    scores = None if result.score_logprobs is None else result.score_logprobs.tolist()
    fields = [result.token, result.logprob, [list(pair) for pair in result.top], scores]
    if result.further:
        return [*fields, result.entropy, [_packed(drawn) for drawn in result.further]]
    return fields if result.entropy is None else [*fields, result.entropy]


def unpacked(fields: list[Any]) -> RowResult:
    """Return the row's result that `Journal.step` wrote."""
    token, logprob, top, scores, *more = fields
    pairs = tuple((float(value), int(other)) for value, other in top)
    values = None if scores is None else np.array(scores, dtype=np.float64)
    further = tuple(unpacked(drawn) for drawn in more[1]) if len(more) > 1 else ()
    return RowResult(token, logprob, pairs, values, more[0] if more else None, further)
