"""Norm, gated SiLU, rotary embedding with the KV write, and logits, against their definitions; outputs start as NaN."""

from __future__ import annotations

import pytest
import torch

from bough.kernels import reference
from bough.kernels.draw import draw
from bough.kernels.gated_silu import gated_silu
from bough.kernels.logits import BLOCK, penalise, prepare_logits
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rms_norm import rms_norm
from bough.kernels.rope import HeadNorm, rotate_and_store
from bough.kernels.store_kv import store_kv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rounding: kernels and definitions may round a product once more or less, never further apart than two units.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)}


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol, rtol = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.cpu(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 96, 1030])
def test_rms_norm_with_and_without_a_residual(size: int, dtype: torch.dtype, device: torch.device) -> None:
    wide, weight = randn(3, size + 7, dtype=dtype), randn(size, dtype=dtype, seed=1)
    x, residual = wide[:, :size], randn(3, size, dtype=dtype, seed=2)
    close(rms_norm(wide.to(device)[:, :size], weight.to(device), 1e-5), reference.rms_norm(x, weight, 1e-5)[1])
    total, expected = reference.rms_norm(x, weight, 1e-5, residual)
    updated, out = residual.clone().to(device), torch.full(x.shape, torch.nan, dtype=dtype, device=device)
    close(rms_norm(wide.to(device)[:, :size], weight.to(device), 1e-5, updated, out), expected)
    close(updated, total)


def test_rms_norm_refuses_shapes_that_do_not_fit(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"x \(2, 8\) does not fit weight \(7,\)"):
        rms_norm(torch.ones(2, 8, device=device), torch.ones(7, device=device), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 1100])
def test_gated_silu(size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = 4 * randn(2, 2 * size, dtype=dtype)
    gate_up[0, 0], gate_up[1, 0] = -100, 100  # exp overflows in float16; silu is 0 and 100
    out = torch.full((2, size), torch.nan, dtype=dtype, device=device)
    close(gated_silu(gate_up.to(device), out), reference.gated_silu(gate_up))
    with pytest.raises(ValueError, match="the width is 5"):
        gated_silu(torch.ones(1, 5, device=device))


def empty_kv(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> PagedKV:
    """Return pages whose slots hold NaN, or -77 where the dtype has none."""
    if dtype == torch.int8:
        k, v = torch.full(shape, -77, dtype=dtype, device=device), torch.full(shape, -77, dtype=dtype, device=device)
    else:
        k, v = (torch.full(shape, torch.nan, device=device).to(dtype) for _ in range(2))
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return PagedKV(k, v)
    return PagedKV(k, v, *(torch.full(shape[:3], torch.nan, device=device) for _ in range(2)))


def same_pages(found: PagedKV, expected: PagedKV) -> None:
    """Stored numbers differ by a rounding at most, untouched slots not at all."""
    for name in ("k", "v"):
        a, b = getattr(found, name).cpu().float(), getattr(expected, name).float()
        assert torch.equal(a.isnan(), b.isnan())
        step = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.int8: 1.0, torch.float8_e4m3fn: 32.0}[found.k.dtype]
        assert (a - b).nan_to_num().abs().max() <= step
        assert ((a - b).nan_to_num().abs() > 1e-6).float().mean() < 0.02
    for name in ("k_scales", "v_scales"):
        if getattr(found, name) is not None:
            torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), equal_nan=True)


KV_DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 80), (3, 64)])
def test_store_kv(heads: int, head_dim: int, kv_dtype: torch.dtype, device: torch.device) -> None:
    dtype = torch.float32 if kv_dtype == torch.float32 else torch.bfloat16
    k, v = randn(5, heads, head_dim, dtype=dtype), randn(5, heads + 1, head_dim, dtype=dtype, seed=1)[:, :heads]
    k[2] = 0  # a scale of 0
    slots = torch.tensor([30, 3, 17, -1, 0])
    found, expected = (empty_kv((4, 8, heads, head_dim), kv_dtype, on) for on in (device, torch.device("cpu")))
    store_kv(k.to(device), v.to(device), found, slots.to(device))
    reference.store_kv(k, v, expected, slots)
    same_pages(found, expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 80), (6, 2, 64), (7, 1, 16)], ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotate_and_store(
    heads: tuple[int, int, int], kv_dtype: torch.dtype, has_norm: bool, device: torch.device
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    dtype = torch.float32 if kv_dtype == torch.float32 else torch.bfloat16
    qkv = randn(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    angles = torch.outer(torch.arange(50.0), 1.0 / 100 ** torch.linspace(0, 1, head_dim // 2))
    positions, slots = torch.tensor([0, 49, 7, 3]), torch.tensor([9, 31, -1, 4], dtype=torch.int32)
    norm = HeadNorm(randn(head_dim, dtype=dtype, seed=2), randn(head_dim, dtype=dtype, seed=3), 1e-6)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if has_norm:
        q, k = (reference.rms_norm(x, w, norm.eps)[1] for x, w in ((q, norm.q_weight), (k, norm.k_weight)))
    cos, sin = angles.cos(), angles.sin()
    found, expected = (empty_kv((4, 8, num_kv_heads, head_dim), kv_dtype, on) for on in (device, torch.device("cpu")))
    reference.store_kv(reference.rotate(k, cos[positions], sin[positions]), v, expected, slots.long())
    moved = HeadNorm(norm.q_weight.to(device), norm.k_weight.to(device), norm.eps) if has_norm else None
    turned = rotate_and_store(
        qkv.clone().to(device),
        num_heads,
        found,
        positions.to(device),
        cos.to(device),
        sin.to(device),
        slots.to(device),
        moved,
    )
    close(turned, reference.rotate(q, cos[positions], sin[positions]))
    same_pages(found, expected)


def test_penalties_and_biases(device: torch.device) -> None:
    logits = randn(3, 700, dtype=torch.float32)
    indptr = torch.tensor([0, 300, 300, 304], dtype=torch.int32)
    token_ids = torch.cat([torch.randperm(700, generator=torch.Generator().manual_seed(1))[:300],
                           torch.tensor([0, 5, 699, 350])]).int()  # fmt: skip
    counts = (torch.arange(304) % 5 - 1).int()
    biases = torch.where(torch.arange(304) % 7 == 0, 1.5, 0.0)
    biases[302] = -torch.inf
    rows = torch.tensor([[1.3, 1.0, 0.7], [0.5, 0.0, 0.1], [0.2, 0.0, -0.4]])
    arguments = (indptr, token_ids, counts, biases, *rows)
    found = logits.clone().to(device)
    penalise(found, *(argument.to(device) for argument in arguments))
    expected = reference.penalise(logits, *arguments)
    close(found, expected)
    assert torch.equal(found[1].cpu(), logits[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [31, 2 * BLOCK + 100])
def test_masks_temperature_and_statistics(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = randn(4, vocab_size, dtype=dtype)
    words = -(-vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (2, words), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    masks[1] = 0
    masks[1, -1] = 1  # all but one token forbidden, so whole blocks are empty
    mask_rows, temperatures = torch.tensor([0, -1, 1, 0], dtype=torch.int32), torch.tensor([0.5, 0.0, 1.0, 2.0])
    expected = reference.prepare_logits(logits, masks, mask_rows, temperatures)
    buffer = torch.full((4, vocab_size), torch.nan, device=device)
    given = (masks.to(device), mask_rows.to(device), temperatures.to(device))
    out, largest, total, argmax = (x.cpu() for x in prepare_logits(logits.to(device), *given, out=buffer))
    close(out, expected)
    assert torch.equal(out.isinf(), expected.isinf())
    log_sums = (largest + total.log()).logsumexp(-1)
    torch.testing.assert_close(log_sums, expected.logsumexp(-1))
    best = argmax.gather(1, largest.argmax(-1, keepdim=True)).squeeze(1)
    assert torch.equal(best.long(), out.argmax(-1))


@pytest.mark.parametrize("vocab_size", [31, 2 * BLOCK + 100])
def test_drawing_inverts_the_cumulative_distribution(vocab_size: int, device: torch.device) -> None:
    """Points at the ends and between; greedy rows; rows with one token left or none; whole blocks forbidden."""
    num_rows = 12
    logits = 3 * randn(num_rows, vocab_size, dtype=torch.float32)
    logits[8, :-1] = logits[9, 1:] = logits[10, :-30] = -torch.inf
    logits[11] = -torch.inf
    temperatures = torch.where(torch.arange(num_rows) < 2, 0.0, 1.0)
    points = torch.tensor([0.5, 0.0, 0.0, 1 - 2**-53, 0.3, 0.6, 0.9, 0.01, 0.7, 0.7, 0.5, 0.5], dtype=torch.float64)
    masks, mask_rows = torch.zeros(1, -(-vocab_size // 32)).int(), torch.full((num_rows,), -1).int()
    given = [x.to(device) for x in (masks, mask_rows, temperatures)]
    out, largest, total, argmax = prepare_logits(logits.to(device), given[0], given[1], given[2])
    tokens = torch.full((num_rows,), -7, dtype=torch.int32, device=device)
    found = draw(out, largest, total, argmax, given[2], points.to(device), tokens).cpu()
    expected = reference.draw(logits, temperatures, points)
    expected[3] = vocab_size - 1  # where the definition's own rounding may run past the end
    assert found.tolist() == expected.tolist()
    assert found.tolist()[8:] == [vocab_size - 1, 0, int(expected[10]), -1]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("num_blocks", [3, 16])
def test_a_row_without_a_number_draws_nothing_and_reads_nothing_else(num_blocks: int, device: torch.device) -> None:
    """16 blocks fill the kernel's tile of them; of 3, what lies beyond them is as large as nothing at all."""
    logits = torch.full((2, num_blocks * BLOCK), torch.nan, device=device)
    none, temperatures = torch.full((2,), -1, device=device).int(), torch.tensor([0.0, 1.0], device=device)
    masks = torch.zeros(1, num_blocks * BLOCK // 32, device=device).int()
    out, largest, total, argmax = prepare_logits(logits, masks, none, temperatures)
    points = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    assert draw(out, largest, total, argmax, temperatures, points).tolist() == [-1, -1]
