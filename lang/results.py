"""The results file of a batch: a JSON line for each item that ended, so that a rerun skips those that ended well.

A line names its item by a hash of program, arguments and sampling defaults; equal items are told apart by counting.
The last line of an item counts. The file is the caller's alone (mode 0600), holds prompts and answers, and is written
by one batch at a time. A last line that was torn by a crash is cut off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bough.errors import BoughError, InvalidRequest
from bough.items import RETURNED, ItemState, ItemUsage, Saved, usage_of
from bough.variables import LAZY, Span

VERSION: Final = 1


def _plain(value: Any) -> Any:
    """Return a pydantic model as JSON types; the rest of what msgspec does not know cannot be kept."""
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise NotImplementedError(f"{type(value).__name__} is not JSON")
    return dump(mode="json")


_encode: Final = msgspec.json.Encoder(order="deterministic", enc_hook=_plain).encode


class Line(msgspec.Struct, omit_defaults=True):
    """One line. `error` says how an item ended that did not end well: such an item is run again."""

    v: int
    key: str
    item: int
    attempts: int = 1
    text: str = ""
    messages: list[dict[str, str]] = []
    variables: dict[str, msgspec.Raw] = {}
    meta: dict[str, msgspec.Raw] = {}
    ret_value: msgspec.Raw = msgspec.Raw(b"null")
    unsaved: dict[str, str] = {}
    usage: dict[str, int] = {}
    error: dict[str, Any] | None = None


def keys_of(program: str, calls: Sequence[Mapping[str, Any]], sampling: object) -> list[str]:
    """Return what names each item in a file. Raises InvalidRequest for arguments that JSON cannot hold."""
    seen: Counter[str] = Counter()
    keys: list[str] = []
    for index, arguments in enumerate(calls):
        try:
            data = _encode([program, arguments, sampling])
        except (NotImplementedError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise InvalidRequest(
                f"item {index} of the batch cannot be named in a results file, its arguments are not JSON: {error}",
                field="resume",
            ) from None
        digest = hashlib.sha256(data).hexdigest()[:32]
        seen[digest] += 1
        keys.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return keys


class ResultsFile:
    """An open results file: what it holds, and where further lines go. `close` it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = -1
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            self._lock()
            self.saved = self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self.close()

    def append(self, key: str, state: ItemState, error: BaseException | None) -> None:
        """Add a line for an item that has ended."""
        line = _encode(_line(key, state, error)) + b"\n"
        written = os.write(self._file, line)
        while written < len(line):  # a full disk raises at the next turn
            written += os.write(self._file, line[written:])

    def _lock(self) -> None:
        """Refuse a file that another batch writes; where files cannot be locked, nobody checks."""
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidRequest(f"another batch writes {self.path} now", field="resume") from None

    def _read(self) -> dict[str, Saved]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        saved: dict[str, Saved] = {}
        for number, text in enumerate(data[:whole].splitlines(), start=1):
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.MsgspecError as error:
                raise InvalidRequest(f"{self.path}:{number} is no line of a results file: {error}") from None
            if line.v != VERSION:
                raise InvalidRequest(f"{self.path}:{number} has version {line.v}, this is {VERSION}", field="resume")
            saved.pop(line.key, None)
            if line.error is None:
                saved[line.key] = _saved(line)
        return saved


def _line(key: str, state: ItemState, error: BaseException | None) -> Line:
    line = Line(VERSION, key, state.index, state.num_attempts, usage=vars(usage_of(state)))
    if error is not None:
        line.error = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, BoughError):
            line.error["details"] = {name: repr(value) for name, value in error.details.items()}
    else:
        line.text, line.messages = state.text(), state.messages()
        line.ret_value = _kept(RETURNED, lambda: state.ret_value, line.unsaved) or line.ret_value
    for name in list(state._variables):
        value = _kept(name, lambda name=name: state[name], line.unsaved)
        if value is None:
            continue
        line.variables[name] = value
        if isinstance(state._variables[name], LAZY) and not isinstance(state._variables[name], Span):
            line.meta[name] = msgspec.Raw(_encode(state.get_meta_info(name)))
    return line


def _kept(name: str, read: Any, unsaved: dict[str, str]) -> msgspec.Raw | None:
    """Return a value as JSON; if it cannot be, note why."""
    try:
        return msgspec.Raw(_encode(read()))
    except Exception as error:  # a branch of a joined variable failed, or the value is no JSON
        unsaved[name] = f"{type(error).__name__}: {error}"
        return None


def _saved(line: Line) -> Saved:
    return Saved(
        line.text,
        line.messages,
        {name: msgspec.json.decode(value) for name, value in line.variables.items()},
        {name: msgspec.json.decode(value) for name, value in line.meta.items()},
        msgspec.json.decode(line.ret_value),
        line.unsaved,
        ItemUsage(**line.usage),
        line.attempts,
    )
