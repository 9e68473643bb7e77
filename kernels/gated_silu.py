"""silu(gate) · up, the two side by side in one matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def gated_silu_kernel(gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never overflows
    silu = (gate * tl.where(gate >= 0, 1.0, small) / (1 + small)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + column, (silu * up).to(out.dtype.element_ty), mask=mask)


def gated_silu(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) · up for gate_up (num_tokens, 2 * size): (num_tokens, size); see `reference.gated_silu`.

    gate_up: contiguous, gate first; float16, bfloat16 or float32. out: contiguous, None to allocate it. silu is
    computed in float32 and rounded to the dtype before the product. Raises ValueError for an odd width.
    """
    num_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gated_silu: gate and up lie side by side, but the width is {width}")
    assert gate_up.is_contiguous(), "gate_up must be contiguous"
    out = torch.empty(num_tokens, width // 2, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    assert out.is_contiguous(), "the output must be contiguous"
    if num_tokens:
        grid = (num_tokens, triton.cdiv(width // 2, BLOCK))
        gated_silu_kernel[grid](gate_up, out, SIZE=width // 2, BLOCK=BLOCK, num_warps=4)
    return out
