"""What a runtime that starts tells those who wait for it: the stage it is in, how much is done, the time that is left.

`Loading` is set by the thread that loads and read by a thread of its own, which decides when something is shown: on a
terminal a line that is drawn again and again, elsewhere a line every few seconds, and nothing if loading is fast.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from shutil import get_terminal_size
from types import TracebackType
from typing import Final, TextIO

QUIET_S: Final = 2.0
"""Loading that is done by then shows nothing."""
DRAW_S: Final = 0.25
LINE_S: Final = 5.0
_ESTIMATE_S: Final = 1.0  # a rate measured for less predicts nothing
_MOST_NAME: Final = 24  # characters: a text should fit a terminal's line

Show = Callable[[str, bool], None]
"""Called with a text and whether it is due as a line of a log, too."""


@dataclass(frozen=True)
class Stage:
    """One part of a start, since `begun` (seconds of the clock); total_bytes 0: nobody knows how much there is."""

    name: str
    begun: float
    done_bytes: int = 0
    total_bytes: int = 0


def describe(model: str, stage: Stage, now: float) -> str:
    """Return one line of text: what is being done, how much of it, and the time left or taken."""
    name = model if len(model) <= _MOST_NAME else f"…{model[1 - _MOST_NAME :]}"
    text, seconds = f"loading {name}: {stage.name}", now - stage.begun
    if not stage.total_bytes:
        return f"{text}, {seconds:.0f} s"
    text += f" {stage.done_bytes / stage.total_bytes:.0%} of {_size(stage.total_bytes)}"
    if seconds >= _ESTIMATE_S and 0 < stage.done_bytes < stage.total_bytes:
        text += f", {max(1.0, seconds / stage.done_bytes * (stage.total_bytes - stage.done_bytes)):.0f} s left"
    return text


class Loading:
    """The start of a runtime, as it goes. A context manager; when it is left, nothing is shown any more."""

    def __init__(self, model: str, show: Show, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._show = show
        self._clock = clock
        self._begun = self._line_at = clock()
        self._stage = Stage("starting", self._begun)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bough-loading", daemon=True)

    def __enter__(self) -> Loading:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def enter(self, stage: str) -> None:
        """Begin another stage; one without a name shows nothing."""
        self._stage = Stage(stage, self._clock())

    def advance(self, done_bytes: int, total_bytes: int) -> None:
        """Say how far the stage is, in bytes."""
        self._stage = replace(self._stage, done_bytes=done_bytes, total_bytes=total_bytes)

    def tick(self) -> None:
        """Show the stage if it is time; the watching thread calls this."""
        now, stage = self._clock(), self._stage
        if now - self._begun < QUIET_S or not stage.name:
            return
        is_line = now - self._line_at >= LINE_S
        if is_line:
            self._line_at = now
        self._show(describe(self._model, stage, now), is_line)

    def _watch(self) -> None:
        while not self._ended.wait(DRAW_S):
            self.tick()


class Display:
    """Shows what `Loading` says on a stream: one line drawn again on a terminal, lines of a log elsewhere."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self._stream = stream
        self._prefix = prefix
        self._is_terminal = stream.isatty()
        self._width = 0  # of what is drawn

    def show(self, text: str, is_line: bool) -> None:
        """Show a text, at once or as a line."""
        if self._is_terminal:
            self._draw(f"{self._prefix}{text}"[: get_terminal_size().columns - 1])
        elif is_line:
            self._write(f"{self._prefix}{text}\n")

    def erase(self) -> None:
        """Take away what is drawn."""
        if self._width:
            self._draw("")
            self._write("\r")

    def _draw(self, text: str) -> None:
        self._write(f"\r{text.ljust(self._width)}")
        self._width = len(text)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            self._stream.write(text)
            self._stream.flush()


def _size(num_bytes: int) -> str:
    """Return bytes in a unit that keeps three digits at most before the point."""
    if num_bytes < 999_500_000:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e9:.1f} GB"
