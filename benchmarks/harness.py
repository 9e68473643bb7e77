"""What every benchmark shares: interleaved repetitions, medians with their spread, the environment, the last line.

Cores are shared and clocks drift, so A and B are never measured one after the other: each repetition runs all cases in
turn, every other one backwards, and a ratio is the median of the ratios within repetitions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

FOLDER: Final = Path(__file__).resolve().parent
# As the runtime does: spinning for long at OpenMP barriers makes short operations slow when someone wants the core.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@dataclass(frozen=True)
class Summary:
    """Repetitions of one figure: their median, their extremes, their number."""

    median: float
    least: float
    most: float
    num: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Summarise at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1], len(ordered))

    def __str__(self) -> str:
        if self.num == 1:
            return short(self.median)
        return f"{short(self.median)} ({short(self.least)}–{short(self.most)})"  # noqa: RUF001

    def fields(self) -> dict[str, float]:
        """Return what the JSON document keeps."""
        return {"median": self.median, "min": self.least, "max": self.most, "n": self.num}


def short(value: float) -> str:
    """Return a number with three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}" if abs(value) >= 0.1 else f"{value:.2g}"


def ratio(above: Sequence[float], below: Sequence[float]) -> Summary:
    """Summarise the ratios of two cases, repetition by repetition."""
    return Summary.of(a / b for a, b in zip(above, below, strict=False))


def interleaved(
    cases: Mapping[str, Callable[[], T]], reps: int, *, warm_up: int = 1, budget_s: float = float("inf")
) -> dict[str, list[T]]:
    """Run every case `reps` times, in turn; return the results of each.

    warm_up: unrecorded runs of each case before. budget_s: no further repetition begins after that long; one always
    runs. The garbage collector rests while a case runs.
    """
    begin = time.monotonic()
    results: dict[str, list[T]] = {name: [] for name in cases}
    for rep in range(-warm_up, reps):
        if rep > 0 and time.monotonic() - begin > budget_s:
            break
        for name in cases if rep % 2 == 0 else reversed(list(cases)):
            gc.collect()
            gc.disable()
            try:
                result = cases[name]()
            finally:
                gc.enable()
            if rep >= 0:
                results[name].append(result)
    return results


def timed_us(func: Callable[[], object], number: int = 1) -> float:
    """Return the microseconds one of `number` calls took."""
    begin = time.perf_counter()
    for _ in range(number):
        func()
    return (time.perf_counter() - begin) / number * 1e6


# ---------------------------------------------------------------------------------------------- command line and report


def parser(doc: str | None, *, needs_model: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works; not figures to quote")
    parser.add_argument("--reps", type=int, help="interleaved repetitions")
    parser.add_argument("--save", action="store_true", help="keep the document in results/, the tables in README.md")
    if needs_model:
        default = Path.home() / ".cache" / "bough-bench"
        parser.add_argument(
            "--models-dir", type=Path, default=default, help=f"where models are made (default {default})"
        )
    return parser


def environment() -> dict[str, Any]:
    """Return where and when this runs; take it at the start, for the load average."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bough": version("bough"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
    }


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def report(
    name: str, options: argparse.Namespace, start: Mapping[str, Any], results: Any, tables: Sequence[str]
) -> None:
    """Print the tables, then the JSON document as the last line; keep it where asked."""
    where = f"commit {start['commit']}, {start['date']}, {start['cpu']} × {start['cores']}"  # noqa: RUF001
    where += f", load {start['load_average_at_start'][0]}, Python {start['python']}, torch {start['torch']}"
    command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    text = "\n\n".join([*tables, f"`{command}`: {where}."])
    print(text, end="\n\n")
    document = {
        "benchmark": name,
        "arguments": sys.argv[1:],
        "quick": options.quick,
        "environment": {**start, "load_average_at_end": round(os.getloadavg()[0], 2)},
        "results": results,
    }
    line = json.dumps(document, default=_jsonable)
    if options.save:
        folder = FOLDER / "results"
        folder.mkdir(exist_ok=True)
        with open(folder / f"{start['date'][:10]}-{name}.jsonl", "a") as file:
            file.write(line + "\n")
        if not options.quick:
            put_between(FOLDER / "README.md", name, text)
    print(line)


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the file's two marks of that name. Raises ValueError if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path} has no marks {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _jsonable(value: object) -> object:
    if isinstance(value, Summary):
        return value.fields()
    raise TypeError(f"{type(value).__name__} has no place in a report")


def _commit() -> str:
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
