"""The report on a GPU: what it writes when a section fails or finds no time, and its sections under the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_report
from gpu_goals import GOALS, summary, verdicts
from gpu_report import Clock, Report, Row, Section, run_sections
from gpu_steps import extend_batch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def failing(clock: Clock) -> Iterator[Row]:
    yield {"us": 1.5}
    raise RuntimeError("out of memory")


def breaking(clock: Clock) -> Iterator[Row]:
    yield {"us": 2.5}
    os.kill(os.getpid(), signal.SIGKILL)
    yield {"us": 3.5}


def hanging(clock: Clock) -> Iterator[Row]:
    yield {"us": 4.5}
    while True:
        time.sleep(0.01)


def long(clock: Clock) -> Iterator[Row]:
    yield {"is_out": clock.is_out}


def written(path: Path) -> dict[str, tuple[str, list[Row]]]:
    sections = json.loads(path.read_text())["sections"]
    return {name: (section["status"].split(" after")[0], section["rows"]) for name, section in sections.items()}


def test_a_section_that_fails_breaks_or_hangs_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "_GRACE_S", 0.0)
    paths = [tmp_path / "new" / "report.json", tmp_path / "copy.json"]
    report = Report({"device": "none"}, paths)
    sections = [
        Section("failing", 60, failing),
        Section("breaking", 60, breaking, "side by side"),
        Section("hanging", 0.2, hanging, "side by side"),
        Section("long", 5, long),
    ]
    run_sections(sections, report, time.monotonic() + 600)
    run_sections([Section("late", 60, long)], report, time.monotonic())
    assert (
        written(paths[0])
        == written(paths[1])
        == {
            "failing": ("failed: RuntimeError: out of memory", [{"us": 1.5}]),
            "breaking": (f"failed: its process ended with {-signal.SIGKILL}", [{"us": 2.5}]),
            "hanging": ("killed", [{"us": 4.5}]),
            "long": ("done", [{"is_out": False}]),
            "late": ("no time left", []),
        }
    )


def test_the_goals_are_read_off_the_rows() -> None:
    step = {"model": "8b", "context": 8320, "shared": 8192, "new": 1, "graphs": True}
    rows = [
        {**step, "batch": 64, "share": True, "ms": 5.0},
        {**step, "batch": 64, "share": False, "ms": 14.0},
        {"model": "8b", "cached": 8192, "new": 64, "ms": 4.0, "floors": 1.2},
    ]
    wrong = {"kernel": "draw", "dtype": "float32", "error": 2.0, "limit": 0.0, "right": False}
    sections = {
        "tree": {"status": "done", "rows": [{"width": 16, "prefix": 8192, "each/tree": 4.5}]},
        "steps 8b": {"status": "cut short", "rows": rows},
        "correctness rows": {"status": "done", "rows": [wrong]},
    }
    found = {what: (value, verdict) for what, value, verdict in verdicts(sections)}
    assert found["tree attention (16, 8k) / each"] == (4.5, "pass (>= 4)")
    assert found["whole step (64, 8k) / unshared"] == (2.8, "FAIL (>= 3)")
    assert found["64 new on 8k / reading the weights"] == (1.2, "pass (<= 1.6)")
    assert found["idle at 8B, batch 1"] == (None, "not measured (<= 0.05)")
    assert len(found) == len(GOALS)
    assert "WRONG draw float32: 2 > 0" in summary(sections)


def test_a_step_of_new_tokens_stands_after_what_is_cached() -> None:
    (row,) = extend_batch(8192, 64).rows
    assert (row.start, len(row.token_ids), len(row.pages)) == (8192, 64, 516)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_a_dry_run_finds_every_kernel_right_and_serves_a_fork_from_the_cache(tmp_path: Path) -> None:
    """In a process of its own: Triton decides at its import whether kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = tmp_path / "report.json"
    command = [sys.executable, "gpu_report.py", "--dry-run", "--no-peers", "--out", str(path)]
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    sections = json.loads(path.read_text())["sections"]
    parts = ["device", "correctness rows", "correctness attention", "correctness keys", "ceilings", "tree"]
    parts += ["steps tiny", "prefill", "serving", "questions", "kernels"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(parts, "done")
    checks = [row["right"] for section in sections.values() for row in section["rows"] if "right" in row]
    assert len(checks) >= 10
    assert all(checks)
    assert {row["kernel"] for row in sections["kernels"]["rows"]} == {"norm", "gate", "rotation", "logits", "draw"}
    assert {row["graphs"] for row in sections["steps tiny"]["rows"] if "graphs" in row} == {True, False}
    assert {row["share"] for row in sections["steps tiny"]["rows"] if "share" in row} == {True, False}
    assert {row["question"] for row in sections["questions"]["rows"]} == {
        "stages, and pages looked up in the loop",
        "programs",
        "costs",
    }
    assert [row["system"] for row in sections["serving"]["rows"]] == ["bough", "bough --no-overlap"]
    for served in sections["serving"]["rows"]:
        assert (served["generated"], served["cached"]) == (4, 32), "two branches of two tokens, one prefix of 32"
    assert "not measured" in result.stdout, "the goals are told last"
