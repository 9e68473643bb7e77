"""The suite's results as rows, one per workload and system: JSON lines, and a Markdown table made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from asks import Trace
from calls import Run
from harness import Summary, ratio, short, table
from traces import FIRST_TOKEN

REFERENCE: Final = "bough"
HEADERS: Final = (
    *("workload", "system", "tok/s", "bough is × faster", "TTFT p50 / p99 ms"),  # noqa: RUF001
    *("between tokens p50 / p99 ms", "program p50 s", "hit rate (best)", "peak MB", "n"),
)
NONE: Final = "–"  # noqa: RUF001


def figures(trace: Trace, run: Run, peak: int | None, tells_hits: bool) -> dict[str, float]:
    """Return one run's figures. tok_s counts every prompt and answer in full, so that it compares systems."""
    found = run.figures()
    del found["total_tok_s"], found["computed_tokens"], found["prompt_tokens"]
    found["tok_s"] = (trace.num_prompt_tokens() + trace.num_generated()) / run.wall_s
    if tells_hits:
        found["best_hit_rate"] = run.best_hit_rate()
    else:
        del found["hit_rate"], found["cached_tokens"]
    if trace.name == FIRST_TOKEN:
        found |= _first_tokens(trace, run)
    if peak is not None:
        found["peak_mb"] = peak / 1e6
    return found


def _first_tokens(trace: Trace, run: Run) -> dict[str, float]:
    """Return the medians of what each program's first prompt, a cold one, took to its first token, and the others."""
    each = len(trace.programs[0])  # one at a time, so that calls are in the order of the programs
    took = [(call.token_times[0] - call.asked_at) * 1e3 for call in run.calls]
    cold, cached = median(took[::each]), median(ms for i, ms in enumerate(took) if i % each)
    return {"cold_ms": cold, "cached_ms": cached, "cold_by_cached": cold / cached}


def row(
    trace: Trace,
    system: str,
    runs: Sequence[Mapping[str, float]],
    both: Sequence[tuple[Mapping[str, float], Mapping[str, float]]] = (),
) -> dict[str, Any]:
    """Return the row of a workload and system that ran; `both`: its run and bough's of each repetition they share."""
    names = sorted({name for run in runs for name in run})
    summaries = {name: Summary.of(run[name] for run in runs if name in run).fields() for name in names}
    found = {**_about(trace, system), "status": "ok", "figures": summaries}
    if both and system != REFERENCE:
        theirs, ours = zip(*both, strict=True)
        found["times_slower"] = ratio([run["wall_s"] for run in theirs], [run["wall_s"] for run in ours]).fields()
    return found


def empty_row(trace: Trace, system: str, why: str) -> dict[str, Any]:
    """Return the row of what did not run: its status is the reason's first words, such as "not installed"."""
    return {**_about(trace, system), "status": why.split(":")[0], "reason": why}


def same_tokens(runs: Mapping[str, Run]) -> dict[str, tuple[int, int]]:
    """Return per system how many of its tokens are bough's, of how many that were chosen after the very same text.

    Text is the same up to the first token that differs, which counts too. Random weights make this hard on bfloat16:
    likeliest tokens are often nearly ties.
    """
    ours = {_prompts(call.prompts): call.answer for call in runs[REFERENCE].calls} if REFERENCE in runs else {}
    found = {}
    for system, run in runs.items():
        same = different = 0
        for call in run.calls:
            if (answer := ours.get(_prompts(call.prompts))) is not None:
                pairs = list(zip(call.answer, answer, strict=True))
                equal = next((i for i, (theirs, mine) in enumerate(pairs) if theirs != mine), len(pairs))
                same, different = same + equal, different + (equal < len(pairs))
        found[system] = same, same + different
    return found


def _prompts(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, prompts))


def _about(trace: Trace, system: str) -> dict[str, Any]:
    about = {"workload": trace.name, "kind": trace.kind, "shape": trace.shape, "system": system}
    return {**about, "width": trace.width, "prefix": trace.prefix} if trace.width else about


def write(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Append the rows as JSON lines, each with what it takes to tell where it is from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for one in rows:
            file.write(json.dumps({**about, **one}) + "\n")


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each model's last run in the file, in the order of those runs."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line]
    if not rows:
        raise ValueError(f"{path} has no rows")
    last = {one["model"]: one["environment"]["date"] for one in rows}
    models = sorted(last, key=last.__getitem__)
    return {m: [one for one in rows if (one["model"], one["environment"]["date"]) == (m, last[m])] for m in models}


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
    return [*notes, *_agreement(rows)]


def _agreement(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line of how far each system's tokens are bough's."""
    found: dict[str, list[tuple[int, int]]] = {}
    for one in rows:
        if one["status"] == "ok" and one["system"] != REFERENCE:
            found.setdefault(one["system"], []).append(one["same_tokens"])
    sums = {system: [sum(column) for column in zip(*pairs, strict=True)] for system, pairs in found.items()}
    told = [f"{system} {same / of:.3f} of {of:,}" for system, (same, of) in sums.items() if of]
    return [f"* of the tokens chosen after the same text, the share that is bough's: {_list(told)}"] if told else []


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _line(name: str, one: Mapping[str, Any]) -> list[str]:
    found = one["figures"]

    def value(key: str) -> str:
        return str(summary(found[key])) if key in found else NONE

    def pair(key: str) -> str:
        if f"{key}_p50_ms" not in found:
            return NONE
        return f"{short(found[f'{key}_p50_ms']['median'])} / {short(found[f'{key}_p99_ms']['median'])}"

    hits = NONE
    if "best_hit_rate" in found:
        hits = f"{found['hit_rate']['median']:.3f} ({found['best_hit_rate']['median']:.3f})"
    slower = str(summary(one["times_slower"])) if "times_slower" in one else NONE
    peak = short(found["peak_mb"]["median"]) if "peak_mb" in found else NONE
    speed = [value("tok_s"), slower, pair("ttft"), pair("gap"), value("program_p50_s")]
    return [name, one["system"], *speed, hits, peak, str(found["wall_s"]["n"])]


def summary(fields: Mapping[str, float]) -> Summary:
    """Return a summary from what the JSON keeps of it."""
    return Summary(fields["median"], fields["min"], fields["max"], int(fields["n"]))
