"""The runtime's process, as its parent sees it: started, watched while it loads, stopped for sure.

The child gets three pipes. On `--status-fd` it writes JSON lines: loading (a text for people), ready or failed. Its
standard input is held open and never written: when this process ends, even by SIGKILL, the child reads the end of it
and exits. Its standard error is passed on, and the tail kept to explain a death.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Final

from bough.errors import BoughError, ResourceExhausted, RuntimeLost, Timeout, from_kind

MAX_PATH_BYTES: Final = 100
"""A Unix socket's path has 107 bytes at most (sun_path), less on other systems."""
TAIL_LINES: Final = 20
TERMINATE_S: Final = 5.0
QUIET_S: Final = 2.0
"""A start that is silent for longer is told of."""


class RuntimeProcess:
    """A `python -m bough.runtime`, started but not ready yet; `stop` is idempotent, and ends a wait for it too."""

    def __init__(self, model: str, options: Sequence[str]) -> None:
        self._parent_pid = os.getpid()
        self._folder = _private_folder()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._stopped = False
        self._stopping = threading.Lock()
        self.address = f"ipc://{self._folder}/s"
        read_end, child_status = os.pipe()
        self._status = status = os.fdopen(read_end, "rb", buffering=0)
        try:
            self._popen = subprocess.Popen(
                [
                    *module_command(),
                    model,
                    *("--listen", self.address),
                    *("--status-fd", str(child_status)),
                    *("--parent-pid", str(self._parent_pid)),
                    *options,
                ],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(child_status,),
                cwd=self._folder,  # nothing to import by accident
                start_new_session=True,  # Ctrl-C is for the program, which then shuts the runtime down
            )
        except BaseException:
            status.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            os.close(child_status)
        assert self._popen.stderr is not None, "asked for above"
        self._reader = threading.Thread(
            target=_pass_on, args=(self._popen.stderr, self._tail), name="bough-runtime-stderr", daemon=True
        )
        self._reader.start()

    def wait_until_ready(self, deadline: float) -> None:
        """Return once the runtime serves; call it once. Raises why it does not, and then it is stopped."""
        try:
            with self._status as pipe:
                self.address = self._address_when_ready(pipe, deadline)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    def reason_of_death(self) -> str | None:
        """Return why the process has ended, or None while it runs."""
        code = self._popen.poll()
        return None if code is None else f"the runtime (pid {self.pid}) {_how(code)}{self._last_words()}"

    def stop(self) -> None:
        """End the process: politely, then for sure; remove its folder."""
        if os.getpid() != self._parent_pid:  # a forked child must not stop its parent's runtime
            return
        with self._stopping:  # whoever comes second returns when it has ended, too
            if not self._stopped:
                self._stopped = True
                self._stop()

    def _stop(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        assert self._popen.stdin is not None, "asked for at the start"
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        self._reader.join(TERMINATE_S)
        assert self._popen.stderr is not None, "asked for at the start"
        self._popen.stderr.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ start

    def _address_when_ready(self, pipe: IO[bytes], deadline: float) -> str:
        with _progress() as show:
            for status in _status_lines(pipe, deadline):
                if status is None:
                    raise Timeout("the runtime was not ready in time (start_timeout)", phase="loading")
                phase = status.get("phase")
                if phase == "loading":
                    show(str(status.get("text", "")), bool(status.get("is_line")))
                elif phase == "failed":
                    raise _failure(status)
                elif phase == "ready":
                    return str(status.get("address") or self.address)
        raise self._death_at_start()

    def _death_at_start(self) -> BoughError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(TERMINATE_S)
        self._reader.join(1.0)
        code = self._popen.poll()
        how = "closed its status pipe" if code is None else _how(code)
        kind = ResourceExhausted if code == -signal.SIGKILL else RuntimeLost
        return kind(f"the runtime {how} before it was ready{self._last_words()}", exit_code=code)

    def _last_words(self) -> str:
        return "" if not self._tail else "; the end of its log:\n" + "".join(self._tail).rstrip()


def module_command() -> list[str]:
    """Return the command that runs the runtime without putting any folder of the user's on its import path.

    With the repository on that path, transformers imports our `kernels` folder as its own optional package.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", "bough.runtime"]
    start = "import runpy, sys; del sys.path[0]; runpy.run_module('bough.runtime', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", start]


def _private_folder() -> str:
    """Make a new folder that only this user can enter, with a path short enough for a socket in it."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = tempfile.mkdtemp(prefix="bough-", dir=parent)
        if len(os.fsencode(folder)) + 2 <= MAX_PATH_BYTES:
            return folder
        os.rmdir(folder)
    raise RuntimeLost(f"no folder for a socket has a path of at most {MAX_PATH_BYTES} bytes")


def _status_lines(pipe: IO[bytes], deadline: float) -> Iterator[dict[str, Any] | None]:
    """Yield what the child reports, None if it is too slow; end when it has closed the pipe."""
    rest, has_news = b"", False
    while True:
        left = max(0.0, deadline - time.monotonic())
        is_quiet = not select.select([pipe], [], [], left if has_news else min(left, QUIET_S))[0]
        if is_quiet and (has_news or left <= QUIET_S):
            yield None
            return
        has_news = True
        if is_quiet:  # reading torch from a disk takes long
            yield {"phase": "loading", "text": "starting the runtime"}
            continue
        chunk = pipe.read(65536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                status = json.loads(line)
                if isinstance(status, dict):
                    yield status


def _failure(status: dict[str, Any]) -> BoughError:
    details = status.get("details")
    return from_kind(
        str(status.get("kind")),
        str(status.get("message", "the runtime could not start")),
        details if isinstance(details, dict) else None,
    )


def _how(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _pass_on(stream: IO[bytes], tail: deque[str]) -> None:
    """Copy the child's log to our standard error, and keep the end of it."""
    with contextlib.suppress(ValueError):  # the stream was closed while this thread read it
        for line in stream:
            text = line.decode(errors="replace")
            tail.append(text)
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(text)
                sys.stderr.flush()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, bool], None]]:
    """Show texts on standard error: drawn one over the other on a terminal, elsewhere those that are due as lines.

    The runtime says when (`bough.runtime.loading`): nothing for the first seconds, a line every few.
    """
    stream = sys.stderr
    is_terminal = stream is not None and stream.isatty()
    width = 0

    def write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(text)
            stream.flush()

    def draw(text: str) -> None:
        nonlocal width
        write(f"\r{text.ljust(width)}")
        width = len(text)

    def show(text: str, is_line: bool) -> None:
        if is_terminal:
            draw(f"bough: {text}"[: shutil.get_terminal_size().columns - 1])
        elif is_line:
            write(f"bough: {text}\n")

    try:
        yield show
    finally:
        if width:
            draw("")
            write("\r")
