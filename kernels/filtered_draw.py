"""Draw a token among those that top-k, top-p and min-p leave: a cut found by search, without sorting a row.

What a row keeps is a head of its ranking: all tokens above a weight, and the first few of those that weigh just so.
Three kernels find it and draw, one after another, and the host waits for none:

    survey   each block of the vocabulary: how many tokens weigh at least a tier, and how much together, for 16 tiers
    gather   each block: the ids from the lowest tier up that can be needed, written in ascending order
    draw     each row: the exact cut among these candidates, by search over the bits of a weight; then the token

A token's weight is exp(logit - largest), so the likeliest weighs 1 and a weight's bits, as an integer, rank it. A row
of 128,256 tokens whose cut lies within a few hundred is read twice, and the rest is done on those few hundred.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bough.kernels import logits as prepared

TIERS = 16
WAYS = 8  # weights that are tried at a time in the search
CANDIDATES = 512  # of one step of the loops over candidates
_SLACK = tl.constexpr(1e-5)  # how far the survey's float32 shares may be off
_HEAVIEST = tl.constexpr(0x3F800000)  # the bits of 1


@triton.jit
def tier_floor(tier: tl.tensor, TIERS: tl.constexpr) -> tl.tensor:
    """Return the least weight of a tier: 1, 1/4, 1/16, ...; the last holds all that is not lost in a sum."""
    exponent = tl.where(tier < TIERS - 1, 127 - 2 * tier, 1)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_statistics(
    block_max: tl.tensor, block_sum: tl.tensor, row: tl.tensor, NUM_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr
) -> tl.tensor:
    """Return a row's largest logit, 0 if all are forbidden, and the sum of its weights."""
    block = tl.arange(0, BLOCK_B)
    is_block = block < NUM_BLOCKS
    largest = tl.load(block_max + row * NUM_BLOCKS + block, mask=is_block, other=float("-inf"))
    top = tl.max(largest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.load(block_sum + row * NUM_BLOCKS + block, mask=is_block, other=0.0)
    return top, tl.sum((sums * tl.exp(largest - top)).to(tl.float64), 0).to(tl.float32)


@triton.jit
def survey_kernel(
    logits: tl.tensor, block_max: tl.tensor, block_sum: tl.tensor, rows: tl.tensor,
    tier_counts: tl.tensor, tier_masses: tl.tensor,
    VOCAB_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
    TIERS: tl.constexpr,
) -> None:  # fmt: skip
    filtered = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + filtered).to(tl.int64)
    top, _ = row_statistics(block_max, block_sum, row, NUM_BLOCKS, BLOCK_B)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * VOCAB_SIZE + token, mask=token < VOCAB_SIZE, other=float("-inf"))
    weight = tl.exp(value - top)
    tier = tl.arange(0, TIERS)
    is_in = weight[None, :] >= tier_floor(tier, TIERS)[:, None]
    place = (filtered * TIERS + tier) * NUM_BLOCKS + tl.program_id(1)
    tl.store(tier_counts + place, tl.sum(is_in.to(tl.int32), 1))
    tl.store(tier_masses + place, tl.sum(tl.where(is_in, weight[None, :], 0.0), 1))


@triton.jit
def gather_kernel(
    logits: tl.tensor, block_max: tl.tensor, block_sum: tl.tensor, rows: tl.tensor,
    tier_counts: tl.tensor, tier_masses: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor,
    candidates: tl.tensor, num_candidates: tl.tensor,
    VOCAB_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
    TIERS: tl.constexpr,
) -> None:  # fmt: skip
    filtered = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + filtered).to(tl.int64)
    top, total = row_statistics(block_max, block_sum, row, NUM_BLOCKS, BLOCK_B)
    tier = tl.arange(0, TIERS)
    block = tl.arange(0, BLOCK_B)
    place = (filtered * TIERS + tier)[:, None] * NUM_BLOCKS + block[None, :]
    is_block = (block < NUM_BLOCKS)[None, :]
    counts = tl.load(tier_counts + place, mask=is_block, other=0)
    count = tl.sum(counts, 1)
    mass = tl.sum(tl.load(tier_masses + place, mask=is_block, other=0.0), 1)
    # One filter that needs nothing below a tier is enough: what is kept passes all of them.
    is_enough = count >= tl.load(top_k + row)
    is_enough = is_enough | (mass >= (tl.load(top_p + row) + _SLACK).to(tl.float32) * total)
    is_enough = is_enough | (tier_floor(tier, TIERS) <= 0.999 * tl.load(min_p + row))
    chosen = tl.min(tl.where(is_enough, tier, TIERS - 1), 0)
    is_before = (tier == chosen)[:, None] & (block < tl.program_id(1))[None, :]
    before = tl.sum(tl.sum(tl.where(is_before, counts, 0), 1), 0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * VOCAB_SIZE + token, mask=token < VOCAB_SIZE, other=float("-inf"))
    is_in = tl.exp(value - top) >= tier_floor(chosen, TIERS)
    index = before + tl.cumsum(is_in.to(tl.int32), 0) - 1
    tl.store(candidates + filtered * VOCAB_SIZE + index, token, mask=is_in & (index < VOCAB_SIZE))
    if tl.program_id(1) == 0:
        tl.store(num_candidates + filtered, tl.sum(tl.where(tier == chosen, count, 0), 0))


@triton.jit
def weights_and_shares(
    logits: tl.tensor, candidates: tl.tensor, row: tl.tensor, filtered: tl.tensor, index: tl.tensor, end: tl.tensor,
    top: tl.tensor, total: tl.tensor, VOCAB_SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return candidates' ids, their weights' bits and their probabilities as float64; 0 beyond the last one."""
    inside = index < end
    token = tl.load(candidates + filtered * VOCAB_SIZE + index, mask=inside, other=0)
    value = tl.load(logits + row * VOCAB_SIZE + token, mask=inside, other=float("-inf"))
    weight = tl.exp(value - top)
    return token, weight.to(tl.int32, bitcast=True), tl.div_rn(weight, total).to(tl.float64)


@triton.jit
def draw_filtered_kernel(
    logits: tl.tensor, block_max: tl.tensor, block_sum: tl.tensor, rows: tl.tensor, top_k: tl.tensor,
    top_p: tl.tensor, min_p: tl.tensor, points: tl.tensor, candidates: tl.tensor, num_candidates: tl.tensor,
    tokens: tl.tensor,
    VOCAB_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
    TIERS: tl.constexpr, WAYS: tl.constexpr,
) -> None:  # fmt: skip
    filtered = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + filtered).to(tl.int64)
    end = tl.load(num_candidates + filtered)
    top, total = row_statistics(block_max, block_sum, row, NUM_BLOCKS, BLOCK_B)
    total = tl.where(total > 0, total, 1.0)  # all tokens forbidden: there are no candidates
    most = tl.load(top_k + row)
    share = tl.load(top_p + row)
    least = tl.div_rn(1.0, total) * tl.load(min_p + row)
    offset = tl.arange(0, BLOCK)
    way = tl.arange(0, WAYS)

    # The lightest weight that is kept: what is heavier is less than top_k tokens and less than top_p of the whole.
    low = tl.full([], 1 << 23, dtype=tl.int32)
    high = tl.full([], _HEAVIEST, dtype=tl.int32)
    while low < high:
        step = (high - low + WAYS) // WAYS
        tried = low + way * step
        counts = tl.zeros([WAYS, BLOCK], dtype=tl.int32)
        shares = tl.zeros([WAYS, BLOCK], dtype=tl.float64)
        for begin in range(0, end, BLOCK):
            _, bits, probability = weights_and_shares(
                logits, candidates, row, filtered, begin + offset, end, top, total, VOCAB_SIZE
            )
            is_heavier = bits[None, :] > tried[:, None]
            counts += is_heavier.to(tl.int32)
            shares += tl.where(is_heavier, probability[None, :], 0.0)
        is_kept = (tl.sum(counts, 1) < most) & (tl.sum(shares, 1) < share)
        is_kept = is_kept & (tl.div_rn(tried.to(tl.float32, bitcast=True), total) >= least)
        num_below = tl.sum((is_kept == 0).to(tl.int32), 0)
        high = tl.minimum(high, tl.where(num_below < WAYS, low + num_below * step, high))
        low = tl.where(num_below > 0, low + (num_below - 1) * step + 1, low)

    # How many weigh just so, and how many of them are kept: the lowest ids.
    counts = tl.zeros([2, BLOCK], dtype=tl.int32)
    shares = tl.zeros([BLOCK], dtype=tl.float64)
    is_equal = (tl.arange(0, 2) == 1)[:, None]
    for begin in range(0, end, BLOCK):
        _, bits, probability = weights_and_shares(
            logits, candidates, row, filtered, begin + offset, end, top, total, VOCAB_SIZE
        )
        counts += tl.where(is_equal, (bits == low)[None, :], (bits > low)[None, :]).to(tl.int32)
        shares += tl.where(bits > low, probability, 0.0)
    both = tl.sum(counts, 1)
    heavier = tl.sum(tl.where(tl.arange(0, 2) == 0, both, 0), 0)
    equal = tl.sum(both, 0) - heavier
    heavier_share = tl.sum(shares, 0)
    equal_share = tl.div_rn(low.to(tl.float32, bitcast=True), total).to(tl.float64)
    room = tl.ceil((share - heavier_share) / tl.where(equal_share > 0, equal_share, 1.0))
    num_equal = tl.minimum(tl.minimum(room, equal.to(tl.float64)), (most - heavier).to(tl.float64))
    target = tl.load(points + row) * (heavier_share + num_equal * equal_share)

    reached = tl.zeros([], dtype=tl.float64)
    seen = tl.zeros([], dtype=tl.int32)
    token = tl.full([], VOCAB_SIZE, dtype=tl.int32)
    last = tl.full([], -1, dtype=tl.int32)
    for begin in range(0, end, BLOCK):
        ids, bits, probability = weights_and_shares(
            logits, candidates, row, filtered, begin + offset, end, top, total, VOCAB_SIZE
        )
        is_same = (bits == low).to(tl.int32)
        nth = seen + tl.cumsum(is_same, 0)
        is_kept = (bits > low) | ((is_same != 0) & (nth.to(tl.float64) <= num_equal))
        kept = tl.where(is_kept, probability, 0.0)
        is_reached = is_kept & (reached + tl.cumsum(kept, 0) > target)
        token = tl.minimum(token, tl.min(tl.where(is_reached, ids, VOCAB_SIZE), 0))
        last = tl.maximum(last, tl.max(tl.where(is_kept, ids, -1), 0))
        reached += tl.sum(kept, 0)
        seen += tl.sum(is_same, 0)
    # The last one, if rounding puts the target at the end. Nothing to draw: what `draw` said stands.
    if last >= 0:
        tl.store(tokens + row, tl.minimum(token, last))


def draw_filtered(
    logits: torch.Tensor,
    block_max: torch.Tensor,
    block_sum: torch.Tensor,
    rows: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    points: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Draw the tokens of some rows anew, among those that pass their filters; `reference.draw_filtered` defines it.

    logits, block_max, block_sum: from `logits.prepare_logits`, (num_rows, vocab_size) and (num_rows, num_blocks)
    float32. rows: (num_filtered,) int32, which rows. For all rows: top_k (num_rows,) int32 at least 1, vocab_size or
    more keeps all; top_p (num_rows,) float64 above 0, above 1 keeps all; min_p (num_rows,) float32 in [0, 1], of the
    likeliest; points (num_rows,) float64 in [0, 1). tokens: (num_rows,) int32, written for `rows` only, and not where
    all tokens are forbidden or logits are no numbers. Equally likely tokens rank by id; top_p keeps the shortest head
    of the ranking whose share reaches it. Takes 4 bytes for each logit of the rows, and never waits for the device.
    """
    num_filtered, vocab_size = len(rows), logits.shape[1]
    num_blocks = block_max.shape[1]
    if not num_filtered:
        return
    shape = (num_filtered, TIERS, num_blocks)
    tier_counts = torch.empty(shape, dtype=torch.int32, device=logits.device)
    tier_masses = torch.empty(shape, dtype=torch.float32, device=logits.device)
    candidates = torch.empty(num_filtered, vocab_size, dtype=torch.int32, device=logits.device)
    num_candidates = torch.empty(num_filtered, dtype=torch.int32, device=logits.device)
    sizes = {"VOCAB_SIZE": vocab_size, "NUM_BLOCKS": num_blocks, "TIERS": TIERS}
    sizes["BLOCK_B"] = max(16, triton.next_power_of_2(num_blocks))
    grid = (num_filtered, num_blocks)
    survey_kernel[grid](
        logits, block_max, block_sum, rows, tier_counts, tier_masses,
        BLOCK=prepared.BLOCK, num_warps=8, **sizes,
    )  # fmt: skip
    gather_kernel[grid](
        logits, block_max, block_sum, rows, tier_counts, tier_masses, top_k, top_p, min_p, candidates, num_candidates,
        BLOCK=prepared.BLOCK, num_warps=8, **sizes,
    )  # fmt: skip
    draw_filtered_kernel[(num_filtered,)](
        logits, block_max, block_sum, rows, top_k, top_p, min_p, points, candidates, num_candidates, tokens,
        BLOCK=CANDIDATES, WAYS=WAYS, num_warps=8, **sizes,
    )  # fmt: skip
