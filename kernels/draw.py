"""Draw a token from prepared logits: the likeliest, or by inverting the cumulative distribution at a given point."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bough.kernels import logits as prepared


@triton.jit
def draw_kernel(
    logits: tl.tensor, block_max: tl.tensor, block_sum: tl.tensor, block_argmax: tl.tensor,
    temperatures: tl.tensor, points: tl.tensor, tokens: tl.tensor,
    VOCAB_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_B)
    is_block = block < NUM_BLOCKS
    largest = tl.load(block_max + row * NUM_BLOCKS + block, mask=is_block, other=float("-inf"))
    top = tl.max(largest, 0)
    # Within the row's blocks, too, where logits are no numbers and so none is the largest.
    first = tl.minimum(tl.min(tl.where(largest == top, block, BLOCK_B), 0), NUM_BLOCKS - 1)
    token = tl.load(block_argmax + row * NUM_BLOCKS + first)
    if (tl.load(temperatures + row) > 0) & (top > float("-inf")):
        sums = tl.load(block_sum + row * NUM_BLOCKS + block, mask=is_block, other=0.0)
        shares = (sums * tl.exp(largest - top)).to(tl.float64)
        target = tl.load(points + row) * tl.sum(shares, 0)
        # The last block that has a share, if rounding puts the target at the end.
        last = tl.max(tl.where(shares > 0, block, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(shares, 0) <= target).to(tl.int32), 0), last)
        # Not below 0, however the sums round: else a forbidden first id would be taken.
        rest = tl.maximum(target - tl.sum(tl.where(block < chosen, shares, 0.0), 0), 0.0)
        offset = tl.arange(0, BLOCK)
        ids = chosen * BLOCK + offset
        value = tl.load(logits + row * VOCAB_SIZE + ids, mask=ids < VOCAB_SIZE, other=float("-inf"))
        weights = tl.exp(value - top).to(tl.float64)
        last = tl.max(tl.where(weights > 0, offset, 0), 0)
        token = chosen * BLOCK + tl.minimum(tl.sum((tl.cumsum(weights, 0) <= rest).to(tl.int32), 0), last)
    tl.store(tokens + row, tl.where(top > float("-inf"), token, -1))


def draw(
    logits: torch.Tensor,
    block_max: torch.Tensor,
    block_sum: torch.Tensor,
    block_argmax: torch.Tensor,
    temperatures: torch.Tensor,
    points: torch.Tensor,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a token id for each row, (num_rows,) int32; `reference.draw` is the definition.

    logits, block_max, block_sum, block_argmax: from `logits.prepare_logits`, temperatures as given to it. points:
    (num_rows,) float64 in [0, 1), one uniform number for each row. A row of temperature 0 takes the lowest id of the
    likeliest; others the first id, in the order of the vocabulary, whose cumulative share is above the point. -1 for a
    row all of whose tokens are forbidden. Reads one block of the logits; knows no top-k, top-p or min-p.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = block_max.shape[1]
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device) if tokens is None else tokens
    if num_rows:
        draw_kernel[(num_rows,)](
            logits, block_max, block_sum, block_argmax, temperatures, points, tokens,
            VOCAB_SIZE=vocab_size, NUM_BLOCKS=num_blocks, BLOCK_B=max(16, triton.next_power_of_2(num_blocks)),
            BLOCK=prepared.BLOCK, num_warps=4,
        )  # fmt: skip
    return tokens
