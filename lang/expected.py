"""What a recorded run says about each place in it: which text and operation belong there, and what came of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from bough.errors import BoughError, BudgetExceeded, Cancelled, ReplayMismatch, Timeout
from bough.journal import RecordedOp, RecordedRun, plain
from bough.runtime import protocol
from bough.runtime.protocol import Extended, Part, SamplingParams
from bough.seeds import Path

_DEFAULTS: Final = SamplingParams()
ENDED_EARLY: Final = (Cancelled, Timeout, BudgetExceeded)
"""How an operation ends when something from outside ends it: nothing that a replay has to repeat."""


class Expected:
    """What one recorded run says about each place: the text appended there, and the operation that follows."""

    def __init__(self, run: RecordedRun) -> None:
        self.run = run
        self._ops: dict[tuple[Path, int], RecordedOp] = {}
        self._texts: dict[tuple[Path, int], deque[tuple[str | None, str]]] = {}  # (None, text) or (role, rendered)
        self._lengths: dict[tuple[Path, int], int] = {}
        self._rewinds: dict[tuple[Path, int], deque[RecordedOp]] = {}
        self._failures: dict[tuple[Path, int], BoughError] = {}
        self._lock = threading.Lock()
        self._ends: dict[Path, int] = {}
        self._last: dict[Path, int] = {}
        for op in run.ops:
            self._take(op)
            self._ends[op.path] = max(op.index, self._ends.get(op.path, 0))
            if op.kind not in ("extend", "rewind"):  # those have the index of what follows them
                self._last[op.path] = max(op.index, self._last.get(op.path, 0))

    def _take(self, op: RecordedOp) -> None:
        where = (op.path, op.index)
        if op.kind == "rewind":
            self._rewinds.setdefault(where, deque()).append(op)
        elif op.kind != "extend":
            self._ops[where] = op
        elif op.error is not None:
            self._failures[where] = op.error
        else:
            marks = iter(op.result.get("rendered", ()))
            texts = self._texts.setdefault(where, deque())
            for part in op.request["parts"]:
                if part["t"] == "text":
                    before = texts.pop()[1] if texts and texts[-1][0] is None else ""
                    texts.append((None, before + part["text"]))
                elif part["t"] != "tokens":
                    texts.append((part.get("role", ""), next(marks, "")))
            self._lengths[where] = op.result["length"]

    def text(self, path: Path, index: int, parts: Sequence[Part]) -> Extended:
        """Return what the backend answered to these parts. Raises ReplayMismatch if others were appended here."""
        where = (path, index)
        with self._lock:
            if where in self._failures:
                raise self._failures[where].again()
            texts = self._texts.get(where, deque())
            rendered: list[str] = []
            for part in parts:
                if isinstance(part, protocol.Text):
                    self._consume(path, index, texts, part.text)
                elif not isinstance(part, protocol.Tokens):
                    role = part.role if isinstance(part, protocol.RoleBegin) else ""
                    if not texts:
                        self._check_recorded(path, index, f"a message of {role!r}" if role else "the end of a message")
                    known, text = texts.popleft() if texts else (None, "")
                    if known != role:
                        raise mismatch(path, index, "role", known if known is not None else text, role)
                    rendered.append(text)
            return Extended(0, self._lengths.get(where, 0), rendered)

    def is_beyond(self, path: Path, index: int) -> bool:
        """Whether the branch's record ends before this: text after the last gen is sent when somebody asks for it."""
        return path in self._ends and index > self._ends[path]

    def _check_recorded(self, path: Path, index: int, asked: str) -> None:
        """Raise ReplayMismatch if the branch's record ends before this operation."""
        if index > self._last.get(path, -1):
            raise ReplayMismatch(
                f"branch {_named(path)}, operation {index}: {asked} is asked for, the journal holds no such operation "
                "yet: it was read before its run was done (wait with `state.sync()`), or the program does more now",
                path=path, index=index, field="operation", expected=None, got=asked,
            )  # fmt: skip

    def _consume(self, path: Path, index: int, texts: deque[tuple[str | None, str]], text: str) -> None:
        if not texts:
            self._check_recorded(path, index, f"the text {_short(text)}")
        role, known = texts.popleft() if texts else (None, "")
        if role is not None or not known.startswith(text):
            raise mismatch(path, index, "text", known, text)
        if len(known) > len(text):
            texts.appendleft((None, known[len(text) :]))

    def operation(self, path: Path, index: int, kind: str, name: str | None, request: Mapping[str, Any]) -> RecordedOp:
        """Return the recorded operation of a place. Raises ReplayMismatch if another one is asked for now."""
        with self._lock:
            op = self._ops.pop((path, index), None)
            left = self._texts.get((path, index))
        if op is None:
            self._check_recorded(path, index, f"{kind} {name or '(unnamed)'}")
            raise mismatch(path, index, "operation", None, kind)
        if left:
            raise mismatch(path, index, "text", left[0][1], "")
        for field, known, now in ((("kind"), op.kind, kind), ("name", op.name, name)):
            if known != now:
                raise mismatch(path, index, field, known, now)
        for field in ("params", "choices", "method", "temperature", "seed", "grammar"):
            known, now = op.request.get(field), plain(request.get(field))
            if known != now:
                raise mismatch(path, index, *_first_difference(field, known, now))
        return op

    def rewind(self, path: Path, index: int, length: int) -> Extended:
        """Return what the backend answered to a rewind. Raises ReplayMismatch if there was none, or another."""
        with self._lock:
            waiting = self._rewinds.get((path, index))
            op = waiting.popleft() if waiting else None
        if op is None or op.request["length"] != length:
            raise mismatch(path, index, "length", op and op.request["length"], length)
        if op.error is not None:
            raise op.error.again()
        return msgspec.convert(op.result, Extended)

    def left(self) -> RecordedOp | None:
        """Return an operation that was recorded and never asked for."""
        ended = (op for op in self._ops.values() if not isinstance(op.error, ENDED_EARLY))
        return min(ended, key=lambda op: (op.path, op.index), default=None)


def _first_difference(field: str, known: Any, now: Any) -> tuple[str, Any, Any]:
    if isinstance(known, dict) and isinstance(now, dict):
        for key in sorted({*known, *now}):
            default = getattr(_DEFAULTS, key, None) if field == "params" else None  # those are not written
            if known.get(key, default) != now.get(key, default):
                return f"{field}.{key}", known.get(key, default), now.get(key, default)
    return field, known, now


def _named(path: Path) -> str:
    return ".".join(map(str, path)) or "root"


def mismatch(path: Path, index: int, field: str, expected: Any, got: Any, position: int | None = None) -> BoughError:
    where = _named(path)
    token = "" if position is None else f", token {position}"
    return ReplayMismatch(
        f"branch {where}, operation {index}{token}: {field} was {_short(expected)} in the journal and is {_short(got)}",
        path=path, index=index, field=field, expected=expected, got=got,
        **({} if position is None else {"position": position}),
    )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
