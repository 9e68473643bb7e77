"""How does bough do on the SGLang paper's workloads, beside itself without its parts and beside its peers?

Systems: bough; without the radix cache; without tree decode; `transformers` generate and its continuous batching; vLLM
where it is installed. Workloads (traces.py): the paper's eleven shapes, forks of growing width and prefix, and random
prompts that share nothing. Same weights, prompts and token counts, greedy, every run from a cold cache; the systems run
in turn within a repetition, and a figure is the median over repetitions.

    python benchmarks/bench_suite.py --quick                 # a minute: see where you stand; not figures to quote
    python benchmarks/bench_suite.py --budget 480 --save     # what matters most first, as often as time permits
    python benchmarks/bench_suite.py --model 110m --only HellaSwag "no sharing"
    python benchmarks/bench_suite.py --render results/2026-11-21-bench_suite.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import harness
import plots
import rows
from asks import Trace
from calls import Run
from clients import NotInstalled, NotPossible, System
from models import SIZES, llama
from schedule import Budget, in_turn, missing, order
from systems import BOUGH, NO_TREE, SYSTEMS, VLLM, start
from traces import control, suite

CACHING: Final = frozenset({BOUGH, NO_TREE, VLLM})
TELLS_HITS: Final = frozenset({BOUGH, NO_TREE, VLLM})
SWEPT: Final = frozenset({BOUGH, NO_TREE, VLLM})
"""Systems that run the sweeps; the others compute every branch's prefix, which says little and takes minutes."""
ALL_SWEPT: Final = ("batch 1", "batch 8")
"""But for these, which share nothing: decoding alone."""
_SLOWER: Final = {"30m": 1.0, "110m": 4.0, "0.5b": 16.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit status."""
    options = _parser().parse_args(arguments)
    if options.render is not None:
        return _render(options.render)
    environment = harness.environment() | {"memory_gb": round(_memory_gb(), 1)}
    size = options.size or ("quick" if options.quick else "standard")
    traces = suite(size)
    if options.only and (unknown := set(options.only) - {trace.name for trace in traces}):
        print(f"bench: no workload {sorted(unknown)}; there are {[trace.name for trace in traces]}", file=sys.stderr)
        return 2
    traces = [trace for trace in traces if not options.only or trace.name in options.only]
    seconds = options.budget or (60.0 if options.quick else 3600.0)
    budget = Budget(seconds, time.monotonic, _SLOWER[options.model])
    model = llama(options.models_dir, options.model)
    suite_run = SuiteRun(
        traces, options.systems or SYSTEMS, budget, reps=options.reps or (1 if options.quick else None)
    )
    with ExitStack() as stack:
        suite_run.start(lambda name: start(name, model, options.vllm_python), stack)
        suite_run.measure()
    environment["load_average_at_end"] = round(os.getloadavg()[0], 2)
    about: dict[str, Any] = {
        "benchmark": "bench_suite",
        "arguments": list(arguments if arguments is not None else sys.argv[1:]),
    }
    about |= {"model": options.model, "size": size, "environment": environment}
    found = [{**about, **row} for row in suite_run.rows()]
    print(_text(found))
    if options.save:
        path = _results() / f"{environment['date'][:10]}-bench_suite.jsonl"
        rows.write(path, suite_run.rows(), about)
        _render(path)
    return 0


class SuiteRun:
    """Traces carried out on systems within a budget, and what came of it."""

    def __init__(self, traces: Sequence[Trace], names: Sequence[str], budget: Budget, reps: int | None = None) -> None:
        self._traces, self._names, self._budget, self._reps = traces, names, budget, reps
        self._systems: dict[str, System] = {}
        self._why: dict[str, str] = {}  # a system's, or (workload/system)'s, reason to have no figures
        self._figures: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        self._same: dict[tuple[str, str], float] = {}

    def start(self, begin: Callable[[str], System], stack: ExitStack) -> None:
        """Start every system and warm it up; one that cannot be started has that as its rows' reason."""
        _say(f"starting {', '.join(self._names)} ...")
        pool = stack.enter_context(ThreadPoolExecutor(len(self._names)))  # most of it is waiting for imports
        starts = {name: pool.submit(begin, name) for name in self._names}
        for name, future in starts.items():
            try:
                system = future.result()
                stack.callback(system.close)
                system.run(control(2, 64, 4))  # first calls of everything
            except NotInstalled as error:
                self._why[name] = f"not installed: {error}"
            except Exception as error:
                self._why[name] = f"failed: {type(error).__name__}: {error}"
            else:
                self._systems[name] = system
            if name in self._why:
                _say(f"{name}: {self._why[name]}")

    def measure(self) -> None:
        """Carry out what fits into the budget."""
        for trace, repetition in order(self._traces, self._reps):
            fitting = self._able(trace, repetition)
            if repetition or trace is not self._traces[0]:  # the first of all runs whatever time starting took
                fitting = self._budget.fits(trace, fitting, CACHING)
            if repetition and not {BOUGH} < set(fitting) and len(self._systems) > 1:
                continue  # a ratio needs both sides
            ran: dict[str, Run] = {}
            for name in in_turn(fitting, repetition):
                if (run := self._run(trace, name, repetition)) is not None:
                    ran[name] = run
            if repetition == 0:
                self._same |= {(trace.name, name): share for name, share in rows.same_answers(ran).items()}
            if ran:
                walls = ", ".join(f"{name} {run.wall_s:.2f} s" for name, run in sorted(ran.items()))
                _say(f"[{self._budget.left():.0f} s left] {trace.name} #{repetition + 1}: {walls}")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per workload and system, those without figures included."""
        found = []
        for trace in self._traces:
            ours = self._figures.get((trace.name, BOUGH), {})
            for name in self._names:
                runs = self._figures.get((trace.name, name), {})
                if not runs:
                    why = self._why.get(name) or missing(self._why, f"{trace.name}/{name}")
                    found.append(rows.empty_row(trace, name, why))
                    continue
                both = [i for i in runs if i in ours]
                row = rows.row(trace, name, list(runs.values()), [])
                if both and name != BOUGH:
                    row |= rows.row(trace, name, [runs[i] for i in both], [ours[i] for i in both]) | {
                        "figures": row["figures"]
                    }
                found.append(row | {"same_answers": self._same.get((trace.name, name), 1.0)})
        return found

    def _able(self, trace: Trace, repetition: int) -> list[str]:
        """Return the systems that are to run the trace."""
        able = []
        for name in self._systems:
            key = f"{trace.name}/{name}"
            if trace.kind == "sweep" and name not in SWEPT and trace.name not in ALL_SWEPT:
                self._why[key] = "left out: it computes every branch's prefix again"
            elif key not in self._why and (repetition == 0 or (trace.name, name) in self._figures):
                able.append(name)
        return able

    def _run(self, trace: Trace, name: str, repetition: int) -> Run | None:
        system, begin = self._systems[name], time.monotonic()
        try:
            run = system.run(trace)
        except NotPossible as error:
            self._why[f"{trace.name}/{name}"] = f"not possible: {error}"
            return None
        except Exception as error:
            self._why[f"{trace.name}/{name}"] = f"failed: {type(error).__name__}: {error}"
            _say(f"{trace.name}, {name}: {error}")
            return None
        self._budget.seen[trace.name, name] = time.monotonic() - begin
        made = rows.figures(trace, run, system.peak_bytes(), name in TELLS_HITS)
        self._figures.setdefault((trace.name, name), {})[repetition] = made
        return run


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.prog = "bough bench"
    parser.add_argument("--size", choices=("quick", "standard", "full"), help="of the texts; default standard")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default: 3600; with --quick 60")
    parser.add_argument("--model", choices=tuple(SIZES), default="30m", help="parameters of the Llama shape")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="run these workloads alone")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument(
        "--vllm-python",
        metavar="PATH",
        default=os.environ.get("VLLM_PYTHON") or sys.executable,
        help="the interpreter of the environment that has vllm; default: VLLM_PYTHON, or this one",
    )
    parser.add_argument("--render", type=Path, metavar="FILE", help="only draw and tabulate the last run in a .jsonl")
    return parser


def _render(path: Path) -> int:
    """Write the table and the plots of the file's last run beside it."""
    if not path.is_file():
        print(f"bench: there is no file {path}", file=sys.stderr)
        return 2
    found = rows.read(path)
    text, stem = _text(found), path.stem + ("" if found[0]["model"] == "30m" else f"-{found[0]['model']}")
    path.with_name(f"{stem}.md").write_text(text + "\n")
    try:
        drawn = plots.draw(found, path.parent, stem, _where(found[0]))
    except ImportError:
        print("bench: no plots: matplotlib is not installed; pip install 'bough[bench]'", file=sys.stderr)
        drawn = []
    _say("wrote " + ", ".join(map(str, [path, path.with_name(f"{stem}.md"), *drawn])))
    return 0


def _text(found: Sequence[Mapping[str, Any]]) -> str:
    arguments = " ".join(found[0]["arguments"])
    return f"{rows.markdown(found)}\n\n`bough bench {arguments}`: {_where(found[0])}"


def _where(row: Mapping[str, Any]) -> str:
    about = row["environment"]
    load = f"load {about['load_average_at_start'][0]} to {about['load_average_at_end']}"
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    machine = f"{about['cpu']} × {about['cores']}"  # noqa: RUF001
    return (
        f"{row['model']} model, {row['size']}; commit {about['commit']}, {about['date']}, {machine}, {load}, {versions}"
    )


def _results() -> Path:
    return harness.FOLDER / "results"


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
