"""Compiled linear layers: the definition to rounding, and a row's bits whatever the rows beside it."""

from __future__ import annotations

import pytest
import torch

from bough.kernels.linear import bfloat16_linear, gated_linear, int8_linear
from bough.kernels.reference import quantise
from bough.runtime.models.layers import _int8_exact, quantising

SHAPES = [(64, 64), (70, 192), (16, 16), (513, 1408)]
COUNTS = (1, 2, 5, 6, 7, 13, 64, 200, 301)

pytestmark = pytest.mark.parametrize(("out_size", "in_size"), SHAPES)


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_bias", [False, True])
def test_bfloat16_is_the_float64_product_rounded_once(out_size: int, in_size: int, has_bias: bool) -> None:
    x, weight, bias = (
        some(*shape, seed=i).bfloat16() for i, shape in enumerate([(301, in_size), (out_size, in_size), (out_size,)])
    )
    linear = bfloat16_linear(weight, bias if has_bias else None)
    if linear is None:
        pytest.skip("this processor has no dot products of bfloat16")
    found, exact = linear(x), x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (found == exact.bfloat16()).double().mean() > 0.98
    for count in COUNTS:
        assert torch.equal(linear(x[-count:]), found[-count:]), count


@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_is_the_float64_gate_rounded_once(out_size: int, in_size: int, has_bias: bool) -> None:
    x, weight, bias = (
        some(*shape, seed=i).bfloat16() for i, shape in enumerate([(301, in_size), (out_size, in_size), (out_size,)])
    )
    x[0] = 0
    gated = gated_linear(weight, bias if has_bias else None)
    if gated is None:
        assert bfloat16_linear(weight, None) is None or out_size % 64, "halves of whole panels"
        pytest.skip("no dot products of bfloat16, or no such panels")
    found = gated(x)
    gate, up = (x.double() @ weight.double().T + (bias.double() if has_bias else 0)).chunk(2, -1)
    exact = gate * torch.sigmoid(gate) * up
    assert found.shape == (301, out_size // 2)
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (found == exact.bfloat16()).double().mean() > 0.98
    for count in COUNTS:
        assert torch.equal(gated(x[-count:]), found[-count:]), count


def test_a_gate_far_out_is_closed_or_open(out_size: int, in_size: int) -> None:
    weight = torch.zeros(out_size, in_size, dtype=torch.bfloat16)
    weight[: out_size // 2, 0], weight[out_size // 2 :, 1] = 1, 1
    gated = gated_linear(weight, None)
    if gated is None:
        pytest.skip("no dot products of bfloat16, or no such panels")
    x = torch.zeros(6, in_size, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor([100.0, -100.0, 1e30, -1e30, torch.nan, 0.0])
    x[:, 1] = 2
    found = gated(x)[:, 0].tolist()
    assert found[:4] == [200.0, pytest.approx(0, abs=1e-30), x[2, 0] * 2, 0.0]
    assert found[4] != found[4]
    assert found[5] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_is_the_definition(out_size: int, in_size: int, has_bias: bool, dtype: torch.dtype) -> None:
    x, bias = some(301, in_size, seed=0).to(dtype), some(out_size, seed=1).to(dtype) if has_bias else None
    units, scales = quantise(some(out_size, in_size, seed=2), torch.int8)
    x[0], x[1], x[2] = 0, 1, -1  # a row of nothing, and the largest sums
    units[0], units[1] = 127, -127
    linear = int8_linear(units, scales, bias)
    if linear is None:
        pytest.skip("this processor has no dot products of bytes")
    found = linear(x)
    torch.testing.assert_close(found, quantising(_int8_exact(units, scales), bias)(x))
    for count in COUNTS:
        assert torch.equal(linear(x[-count:]), found[-count:]), count
    x[3, in_size // 2], x[4, 0] = torch.nan, torch.inf
    strange = linear(x)
    assert not strange[3:5].isfinite().any()
    assert torch.equal(strange[5:], found[5:])
