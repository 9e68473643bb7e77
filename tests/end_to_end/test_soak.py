"""The soak, in short: nothing leaks and nothing is lost over thousands of random operations on a real runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "scripts" / "soak"


def test_thousands_of_random_operations_leave_nothing_behind() -> None:
    run = subprocess.run(
        [sys.executable, str(SOAK), "--operations", "6000"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "flat memory, all pages back, no operation lost" in run.stdout
