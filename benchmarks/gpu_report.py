"""What does the CUDA path do on this GPU? One command, at most eight minutes: correctness first, then every figure.

    python benchmarks/gpu_report.py             # on a machine with a CUDA device: this repository, torch and triton
    TRITON_INTERPRET=1 python benchmarks/gpu_report.py --dry-run     # without one: all that can run, on tiny shapes

Sections run in order, each within its own seconds and the whole; one that fails or finds no time is noted and the
others go on. After each, everything so far is written to benchmarks/results/DATE-gpu_report.json. Times are medians of
repetitions that alternate between the systems compared; ratios are of one run. A dry run's figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass
class Clock:
    """How long a section may still run: its own seconds, and those of the whole."""

    ends_at: float

    @property
    def is_out(self) -> bool:
        return time.monotonic() >= self.ends_at


@dataclass(frozen=True)
class Section:
    """A part of the report: rows, and which columns of them the short table at the end shows."""

    name: str
    seconds: float
    run: Callable[[Clock], Iterable[Row]]


@dataclass
class Report:
    """All that was found so far."""

    environment: Row
    sections: dict[str, Row] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        document = {"environment": self.environment, "sections": self.sections}
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(unfinished, path)


def run_sections(sections: Sequence[Section], report: Report, path: Path, ends_at: float) -> None:
    """Run what there is time for; a failure is part of the report."""
    for section in sections:
        begin = time.monotonic()
        if begin >= ends_at:
            report.sections[section.name] = {"status": "no time left", "rows": []}
            report.write(path)
            continue
        rows: list[Row] = []
        status = "done"
        clock = Clock(min(begin + section.seconds, ends_at))
        try:
            for row in section.run(clock):
                rows.append(row)
                print(section.name, _line(row), flush=True)
        except Exception as error:  # whatever breaks here must not cost the other sections their GPU
            status = f"failed: {type(error).__name__}: {error}"
            traceback.print_exc()
        else:
            status = "cut short" if clock.is_out else status
        report.sections[section.name] = {"status": status, "seconds": time.monotonic() - begin, "rows": rows}
        report.write(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; return 0 if everything that ran was right."""
    options = _parser().parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        print("a dry run needs TRITON_INTERPRET=1, set before Triton is imported", file=sys.stderr)
        return 2
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bough-report-") as folder:
        _make_importable(Path(folder))
        import gpu_kernels
        import gpu_steps
        import gpu_tree
        import torch

        if not options.dry_run and not torch.cuda.is_available():
            print(f"PyTorch {torch.__version__} finds no CUDA device; see --dry-run", file=sys.stderr)
            return 2
        device = torch.device("cpu" if options.dry_run else "cuda")
        report = Report(_environment(device))
        peers = not options.no_peers
        parts = gpu_kernels.parts(device) | gpu_tree.parts(device, peers) | gpu_steps.parts(device, peers)
        sections = [section for section in _sections(parts) if not options.only or section.name in options.only]
        path = options.output or ROOT / "benchmarks/results" / f"{report.environment['date'][:10]}-gpu_report.json"
        run_sections(sections, report, path, begin + options.seconds)
    print(f"\n{path} · {time.monotonic() - begin:.0f} s · {report.environment['device']}")
    print(_summary(report))
    wrong = [row for row in report.sections.get("correctness", {}).get("rows", []) if not row["right"]]
    return 1 if wrong or any(s["status"].startswith("failed") for s in report.sections.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, under Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=460.0, help="of the whole report (default 460)")
    parser.add_argument("--no-peers", action="store_true", help="bough alone")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-gpu_report.json")
    return parser


def _sections(parts: Mapping[str, tuple[float, Callable[[Clock], Iterable[Row]]]]) -> list[Section]:
    return [Section(name, seconds, run) for name, (seconds, run) in parts.items()]


def _make_importable(folder: Path) -> None:
    """Let `bough.kernels` and `bough.runtime` be imported from this checkout where bough is not installed."""
    try:
        import bough.kernels  # noqa: F401
    except ImportError:
        (folder / "bough").mkdir()
        for source in (*(ROOT / "lang").iterdir(), ROOT / "runtime", ROOT / "kernels"):
            (folder / "bough" / source.name).symlink_to(source)
        try:
            import msgspec  # noqa: F401
        except ImportError:  # the language needs it, the kernels do not
            (folder / "bough/__init__.py").unlink()
            (folder / "bough/__init__.py").write_text("")
        for name in [name for name in sys.modules if name == "bough" or name.startswith("bough.")]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))


def _environment(device: Any) -> Row:
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    found: Row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "cpu, interpreted: no figure means anything",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "num_sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def _summary(report: Report) -> str:
    """Return the short table: a line for each row of each section."""
    lines = []
    for name, section in report.sections.items():
        lines.append(f"{name}: {section['status']}")
        lines += [f"  {_line(row)}" for row in section["rows"]]
    return "\n".join(lines)


def _line(row: Row) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
    )


if __name__ == "__main__":
    sys.exit(main())
