"""The suite's results as rows, one per workload and system: JSON lines, and a Markdown table made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from asks import Trace
from calls import Run
from harness import Summary, ratio, short, table

REFERENCE: Final = "bough"
HEADERS: Final = (
    *("workload", "system", "tok/s", "bough is × faster", "TTFT p50 / p99 ms"),  # noqa: RUF001
    *("between tokens p50 / p99 ms", "program p50 s", "hit rate (best)", "peak MB", "n"),
)
_NONE: Final = "–"  # noqa: RUF001


def figures(trace: Trace, run: Run, peak: int | None, tells_hits: bool) -> dict[str, float]:
    """Return one run's figures. tok_s counts every prompt and answer in full, so that it compares systems."""
    found = run.figures()
    del found["total_tok_s"], found["computed_tokens"], found["prompt_tokens"]
    found["tok_s"] = (trace.num_prompt_tokens() + trace.num_generated()) / run.wall_s
    if tells_hits:
        found["best_hit_rate"] = run.best_hit_rate()
    else:
        del found["hit_rate"], found["cached_tokens"]
    if peak is not None:
        found["peak_mb"] = peak / 1e6
    return found


def row(
    trace: Trace, system: str, runs: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Return the row of a workload and system that ran; `reference` are bough's runs of the same repetitions."""
    names = sorted({name for run in runs for name in run})
    summaries = {name: Summary.of(run[name] for run in runs if name in run).fields() for name in names}
    found = {**_about(trace, system), "status": "ok", "figures": summaries}
    if reference and system != REFERENCE:
        slower = ratio([run["wall_s"] for run in runs], [run["wall_s"] for run in reference])
        found["times_slower"] = slower.fields()
    return found


def empty_row(trace: Trace, system: str, why: str) -> dict[str, Any]:
    """Return the row of what did not run: its status is the reason's first words, such as "not installed"."""
    return {**_about(trace, system), "status": why.split(":")[0], "reason": why}


def same_answers(runs: Mapping[str, Run]) -> dict[str, float]:
    """Return per system the share of its answers that are bough's, of those to the very same prompts; 1 if none are."""
    ours = {_prompts(call.prompts): call.answer for call in runs[REFERENCE].calls} if REFERENCE in runs else {}
    shares = {}
    for system, run in runs.items():
        both = [call.answer == ours[key] for call in run.calls if (key := _prompts(call.prompts)) in ours]
        shares[system] = sum(both) / len(both) if both else 1.0
    return shares


def _prompts(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, prompts))


def _about(trace: Trace, system: str) -> dict[str, Any]:
    about = {"workload": trace.name, "kind": trace.kind, "shape": trace.shape, "system": system}
    return {**about, "width": trace.width, "prefix": trace.prefix} if trace.kind == "sweep" else about


def write(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Append the rows as JSON lines, each with what it takes to tell where it is from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for one in rows:
            file.write(json.dumps({**about, **one}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file's last run: of the date that its last line has."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return [one for one in rows if one["environment"]["date"] == rows[-1]["environment"]["date"]]


# ---------------------------------------------------------------------------------------------- the table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table, what they are about below it, and why some are missing."""
    lines, shapes, before = [], [], None
    for one in rows:
        if one["status"] == "ok":
            name = one["workload"] if one["workload"] != before else ""
            lines.append(_line(name, one))
            if name:
                shapes.append(f"* {name}: {one['shape']}")
            before = one["workload"]
    return "\n\n".join([table(HEADERS, lines), "\n".join([*shapes, *_notes(rows)])])


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per reason why workloads have no figures, and one for answers that differ."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in rows:
        if one["status"] != "ok":
            reasons.setdefault((one["system"], one["reason"]), []).append(one["workload"])
    num = len({one["workload"] for one in rows})
    notes = [
        f"* {system}: {reason} ({'every workload' if len(names) == num else _list(names)})"
        for (system, reason), names in reasons.items()
    ]
    differ = [f"{r['workload']} / {r['system']} {r['same_answers']:.2f}" for r in rows if r.get("same_answers", 1) < 1]
    return [*notes, *([f"* share of answers equal to bough's, where below 1: {_list(differ)}"] if differ else [])]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _line(name: str, one: Mapping[str, Any]) -> list[str]:
    found = one["figures"]

    def value(key: str) -> str:
        return str(summary(found[key])) if key in found else _NONE

    def pair(key: str) -> str:
        if f"{key}_p50_ms" not in found:
            return _NONE
        return f"{short(found[f'{key}_p50_ms']['median'])} / {short(found[f'{key}_p99_ms']['median'])}"

    hits = _NONE
    if "best_hit_rate" in found:
        hits = f"{found['hit_rate']['median']:.3f} ({found['best_hit_rate']['median']:.3f})"
    slower = str(summary(one["times_slower"])) if "times_slower" in one else _NONE
    peak = short(found["peak_mb"]["median"]) if "peak_mb" in found else _NONE
    speed = [value("tok_s"), slower, pair("ttft"), pair("gap"), value("program_p50_s")]
    return [name, one["system"], *speed, hits, peak, str(found["wall_s"]["n"])]


def summary(fields: Mapping[str, float]) -> Summary:
    """Return a summary from what the JSON keeps of it."""
    return Summary(fields["median"], fields["min"], fields["max"], int(fields["n"]))
