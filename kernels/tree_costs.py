"""What the parts of tree attention cost on a device, and how that is read off timings: numbers only, no device.

`calibration` takes the timings where a model is loaded on a GPU; the planner (`tree_plan`) compares ways to read the
same keys by the costs, and reads a shared segment once only where that is the shorter way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log2, sqrt
from statistics import median
from typing import Final, Literal

import numpy as np

Kind = Literal["narrow", "wide", "again", "merge", "launch"]
_MOST_RESIDUAL: Final = 0.25  # of a timing, root mean square: above it the model does not describe the device
_LEAST: Final = 0.125  # of a token: what is cheaper is lost in the noise
# What a GPU from sm_80 on can plausibly cost, several times what is expected on either side. Noise around no cost at
# all may be a little below it.
_BOUNDS: Final = {
    "item_tokens": (-16.0, 4096.0),
    "wide_item_tokens": (-16.0, 16384.0),
    "wide_token": (0.1, 64.0),
    "again_token": (0.02, 1.5),
    "partial_tokens": (-1.0, 1024.0),
    "launch_tokens": (-16.0, 8192.0),
}


@dataclass(frozen=True, slots=True)
class TreeCosts:
    """Times, counted in tokens: what a program takes to read K and V of one token and one KV head in an item of the
    narrow tile, while all programs read keys of their own.

    item_tokens, wide_item_tokens: starting an item of a tile and writing its result. wide_token: a token read in the
    wide tile. again_token: a token that another item reads as well, so that the second-level cache has it.
    partial_tokens: one more partial result of one token's group of heads, written and merged; a share of one program's
    work, as of all that programs do. launch_tokens: one more kernel in a step's layer. token_us: the unit, 0 where
    nothing was measured. source: "measured", or "estimated" and why.

    The defaults are estimates for an H200 and heads of 128 in 16 bits: 4.3 TB/s over 396 programs, 2 µs a kernel.
    """

    item_tokens: float = 64.0
    wide_item_tokens: float = 64.0
    wide_token: float = 0.75
    again_token: float = 0.75
    partial_tokens: float = 8.0
    launch_tokens: float = 40.0
    token_us: float = 0.0
    source: str = "estimated"

    def figures(self) -> dict[str, int | float | str]:
        """Return the costs as the runtime's stats tell them."""
        names = ("item_tokens", "wide_item_tokens", "wide_token", "again_token", "partial_tokens", "launch_tokens")
        costs = {f"tree_{name}": float(getattr(self, name)) for name in (*names, "token_us")}
        return {"tree_costs": self.source, **costs}


ESTIMATED: Final = TreeCosts()


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one shape of work took, each time it was tried, in µs.

    kind: "narrow", "wide": items of that tile over keys of their own; "again": narrow items that all read the same
    keys; "merge": merging partial results; "launch": kernels without work. items: items, partial results (of one KV
    head's group), or kernels; tokens: tokens of one KV head; items and tokens per program, kernels in all.
    """

    kind: Kind
    items: float
    tokens: float
    us: tuple[float, ...]


def fit(timings: Sequence[Timing], estimate: TreeCosts) -> TreeCosts:
    """Return the costs that explain the timings best, or `estimate` with the reason in its `source` if none do.

    A timing is base + items · item + tokens · token, and the median of its repetitions counts. Costs are rounded to
    powers of √2: two starts on one device then nearly always plan alike. Without "wide" timings those costs stay
    estimates.
    """
    times = [median(timing.us) if timing.us else float("nan") for timing in timings]
    if not all(isfinite(us) and us > 0 for us in times):
        return replace(estimate, source="estimated: a timing is missing or not above 0")
    missing = sorted({"narrow", "again", "merge", "launch"} - {timing.kind for timing in timings})
    if missing:
        return replace(estimate, source=f"estimated: no timings of {', '.join(missing)}")
    attend = _solve([(t, us) for t, us in zip(timings, times, strict=True) if t.kind in _ATTEND], _attend_columns)
    merge, launch = (
        _solve([(t, us) for t, us in zip(timings, times, strict=True) if t.kind == kind], _line)
        for kind in ("merge", "launch")
    )
    if attend is None or merge is None or launch is None:
        return replace(estimate, source="estimated: too few different shapes were timed")
    residual = max(attend[1], merge[1], launch[1])
    if residual > _MOST_RESIDUAL:
        return replace(estimate, source=f"estimated: timings are {residual:.0%} off the best fit")
    _, item_us, token_us, wide_item_us, wide_token_us, again_us = attend[0]
    if token_us <= 0:
        return replace(estimate, source=f"estimated: a token took {token_us:.3g} us")
    found = {
        "item_tokens": item_us / token_us,
        "again_token": again_us / token_us,
        "partial_tokens": 2 * merge[0][1] / token_us,  # a result is written once and read once
        "launch_tokens": launch[0][1] / token_us,
    }
    if any(timing.kind == "wide" for timing in timings):
        found |= {"wide_item_tokens": wide_item_us / token_us, "wide_token": wide_token_us / token_us}
    for name, value in found.items():
        least, most = _BOUNDS[name]
        if not least <= value <= most:
            return replace(estimate, source=f"estimated: {name} came out as {value:.3g}")
    rounded = {name: _rounded(value) for name, value in found.items()}
    return replace(estimate, **rounded, token_us=token_us, source="measured")


_ATTEND: Final = ("narrow", "wide", "again")
_ROOMS: Final = {"narrow": (1, 2), "wide": (3, 4), "again": (1, 5)}


def _attend_columns(timing: Timing) -> list[float]:
    """Return what a timing counts of: 1, items and tokens of the narrow tile, of the wide one, tokens read again."""
    row = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    items, tokens = _ROOMS[timing.kind]
    row[items], row[tokens] = timing.items, timing.tokens
    return row


def _line(timing: Timing) -> list[float]:
    return [1.0, timing.items]


def _solve(
    timed: list[tuple[Timing, float]], columns: Callable[[Timing], list[float]]
) -> tuple[list[float], float] | None:
    """Return the least relative squares solution and its residual, None where timings do not determine it."""
    us = np.array([time for _, time in timed])
    rows = np.array([columns(timing) for timing, _ in timed]) / us[:, None]
    used = np.flatnonzero(rows.any(axis=0))
    scale = np.abs(rows[:, used]).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(rows[:, used] / scale, np.ones(len(us)), rcond=1e-6)
    if rank < len(used):
        return None
    found = np.zeros(rows.shape[1])
    found[used] = solution / scale
    return found.tolist(), sqrt(float(np.mean((rows @ found - 1) ** 2)))


def _rounded(value: float) -> float:
    return float(2 ** (round(2 * log2(max(value, _LEAST))) / 2))
