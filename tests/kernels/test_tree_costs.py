"""What timings say about a device's costs: known ones are found again, useless ones are refused with the reason."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bough.kernels.tree_costs import ESTIMATED, Kind, Timing, TreeCosts, fit

BASE_US, TOKEN_US = 6.0, 0.05
DEVICE = TreeCosts(32.0, 128.0, 1.0, 0.5, 4.0, 64.0)  # powers of √2, as they are rounded to


def us_of(kind: Kind, items: float, tokens: float, costs: TreeCosts = DEVICE) -> float:
    """Return the time of work on a device of known costs."""
    tokens_taken = {
        "narrow": items * costs.item_tokens + tokens,
        "again": items * costs.item_tokens + tokens * costs.again_token,
        "wide": items * costs.wide_item_tokens + tokens * costs.wide_token,
        "merge": items * costs.partial_tokens / 2,
        "launch": items * costs.launch_tokens,
    }[kind]
    return BASE_US + tokens_taken * TOKEN_US


def timings(
    noise: float = 0.0, outliers: bool = False, without: str = "", costs: TreeCosts = DEVICE, seed: int = 7
) -> list[Timing]:
    """Return what `calibration` would take there; repetitions differ by `noise`, one of them may be far off."""
    draw = random.Random(seed)
    shapes: list[tuple[Kind, float, float]] = [
        *((kind, items, items * length) for kind in ("narrow", "wide") for items in (1, 4) for length in (128, 512)),
        *(("again", items, items * 512) for items in (1, 4)),
        *(("merge", items, 0) for items in (2.6, 10.3, 41.4)),
        *(("launch", items, 0) for items in (1, 3, 6)),
    ]
    found = []
    for kind, items, tokens in shapes:
        us = [us_of(kind, items, tokens, costs) * (1 + draw.gauss(0, noise)) for _ in range(7)]
        if outliers:
            us[draw.randrange(7)] *= 20
        found.append(Timing(kind, items, tokens, tuple(us)))
    return [timing for timing in found if timing.kind != without]


NAMES = ("item_tokens", "wide_item_tokens", "wide_token", "again_token", "partial_tokens", "launch_tokens")


def test_the_costs_of_a_device_are_found_again() -> None:
    found = fit(timings(), ESTIMATED)
    assert replace(found, token_us=0.0) == replace(DEVICE, source="measured")
    assert found.token_us == pytest.approx(TOKEN_US)


def test_noise_and_a_repetition_that_was_disturbed_move_them_little() -> None:
    found = fit(timings(noise=0.03, outliers=True), ESTIMATED)
    assert found.source == "measured"
    for name in NAMES:
        assert getattr(DEVICE, name) / 2 <= getattr(found, name) <= 2 * getattr(DEVICE, name), name


def test_two_starts_on_one_device_count_alike() -> None:
    """Costs are rounded, so that plans, and with them bits, do not change with every start."""
    first, second = (fit(timings(noise=0.01, seed=seed), ESTIMATED) for seed in (1, 2))
    assert first.token_us != second.token_us
    assert replace(first, token_us=0.0) == replace(second, token_us=0.0)


def test_without_a_wide_tile_its_costs_stay_estimates() -> None:
    found = fit(timings(without="wide"), ESTIMATED)
    assert (found.source, found.item_tokens) == ("measured", DEVICE.item_tokens)
    assert (found.wide_token, found.wide_item_tokens) == (ESTIMATED.wide_token, ESTIMATED.wide_item_tokens)


def test_a_cost_that_cannot_be_told_from_none_is_the_least_there_is() -> None:
    free = [Timing(t.kind, t.items, t.tokens, (BASE_US,)) if t.kind == "launch" else t for t in timings()]
    assert fit(free, ESTIMATED).launch_tokens == 0.125


def changed(kind: str, us: float) -> list[Timing]:
    return [replace(t, us=(us,)) if t.kind == kind else t for t in timings()]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "no timings of again, launch, merge, narrow"),
        (timings(without="merge"), "no timings of merge"),
        ([replace(t, us=()) for t in timings()], "a timing is missing"),
        (changed("again", 0.0), "a timing is missing or not above 0"),
        (changed("again", float("nan")), "a timing is missing or not above 0"),
        ([t for t in timings() if t.kind != "narrow" or (t.items == 1 and t.tokens == 128)], "too few"),
        ([replace(t, us=(BASE_US,)) for t in timings()], "came out as"),
        (
            [replace(t, us=(10.0 if t.tokens == 2048 else 100.0,)) if t.kind == "narrow" else t for t in timings()],
            "off the best fit",
        ),
        (timings(costs=replace(DEVICE, wide_token=200.0)), "wide_token came out as 200"),
        (timings(costs=replace(DEVICE, again_token=2.0)), "again_token came out as 2"),
    ],
)
def test_timings_that_describe_no_device_leave_the_estimates_and_say_why(given: list[Timing], reason: str) -> None:
    found = fit(given, ESTIMATED)
    assert replace(found, source="estimated") == ESTIMATED
    assert found.source.startswith("estimated: ")
    assert reason in found.source


def test_costs_are_told_as_the_stats_of_a_runtime() -> None:
    figures = fit(timings(), ESTIMATED).figures()
    assert (figures["tree_costs"], figures["tree_item_tokens"]) == ("measured", 32.0)
    assert ESTIMATED.figures()["tree_costs"] == "estimated"
