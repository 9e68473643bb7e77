"""RMSNorm, with the residual sum that comes before it in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, eps: tl.tensor, x_stride: tl.tensor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
        # The norm is of the sum as it is kept, rounded: the next layer adds to those bits.
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + row * SIZE + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    normed = normed.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + column, mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(out + row * SIZE + column, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return RMSNorm of x, or of x + residual, which is then written to `residual`; see `reference.rms_norm`.

    x: (num_tokens, size), rows may be strided; float16, bfloat16 or float32. weight: (size,). residual: like x and
    contiguous, updated in place, or None. out: like x and contiguous, may be x itself; None to allocate it. Sums in
    float32; the sum x + residual and the normalised value are rounded to x's dtype, the latter before the weight, as
    transformers does. One program holds a row: sizes to 65,536. Raises ValueError for shapes that do not fit.
    """
    num_tokens, size = x.shape
    if weight.shape != (size,) or (residual is not None and residual.shape != x.shape) or x.stride(1) != 1:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)} and the residual")
    assert residual is None or residual.is_contiguous(), "the residual must be contiguous"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert out.is_contiguous(), "the output must be contiguous"
    block = triton.next_power_of_2(size)
    if num_tokens:
        rms_norm_kernel[(num_tokens,)](
            x, x if residual is None else residual, weight, out, eps, x.stride(0),
            SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None, num_warps=warps_for(block),
        )  # fmt: skip
    return out


def warps_for(block: int) -> int:
    """Return warps for a row of `block` numbers: 16 to 32 of them for each thread, and never fewer than 1 warp."""
    return min(16, max(1, block // 512))
