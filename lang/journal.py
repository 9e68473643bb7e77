"""Journals: a file that holds a run, so that it can be repeated, checked, or played back without a model.

A stream of MessagePack maps; the file's mode is 0600, for it holds prompts and answers. Every record is whole on disk
before anybody can read the result that it holds, so that a journal of a program that was killed is good up to there.

    {"t": "journal", "format": 1, "bough": version, "time": Unix time}
    {"t": "run", "run": id, "outer": id | None, "seed", "title", "backend", "module", "name", "args", "kwargs",
     "params", "n", "timeout_s", "batch_seed"}
    {"t": "op", "run": id, "path": [child, ...], "index", "kind", "name", "request": {...}, "result": {...} | "error"}
    {"t": "end", "run": id, "error": None | {"type", "message"}}
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgpack
import msgspec

from bough import __version__, errors
from bough.errors import BoughError, InvalidRequest
from bough.runtime import protocol
from bough.seeds import Path
from bough.watch import Observer, Op, RunInfo

if TYPE_CHECKING:
    from bough.sampling import Sampling

FORMAT: Final = 1
_UNKNOWN: Final = "__not_recorded__"


class JournalFile:
    """The file that the runs of one `run` or `run_batch` are written to. Raises InvalidRequest if it exists."""

    def __init__(self, path: object) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidRequest(f"journal must be the path of a file, got {path!r}", field="journal")
        self.path: Final = os.fspath(path)
        self._ids = count()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise InvalidRequest(
                f"the journal {self.path} exists already, and is not overwritten", field="journal"
            ) from None
        except OSError as error:
            raise InvalidRequest(f"the journal {self.path} cannot be written: {error}", field="journal") from error
        os.close(descriptor)
        self.write({"t": "journal", "format": FORMAT, "bough": __version__, "time": time.time()})

    def writer(self) -> JournalWriter:
        """Return the observer of one run."""
        return JournalWriter(self)

    def new_id(self) -> int:
        """Number a run."""
        return next(self._ids)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, whole: several runs and threads write to one file."""
        data = packed(record)
        # Opened for each record: a run has no end at which to close it, its state can be appended to for ever.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(f"the journal {self.path} took {written} of {len(data)} bytes")


class JournalWriter(Observer):
    """Writes one run, with the runs inside it."""

    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._ids: dict[int, int] = {}

    def run_began(self, run: RunInfo) -> None:
        """Write what is run, with its arguments where they can be written."""
        ours: Sampling = run.sampling
        self._file.write(
            {
                "t": "run",
                "run": self._id_of(run),
                "outer": self._ids.get(0) if run.number else None,
                "seed": run.seed,
                "title": run.title,
                "backend": {key: value for key, value in run.backend.server_info().items() if key != "address"},
                "module": run.program.__module__,
                "name": run.program.__qualname__,
                "args": list(run.args),
                "kwargs": run.kwargs,
                "params": msgspec.to_builtins(ours.params),
                "n": ours.n,
                "timeout_s": ours.timeout_s,
                "batch_seed": ours.batch_seed,
            }
        )

    def run_ended(self, run: RunInfo, error: BaseException | None) -> None:
        """Write how the body ended."""
        told = None if error is None else {"type": type(error).__name__, "message": str(error)}
        self._file.write({"t": "end", "run": self._id_of(run), "error": told})

    def done(self, op: Op, result: Any) -> BoughError | None:
        """Write an operation and its result."""
        self._write(op, result=result if op.kind == "recorded" else plain(result))
        return None

    def failed(self, op: Op, error: BoughError) -> BoughError | None:
        """Write an operation and its failure."""
        told = {"type": type(error).__name__, "message": error.message, "details": plain(error.details)}
        self._write(op, error=told)
        return None

    def _write(self, op: Op, **outcome: Any) -> None:
        request = {key: plain(value) for key, value in op.request.items()}
        self._file.write(
            {
                "t": "op",
                "run": self._id_of(op.run),
                "path": op.path,
                "index": op.index,
                "kind": op.kind,
                "name": op.name,
                "request": request,
                **outcome,
            }
        )

    def _id_of(self, run: RunInfo) -> int:
        known = self._ids.get(run.number)
        if known is None:
            known = self._ids[run.number] = self._file.new_id()
        return known


class RecordedOp(msgspec.Struct):
    """One operation of a journal. `result` is as the backend's, `error` is set if it failed."""

    path: Path
    index: int
    kind: str
    name: str | None
    request: dict[str, Any]
    result: Any = None
    error: BoughError | None = None


class RecordedRun(msgspec.Struct):
    """One run of a journal: how it was started, and its operations in the order in which they were done."""

    id: int
    outer: int | None
    seed: int
    title: str
    backend: dict[str, Any]
    module: str
    name: str
    args: Any
    kwargs: Any
    params: dict[str, Any]
    n: int
    timeout_s: float | None
    batch_seed: int | None = None
    ops: list[RecordedOp] = []

    @property
    def lacks(self) -> list[str]:
        """The arguments that could not be recorded."""
        given = [*((str(i), value) for i, value in enumerate(self.args)), *self.kwargs.items()]
        return [name for name, value in given if lacks(value)]


class Journal:
    """A journal that was read. Raises InvalidRequest if the file is none, or of another format.

    ::

        for op in bo.Journal("run.journal").runs[0].ops:
            print(op.path, op.index, op.kind, op.name, op.result)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = os.fspath(path)
        self._runs: dict[int, RecordedRun] = {}
        try:
            with open(self.path, "rb") as file:
                for record in self._records(file):
                    self._take(record)
        except OSError as error:
            raise InvalidRequest(f"the journal {self.path} cannot be read: {error}", field="journal") from error

    @property
    def runs(self) -> list[RecordedRun]:
        """The runs that were asked for, in the order in which they began; not those that they started inside."""
        return [run for run in self._runs.values() if run.outer is None]

    def run(self, number: int) -> RecordedRun:
        """Return one of `runs`. Raises InvalidRequest if the journal has no such number."""
        if not 0 <= number < len(self.runs):
            raise InvalidRequest(f"{self.path} has {len(self.runs)} runs, there is no number {number}", field="run")
        return self.runs[number]

    @property
    def all_runs(self) -> list[RecordedRun]:
        """All runs, in the order in which they began."""
        return list(self._runs.values())

    def _records(self, file: Any) -> Iterator[dict[str, Any]]:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False, object_hook=_unpacked)
        try:
            yield from unpacker  # a last record that is not whole ends it silently: the program was killed there
        except (ValueError, msgpack.UnpackException) as error:
            raise InvalidRequest(f"{self.path} is not a journal: {error}", field="journal") from None

    def _take(self, record: Any) -> None:
        kind = record.get("t") if isinstance(record, dict) else None
        if kind == "journal":
            if record["format"] != FORMAT:
                raise InvalidRequest(f"{self.path} has format {record['format']}, this version reads {FORMAT}")
        elif kind == "run":
            fields = {key: value for key, value in record.items() if key not in ("t", "run")}
            self._runs[record["run"]] = RecordedRun(id=record["run"], **fields)
        elif kind == "op" and record["run"] in self._runs:
            self._runs[record["run"]].ops.append(_op_of(record))
        elif kind not in ("end", "op"):
            raise InvalidRequest(f"{self.path} is not a journal of this version", field="journal")


def _op_of(record: Mapping[str, Any]) -> RecordedOp:
    told = record.get("error")
    error = None
    if told is not None:
        kind = getattr(errors, told["type"], None)
        known = kind if isinstance(kind, type) and issubclass(kind, BoughError) else errors.BackendError
        error = known(told["message"], **told["details"])
    return RecordedOp(
        path=tuple(record["path"]), index=record["index"], kind=record["kind"], name=record["name"],
        request=record["request"], result=record.get("result"), error=error,
    )  # fmt: skip


def packed(record: Mapping[str, Any]) -> bytes:
    """Return a record as MessagePack; what cannot be written is marked as not recorded."""
    data: bytes = msgpack.packb(record, strict_types=True, default=_packable)
    return data


def _packable(value: Any) -> Any:
    """Return what stands for a value that MessagePack does not have."""
    if isinstance(value, tuple):
        return {"__tuple__": list(value)}
    if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 64:
        return {"__int__": str(value)}
    return {_UNKNOWN: repr(value)[:200]}


def _unpacked(value: dict[str, Any]) -> Any:
    if len(value) == 1:
        if "__tuple__" in value:
            return tuple(value["__tuple__"])
        if "__int__" in value:
            return int(value["__int__"])
    return value


def lacks(value: Any) -> bool:
    """Return whether a recorded value has a part that could not be recorded."""
    if isinstance(value, dict):
        return _UNKNOWN in value or any(map(lacks, value.values()))
    return isinstance(value, (list, tuple)) and any(map(lacks, value))


def plain(value: Any) -> Any:
    """Return a message, or a list of them, as what MessagePack has; token ids as raw little-endian int32."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.to_builtins(value)
        if isinstance(fields, dict) and isinstance(fields.get("token_ids"), list):
            fields["token_ids"] = protocol.encode_tokens(fields["token_ids"])
        return fields
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def tokens_of(raw: bytes) -> list[int]:
    """Return the token ids of a recorded generation."""
    return protocol.decode_tokens([raw], 0)
