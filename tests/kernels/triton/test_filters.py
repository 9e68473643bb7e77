"""Draws among the tokens that top-k, top-p and min-p leave, against both definitions: of the kernel, of the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bough.kernels import reference
from bough.kernels.draw import draw
from bough.kernels.filtered_draw import CANDIDATES, draw_filtered
from bough.kernels.logits import BLOCK, prepare_logits
from bough.runtime import sampler
from bough.runtime.batch import SampleRequest
from bough.runtime.grammar.masks import Masks
from bough.runtime.protocol import SamplingParams
from bough.runtime.rng import uniforms

FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 2, "top_p": 0.999},
    {"top_k": 40, "temperature": 0.7},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"top_p": 0.5, "min_p": 0.02},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_p": 0.999999},
    {"top_k": 700, "top_p": 0.97, "temperature": 5.0},
    {"min_p": 1.0},
    {"min_p": 0.1, "top_k": 3},
    {"min_p": 1e-6},
]
NOTHING = np.zeros(0, dtype=np.int32)


def logits_of_all_kinds(vocab_size: int, shift: int) -> torch.Tensor:
    """Return (len(FILTERS), vocab_size) logits, row by row peaked; flat; many equals; two levels; few allowed."""
    drawn = torch.randn(len(FILTERS), vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    few = torch.where(torch.arange(vocab_size) % 97 == 5, drawn, -1e30)
    kinds = torch.stack([4 * drawn, 0.1 * drawn, (2 * drawn).round(), (drawn > 0).float(), few])
    rows = torch.arange(len(FILTERS))
    return kinds[(rows + shift) % len(kinds), rows]


def arguments(
    params: list[SamplingParams], vocab_size: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Return every row's top_k, top_p, min_p as the kernels take them."""
    top_k = torch.tensor([vocab_size if p.top_k == -1 else min(p.top_k, vocab_size) for p in params]).int()
    top_p = torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=torch.float64)
    min_p = torch.tensor([p.min_p for p in params])
    return {"top_k": top_k.to(device), "top_p": top_p.to(device), "min_p": min_p.to(device)}


def drawn_by_kernels(
    logits: torch.Tensor, params: list[SamplingParams], points: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prepared logits and the tokens drawn, for rows that are all filtered."""
    num_rows, vocab_size = logits.shape
    temperatures = torch.tensor([p.temperature for p in params]).to(device)
    masks, mask_rows = torch.zeros(1, -(-vocab_size // 32)).int(), torch.full((num_rows,), -1).int()
    out, largest, total, argmax = prepare_logits(
        logits.to(device), masks.to(device), mask_rows.to(device), temperatures
    )
    tokens = draw(out, largest, total, argmax, temperatures, points.to(device))
    rows = torch.arange(num_rows, dtype=torch.int32, device=device).flip(0)
    filters = arguments(params, vocab_size, device)
    draw_filtered(out, largest, total, rows, points=points.to(device), tokens=tokens, **filters)
    return out.cpu(), tokens.cpu()


@pytest.mark.parametrize(("vocab_size", "shift"), [(BLOCK + 70, 0), (600, 3), (31, 1)])
def test_draws_are_those_of_both_definitions(vocab_size: int, shift: int, device: torch.device) -> None:
    logits = logits_of_all_kinds(vocab_size, shift)
    params = [SamplingParams(**options) for options in FILTERS]
    requests = [SampleRequest(p, seed, shift, NOTHING, NOTHING, ()) for seed, p in enumerate(params)]
    points = torch.from_numpy(uniforms([r.seed for r in requests], [r.position for r in requests]))
    prepared, tokens = drawn_by_kernels(logits, params, points, device)
    assert tokens.tolist() == [found.token for found in sampler.sample(logits.clone(), requests, Masks())]
    assert tokens.tolist() == reference.draw_filtered(prepared, points=points, **arguments(params, vocab_size)).tolist()


def test_points_at_the_ends_take_the_first_and_the_last_token_that_pass(device: torch.device) -> None:
    """One row keeps more candidates than one step of a loop takes; ids that do not pass lie on both sides."""
    logits = torch.zeros(4, 2 * CANDIDATES)
    logits[:, :3] = logits[:, -4:] = -1.0
    logits[3, 5::7] = 1.0  # what two of the rows keep
    params = [SamplingParams(top_k=2 * CANDIDATES - 7)] * 2 + [SamplingParams(min_p=1.0)] * 2
    points = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-53, 1 - 2**-53], dtype=torch.float64)
    _, tokens = drawn_by_kernels(logits, params, points, device)
    assert tokens.tolist() == [3, 2 * CANDIDATES - 5, 2 * CANDIDATES - 5, max(range(5, 2 * CANDIDATES, 7))]


def test_other_rows_and_rows_without_a_number_keep_their_tokens(device: torch.device) -> None:
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0)).to(device)
    logits[1] = -torch.inf
    logits[2, 7] = torch.nan
    masks, mask_rows = torch.zeros(1, 3, device=device).int(), torch.full((4,), -1, device=device).int()
    out, largest, total, _ = prepare_logits(logits, masks, mask_rows, torch.ones(4, device=device))
    tokens = torch.tensor([-5, -6, 69, -8], dtype=torch.int32, device=device)
    rows = torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    points = torch.zeros(4, dtype=torch.float64, device=device)
    filters = arguments([SamplingParams(top_k=1)] * 4, 70, device)
    draw_filtered(out, largest, total, rows, points=points, tokens=tokens, **filters)
    found = tokens.tolist()
    assert found[:2] == [-5, -6]
    assert 0 <= found[2] < 70, "whatever it is, an id"
    assert found[3] == int(logits[3].argmax())
