"""From the model's logits to those that are drawn from: penalties, grammar masks, temperature."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # ids of one program and of one block of statistics
ENTRIES = 256


@triton.jit
def penalise_kernel(
    logits: tl.tensor, indptr: tl.tensor, token_ids: tl.tensor, counts: tl.tensor, biases: tl.tensor,
    repetition: tl.tensor, frequency: tl.tensor, presence: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(indptr + row + 1)
    factor = tl.load(repetition + row)
    per_count = tl.load(frequency + row)
    once = tl.load(presence + row)
    for start in range(tl.load(indptr + row), end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < end
        place = logits + row * stride + tl.load(token_ids + entry, mask=mask, other=0)
        count = tl.load(counts + entry, mask=mask, other=0)
        value = tl.load(place, mask=mask, other=0.0)
        repeated = tl.where(value > 0, value / factor, value * factor)
        value = tl.where(count >= 0, repeated, value)
        value -= tl.where(count > 0, per_count * count.to(tl.float32) + once, 0.0)
        tl.store(place, value + tl.load(biases + entry, mask=mask, other=0.0), mask=mask)


def penalise(
    logits: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    biases: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Apply penalties and biases to the tokens that have any, in place; `reference.penalise` is the definition.

    logits: (num_rows, vocab_size) float32. Row i has entries indptr[i]:indptr[i + 1] (int32), one for each token id at
    most: token_ids int32; counts int32, how often the row generated it, 0 if it stands in the prompt only, -1 if in
    neither; biases float32, -inf to forbid. repetition (1 is off), frequency, presence: (num_rows,) float32, as the
    sampling parameters of these names. Costs the entries, not the vocabulary.
    """
    if len(logits):
        penalise_kernel[(len(logits),)](
            logits, indptr, token_ids, counts, biases, repetition, frequency, presence, logits.stride(0),
            BLOCK=ENTRIES, num_warps=4,
        )  # fmt: skip


@triton.jit
def prepare_logits_kernel(
    logits: tl.tensor, masks: tl.tensor, mask_rows: tl.tensor, temperatures: tl.tensor, out: tl.tensor,
    block_max: tl.tensor, block_sum: tl.tensor, block_argmax: tl.tensor, stride: tl.tensor, mask_stride: tl.tensor,
    VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB_SIZE
    value = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    mask_row = tl.load(mask_rows + row).to(tl.int64)
    if mask_row >= 0:
        word = tl.load(masks + mask_row * mask_stride + token // 32, mask=inside, other=0)
        value = tl.where((word >> (token % 32)) & 1 != 0, value, float("-inf"))
    temperature = tl.load(temperatures + row)
    value = value / tl.where(temperature > 0, temperature, 1.0)
    tl.store(out + row * VOCAB_SIZE + token, value, mask=inside)
    largest = tl.max(value, 0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * tl.num_programs(1) + block
    tl.store(block_max + place, largest)
    tl.store(block_sum + place, tl.sum(tl.exp(value - reference), 0))
    tl.store(block_argmax + place, tl.min(tl.where(value == largest, token, VOCAB_SIZE), 0))


def prepare_logits(
    logits: torch.Tensor, masks: torch.Tensor, mask_rows: torch.Tensor, temperatures: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Mask, divide by the temperature, and look at each block of the vocabulary; see `reference.prepare_logits`.

    logits: (num_rows, vocab_size), rows may be strided; float16, bfloat16 or float32. masks: (num_masks, at least
    vocab_size / 32) int32, bit i % 32 of word i // 32 set where token i is allowed. mask_rows: (num_rows,) int32, which
    mask a row has, -1 for none: the masks of a grammar's states may stay on the device. temperatures: (num_rows,)
    float32; 0 (greedy) divides by nothing.

    Returns out (num_rows, vocab_size) float32, -inf where forbidden, and for each block of BLOCK tokens, (num_rows,
    num_blocks): the largest value; the sum of exp(value - largest), 0 if all are forbidden; the lowest id of the
    largest, as int32. So a greedy row is drawn, and any row's log-sum-exp is known, from a thousandth of the numbers.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    if masks.shape[1] * 32 < vocab_size:
        raise ValueError(f"prepare_logits: masks have {masks.shape[1]} words, {vocab_size} tokens need more")
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device) if out is None else out
    assert out.is_contiguous(), "the output must be contiguous"
    largest, total = (torch.empty(num_rows, num_blocks, dtype=torch.float32, device=out.device) for _ in range(2))
    argmax = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=out.device)
    if num_rows:
        prepare_logits_kernel[(num_rows, num_blocks)](
            logits, masks, mask_rows, temperatures, out, largest, total, argmax, logits.stride(0), masks.stride(0),
            VOCAB_SIZE=vocab_size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out, largest, total, argmax
