"""Compiled linear layers: the definition to rounding, and a row's bits whatever the rows beside it."""

from __future__ import annotations

import pytest
import torch

from bough.kernels.linear import bfloat16_linear, int8_linear
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
