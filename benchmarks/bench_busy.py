"""What becomes of a decode step when something else wants one of the cores?

A step of 8 sequences of the 30M model, on all cores, alone and beside a process that keeps one core busy; with
OpenMP's threads waiting as the runtime has them wait (they spin for 50 us and then sleep), for a quarter of that, as
they do by default (they spin for long), and passively (they sleep at once). Each setting is a process of its own; they
take turns.

    python benchmarks/bench_busy.py [--quick] [--save]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import harness
import numpy as np
from harness import Summary, ratio
from models import llama_30m

BUSY_S: Final = 300  # when the busy process ends by itself, should nobody end it
SETTINGS: Final = {
    "50 µs, then sleep (the runtime's)": {"GOMP_SPINCOUNT": "2000"},
    "12 µs, then sleep": {"GOMP_SPINCOUNT": "500"},
    "OpenMP's default": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__).parse_args()
    environment = harness.environment()
    reps, steps = options.reps or (2 if options.quick else 7), 50 if options.quick else 200
    model = llama_30m(options.models_dir)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(model, added)) for name, added in SETTINGS.items()}
        cases = {name: partial(_times, worker, steps) for name, worker in workers.items()}
        alone = harness.interleaved(cases, reps)
        with _busy():
            beside = harness.interleaved(cases, reps)
    results: dict[str, Any] = {}
    rows = []
    for name in SETTINGS:
        parts = {
            f"{when}_{label}": [float(np.percentile(times, share)) for times in found[name]]
            for when, found in (("alone", alone), ("busy", beside))
            for label, share in (("p50", 50), ("p99", 99))
        }
        figures = {key: Summary.of(values) for key, values in parts.items()}
        figures["busy_by_alone"] = ratio(parts["busy_p50"], parts["alone_p50"])
        results[name] = figures
        columns = ("alone_p50", "alone_p99", "busy_p50", "busy_p99", "busy_by_alone")
        rows.append([name, *(figures[column] for column in columns)])
    headers = ("threads wait", "alone, p50 ms", "p99", "one core busy, p50 ms", "p99", "busy / alone")
    harness.report("bench_busy", options, environment, results, [harness.table(headers, rows)])


@contextmanager
def _worker(model: Path, added: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, str(harness.FOLDER / "busy_worker.py"), str(model)]
    process = subprocess.Popen(command, env=inherited | added, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


@contextmanager
def _busy() -> Iterator[None]:
    code = f"import time\nend = time.monotonic() + {BUSY_S}\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _times(worker: subprocess.Popen[str], steps: int) -> list[float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    times: list[float] = json.loads(worker.stdout.readline())
    return times


if __name__ == "__main__":
    main()
