"""Merge the partial results of each token's runs of keys by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bough.kernels.tuning import padded_head_dim

BLOCK_PARTS = 16


@triton.jit
def merge_partials_kernel(
    part_out: tl.tensor, part_lse: tl.tensor, merge_indptr: tl.tensor, merge_indices: tl.tensor, out: tl.tensor,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, BLOCK_P)
    begin = tl.load(merge_indptr + token)
    end = tl.load(merge_indptr + token + 1)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    largest = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    # Parts come in the order of positions and in blocks counted from the first: the order of the sum is fixed.
    for start in range(begin, end, BLOCK_P):
        is_part = start + offset < end
        part = tl.load(merge_indices + start + offset, mask=is_part, other=0).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(part_lse + part, mask=is_part, other=float("-inf"))
        mask = is_part[:, None] & (channel < HEAD_DIM)[None, :]
        values = tl.load(part_out + part[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(lse - reference)
        decay = tl.exp2(largest - reference)
        acc = acc * decay + tl.sum(weights[:, None] * values, 0)
        total = total * decay + tl.sum(weights, 0)
        largest = new_largest
    result = acc / tl.where(total > 0, total, 1.0)
    target = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    if end > begin:
        tl.store(out + target + channel, result.to(out.dtype.element_ty), mask=channel < HEAD_DIM)


def merge_partials(
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    merge_indptr: torch.Tensor,
    merge_indices: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write each token's result into `out`; `reference.merge_partials` is the definition.

    part_out: (max_partials, num_heads, head_dim) and part_lse: (max_partials, num_heads), float32, as `decode` writes
    them. merge_indptr: (num_tokens + 1,) and merge_indices, int32: token i merges the partials
    merge_indices[merge_indptr[i]:merge_indptr[i + 1]], in the order of positions. out: (num_tokens, num_heads,
    head_dim) contiguous; a token without partials is left as it is (it belongs to another kernel, or to padding).

        out[i] = sum_p 2^lse[p] · part_out[p] / sum_p 2^lse[p]
    """
    num_tokens, num_heads, head_dim = out.shape
    assert out.is_contiguous(), "the output must be contiguous"
    merge_partials_kernel[(num_tokens, num_heads)](
        part_out, part_lse, merge_indptr, merge_indices, out,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_P=BLOCK_PARTS,
        num_warps=warps_for(head_dim),
    )  # fmt: skip


def warps_for(head_dim: int) -> int:
    """Return warps for tiles of BLOCK_PARTS partial results."""
    return 4 if head_dim > 64 else 2
