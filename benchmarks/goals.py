"""What the suite is held to: each goal, what was measured, and whether it is met or missed, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness import Summary, short, table
from rows import summary
from shapes import SHAPES
from systems import BOUGH, CONTINUOUS, GENERATE, NO_RADIX, VLLM
from traces import FIRST_TOKEN

Row = Mapping[str, Any]
HEADERS: Final = ("goal", "aim", "measured", "verdict")
PEERS: Final = (VLLM, GENERATE, CONTINUOUS)
HIT_HEAVY: Final = 0.85
"""A shape is hit-heavy if the best possible hit rate is this or more (few-shot, agents, trees; not chats)."""
_PAPER: Final = tuple(shape.name for shape in SHAPES)


@dataclass(frozen=True)
class Verdict:
    """A goal and what came of it. unit: "%" for a cost, which is to be at most `aim`; a ratio is to be at least that.

    why_not: why there is no figure. part: of the goal above it, for the full table only.
    """

    goal: str
    aim: float
    measured: Summary | None
    unit: str = "×"  # noqa: RUF001
    note: str = ""
    why_not: str = "not measured"
    part: bool = False

    @property
    def met(self) -> bool:
        """Whether the median reaches the aim."""
        if self.measured is None:
            return False
        return self.measured.median <= self.aim if self.unit == "%" else self.measured.median >= self.aim

    def cells(self) -> tuple[str, str, str, str]:
        """Return its line of the table."""
        sign = "≤" if self.unit == "%" else "≥"
        aim = f"{sign} {self.aim:g} {self.unit}"
        note = f" {self.note}" if self.note else ""
        if self.measured is None:
            return self.goal, aim, f"–{note}", self.why_not  # noqa: RUF001
        return self.goal, aim, f"{self.measured} {self.unit}{note}", self._verdict(self.measured.median)

    def _verdict(self, median: float) -> str:
        if self.unit == "%":
            return "met" if self.met else f"missed by {median - self.aim:.2g} points"
        share = abs(median / self.aim - 1)
        return f"met, by {share:.0%}" if self.met else f"**missed** by {share:.0%}"


def goals(rows: Sequence[Row], others: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Return every goal's verdict. others: the last saved document of other benchmarks, by its name."""
    found = _Found(rows)
    return [
        found.against("32 branches on 1,024 shared, vllm", 1.5, "fork 32 × 1024", VLLM),  # noqa: RUF001
        *_growth(found),
        found.against("batch of 8, vllm", 1.3, "batch 8", VLLM),
        found.against("batch of 1, vllm", 1.0, "batch 1", VLLM),
        found.against("cold prefill, one prompt of 1,024, vllm", 1.5, "prefill 1 × 1024", VLLM),  # noqa: RUF001
        found.against("cold prefill, 8 prompts of 1,024, vllm", 1.5, "prefill 8 × 1024", VLLM),  # noqa: RUF001
        *_least("ahead of every peer on each of the paper's shapes", 1.0, list(_ahead(found))),
        *_least("radix cache on, against off, hit-heavy shapes", 3.0, list(_radix(found))),
        _first_token(found),
        *_overhead(found, others.get("bench_cache")),
        *(_attention(others.get("bench_attention"), width, prefix, aim) for width, prefix, aim in _TREE),
    ]


def markdown(verdicts: Iterable[Verdict], *, parts: bool) -> str:
    """Return the table; parts: with the workloads that composed goals are made of."""
    return table(HEADERS, (verdict.cells() for verdict in verdicts if parts or not verdict.part))


class _Found:
    """The run's rows by workload and system."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row["workload"], row["system"]): row for row in rows}

    def slower(self, workload: str, system: str) -> Summary | None:
        """Return how many times longer than bough the system took."""
        row = self._rows.get((workload, system), {})
        return summary(row["times_slower"]) if "times_slower" in row else None

    def figure(self, workload: str, name: str, system: str = BOUGH) -> Summary | None:
        """Return a figure of the system's."""
        figures = self._rows.get((workload, system), {}).get("figures", {})
        return summary(figures[name]) if name in figures else None

    def why_not(self, workload: str, system: str) -> str:
        """Return why a system has no figure there."""
        row = self._rows.get((workload, system))
        return "not measured" if row is None or row["status"] == "ok" else f"not measured: {row['status']}"

    def against(self, goal: str, aim: float, workload: str, system: str, *, part: bool = False) -> Verdict:
        """Return the verdict on being `aim` times as fast as the system."""
        measured = self.slower(workload, system)
        return Verdict(goal, aim, measured, why_not=self.why_not(workload, system), part=part)

    def forks(self) -> list[tuple[int, int, str]]:
        """Return (prefix, width, name) of each fork."""
        rows = (row for (_, system), row in self._rows.items() if system == BOUGH and row.get("prefix"))
        return sorted((row["prefix"], row["width"], row["workload"]) for row in rows)


def _growth(found: _Found) -> list[Verdict]:
    """Return whether the gain grows from the smallest fork to the largest, and the gain of each between."""
    goal = "and it grows with prefix and width: largest fork's ratio by the smallest's"
    gains = [(f"fork {w} on {p:,}", found.slower(name, VLLM)) for p, w, name in found.forks()]
    known = [(name, gain) for name, gain in gains if gain is not None]
    if len(known) < 2:
        return [Verdict(goal, 1.0, None)]
    (small, first), (large, last) = known[0], known[-1]
    grown = Summary(last.median / first.median, last.least / first.most, last.most / first.least, last.num)
    note = f"({large} {short(last.median)} ×, {small} {short(first.median)} ×)"  # noqa: RUF001
    return [Verdict(goal, 1.0, grown, note=note), *(Verdict(f"· {n}, vllm", 1.0, g, part=True) for n, g in known)]


def _ahead(found: _Found) -> Iterable[Verdict]:
    """Yield a verdict per shape of the paper, on the peer that came nearest."""
    for name in _PAPER:
        known = [(gain, peer) for peer in PEERS if (gain := found.slower(name, peer)) is not None]
        if not known:
            yield Verdict(name, 1.0, None, part=True)
            continue
        gain, peer = min(known, key=lambda one: one[0].median)
        yield Verdict(name, 1.0, gain, note=f"({peer})", part=True)


def _radix(found: _Found) -> Iterable[Verdict]:
    for name in _PAPER:
        best = found.figure(name, "best_hit_rate")
        if best is not None and best.median >= HIT_HEAVY:
            yield Verdict(name, 3.0, found.slower(name, NO_RADIX), note=f"(hit rate {best.median:.2f})", part=True)


def _least(goal: str, aim: float, parts: Sequence[Verdict]) -> list[Verdict]:
    """Return a goal that holds where all of its parts do, with its least part's figure, and the parts."""
    known = [part for part in parts if part.measured is not None]
    if not known:
        return [Verdict(goal, aim, None)]
    least = min(known, key=lambda part: part.measured.median if part.measured else 0.0)
    told = f"{least.note[1:-1]}, " if least.note else ""
    note = f"({least.goal}: {told}the least of {len(known)}; {sum(part.met for part in known)} of {len(parts)} met)"
    shown = [Verdict(f"· {p.goal}", p.aim, p.measured, p.unit, p.note, p.why_not, part=True) for p in parts]
    return [Verdict(goal, aim, least.measured, note=note), *shown]


def _first_token(found: _Found) -> Verdict:
    measured, note = found.figure(FIRST_TOKEN, "cold_by_cached"), ""
    cold, cached = found.figure(FIRST_TOKEN, "cold_ms"), found.figure(FIRST_TOKEN, "cached_ms")
    if cold is not None and cached is not None:
        note = f"({short(cold.median)} ms, {short(cached.median)} ms)"
    theirs = found.figure(FIRST_TOKEN, "cached_ms", VLLM)
    note += f"; vllm {short(theirs.median)} ms cached" if note and theirs is not None else ""
    return Verdict("first token of 64 new on 1,024 cached, cold by cached", 7.0, measured, note=note)


def _overhead(found: _Found, cache: Mapping[str, Any] | None) -> list[Verdict]:
    """Return what the radix cache costs where nothing hits: of a run's time, and counted without the model."""
    off = found.slower("no sharing", NO_RADIX)
    share = None if off is None else Summary(_cost(off.median), _cost(off.most), _cost(off.least), off.num)
    whole = Verdict("radix cache where nothing is shared, of the whole time", 0.3, share, "%")
    prefill = found.figure("prefill 1 × 1024", "wall_s")  # noqa: RUF001
    goal = "· its bookkeeping for a prompt of 1,024, of that prompt's time"
    if cache is None or prefill is None:
        why = "not measured" + (": python benchmarks/bench_cache.py --save" if cache is None else "")
        return [whole, Verdict(goal, 0.3, None, "%", why_not=why)]
    times = cache["results"]
    on, without = (times[f"random 1,024-token prompt, cache {word}"]["median"] for word in ("on", "off"))
    part = (on - without) / prefill.median * 1e-4  # µs by s, in percent
    note = f"({short(on - without)} µs, {_from(cache)})"
    return [whole, Verdict(goal, 0.3, Summary(part, part, part, 1), "%", note=note)]


def _cost(slower: float) -> float:
    """Return what bough takes more than a system that takes `slower` times as long, in percent."""
    return (1 / slower - 1) * 100


_TREE: Final = ((16, 1024, 4.0), (16, 4096, 12.0))


def _attention(document: Mapping[str, Any] | None, width: int, prefix: int, aim: float) -> Verdict:
    goal = f"tree attention, {width} branches on {prefix:,}, against gather and SDPA"
    if document is None:
        return Verdict(goal, aim, None, why_not="not measured: python benchmarks/bench_attention.py --save")
    figures = document["results"]["attention"][f"{width} x {prefix}"]
    return Verdict(goal, aim, summary(figures["torch_by_tree"]), note=f"({_from(document)})")


def _from(document: Mapping[str, Any]) -> str:
    about = document["environment"]
    return f"{document['benchmark']}, {about['date'][:10]}, {about['commit']}"
