"""The report on a GPU: what it writes when a section fails or finds no time, and its sections under the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_report import Clock, Report, Row, Section, run_sections

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_what_was_found_is_written_although_a_section_fails_and_another_finds_no_time(tmp_path: Path) -> None:
    out_of_time: list[bool] = []

    def failing(clock: Clock) -> Iterator[Row]:
        yield {"us": 1.5}
        raise RuntimeError("out of memory")

    def long(clock: Clock) -> Iterator[Row]:
        out_of_time.append(clock.is_out)
        yield {"us": 2.5}

    path = tmp_path / "new" / "report.json"
    report = Report({"device": "none"})
    run_sections([Section("failing", 60, failing), Section("long", 0, long)], report, path, time.monotonic() + 600)
    assert out_of_time == [True]
    run_sections([Section("late", 60, long)], report, path, time.monotonic())
    assert len(out_of_time) == 1, "a section was begun although no time was left"
    written = json.loads(path.read_text())
    assert written["environment"] == {"device": "none"}
    found = {name: (section["status"], section["rows"]) for name, section in written["sections"].items()}
    assert found == {
        "failing": ("failed: RuntimeError: out of memory", [{"us": 1.5}]),
        "long": ("cut short", [{"us": 2.5}]),
        "late": ("no time left", []),
    }


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_a_dry_run_finds_every_kernel_right_and_serves_a_fork_from_the_cache(tmp_path: Path) -> None:
    """In a process of its own: Triton decides at its import whether kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = tmp_path / "report.json"
    command = [sys.executable, "gpu_report.py", "--dry-run", "--no-peers", "--output", str(path)]
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    sections = json.loads(path.read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(
        ["correctness", "ceilings", "kernels", "tree", "steps", "serving"], "done"
    )
    assert all(row["right"] for row in sections["correctness"]["rows"])
    assert {row["kernel"] for row in sections["kernels"]["rows"]} == {"norm", "gate", "rotation", "logits", "draw"}
    assert all(row["error_each"] < 1e-5 for row in sections["tree"]["rows"])
    assert {row["graphs"] for row in sections["steps"]["rows"]} == {True, False}
    (served,) = sections["serving"]["rows"]
    assert (served["generated"], served["cached"]) == (4, 32), "two branches of two tokens, one prefix of 32"
