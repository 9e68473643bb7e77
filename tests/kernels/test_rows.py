"""Norms, rotation and gate against their definitions in float64; the same bits for a row whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from bough.kernels.native_library import native_library
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import dequantised, quantise
from bough.kernels.rows import HeadNorms, NativeRows, Rotation, RowOps, TorchRows, choose_rows

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["native", "torch"])
def ops(request: pytest.FixtureRequest) -> RowOps:
    if request.param == "torch":
        return TorchRows()
    if native_library() is None:
        pytest.skip("the compiled kernels were not built here")
    return NativeRows()


def some(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    limit = 2 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 64, 1536])
def test_a_norm_is_its_definition(ops: RowOps, size: int, dtype: torch.dtype) -> None:
    x, delta, weight = some(5, size, dtype=dtype), some(5, size, dtype=dtype, seed=1), some(size, dtype=dtype, seed=2)
    total = x + delta
    exact = total.double() / (total.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    added, normed = ops.add_norm(x.clone(), delta, weight, EPS)
    assert torch.equal(added, total)
    close(normed, exact)
    alone, again = ops.add_norm(total.clone(), None, weight, EPS)
    assert torch.equal(alone, total)
    assert torch.equal(again, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 1408])
def test_the_gate_is_its_definition_also_far_out(ops: RowOps, size: int, dtype: torch.dtype) -> None:
    gate_up = some(7, 2 * size, dtype=dtype) * 4
    gate_up[0, :5] = torch.tensor([0.0, 100.0, -100.0, 1e30, -1e30]).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    close(ops.gated_silu(gate_up), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 80), (2, 2, 128)])
def test_heads_are_parted_turned_and_stored(
    ops: RowOps, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, has_norms: bool
) -> None:
    count, slots = 3, torch.tensor([5, 0, 9])
    qkv = some(count, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = torch.tensor([0.0, 1.0, 50.0]).unsqueeze(1) / torch.arange(1, head_dim // 2 + 1)
    norms = HeadNorms(some(head_dim, dtype=dtype, seed=3), some(head_dim, dtype=dtype, seed=4)) if has_norms else None
    k_pages, v_pages = torch.full((2, 3, 4, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    rotation = Rotation(angles.cos(), angles.sin(), slots)
    q = ops.split_rotate_store(qkv, PagedKV(k_pages, v_pages), rotation, norms, EPS)

    heads = qkv.view(count, -1, head_dim).double()
    exact_q, exact_k, exact_v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
    if norms is not None:
        exact_q, exact_k = (
            (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()) * weight.double()
            for x, weight in ((exact_q, norms.q), (exact_k, norms.k))
        )
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    limit = 3 * torch.finfo(dtype).eps * 4
    torch.testing.assert_close(q.double(), turned(exact_q), atol=limit, rtol=limit)
    torch.testing.assert_close(k_pages.flatten(0, 1)[slots].double(), turned(exact_k), atol=limit, rtol=limit)
    assert torch.equal(v_pages.flatten(0, 1)[slots].double(), exact_v)
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert k_pages.flatten(0, 1)[untouched].isnan().all()
    assert v_pages.flatten(0, 1)[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 80), (2, 2, 128)])
def test_int8_pages_get_what_others_get_quantised(
    ops: RowOps, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    count, slots = 40, torch.randperm(60, generator=torch.Generator().manual_seed(2))[:40]
    qkv = some(count, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    qkv[3] = 0
    angles = torch.arange(count).unsqueeze(1) / torch.arange(1, head_dim // 2 + 1)
    rotation, norms = Rotation(angles.cos(), angles.sin(), slots), HeadNorms(*some(2, head_dim, dtype=dtype, seed=3))
    plain = PagedKV(*torch.zeros(2, 15, 4, num_kv_heads, head_dim, dtype=dtype))
    small = PagedKV(
        *torch.full((2, 15, 4, num_kv_heads, head_dim), 99, dtype=torch.int8),
        *torch.full((2, 15, 4, num_kv_heads), torch.nan),
    )
    q = ops.split_rotate_store(qkv, plain, rotation, norms, EPS)
    assert torch.equal(ops.split_rotate_store(qkv, small, rotation, norms, EPS), q)
    assert small.k_scales is not None
    assert small.v_scales is not None
    for given, units, scales in ((plain.k, small.k, small.k_scales), (plain.v, small.v, small.v_scales)):
        exact_units, exact_scales = quantise(given.flatten(0, 1)[slots], torch.int8)
        assert torch.equal(units.flatten(0, 1)[slots], exact_units)
        assert torch.equal(scales.flatten(0, 1)[slots], exact_scales)
        assert scales.isnan().sum() == 20 * num_kv_heads, "other slots are left alone"


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_a_key_that_is_not_finite_is_none_when_read_from_int8_pages(ops: RowOps, strange: float) -> None:
    kv = PagedKV(*torch.zeros(2, 1, 2, 1, 32, dtype=torch.int8), *torch.zeros(2, 1, 2, 1))
    qkv = torch.ones(2, 3 * 32)
    qkv[1, 50], qkv[1, 70] = strange, strange
    angles = torch.ones(2, 16)
    ops.split_rotate_store(qkv, kv, Rotation(angles, angles, torch.tensor([0, 1])), None, EPS)
    for values in dequantised(kv):
        assert values[0, 0].isfinite().all()
        assert not values[0, 1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_many(ops: RowOps, dtype: torch.dtype) -> None:
    """1,000 rows of 96 go to several threads, one row does not."""
    x, delta, weight = some(1000, 96, dtype=dtype), some(1000, 96, dtype=dtype, seed=1), some(96, dtype=dtype, seed=2)
    gate_up = some(1000, 192, dtype=dtype)
    normed, gated = ops.add_norm(x.clone(), delta, weight, EPS)[1], ops.gated_silu(gate_up)
    for count in (1, 3, 17):
        part = slice(500, 500 + count)
        assert torch.equal(ops.add_norm(x[part].clone(), delta[part], weight, EPS)[1], normed[part])
        assert torch.equal(ops.gated_silu(gate_up[part].clone()), gated[part])


def test_what_is_not_finite_stays_so(ops: RowOps) -> None:
    """The runner refuses logits that are not finite: nothing on the way may hide one."""
    gate_up = torch.zeros(1, 64)
    gate_up[0, 3], gate_up[0, 40] = torch.nan, torch.nan
    assert ops.gated_silu(gate_up).isnan().sum() == 2
    assert ops.add_norm(torch.full((1, 32), torch.inf), None, torch.ones(32), EPS)[1].isnan().all()


def test_rows_that_do_not_fit_the_lanes_are_left_to_pytorch() -> None:
    assert isinstance(choose_rows((64, 100), 32, torch.float32), TorchRows)
    assert isinstance(choose_rows((64, 96), 24, torch.float32), TorchRows)
    assert isinstance(choose_rows((64, 96), 32, torch.float64), TorchRows)
