"""Trying a grammar out where it can do no harm: in a child process that may crash, swell or be killed.

The runtime starts one process, once, before it serves (it starts none later). That process never compiles: for each
grammar it forks a child with limits on its memory and its time, which compiles the grammar and takes a few steps. What
is left of a hostile grammar is an exit status.

    runtime  --[length][number, text]-->  vetter  --fork-->  child
             <-[length][number, complaint]--        <-pipe--

A native stack overflow (3,000 rules, each calling the next, was enough) would otherwise end the runtime.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from io import FileIO
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import llguidance
import msgpack
import numpy as np

from bough.runtime.grammar.limits import LLGUIDANCE_LIMITS, Limits, for_llguidance

if TYPE_CHECKING:
    from bough.runtime.grammar.vocabulary import Vocabulary

_HEAD = struct.Struct("<I")
_STEPS = 8  # tokens that a trial takes after compiling


class Vetter:
    """The runtime's end. `vet` may be called from several threads; it waits for the verdict."""

    def __init__(self, limits: Limits, vocabulary: Vocabulary) -> None:
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bough.runtime.grammar.vetting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt at the terminal is the runtime's
        )
        self._numbers = count()
        self._lock = threading.Lock()
        self._verdicts: dict[int, str] = {}
        self._arrived = threading.Condition()
        self._is_gone = False
        facts = {
            "compile_s": limits.compile_s,
            "memory_bytes": limits.memory_bytes,
            "limits": [getattr(limits, name) for name in LLGUIDANCE_LIMITS],
            "tokens": vocabulary.token_table(),
            "eos": list(vocabulary.eos_ids),
            "special": sorted(vocabulary.special_ids),
        }
        self._send(facts)
        threading.Thread(target=self._read, name="vetter", daemon=True).start()

    def vet(self, text: str) -> str:
        """Return "" for a grammar that compiles within the limits, else what is wrong; "!": it costs too much."""
        number = next(self._numbers)
        try:
            self._send([number, text])
        except (OSError, ValueError):  # ValueError: closed by us
            return "! the process that tries grammars out is gone"
        with self._arrived:
            # The other side keeps the time; this is for when it is gone or stuck.
            self._arrived.wait_for(
                lambda: number in self._verdicts or self._is_gone, timeout=4 * self._limits.compile_s + 60
            )
            return self._verdicts.pop(number, "! no verdict came")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            _pipe(self._process.stdin).close()
        self._process.kill()
        self._process.wait()
        _pipe(self._process.stdout).close()

    def _send(self, message: Any) -> None:
        packed = msgpack.packb(message)
        with self._lock:
            pipe = _pipe(self._process.stdin)
            pipe.write(_HEAD.pack(len(packed)) + packed)
            pipe.flush()

    def _read(self) -> None:
        while (message := _receive(_pipe(self._process.stdout))) is not None:
            number, verdict = message
            with self._arrived:
                self._verdicts[number] = verdict
                self._arrived.notify_all()
        with self._arrived:
            self._is_gone = True
            self._arrived.notify_all()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the process was started with pipes"
    return pipe


def _receive(pipe: IO[bytes] | FileIO) -> Any:
    """Return the next message, None at the end."""
    try:
        (size,) = _HEAD.unpack(_exactly(pipe, _HEAD.size))
        return msgpack.unpackb(_exactly(pipe, size))
    except (OSError, ValueError, struct.error):
        return None


def _exactly(pipe: IO[bytes] | FileIO, size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --------------------------------------------------------------------------------------------- the other process


class _Encoder:
    """Tokens for a trial. How forced bytes are cut into tokens does not matter to it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.tokens = facts["tokens"]
        self.eos_token_id = facts["eos"][0] if facts["eos"] else 0
        self.bos_token_id = None
        self.special_token_ids = facts["special"]
        self._single = {piece: token for token, piece in enumerate(self.tokens) if len(piece) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self._single[bytes((byte,))] for byte in raw if bytes((byte,)) in self._single]


def _try_out(text: str, tokenizer: llguidance.LLTokenizer, limits: Limits) -> str:
    """Compile a grammar and walk into it a little; return what is wrong."""
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=for_llguidance(limits))
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if not len(allowed):
            break
        matcher.deep_copy().consume_token(int(allowed[0]))
        if not matcher.consume_token(int(allowed[len(allowed) // 2])):
            break
    return matcher.get_error()


def _child(text: str, tokenizer: llguidance.LLTokenizer, limits: Limits, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory_bytes, used + limits.memory_bytes))
    os.write(pipe, b"." + _try_out(text, tokenizer, limits).encode()[:4000])


class _Trials:
    """The children that run: one per grammar, each with a pipe and a time."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._running: dict[int, tuple[int, int, float]] = {}  # pipe -> number, pid, until

    def start(self, number: int, text: str) -> int:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(ours)
                _child(text, self._tokenizer, self._limits, theirs)
                status = 0
            finally:
                os._exit(status)
        os.close(theirs)
        self._running[ours] = number, pid, time.monotonic() + self._limits.compile_s
        return ours

    def patience(self) -> float | None:
        return min((max(until - time.monotonic(), 0) for _, _, until in self._running.values()), default=None)

    def late(self) -> list[int]:
        return [pipe for pipe, (_, _, until) in self._running.items() if until <= time.monotonic()]

    def end(self, pipe: int, *, is_late: bool) -> tuple[int, str]:
        """Return a trial's number and verdict."""
        number, pid, _ = self._running.pop(pipe)
        said = b"" if is_late else os.read(pipe, 8192)
        os.close(pipe)
        if is_late:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if is_late:
            return number, f"! it takes longer than {self._limits.compile_s:g} s to compile"
        return number, said[1:].decode("utf-8", "replace") if said else "! compiling it takes too much memory or depth"


def main() -> None:
    """Serve trials until the runtime is gone."""
    requests = FileIO(0, closefd=False)  # unbuffered: what is left to read can be waited for
    facts = _receive(requests)
    if facts is None:
        return
    named = dict(zip(LLGUIDANCE_LIMITS, facts["limits"], strict=True))
    limits = Limits(compile_s=facts["compile_s"], memory_bytes=facts["memory_bytes"], **named)
    tokenizer = llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Encoder(facts)), n_vocab=len(facts["tokens"]), eos_token=facts["eos"] or None
    )
    trials = _Trials(tokenizer, limits)
    output = sys.stdout.buffer
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(trials.patience())]
            verdicts = []
            for source in ready:
                if isinstance(source, int):
                    selector.unregister(source)
                    verdicts.append(trials.end(source, is_late=False))
                    continue
                message = _receive(requests)
                if message is None:
                    return
                selector.register(trials.start(*message), selectors.EVENT_READ)
            for pipe in trials.late():
                selector.unregister(pipe)
                verdicts.append(trials.end(pipe, is_late=True))
            for verdict in verdicts:
                packed = msgpack.packb(verdict)
                output.write(_HEAD.pack(len(packed)) + packed)
                output.flush()


if __name__ == "__main__":
    main()
