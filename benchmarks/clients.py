"""Carries a trace out on any system that answers asks one by one.

No import beyond the standard library: peers that live in an environment of their own (hosting.py) are carried so too.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from asks import Ask, Program, Trace
from calls import Call, Run

Start = Callable[[list[int], Ask], "Future[Call]"]


class System(Protocol):
    """What carries traces out. Every run begins with an empty cache."""

    def run(self, trace: Trace) -> Run:
        """Carry the trace out. Raises NotPossible if this system has no way to."""
        ...

    def peak_bytes(self) -> int | None:
        """Return the most memory resident since the run began; None where the system does not tell."""
        ...

    def close(self) -> None:
        """Stop it."""
        ...


class NotPossible(Exception):
    """The system is installed, but has no way to do this."""


class NotInstalled(Exception):
    """The system is not installed here; the message says how to install it."""


@dataclass
class _Running:
    """A program under way."""

    program: Program
    begun_at: float
    answers: dict[int, list[int]] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)

    def ready(self) -> list[int]:
        """Return the places of the asks that can be sent now."""
        return [
            place
            for place, ask in enumerate(self.program)
            if place not in self.sent and all(before in self.answers for before in ask.after)
        ]


_Done = queue.SimpleQueue[tuple[_Running, int, "Future[Call]"]]


def _pass_on(done: _Done, running: _Running, place: int, future: Future[Call]) -> None:
    done.put((running, place, future))


def carry_out(trace: Trace, start: Start) -> Run:
    """Run the trace's programs, `concurrency` at once; `start` sends one ask. Raises what an ask raised."""
    done: _Done = queue.SimpleQueue()
    waiting = list(reversed(trace.programs))
    calls: list[Call] = []
    program_s: list[float] = []

    def send(running: _Running) -> None:
        for place in running.ready():
            running.sent.add(place)
            ask = running.program[place]
            future = start(ask.prompt(running.answers), ask)
            future.add_done_callback(partial(_pass_on, done, running, place))

    begin = time.perf_counter()
    for _ in range(min(trace.concurrency, len(waiting))):
        send(_Running(waiting.pop(), time.perf_counter()))
    while len(program_s) < len(trace.programs):
        running, place, future = done.get()
        call = future.result()
        calls.append(call)
        running.answers[place] = call.answer
        if len(running.answers) < len(running.program):
            send(running)
            continue
        program_s.append(time.perf_counter() - running.begun_at)
        if waiting:
            send(_Running(waiting.pop(), time.perf_counter()))
    return Run(time.perf_counter() - begin, program_s, calls)


# ---------------------------------------------------------------------------------------------- memory


def forget_peak(pid: int | str = "self") -> None:
    """Let the process's peak begin again at what is resident now, where the kernel does that."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int | str = "self") -> int | None:
    """Return the most memory that was resident, in bytes; None where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
