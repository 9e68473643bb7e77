"""What does the CUDA path do on this GPU? One command, at most eight minutes: correctness first, then every figure.

    python benchmarks/gpu_report.py             # on a machine with a CUDA device: this repository, torch and triton
    TRITON_INTERPRET=1 python benchmarks/gpu_report.py --dry-run     # without one: all that can run, on tiny shapes

Nothing needs to be installed or fetched: bough is imported from this checkout, and msgspec, pyzmq, llguidance and
safetensors, where they are missing, from the wheels of a folder (--wheels). Triton builds its launcher with a C
compiler (gcc, clang, CC).

The most important sections come first. Each runs in a process of its own and within its own seconds, whose sum is that
of the whole (460, those side by side counted once); serving has also what those before it did not need. One that fails,
hangs, or breaks the device for its process costs no other, and what found no time is told as not run. Every row is
written as it is found, to benchmarks/results/DATE-gpu_report.json or --out, and into the folder that the variable OUT
names, if it is set. Times are medians of repetitions that alternate between the systems compared; ratios are of one
run. A dry run has all the time it takes, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
_GRACE_S: Final = 8.0  # a section that is out of time may still finish the row it is at
_DRY_RUN_S: Final = 3600.0  # of each section and of all
_OF_PEERS: Final = ("flashinfer", "peers", "peers flashinfer", "serving peer")
_NEEDED: Final = ("msgspec", "llguidance", "safetensors")  # by the runtime: by whole steps and serving
_WITHOUT: Final = (
    "not installed: {missing}. Whole steps and serving will fail; kernels can be measured. Where there is a network, "
    "`pip download --no-deps --only-binary=:all: -d {wheels} {missing}` for this machine's Python brings them along."
)
_COMPILERS: Final = ("gcc", "clang", "cc")


@dataclass
class Clock:
    """How long a section may still run: its own seconds, and those of the whole."""

    ends_at: float

    @property
    def is_out(self) -> bool:
        return time.monotonic() >= self.ends_at


@dataclass(frozen=True)
class Section:
    """A part of the report: what yields its rows, in at most `seconds`. Sections of one `together` run side by side.

    takes_more: it has also the seconds that sections before it left, and that no later one may need.
    """

    name: str
    seconds: float
    run: Callable[[Clock], Iterable[Row]]
    together: str = ""
    takes_more: bool = False


@dataclass
class Report:
    """All that was found so far; written to every one of `paths` as it changes."""

    environment: Row
    paths: Sequence[Path]
    sections: dict[str, Row] = field(default_factory=dict)

    def write(self) -> None:
        """Write the report where that can be done; what is no JSON, a NumPy number say, costs no other row."""
        document = (
            json.dumps({"environment": self.environment, "sections": self.sections}, indent=1, default=str) + "\n"
        )
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".part")
                unfinished.write_text(document)
                os.replace(unfinished, path)
            except OSError as error:  # the other path, and what is printed, remain
                print(f"{path} cannot be written: {error}", file=sys.stderr)


class _Child:
    """A section in a process of its own."""

    def __init__(self, section: Section, ends_at: float, num_together: int) -> None:
        context = multiprocessing.get_context("fork")  # torch is imported already, and no device is in use yet
        self.name = section.name
        self.begin = time.monotonic()
        soft = min(self.begin + section.seconds, ends_at)
        self.deadline = soft + _GRACE_S
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(section, Clock(soft), theirs, num_together), daemon=False)
        self.process.start()
        theirs.close()

    def status_of_death(self) -> str:
        self.process.join(5)
        return f"failed: its process ended with {self.process.exitcode}"

    def kill(self) -> None:
        """End the process and all that it started: compilers, too."""
        try:
            assert self.process.pid is not None
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()


def _work(section: Section, clock: Clock, pipe: Connection, num_together: int) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if num_together > 1:  # what is computed on the CPU, definitions above all, has these cores with the others
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_together))
    status = "done"
    try:
        for row in section.run(clock):
            pipe.send(row)
        status = "cut short" if clock.is_out else status
    except Exception as error:
        status = f"failed: {type(error).__name__}: {error}"
        traceback.print_exc()
    pipe.send(status)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # a broken device may not let go of the process otherwise


def run_sections(sections: Sequence[Section], report: Report, ends_at: float) -> None:
    """Run what there is time for, in order; a failure is part of the report."""
    groups = grouped(sections)
    for index, group in enumerate(groups):
        left = ends_at - time.monotonic()
        if left <= 0:
            report.sections |= {section.name: {"status": "not run: no time left", "rows": []} for section in group}
            report.write()
        else:
            _run_together(with_spare(group, groups[index + 1 :], left), report, ends_at)


def grouped(sections: Sequence[Section]) -> list[list[Section]]:
    """Return sections in order, neighbours that run side by side together."""
    groups: list[list[Section]] = []
    for section in sections:
        if groups and section.together and groups[-1][0].together == section.together:
            groups[-1].append(section)
        else:
            groups.append([section])
    return groups


def with_spare(group: Sequence[Section], later: Sequence[Sequence[Section]], left: float) -> list[Section]:
    """Return the group, those that take more with what is left of `left` seconds when all later ones have theirs."""
    spare = left - sum(max(section.seconds for section in each) for each in (group, *later))
    return [
        replace(section, seconds=section.seconds + max(0.0, spare)) if section.takes_more else section
        for section in group
    ]


def _run_together(group: Sequence[Section], report: Report, ends_at: float) -> None:
    running: dict[Connection, _Child] = {}
    try:
        for section in group:
            report.sections[section.name] = {"status": "running", "rows": []}
            child = _Child(section, ends_at, len(group))
            running[child.pipe] = child
        _listen(running, report)
    except KeyboardInterrupt:  # each is a session of its own: no signal to us ends them
        for child in running.values():
            child.kill()
        for child in running.values():
            _end(child, "stopped from outside", report)
        raise


def _listen(running: dict[Connection, _Child], report: Report) -> None:
    """Take down what sections find until all have ended, or are out of time."""
    while running:
        patience = min(child.deadline for child in running.values()) - time.monotonic()
        for pipe in wait(list(running), max(0.0, patience)):
            assert isinstance(pipe, Connection)
            child = running[pipe]
            try:
                message: Row | str = pipe.recv()
            except (EOFError, OSError):  # OSError: it died while it told something
                message = child.status_of_death()
            if isinstance(message, str):
                del running[pipe]
                _end(child, message, report)
            else:
                report.sections[child.name]["rows"].append(message)
                print(child.name, _line(message), flush=True)
                report.write()
        for child in [child for child in running.values() if time.monotonic() >= child.deadline]:
            del running[child.pipe]
            child.kill()
            _end(child, f"killed after {time.monotonic() - child.begin:.0f} s", report)


def _end(child: _Child, status: str, report: Report) -> None:
    child.process.join(5)
    child.kill()  # compilers and their workers outlive it, with our output open
    report.sections[child.name] |= {"status": status, "seconds": time.monotonic() - child.begin}
    report.write()
    print(f"-- {child.name}: {status} ({time.monotonic() - child.begin:.0f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report; return 0 if everything that ran was right."""
    options = _parser().parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        print("a dry run needs TRITON_INTERPRET=1, set before Triton is imported", file=sys.stderr)
        return 2
    begin = time.monotonic()
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None and not options.dry_run:
        print("no C compiler (gcc, clang or CC): Triton cannot build its launcher, kernels will fail", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bough-report-") as folder:
        _give_caches(Path(folder))
        _make_importable(Path(folder), options.wheels)
        import torch

        if not options.dry_run and not torch.version.cuda:
            print(f"PyTorch {torch.__version__} finds no CUDA device; see --dry-run", file=sys.stderr)
            return 2
        missing = [name for name in _NEEDED if not _is_here(name)]
        if missing:
            print(_WITHOUT.format(missing=" ".join(missing), wheels=options.wheels), file=sys.stderr, flush=True)
        environment = _environment() | {"c_compiler": compiler, "missing": missing}
        name = f"{environment['date'][:10]}-gpu_report.json"
        paths = [options.out or ROOT / "benchmarks/results" / name]
        if os.environ.get("OUT"):
            paths.append(Path(os.environ["OUT"]) / name)
        report = Report(environment, paths)
        sections = _sections(torch.device("cpu" if options.dry_run else "cuda"), peers=not options.no_peers)
        if options.dry_run:  # its figures mean nothing, and how busy the machine is says nothing of the code
            sections = [replace(section, seconds=_DRY_RUN_S) for section in sections]
        ends_at = begin + (_DRY_RUN_S if options.dry_run else options.seconds)
        only = tuple(options.only or ("",))
        chosen = [section for section in sections[1:] if section.name.startswith(only)]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run_sections(sections[:1], report, ends_at)
            if report.sections["device"]["status"] == "done":  # else nothing could run
                run_sections(chosen, report, ends_at)
        except KeyboardInterrupt:
            print("stopped from outside: what follows is of the sections before", file=sys.stderr)
        from gpu_goals import summary
    print(f"\n{' '.join(map(str, paths))} · {time.monotonic() - begin:.0f} s\n{summary(report.sections)}")
    if missing:
        print(_WITHOUT.format(missing=" ".join(missing), wheels=options.wheels))
    wrong = [row for section in report.sections.values() for row in section["rows"] if row.get("right") is False]
    ended_badly = ("failed", "killed", "stopped")
    return 1 if wrong or any(s["status"].startswith(ended_badly) for s in report.sections.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, under Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=460.0, help="of the whole report (default 460)")
    parser.add_argument("--no-peers", action="store_true", help="bough alone")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run the sections whose names begin so")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", metavar="FOLDER", help="(default: wheels)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-gpu_report.json")
    return parser


def _sections(device: Any, *, peers: bool) -> list[Section]:
    """Return all sections, the most important first."""
    import gpu_kernels
    import gpu_questions
    import gpu_serving
    import gpu_steps
    import gpu_tree

    right = {name: run for name, run in gpu_kernels.correctness(device).items()}
    steps = gpu_steps.steps(device)
    found = [
        Section("device", 30, lambda clock: gpu_kernels.about(device)),
        *(Section(f"correctness {name}", 75, run, "right") for name, run in right.items()),
        Section("correctness steps", 75, lambda clock: gpu_serving.agreement(device, clock), "right"),
        # Beside them, since it may compile for a minute what later sections call.
        Section("flashinfer", 75, lambda clock: gpu_tree.flashinfer_kernels(device, clock), "right"),
        Section("ceilings", 12, lambda clock: gpu_kernels.ceilings(device, clock)),
        Section("tree", 40, lambda clock: gpu_tree.tree(device, clock)),
        *(Section(f"steps {name}", 60 if name == "8b" else 38, run) for name, run in steps.items()),
        Section("peers", 35, lambda clock: gpu_tree.peers(device, clock)),
        Section("peers flashinfer", 20, lambda clock: gpu_tree.flashinfer_peers(device, clock)),
        Section("prefill", 22, lambda clock: gpu_tree.prefill(device, peers, clock)),
        Section("serving", 45, lambda clock: gpu_serving.serving(device, clock), takes_more=True),
        Section("serving peer", 40, lambda clock: gpu_serving.peer(device, clock), takes_more=True),
        Section("questions", 28, lambda clock: gpu_questions.questions(device, clock)),
        Section("kernels", 15, lambda clock: gpu_kernels.kernels(device, clock)),
    ]
    return [section for section in found if peers or section.name not in _OF_PEERS]


def _give_caches(folder: Path) -> None:
    """Let all sections share what Triton and torch.compile have compiled, where the home folder cannot hold it."""
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(home, os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked processes


def _make_importable(folder: Path, wheels: Path) -> None:
    """Let `bough` be imported from this checkout where it is not installed, and from wheels what else is missing."""
    site = folder / "site"
    for wheel in sorted(wheels.glob("*.whl")) if wheels.is_dir() else ():
        tags = wheel.stem.split("-")[-3:]
        if tags[0].startswith("py3") or "abi3" in tags[1] or f"cp{sys.version_info[0]}{sys.version_info[1]}" in tags[0]:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    sys.path.append(str(site))  # what is installed comes first
    try:
        import bough.kernels  # noqa: F401
    except ImportError:
        (folder / "bough").mkdir()
        for source in (*(ROOT / "lang").iterdir(), ROOT / "runtime", ROOT / "kernels"):
            (folder / "bough" / source.name).symlink_to(source)
        # The language's own imports are of no use here, and may be missing: kernels and runtime are.
        (folder / "bough/__init__.py").unlink()
        (folder / "bough/__init__.py").write_text("")
        for name in [name for name in sys.modules if name == "bough" or name.startswith("bough.")]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))


def _is_here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _environment() -> Row:
    """Return what this runs on, without touching the device: sections are forked from this process."""
    import torch
    import triton

    command = ["git", "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def _line(row: Row) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a process that its device does not let go of, killed or not, would be waited for
