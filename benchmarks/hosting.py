"""A process per system: its peak memory is its own, and what it imports or pins does not meet the others.

The process may be another environment's Python (`python=`), which then needs nothing but the system's own package: what
goes over the connection is of asks.py and calls.py, and those, clients.py and this file import the standard library
only. Protocol, pickled over a pair of sockets that both ends own: `(make, model)` → `ready`, then `Trace` → `done`
with the run and its peak memory; in the place of either answer `failed` with the exception. The end of the connection
ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from asks import Trace
from calls import Run
from clients import NotInstalled, NotPossible, System, forget_peak

_END_S: Final = 30.0
_LAST: Final = 600
"""Bytes of what a process wrote that are told when it ends unasked."""


class Hosted:
    """A system in a process of its own; `make(model)` runs there. Raises NotInstalled or what else it raised.

    python: the interpreter, default this one. environment: variables to set, or to take away (None).
    """

    def __init__(
        self,
        make: Callable[[Path], System],
        model: Path,
        python: str = sys.executable,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        self._log = TemporaryFile()  # noqa: SIM115 - as long as the process
        command = [python, str(Path(__file__).resolve()), str(theirs.fileno())]
        changes = environment or {}
        variables = {key: value for key, value in {**os.environ, **changes}.items() if value is not None}
        try:
            self._process = subprocess.Popen(
                command,
                env=variables,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # so that what it started can be ended with it
            )
        except OSError as error:
            ours.close()
            self._log.close()
            raise NotInstalled(f"{python} does not run: {error.strerror}") from error
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self._peak: int | None = None
        try:
            self._send((make, model))
            self._receive()
        except BaseException:
            self.close()
            raise

    def run(self, trace: Trace) -> Run:
        """Carry the trace out."""
        self._send(trace)
        run, self._peak = self._receive()
        assert isinstance(run, Run), "what the host sends after a trace"
        return run

    def peak_bytes(self) -> int | None:
        """Return the process's peak during the last run."""
        return self._peak

    def close(self) -> None:
        """End the process, and what it started."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # it has ended: what it said last is still to be read
            self._connection.send(message)

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            raise RuntimeError(f"the system's process ended with status {status}: {self._said()}") from None
        if kind == "failed":
            raise value
        return value

    def _said(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _LAST))
        return self._log.read().decode(errors="replace").strip() or "it wrote nothing"


def serve(connection: Connection) -> None:
    """Make the system that the other end asks for and serve its traces until it closes."""
    try:
        make, model = connection.recv()
        system: System = make(model)
    except BaseException as error:
        connection.send(("failed", _sendable(error)))
        return
    connection.send(("ready", None))
    try:
        while True:
            trace = connection.recv()
            forget_peak()
            try:
                connection.send(("done", (system.run(trace), system.peak_bytes())))
            except Exception as error:
                connection.send(("failed", _sendable(error)))
    except (EOFError, ConnectionError):
        pass
    finally:
        system.close()


def _sendable(error: BaseException) -> Exception:
    """Return the error, or one that tells of it, if its class may be unknown at the other end."""
    if isinstance(error, (NotInstalled, NotPossible)):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
