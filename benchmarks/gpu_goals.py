"""The short table at the end of the GPU report: what was aimed at on an H200, what came out, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]
Sections = Mapping[str, Row]


class Goal(NamedTuple):
    """An aim: where its figure stands, and the least (or, with at_most, the greatest) it should be.

    stand_in: what is compared with instead where the peer of the aim is not here, and its name.
    """

    what: str
    limit: float
    value: Callable[[Sections], float | None]
    at_most: bool = False
    stand_in: tuple[str, Callable[[Sections], float | None]] | None = None


def _rows(sections: Sections, name: str, **where: object) -> list[Row]:
    """Return the rows of the sections whose name begins with `name` that have these values."""
    found = [row for key, section in sections.items() if key.startswith(name) for row in section["rows"]]
    return [row for row in found if all(row.get(column) == value for column, value in where.items())]


def _value(section: str, column: str, **where: object) -> Callable[[Sections], float | None]:
    def value(sections: Sections) -> float | None:
        return next((row[column] for row in _rows(sections, section, **where) if column in row), None)

    return value


def _ratio(column: str, above: Row, below: Row) -> Callable[[Sections], float | None]:
    """Return one whole step's figure over another's."""

    def value(sections: Sections) -> float | None:
        first, second = (_rows(sections, "steps", **where) for where in (above, below))
        return first[0][column] / second[0][column] if first and second else None

    return value


def _step(model: str, batch: int, context: int, shared: int = 0, *, graphs: bool = True, share: bool = True) -> Row:
    return {
        "model": model, "batch": batch, "context": context, "shared": shared, "new": 1, "graphs": graphs, "share": share
    }  # fmt: skip


def _share_gain(batch: int, prefix: int) -> Callable[[Sections], float | None]:
    case = ("8b", batch, prefix + 128, prefix)
    return _ratio("ms", _step(*case, share=False), _step(*case))


GOALS = (
    Goal("8B batch 1: share of copy bandwidth", 0.75, _value("steps", "share_of_copy", **_step("8b", 1, 1024))),
    Goal("tree attention (16, 8k) / each", 4, _value("tree", "each/tree", width=16, prefix=8192)),
    Goal("tree attention (64, 8k) / each", 12, _value("tree", "each/tree", width=64, prefix=8192)),
    Goal("tree attention (64, 32k) / each", 12, _value("tree", "each/tree", width=64, prefix=32768)),
    Goal("whole step (16, 8k) / unshared", 1.5, _share_gain(16, 8192)),
    Goal("whole step (64, 8k) / unshared", 3, _share_gain(64, 8192)),
    Goal("whole step (64, 32k) / unshared", 6, _share_gain(64, 32768)),
    Goal(
        "loss where nothing is shared", 1.02,
        _ratio("ms", _step("8b", 64, 1024), _step("8b", 64, 1024, share=False)), at_most=True,
    ),
    Goal("FlashInfer decode / ours", 0.9, _value("peers", "flashinfer/tree", width=64, prefix=0)),
    Goal("FlashInfer cascade / ours (64, 8k)", 1.0, _value("peers", "cascade/tree", width=64, prefix=8192)),
    Goal(
        "FA3 prefill / ours, 4k", 0.7, _value("prefill", "fa3/ours", tokens=4096),
        stand_in=("PyTorch's flash attention, no FA3 here", _value("prefill", "flash/ours", tokens=4096)),
    ),
    Goal("cuDNN prefill / ours, 4k", 0.7, _value("prefill", "cudnn/ours", tokens=4096)),
    Goal("idle at 8B, batch 1", 0.05, _value("steps", "idle", **_step("8b", 1, 1024)), at_most=True),
    Goal(
        "graphs at 8B", 1.3, _ratio("ms", _step("8b", 1, 1024, graphs=False), _step("8b", 1, 1024)),
    ),
    Goal(
        "graphs at 1B", 3.0, _ratio("ms", _step("1b", 1, 1024, graphs=False), _step("1b", 1, 1024)),
    ),
    Goal("64 new on 8k / reading the weights", 1.6, _value("steps", "floors", model="8b", new=64), at_most=True),
)  # fmt: skip


def verdicts(sections: Sections) -> list[tuple[str, float | None, str]]:
    """Return what was aimed at, its figure if there is one, and "pass", "fail" or "not measured" with the limit."""
    found: list[tuple[str, float | None, str]] = []
    for goal in GOALS:
        value, of = goal.value(sections), ""
        if value is None and goal.stand_in is not None:
            name, instead = goal.stand_in
            value, of = instead(sections), f", of {name}"
        aim = f"{'<=' if goal.at_most else '>='} {goal.limit:g}"
        if value is None:
            found.append((goal.what, None, f"not measured ({aim})"))
        else:
            is_met = value <= goal.limit if goal.at_most else value >= goal.limit
            found.append((goal.what, value, f"{'pass' if is_met else 'FAIL'} ({aim}{of})"))
    return found


def summary(sections: Sections) -> str:
    """Return the short table: each section's end, what was wrong, and the goals."""
    lines = [f"{name:34} {section['status'][:150]}" for name, section in sections.items()]
    wrong = [row for section in sections.values() for row in section["rows"] if row.get("right") is False]
    right = [row for section in sections.values() for row in section["rows"] if row.get("right") is True]
    lines.append(f"\n{len(right)} checks right, {len(wrong)} wrong")
    lines += [f"  WRONG {row['kernel']} {row['dtype']}: {row['error']:.3g} > {row['limit']:.3g}" for row in wrong]
    lines.append("")
    lines += [
        f"{what:36} {'' if value is None else format(value, '8.3g'):>8}  {verdict}"
        for what, value, verdict in verdicts(sections)
    ]
    lines += ["", *_served(sections)]
    return "\n".join(lines)


def _served(sections: Sections) -> list[str]:
    """Return a line for each workload served: tokens a second, and how much faster than the peer."""
    rows = [row for row in _rows(sections, "serving") if "workload" in row]
    lines = []
    for row in (row for row in rows if row["system"] == "bough"):
        peer = next((r for r in rows if r["workload"] == row["workload"] and r["system"].startswith("transf")), {})
        ours, theirs = (each.get("seconds") for each in (row, peer))
        took = row.get("no", "") if ours is None else f"{ours:8.3f} s"
        than = peer.get("no", "no peer") if theirs is None or ours is None else f"{theirs / ours:.3g}x {peer['system']}"
        lines.append(f"{'serving ' + row['workload']:36} {took}  {than}")
    return lines
