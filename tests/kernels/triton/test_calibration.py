"""Timing a device: what is timed runs as on a GPU; interpreted, a clock of known costs tells the times."""

from __future__ import annotations

from dataclasses import replace

import torch

from bough.kernels.calibration import Probe, calibrate
from bough.kernels.cuda_attention import Kernels, choose_kernels
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import quantise
from bough.kernels.tree_costs import ESTIMATED, TreeCosts

DEVICE = TreeCosts(32.0, 128.0, 1.0, 0.5, 4.0, 64.0)
HEADS = (4, 2, 64)


def clock(probe: Probe) -> float:
    """Return how long the work would take on a device of those costs, 0.05 us a token."""
    tokens = {
        "narrow": probe.items * DEVICE.item_tokens + probe.tokens,
        "again": probe.items * DEVICE.item_tokens + probe.tokens * DEVICE.again_token,
        "wide": probe.items * DEVICE.wide_item_tokens + probe.tokens * DEVICE.wide_token,
        "merge": probe.items * DEVICE.partial_tokens / 2,
        "launch": probe.items * DEVICE.launch_tokens,
    }[probe.kind]
    return 6.0 + 0.05 * tokens


def pages(num_pages: int, device: torch.device, dtype: torch.dtype = torch.float32) -> PagedKV:
    k = torch.randn(num_pages, 16, HEADS[1], HEADS[2], generator=torch.Generator().manual_seed(0)).to(device)
    if dtype == torch.float32:
        return PagedKV(k, k.clone())
    (stored, scales) = quantise(k, dtype)
    return PagedKV(stored, stored.clone(), scales, scales.clone())


def kernels(exact_split: int | None = None) -> Kernels:
    """Return kernels of a device with one multiprocessor, and of chunks of 32 keys."""
    chosen = choose_kernels(*HEADS, torch.float32, (9, 0), 1)
    narrow, wide = (replace(config, block_n=32) for config in (chosen.narrow, chosen.wide))
    options = replace(chosen.options, block_n=32, min_split=32, exact_split=exact_split)
    return replace(chosen, narrow=narrow, wide=wide, options=options)


def test_costs_come_from_the_times_of_a_models_own_work(device: torch.device) -> None:
    kv = pages(20, device)
    before = kv.k.clone()
    found = calibrate(kernels(), kv, torch.float32, timer=clock, seconds=0.0)
    assert replace(found, token_us=0.0) == replace(DEVICE, source="measured")
    assert torch.equal(kv.k, before)


def test_a_device_is_timed_or_keeps_the_estimates_and_says_why(device: torch.device) -> None:
    """On a GPU by its own events; times are not checked, only that what comes out can be planned with."""
    found = calibrate(kernels(), pages(20, device), torch.float32)
    if device.type == "cpu":
        assert found == replace(ESTIMATED, source="estimated: no GPU")
    else:
        assert found.source == "measured" or found.source.startswith("estimated: ")
        assert found.again_token > 0


def test_what_cannot_be_timed_leaves_the_estimates(device: torch.device) -> None:
    few = calibrate(kernels(), pages(2, device), torch.float32, timer=clock)
    assert few == replace(ESTIMATED, source="estimated: ValueError: 2 pages hold less than an item of 128 tokens")


def test_exact_mode_has_no_wide_tile_to_time(device: torch.device) -> None:
    """And keys may be quantised."""
    kinds = []

    def noting(probe: Probe) -> float:
        kinds.append(probe.kind)
        return clock(probe)

    found = calibrate(kernels(32), pages(20, device, torch.int8), torch.float32, timer=noting, seconds=0.0)
    assert set(kinds) == {"narrow", "again", "merge", "launch"}
    assert (found.source, found.wide_token) == ("measured", ESTIMATED.wide_token)
