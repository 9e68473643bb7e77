"""The event log of a run: everything that happened on all its branches, in one order, for any number of readers.

::

    state = program.run(question, stream=True)           # or events=True, without a thread of its own
    for event in state.events():
        if event.kind == "delta":
            print(event.branch, event.variable, event.text, end="")

A reader has its own position and may begin anywhere, also after the end. Nothing is dropped and nobody waits busily.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from bough.backend import Delta, Generation, default_backend
from bough.errors import BoughError, of
from bough.runtime.protocol import (
    Extended,
    FinishReason,
    Part,
    RoleBegin,
    RoleEnd,
    Selected,
    Text,
    TokenLogprob,
    Usage,
)
from bough.seeds import Path
from bough.streaming import Feed
from bough.watch import Observer, Op, RunInfo
from bough.watched import Watched

EventKind: TypeAlias = Literal[
    "begin", "text", "start", "delta", "end", "choice", "recorded", "fork", "rewind", "cancel", "error", "finish"
]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened.

    kind
        begin, finish   a program's body began, or ended (with `error`, if it raised)
        text            text and rendered roles were appended
        start           a gen or select was sent
        delta           a gen said more: text, token ids and, if asked for, log-probabilities
        end             a gen is done: its whole text, all its token ids, finish reason, usage
        choice          a select is done: `text` is the choice; a score is done: `text` is the best
        recorded        a value of `State.recorded` is there; `variable` is its name
        fork            `children` were forked off `branch`
        rewind          the branch was cut back to `length` tokens (None: not known yet); what follows is on the one of
                        `children`, if there is one
        cancel          the branch was cancelled, with all that was forked off it
        error           a gen, select or text failed with `error`

    seq counts from 0 without gaps; time is in seconds since the run began. run is 0, or the number of a run that the
    program started inside. branch is the path from the root, () itself: the number of each child on the way down. index
    is the operation's number on its branch. length is the branch's length in tokens after it.
    """

    seq: int
    time: float
    kind: EventKind
    run: int = 0
    branch: Path = ()
    index: int | None = None
    variable: str | None = None
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    length: int | None = None
    children: Sequence[Path] = ()
    error: BaseException | None = None


class EventLog(Observer):
    """Keeps the events of a run and of the runs inside it. Written by whoever observes, read by anybody."""

    wants_deltas = True

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._feed = Feed()

    def __len__(self) -> int:
        return len(self._events)

    # ------------------------------------------------------------------------------------------ read

    def read(self, start: int = 0) -> Iterator[Event]:
        """Yield the events from number `start` on, waiting for more until nothing runs any more."""
        position = start
        while True:
            seen, is_over = self._feed.version, self._is_over()  # before the events: what comes in between is news
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if is_over:
                return
            if self._feed.version == seen:
                self._feed.wait(seen)

    async def aread(self, start: int = 0) -> AsyncIterator[Event]:
        """Yield the events from number `start` on, leaving the event loop free."""
        position = start
        while True:
            seen, is_over = self._feed.version, self._is_over()
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if is_over:
                return
            if self._feed.version == seen:
                await self._feed.wait_async(seen)

    def _is_over(self) -> bool:
        if self.watch.is_settled:
            return True
        here = default_backend.get()  # a body that reads its own events would wait for its own end
        return isinstance(here, Watched) and here.watch is self.watch and self.watch.is_idle

    # ------------------------------------------------------------------------------------------ write

    def _add(self, kind: EventKind, run: RunInfo, branch: Path = (), **fields: Any) -> None:
        with self._lock:
            now = self.watch.now()
            self._events.append(
                Event(seq=len(self._events), time=now, kind=kind, run=run.number, branch=branch, **fields)
            )
        self._feed.notify()

    def _add_of(self, kind: EventKind, op: Op, **fields: Any) -> None:
        self._add(kind, op.run, op.path, index=op.index, variable=op.name, **fields)

    def run_began(self, run: RunInfo) -> None:
        """Note that a body began."""
        self._add("begin", run)

    def run_ended(self, run: RunInfo, error: BaseException | None) -> None:
        """Note that a body ended."""
        self._add("finish", run, error=error)

    def forked(self, run: RunInfo, path: Path, children: Sequence[Path]) -> None:
        """Note a fork."""
        self._add("fork", run, path, children=children)

    def rewound(self, run: RunInfo, path: Path, onward: Path, length: int | None) -> None:
        """Note that a text goes on from an earlier point."""
        self._add("rewind", run, path, children=[onward], length=length)

    def cancelled(self, run: RunInfo, path: Path) -> None:
        """Note a cancel."""
        self._add("cancel", run, path)

    def sending(self, op: Op) -> BoughError | None:
        """Note that a gen or select begins."""
        if op.kind in ("gen", "select", "score"):
            self._add_of("start", op)
        return None

    def streamed(self, op: Op, delta: Delta) -> None:
        """Note what a gen said."""
        self._add_of("delta", op, text=delta.text, token_ids=delta.token_ids, logprobs=delta.logprobs)

    def done(self, op: Op, result: Any) -> BoughError | None:
        """Note what an operation came to."""
        if isinstance(result, Generation):
            self._add_of(
                "end", op, text=result.text, token_ids=result.token_ids, logprobs=result.logprobs, usage=result.usage,
                finish_reason=result.finish_reason, length=result.length,
            )  # fmt: skip
        elif isinstance(result, Selected):
            chosen = op.request["choices"][result.index]
            self._add_of("choice", op, text=chosen, usage=result.usage, length=result.length)
        elif op.kind == "recorded":
            self._add_of("recorded", op)
        elif isinstance(result, Extended):
            text = _text_of(op.request["parts"], result.rendered) if op.kind == "extend" else ""
            self._add_of("text" if op.kind == "extend" else "rewind", op, text=text, length=result.length)
        return None

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """Note a failure."""
        self._add_of("error", op, error=of(error))
        return None

    def settled(self) -> None:
        """Let readers see that it is over."""
        self._feed.notify()


def _text_of(parts: Sequence[Part], rendered: Sequence[str]) -> str:
    marks = iter(rendered)
    return "".join(
        part.text if isinstance(part, Text) else next(marks, "") if isinstance(part, (RoleBegin, RoleEnd)) else ""
        for part in parts
    )
