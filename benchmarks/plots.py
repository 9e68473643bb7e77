"""The suite's rows as pictures (matplotlib, of the extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

Row = Mapping[str, Any]
_COLOURS: Final = {
    "bough": "#1b7837",
    "bough, no radix": "#a6dba0",
    "bough, no tree decode": "#5aae61",
    "transformers generate": "#e08214",
    "transformers continuous": "#b35806",
    "vllm": "#542788",
}


_SWEPT: Final = ("vllm", "bough, no tree decode")
"""The systems that the heat maps compare with, in their order; they run every fork."""


def draw(rows: Sequence[Row], folder: Path, stem: str, where: str) -> list[Path]:
    """Draw what the rows allow; return the files. where: the line below each picture. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    ok = [row for row in rows if row["status"] == "ok"]
    programs = [row for row in ok if row["kind"] != "sweep"]
    sweep = [row for row in ok if row.get("prefix")]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture in (
        ("speed", _speed(programs)),
        ("latency", _latency(programs)),
        ("hits", _hits(programs)),
        ("memory", _memory(programs)),
        ("sweep", _sweep(sweep)),
    ):
        if picture is not None:
            picture.text(0.995, 0.005, where, ha="right", va="bottom", fontsize=7, color="#666666")
            path = folder / f"{stem}-{name}.png"
            picture.savefig(path, dpi=110)
            drawn.append(path)
    return drawn


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _bars(axes: Any, rows: Sequence[Row], value: Any, spread: Any = None, floor: float = 0.0) -> None:
    """Draw a group of bars per workload, one per system that has a value; they stand on `floor`."""
    workloads, systems = _names(rows, "workload"), _names(rows, "system")
    width = 0.84 / max(1, len(systems))
    for place, system in enumerate(systems):
        found = {row["workload"]: row for row in rows if row["system"] == system and value(row) is not None}
        at = np.array([i for i, name in enumerate(workloads) if name in found])
        if not len(at):
            continue
        heights = np.array([value(found[workloads[i]]) for i in at])
        errors = None
        if spread is not None:
            least, most = np.array([spread(found[workloads[i]]) for i in at]).T
            errors = np.stack([np.maximum(heights - least, 0), np.maximum(most - heights, 0)])
        offset = (place - (len(systems) - 1) / 2) * width
        colour = _COLOURS.get(system, "#888888")
        axes.bar(
            at + offset, heights - floor, width, floor, yerr=errors, color=colour, label=system, error_kw={"lw": 0.8}
        )
    axes.set_xticks(range(len(workloads)), workloads, rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(workloads) - 0.4)
    axes.grid(axis="y", lw=0.3)
    axes.set_axisbelow(True)


def _figure(num_rows: int = 1, height: float = 4.8) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0.03, 1, 0.97))
    return figure, figure.subplots(num_rows, 1, squeeze=False)[:, 0]


def _speed(rows: Sequence[Row]) -> Any:
    """Time of the same work, relative to bough's."""
    others = [row for row in rows if "times_slower" in row]
    if not others:
        return None
    figure, (axes,) = _figure()
    _bars(axes, others, lambda row: row["times_slower"]["median"], lambda row: _ends(row["times_slower"]), floor=1.0)
    axes.axhline(1, color=_COLOURS["bough"], lw=1.5)
    axes.set_yscale("log")
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if _near(axes, tick)]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])  # noqa: RUF001
    axes.minorticks_off()
    axes.set_ylabel("time of the same work, bough = 1")
    axes.set_title("How many times longer than bough (green line; above it bough is faster)", fontsize=11)
    _legend(figure, axes)
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """Put the legend above the picture, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)


def _logarithmic(axes: Any) -> None:
    """Make the values' axis logarithmic, its ticks plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _near(axes: Any, tick: float) -> bool:
    low, high = axes.get_ylim()
    return bool(low / 1.01 <= tick <= high * 1.01)


def _ends(fields: Mapping[str, float]) -> tuple[float, float]:
    return fields["min"], fields["max"]


def _latency(rows: Sequence[Row]) -> Any:
    """Time to first token, between tokens, and of a program."""
    if not rows:
        return None
    figure, panels = _figure(3, 12)
    panel_of = (
        ("ttft_p50_ms", "time to first token, p50, ms"),
        ("gap_p99_ms", "between tokens, p99, ms"),
        ("program_p50_s", "a whole program, p50, s"),
    )
    for axes, (key, label) in zip(panels, panel_of, strict=True):
        _bars(axes, rows, lambda row, key=key: _median(row, key), lambda row, key=key: _ends(row["figures"][key]))
        _logarithmic(axes)
        axes.set_ylabel(label)
    _legend(figure, panels[0])
    panels[0].set_title("Latency: less is better", fontsize=11)
    return figure


def _median(row: Row, key: str) -> float | None:
    return float(row["figures"][key]["median"]) if key in row["figures"] else None


def _hits(rows: Sequence[Row]) -> Any:
    """Share of the prompts' tokens found in the cache, beside the best possible."""
    ours = [row for row in rows if row["system"] in ("bough", "vllm") and "best_hit_rate" in row["figures"]]
    if not ours:
        return None
    figure, (axes,) = _figure()
    _bars(axes, ours, lambda row: _median(row, "hit_rate"))
    names = _names(ours, "workload")
    best = {row["workload"]: _median(row, "best_hit_rate") for row in ours if row["system"] == "bough"}
    for i, name in enumerate(names):
        if name in best:
            label = "best possible" if i == 0 else None
            axes.hlines(best[name], i - 0.45, i + 0.45, color="black", lw=1.5, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("cached share of prompt tokens")
    axes.set_title("Hit rate from a cold cache", fontsize=11)
    _legend(figure, axes)
    return figure


def _memory(rows: Sequence[Row]) -> Any:
    """Peak resident memory of the serving process."""
    known = [row for row in rows if "peak_mb" in row["figures"]]
    if not known:
        return None
    figure, (axes,) = _figure()
    _bars(axes, known, lambda row: _median(row, "peak_mb"))
    axes.set_ylabel("peak resident memory, MB")
    axes.set_title("Memory of the serving process, libraries included: less is better", fontsize=11)
    _legend(figure, axes)
    return figure


def _sweep(rows: Sequence[Row]) -> Any:
    """Fork width times prefix length: how much longer the others take, a heat map per system."""
    others = [row for row in rows if "times_slower" in row and row["system"] in _SWEPT]
    systems = [system for system in _SWEPT if system in _names(others, "system")]
    if not systems:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(systems) + 0.6, 4.4), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0.05, 1, 0.95))
    widths, prefixes = (sorted({row[key] for row in others}) for key in ("width", "prefix"))
    every = [row["times_slower"]["median"] for row in others]
    for axes, system in zip(figure.subplots(1, len(systems), squeeze=False)[0], systems, strict=True):
        grid = np.full((len(prefixes), len(widths)), np.nan)
        for row in others:
            if row["system"] == system:
                grid[prefixes.index(row["prefix"]), widths.index(row["width"])] = row["times_slower"]["median"]
        _heat(axes, grid, max(2.0, *every))
        axes.set_xticks(range(len(widths)), widths)
        axes.set_yticks(range(len(prefixes)), [f"{prefix:,}" for prefix in prefixes])
        axes.set_xlabel("branches of the fork")
        axes.set_title(f"{system}: times as long as bough", fontsize=11)
    figure.axes[0].set_ylabel("tokens of the shared prefix")
    return figure


def _heat(axes: Any, grid: Any, most: float) -> None:
    """Draw ratios on a logarithmic scale around 1: green where bough is faster, purple where it is slower."""
    axes.imshow(np.log(grid), cmap="PRGn", vmin=-np.log(most), vmax=np.log(most), origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        told = "–" if np.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"  # noqa: RUF001
        dark = not np.isnan(value) and abs(np.log(value)) > 0.7 * np.log(most)
        axes.text(x, y, told, ha="center", va="center", fontsize=12, color="white" if dark else "black")
