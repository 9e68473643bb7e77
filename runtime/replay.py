"""Repeat a journal off-line: the same engine, scheduler and cache, fed what was recorded; no weights, no sockets.

`python -m bough.runtime.replay FILE` says that every plan came out the same, or names the first step that did not.
`shrink` cuts a journal that breaks an invariant down to the requests that are needed for it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bough.runtime.batch import Batch, Row, RowResult
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.drafts import DraftCosts
from bough.runtime.engine import Engine
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.inflight import InFlight
from bough.runtime.journal import plan_digest, read_events, unpacked
from bough.runtime.models.folder import resolve_model
from bough.runtime.pipeline import Executor
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import ProtocolError, RequestError, decode_request
from bough.runtime.scheduler import Scheduler
from bough.runtime.session import Session
from bough.runtime.speculation import Speculator
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tokenizer import load_tokenizer

Event = list[Any]


class Diverged(Exception):
    """A replayed plan differs from the recorded one; the message names the step."""


class RecordedExecutor:
    """Gives back recorded results, and checks that the plan they belong to is the one asked for.

    divergence: how the first plan that differs does; kept rather than raised, for a step that raises is survived.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.divergence: str | None = None
        self._next: tuple[bytes, list[RowResult]] | None = None

    @property
    def is_satisfied(self) -> bool:
        """Whether the step that was expected has run."""
        return self._next is None

    def expect(self, digest: bytes, results: list[RowResult]) -> None:
        """Set what the next step must be, and what it returns."""
        self._next = digest, results

    def execute(self, batch: Batch) -> Sequence[RowResult]:
        """Return the recorded results, or stand-ins once the plans have parted."""
        self.num_steps += 1
        digest, results = self._next if self._next is not None else (b"", [])
        self._next = None
        if digest != plan_digest(batch) and self.divergence is None:
            self.divergence = (
                f"step {self.num_steps}: the replay plans {len(batch.rows)} rows, which differ from the journal's "
                f"{len(results)} in number, tokens, pages or parameters"
            )
        return results if self.divergence is None else HashExecutor(2).execute(batch)


class HashExecutor:
    """A stand-in for the model when recorded results do not fit any more: tokens are hashes of rows."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def execute(self, batch: Batch) -> Sequence[RowResult]:
        """Return some token, or some scores, for each row."""
        return [self._result(row) for row in batch.rows]

    def _result(self, row: Row) -> RowResult:
        digest = hashlib.blake2b(row.token_ids.tobytes() + bytes(str(row.start), "ascii"), digest_size=4).digest()
        scores = None if row.score_ids is None else -1.0 - row.score_ids / self._vocab_size
        token = None if row.sample is None else int.from_bytes(digest, "little") % self._vocab_size
        return RowResult(token, -1.0, (), scores)


@dataclass(slots=True)
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def _speculator(start: dict[str, Any]) -> Speculator:
    return Speculator(start["context_len"], costs=DraftCosts(**start["draft_costs"]))


class Replay:
    """A runtime without its wire and its model, driven by events."""

    def __init__(self, start: dict[str, Any], executor: Executor) -> None:
        folder = resolve_model(start["model"])
        config = RuntimeConfig(**start["config"])
        self._clock = _Clock()
        self._sessions: dict[bytes, Session] = {}
        cache = PrefixCache(start["num_pages"], start["page_size"], enabled=config.radix_cache)
        self.scheduler = Scheduler(
            cache,
            token_budget=config.token_budget,
            max_running=config.max_running,
            policy=config.schedule_policy,
            speculator=_speculator(start) if config.speculate else None,
            clock=self._clock,
        )
        prompter = Prompter(load_tokenizer(folder), load_chat_template(folder), start["model"])
        self._grammars = GrammarCompiler(Vocabulary(prompter.tokenizer, start["vocab_size"]), is_deferred=True)
        composer = Composer(
            prompter,
            grammars=self._grammars,
            vocab_size=start["vocab_size"],
            context_len=start["context_len"],
            seed=start["seed"],
            credit=config.credit,
        )
        in_flight = InFlight(self.scheduler, executor, credit=config.credit, clock=self._clock)
        self.engine = Engine(config, self.scheduler, in_flight, composer, epoch=start["epoch"], clock=self._clock)

    def apply(self, event: Event) -> None:
        """Carry out one event other than a step."""
        if event[0] == "compiled":
            _, key, refusal = event
            self._grammars.complete(GrammarKey(*key), None if refusal is None else RequestError(*refusal))
            self.engine.take_compiled()
            return
        kind, self._clock.now = event[0], event[1]
        match kind:
            case "hello":
                _, now, identity, namespace, client = event
                self._sessions[identity] = Session(identity, namespace, client, now)
            case "request":
                self._request(event[2], event[3])
            case "tick":
                self.engine.expire(event[1])
            case "drop":
                self.engine.close(self._sessions.pop(event[2]))
            case "drain":
                self.engine.is_draining = True
            case _:
                raise RequestError("invalid_request", f"a journal has no event {kind!r}")
        for session in self._sessions.values():
            session.take_outbox()

    def _request(self, identity: bytes, frames: list[bytes]) -> None:
        session = self._sessions.get(identity)
        try:
            request, buffers = decode_request(frames)
        except ProtocolError:
            return
        if session is not None:
            self.engine.handle(session, request, buffers, self._clock.now)

    def step(self) -> None:
        """Run one step."""
        self.engine.step(self._clock.now)
        for session in self._sessions.values():
            session.take_outbox()


def replay(path: Path) -> int:
    """Repeat a journal; return how many steps came out the same. Raises Diverged at the first that does not."""
    events = read_events(path)
    executor = RecordedExecutor()
    machine = Replay(next(events)[1], executor)
    for event in events:
        if event[0] == "step":
            executor.expect(event[1], [unpacked(fields) for fields in event[2]])
            machine.step()
            if executor.divergence is not None:
                raise Diverged(executor.divergence)
            if not executor.is_satisfied:
                raise Diverged(f"after step {executor.num_steps}: the journal has a step where the replay has no work")
        else:
            machine.apply(event)
    return executor.num_steps


def breaks_an_invariant(start: dict[str, Any], events: Sequence[Event]) -> bool:
    """Tell whether these events, on a stand-in for the model, end in a broken invariant."""
    machine = Replay(start, HashExecutor(start["vocab_size"]))
    try:
        for event in events:
            if event[0] == "step":
                machine.step()
            else:
                machine.apply(event)
            machine.scheduler.check_invariants()
    except AssertionError:
        return True
    return False


def shrink(events: Sequence[Event], fails: Callable[[Sequence[Event]], bool]) -> list[Event]:
    """Return a smaller list of events that still fails: delta debugging (Zeller and Hildebrandt 2002)."""
    kept = list(events)
    chunk = max(len(kept) // 2, 1)
    while True:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + chunk :]
            if fails(fewer):
                kept = fewer
            else:
                at += chunk
        if chunk == 1:
            return kept
        chunk = max(chunk // 2, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a journal from the command line; exit status 1 if a plan differs."""
    parser = argparse.ArgumentParser(prog="python -m bough.runtime.replay", description=__doc__)
    parser.add_argument("journal", type=Path)
    path = parser.parse_args(arguments).journal
    try:
        print(f"{replay(path)} steps, every plan the same")
    except Diverged as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
