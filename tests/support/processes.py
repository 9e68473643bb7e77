"""Real processes for end-to-end tests: start them, look at them, wait for what they do, never longer than said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import bough as bo
from bough.process import module_command

T = TypeVar("T")
START_S = 60.0  # a busy machine takes a while to import torch


def wait_until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    """Look again and again until a condition holds; fail with `what` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def within(seconds: float, act: Callable[[], T]) -> T:
    """Return what `act` returns or raise what it raises; fail if it takes longer."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((act(), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still waiting after {seconds:g} s"
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def socket_folder(address: str) -> Path:
    """Return the folder that an ipc address lies in."""
    return Path(address.removeprefix("ipc://")).parent


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start this interpreter with the repository off its path; its output can be read as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, *arguments], text=True, **options)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process of ours that may still run, and close its pipes."""
    if process.poll() is None:
        process.kill()
    process.communicate()


class Served:
    """`python -m bough.runtime MODEL --listen ipc://...`, as somebody else's runtime; a context manager."""

    def __init__(self, model: str | Path, *options: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="bough-e2e-")
        self.address = f"ipc://{self.folder.name}/s"
        self.log = Path(self.folder.name) / "log"
        with self.log.open("w") as log:
            command = [*module_command(), str(model), "--listen", self.address, *options]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, cwd=self.folder.name)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.folder.cleanup()

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self, **options: Any) -> bo.RuntimeClient:
        """Connect, waiting for the runtime to listen."""
        return bo.RuntimeClient(self.address, **{"timeout": START_S, **options})


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with some changes."""
    return {**os.environ, **changes}
