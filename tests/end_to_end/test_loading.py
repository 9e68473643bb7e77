"""A model that loads slowly, as a person at a terminal sees it: how far it is, and that Ctrl-C ends it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import START_S, end

SLOW = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from bough.runtime.models.weights import Weights
read = Weights._read

def read_when_told(self, name):
    sys.stdin.readline()  # one line per tensor
    return read(self, name)

Weights._read = read_when_told
from bough.runtime.__main__ import main
sys.exit(main(["pocket", "--listen", sys.argv[1]]))
"""


def read_until(terminal: int, words: str) -> str:
    """Return what a terminal shows until some words are among it, or it is closed."""
    seen, deadline = "", time.monotonic() + START_S
    while words not in seen:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], f"no {words!r} in {seen!r}"
        try:
            seen += os.read(terminal, 65536).decode()
        except OSError:  # the other end is closed
            break
    return seen


def test_a_slow_load_shows_how_far_it_is_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    terminal, others_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, f"ipc://{tmp_path}/s"],
        cwd=tmp_path,  # nothing to import by accident
        stdin=subprocess.PIPE,
        stderr=others_end,
        stdout=others_end,
        text=True,
    )
    os.close(others_end)
    try:
        assert process.stdin is not None
        process.stdin.write("\n" * 4)
        process.stdin.flush()
        seen = read_until(terminal, "% of 6 MB")
        assert seen.startswith("bough serve: loading pocket")
        assert "\rbough serve: loading pocket: reading weights " in seen
        process.send_signal(signal.SIGINT)
        rest = read_until(terminal, "interrupted")
        assert rest.endswith("\rbough serve: interrupted") or "\rbough serve: interrupted\r\n" in rest
        assert "Traceback" not in rest + read_until(terminal, "never")
        assert process.wait(START_S) == 130
    finally:
        end(process)
        os.close(terminal)
