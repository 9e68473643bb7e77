"""Draws a run as text: its branches, its gens, and what was cached, computed and generated."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from bough.backend import Generation
from bough.calls import GenCall, SelectCall
from bough.errors import BoughError
from bough.pieces import Mark
from bough.runtime.protocol import Selected, Usage
from bough.strands import Onward, Strand
from bough.waiting import wait

PREVIEW_LEN = 48


def draw(title: str, strand: Strand) -> str:
    """Return the drawing of everything that was appended to a strand and to the strands forked off it.

    Everything must be done; a failed call shows its error.
    """
    totals = [0, 0, 0]
    lines = [title, *_strand_lines(strand, totals)]
    cached, computed, generated = totals
    lines.append(f"total: cached {cached} · computed {computed} · generated {generated}")
    return "\n".join(lines)


def _strand_lines(strand: Strand, totals: list[int]) -> list[str]:
    rows = list(_rows(strand))
    lines: list[str] = []
    for index, row in enumerate(rows):
        last = index == len(rows) - 1
        branch, rail = ("└─ ", "   ") if last else ("├─ ", "│  ")
        if isinstance(row, list):
            if isinstance(row, Onward):
                inner = _strand_lines(row[0], totals)
                lines.append(branch + (row.how if inner else row.how.removesuffix(", then")))
                lines += [f"{rail}{line}" for line in inner]
                continue
            lines.append(f"{branch}fork {len(row)}")
            for number, child in enumerate(row):
                inner = _strand_lines(child, totals)
                corner, side = ("└─ ", "   ") if number == len(row) - 1 else ("├─ ", "│  ")
                name = str(number) if child.name is None else _preview(" ".join(child.name.split()))
                lines.append(f"{rail}{corner}[{name}]")
                lines += [f"{rail}{side}{line}" for line in inner]
        elif isinstance(row, str):
            lines.append(f"{branch}{_preview(row)}")
        else:
            lines += [
                f"{branch}{_call_line(row, future, number, totals)}" for number, future in enumerate(row.futures())
            ]
    return lines


def _rows(strand: Strand) -> Iterator[str | GenCall | SelectCall | list[Strand]]:
    """Yield text (with the role it stands in), calls and forks in the order they were appended."""
    forks = sorted(strand.forks, key=lambda fork: fork[0])
    role, text = "", ""
    for position, item in enumerate([*strand.items, None]):
        at_fork = bool(forks) and forks[0][0] == position
        if text and (at_fork or not isinstance(item, str)):
            yield f"{role}{text!r}"
            text = ""
        while forks and forks[0][0] == position:
            yield forks.pop(0)[1]
        if isinstance(item, str):
            text += item
        elif isinstance(item, Mark):
            role = f"{item.role}: " if item.role else ""
        elif item is not None:
            yield item


def _call_line(call: GenCall | SelectCall, future: Future[Any], number: int, totals: list[int]) -> str:
    kind = "gen" if isinstance(call, GenCall) else "select"
    name = f"{kind} {call.name or '(unnamed)'}" + (f"[{number}]" if len(call.futures()) > 1 else "")
    wait(future)
    failure = future.exception()
    if failure is not None:
        return f"{name}  failed: {type(failure).__name__}: {failure}"
    done: Generation | Selected = future.result()
    _add(totals, done.usage)
    if isinstance(done, Generation):
        return f"{name}  {_cost(done.usage)} · {done.finish_reason}  {_preview(repr(done.text))}"
    assert isinstance(call, SelectCall)
    try:
        index = call.index()
    except BoughError as error:  # the program's own method could not decide
        return f"{name}  failed: {type(error).__name__}: {error}"
    share = done.distribution[index] if done.distribution else 1.0
    return f"{name}  {_cost(done.usage)} · p {share:.2f}  {_preview(repr(call.choices[index]))}"


def _cost(usage: Usage) -> str:
    cost = f"cached {usage.cached_tokens} · computed {usage.computed_tokens}"
    return f"{cost} · generated {usage.completion_tokens}"


def _add(totals: list[int], usage: Usage) -> None:
    totals[0] += usage.cached_tokens
    totals[1] += usage.computed_tokens
    totals[2] += usage.completion_tokens


def _preview(text: str) -> str:
    return text if len(text) <= PREVIEW_LEN else text[: PREVIEW_LEN - 1] + "…"
