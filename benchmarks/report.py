"""Puts the suite's results where they are read: tables and pictures beside them, and what READMEs show of them."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import goals
import plots
import rows
from harness import FOLDER, put_between, short, table
from rows import NONE, summary
from systems import BOUGH, CONTINUOUS, GENERATE, NO_RADIX, NO_TREE, VLLM
from traces import FIRST_TOKEN

Row = Mapping[str, Any]
MAIN: Final = "30m"
_COMPACT: Final = (VLLM, GENERATE, CONTINUOUS, NO_RADIX, NO_TREE)


def results() -> Path:
    """Return the folder of saved results."""
    return FOLDER / "results"


def text(found: Sequence[Row], folder: Path | None = None) -> str:
    """Return the run's goals and its table as Markdown; folder: of what other benchmarks saved."""
    arguments = " ".join(found[0]["arguments"])
    held = goals.markdown(goals.goals(found, documents(folder or results())), parts=True)
    return f"{held}\n\n{rows.markdown(found)}\n\n`bough bench {arguments}`: {where(found[0])}"


def where(row: Row) -> str:
    """Return on what machine, of what versions and when a row was measured."""
    about = row["environment"]
    load = f"load {about['load_average_at_start'][0]} to {about['load_average_at_end']}"
    versions = f"torch {about['torch']}, transformers {about['transformers']}"
    machine = f"{about['cpu']} × {about['cores']}"  # noqa: RUF001
    return (
        f"{row['model']} model, {row['size']}; commit {about['commit']}, {about['date']}, {machine}, {load}, {versions}"
    )


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the last document that each other benchmark saved in the folder, by name, without --quick ones."""
    found = {}
    for path in sorted(folder.glob("*-bench_*.jsonl")):  # by date
        if path.stem.endswith("-bench_suite"):
            continue
        for line in path.read_text().splitlines():
            document = json.loads(line)
            if not document.get("quick", True):
                found[document["benchmark"]] = document
    return found


def render(path: Path, *, readmes: bool) -> int:
    """Write tables and pictures of each model's last run in the file beside it, and into both READMEs if asked."""
    if not path.is_file():
        print(f"bench: there is no file {path}", file=sys.stderr)
        return 2
    runs = rows.read(path)
    for model, found in runs.items():
        stem = path.stem + ("" if model == MAIN else f"-{model}")
        tables = path.with_name(f"{stem}.md")
        tables.write_text(text(found, path.parent) + "\n")
        try:
            drawn = plots.draw(found, path.parent, stem, where(found[0]))
        except ImportError:
            print("bench: no plots: matplotlib is not installed; pip install 'bough[bench]'", file=sys.stderr)
            drawn = []
        print("wrote " + ", ".join(map(str, [tables, *drawn])), file=sys.stderr)
        if readmes:
            shown = "\n".join(f"![{one.stem.rsplit('-', 1)[-1]}](results/{one.name})" for one in drawn)
            put_between(FOLDER / "README.md", f"bench_suite {model}", f"{text(found, path.parent)}\n\n{shown}")
    if readmes and MAIN in runs:
        put_between(FOLDER.parent / "README.md", "bench", summary_of(runs, path.parent))
    return 0


def summary_of(runs: Mapping[str, Sequence[Row]], folder: Path) -> str:
    """Return what the front page shows: goals, a line per workload, and how ratios go with the model's size."""
    found, about = runs[MAIN], runs[MAIN][0]["environment"]
    day = f"{about['date'][:10]}, commit {about['commit']}"
    intro = (
        f"A 30M-parameter Llama shape (8 layers, hidden 512, random weights, bfloat16) on {about['cores']} cores "
        f"({about['cpu']}): the same weights, token ids and counts for all, greedy, every run from a cold cache, "
        f"medians of interleaved repetitions (least and most in brackets); {day}. Every figure, pictures and the "
        "method: [benchmarks/README.md](benchmarks/README.md)."
    )
    parts = [
        textwrap.fill(intro, 120, break_on_hyphens=False),
        goals.markdown(goals.goals(found, documents(folder)), parts=False),
        "How many times longer than bough each takes for the same work (below 1: bough is slower):",
        compact(found),
    ]
    others = {model: rows for model, rows in runs.items() if model != MAIN}
    if others:
        parts += ["The same for larger shapes:", sizes({MAIN: found, **others})]
    return "\n\n".join(parts)


def compact(found: Sequence[Row]) -> str:
    """Return a line per workload: bough's speed, hits and first token, and how much longer the others take."""
    headers = ("workload", "bough, tok/s", *_COMPACT, "TTFT p50, bough / vllm, ms", "hit rate (best)")
    by = {(row["workload"], row["system"]): row for row in found if row["status"] == "ok"}
    lines = []
    for name in dict.fromkeys(row["workload"] for row in found if row["system"] == BOUGH and row["status"] == "ok"):
        ours = by[name, BOUGH]["figures"]
        speed = short(ours["tok_s"]["median"])
        slower = [_slower(by.get((name, system))) for system in _COMPACT]
        first = " / ".join(_first(by.get((name, system))) for system in (BOUGH, VLLM))
        hits = f"{ours['hit_rate']['median']:.2f} ({ours['best_hit_rate']['median']:.2f})"
        lines.append([name, speed, *slower, first, hits])
    return table(headers, lines)


def sizes(runs: Mapping[str, Sequence[Row]]) -> str:
    """Return how many times longer the others take, per workload that every model ran: a column per model, system."""
    slower = {
        (model, row["system"], row["workload"]): _slower(row)
        for model, found in runs.items()
        for row in found
        if "times_slower" in row
    }
    systems = [s for s in _COMPACT if all(any(k[:2] == (model, s) for k in slower) for model in runs)]
    names = [
        name
        for name in dict.fromkeys(row["workload"] for row in runs[MAIN])
        if all((model, system, name) in slower for model in runs for system in systems[:1])
    ]
    headers = ("workload", *(f"{system}, {model}" for system in systems for model in runs))
    lines = [[n, *(slower.get((model, s, n), NONE) for s in systems for model in runs)] for n in names]
    return table(headers, lines)


def _slower(row: Row | None) -> str:
    return NONE if row is None or "times_slower" not in row else short(summary(row["times_slower"]).median)


def _first(row: Row | None) -> str:
    key = "cached_ms" if row is not None and row["workload"] == FIRST_TOKEN else "ttft_p50_ms"
    return NONE if row is None or key not in row["figures"] else short(row["figures"][key]["median"])
