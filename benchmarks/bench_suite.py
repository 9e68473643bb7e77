"""How does bough do on the SGLang paper's workloads, beside itself without its parts and beside its peers?

Systems: bough; without the radix cache; without tree decode; `transformers` generate and its continuous batching; vLLM
where it is installed. Workloads (traces.py): what the goals are about (a fork, batches, prefill, first tokens, prompts
that share nothing), the paper's eleven shapes, and forks of growing width and prefix. Same weights, prompts and token
counts, greedy, every run from a cold cache; the systems run in turn within a repetition, and a figure is the median
over repetitions.

    python benchmarks/bench_suite.py --quick                 # a minute: see where you stand; not figures to quote
    python benchmarks/bench_suite.py --vllm-python vllm-env/bin/python --budget 1200 --save
    python benchmarks/bench_suite.py --model 110m --only HellaSwag "no sharing" --systems bough vllm
    python benchmarks/bench_suite.py --render results/2026-11-21-bench_suite.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import harness
import report
import rows
from measuring import SuiteRun
from models import SIZES, llama
from schedule import Budget
from systems import SYSTEMS, VLLM, start
from traces import HELLASWAG, control, fork, from_shape, suite

_SLOWER: Final = {"30m": 1.0, "110m": 4.0, "0.5b": 16.0}
QUICK_S: Final = 50.0
"""Seconds of a quick run, starting included; what it runs last may take some more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit status."""
    options = _parser().parse_args(arguments)
    if options.render is not None:
        return report.render(options.render, readmes=options.save)
    environment = harness.environment()
    size = options.size or ("quick" if options.quick else "standard")
    traces = suite(size)
    if options.only and (unknown := set(options.only) - {trace.name for trace in traces}):
        print(f"bench: no workload {sorted(unknown)}; there are {[trace.name for trace in traces]}", file=sys.stderr)
        return 2
    traces = [trace for trace in traces if not options.only or trace.name in options.only]
    budget = Budget(options.budget or (QUICK_S if options.quick else 3600.0), time.monotonic, _SLOWER[options.model])
    model = llama(options.models_dir, options.model)
    suite_run = SuiteRun(
        traces,
        options.systems or SYSTEMS,
        budget,
        reps=options.reps or (1 if options.quick else None),
        why_not={VLLM: _SLOW_START} if options.quick and not options.systems else {},
        warm_up=[control(2, 64, 4)] if options.quick else _WARM_UP,
    )
    with ExitStack() as stack:
        suite_run.start(lambda name: start(name, model, options.vllm_python), stack)
        if not options.quick:
            budget.begin()
        suite_run.measure()
    environment["load_average_at_end"] = round(os.getloadavg()[0], 2)
    given = list(arguments if arguments is not None else sys.argv[1:])
    about: dict[str, Any] = {"benchmark": "bench_suite", "arguments": given}
    about |= {"model": options.model, "size": size, "environment": environment}
    print(report.text([{**about, **row} for row in suite_run.rows()]))
    if not options.save:
        return 0
    path = report.results() / f"{environment['date'][:10]}-bench_suite.jsonl"
    rows.write(path, suite_run.rows(), about)
    return report.render(path, readmes=size != "quick" and (options.model != report.MAIN or not options.only))


_SLOW_START: Final = "left out: it starts for longer than a quick run lasts; --systems bough vllm has it"
_WARM_UP: Final = (control(2, 64, 4), fork(16, 512, 16, 4), from_shape(HELLASWAG, 8, 0.25))
"""First calls of everything, at sizes for which libraries choose what they choose for large ones."""


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(__doc__)
    parser.prog = "bough bench"
    parser.add_argument("--size", choices=("quick", "standard", "full"), help="of the texts; default standard")
    told = "of measuring, starting not counted; default: 3600; with --quick 50, starting counted"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=told)
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


if __name__ == "__main__":
    sys.exit(main())
