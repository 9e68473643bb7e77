"""How fast is a program served, and what does the radix cache change?

Five workloads (workloads.py) run on two runtimes that differ in the radix cache alone, and on `transformers` generate
as a baseline, interleaved, every run from a cold cache. Reported per workload and system: tokens per second, generated
and in total (prompts included); time to first token and between tokens, as the client sees them; latency of a program;
tokens cached; and the hit rate beside that of a cache that never forgets.

    python benchmarks/bench_serving.py [--quick] [--only few-shot fork] [--save]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import harness
from calls import Run
from drivers import Bough, Transformers
from harness import Summary, ratio, short
from models import llama_30m
from workloads import Workload, all_workloads, unshared

ON: Final = "cache on"
OFF: Final = "cache off"
BASELINE: Final = "transformers"
HEADERS: Final = (
    *("workload", "system", "generated tok/s", "all tok/s", "× off", "× transformers"),  # noqa: RUF001
    *("TTFT p50 / p99 ms", "gap p50 / p99 ms", "program p50 s", "hit rate (best)"),
)


def main() -> None:
    """Measure and report."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="run these workloads alone")
    parser.add_argument("--no-baseline", action="store_true", help="leave transformers out")
    parser.add_argument("--budget", type=float, help="seconds per workload after which no repetition begins")
    options = parser.parse_args()
    environment = harness.environment()
    reps = options.reps or (1 if options.quick else 3)
    budget_s = options.budget or (5.0 if options.quick else 85.0)
    workloads = [w for w in all_workloads(options.quick) if not options.only or w.name in options.only]
    model = llama_30m(options.models_dir)
    results = {}
    with ExitStack() as stack:
        systems: dict[str, Bough | Transformers] = {}
        for name in (ON, OFF):
            systems[name] = started = Bough(model, radix_cache=name == ON)
            stack.callback(started.runtime.shutdown)
        if not options.no_baseline:
            systems[BASELINE] = Transformers(model)
        for system in systems.values():
            system.run(unshared(2, 64, 4, seed=99))  # warm-up: first calls of everything
        for workload in workloads:
            print(f"{workload.name}: {workload.shape} ...", file=sys.stderr)
            cases: dict[str, Callable[[], Run]] = {name: partial(s.run, workload) for name, s in systems.items()}
            results[workload.name] = _summary(workload, harness.interleaved(cases, reps, warm_up=0, budget_s=budget_s))
    harness.report("bench_serving", options, environment, results, [_table(results), _notes(results)])


def _summary(workload: Workload, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return a workload's figures: per system, and as ratios within repetitions."""
    wall = {name: [run.wall_s for run in many] for name, many in runs.items()}
    systems = {}
    for name, many in runs.items():
        figures = [run.figures() for run in many]
        systems[name] = {key: Summary.of(f[key] for f in figures) for key in figures[0]}
        for other, label in ((OFF, "times_off"), (BASELINE, "times_baseline")):
            if other in runs and other != name:
                systems[name][label] = ratio(wall[other], wall[name])
    answers = {name: sorted(str((call.prompts, call.answer)) for call in runs[name][0].calls) for name in (ON, OFF)}
    return {
        "shape": workload.shape,
        "systems": systems,
        "best_hit_rate": runs[ON][0].best_hit_rate(),
        "same_answers_on_and_off": answers[ON] == answers[OFF],
    }


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        for place, (system, figures) in enumerate(result["systems"].items()):
            rows.append(_row(name if place == 0 else "", system, figures, result["best_hit_rate"]))
    return harness.table(HEADERS, rows)


def _row(workload: str, system: str, figures: Mapping[str, Summary], best: float) -> list[str]:
    def pair(name: str) -> str:
        if f"{name}_p50_ms" not in figures:
            return "–"  # noqa: RUF001
        return f"{short(figures[f'{name}_p50_ms'].median)} / {short(figures[f'{name}_p99_ms'].median)}"

    def one(name: str) -> str:
        return str(figures[name]) if name in figures else "–"  # noqa: RUF001

    hits = f"{figures['hit_rate'].median:.3f} ({best:.3f})" if system == ON else "–"  # noqa: RUF001
    speeds = [one("generated_tok_s"), one("total_tok_s"), one("times_off"), one("times_baseline")]
    return [workload, system, *speeds, pair("ttft"), pair("gap"), one("program_p50_s"), hits]


def _notes(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"* {name}: {result['shape']}; {_tokens(result)}" for name, result in results.items()]
    different = [name for name, result in results.items() if not result["same_answers_on_and_off"]]
    lines.append(f"* answers with the cache on and off are identical{f', EXCEPT {different}' if different else ''}")
    return "\n".join(lines)


def _tokens(result: Mapping[str, Any]) -> str:
    on = result["systems"][ON]
    prompt, cached, computed = (on[f"{kind}_tokens"].median for kind in ("prompt", "cached", "computed"))
    return f"{prompt:,.0f} prompt tokens, cache on: {cached:,.0f} cached, {computed:,.0f} computed"


if __name__ == "__main__":
    main()
