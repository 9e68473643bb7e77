"""The decoder's linear layers, with results of a row that do not depend on the rows beside it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from bough.kernels.linear import bfloat16_linear, gated_linear, int8_linear
from bough.kernels.reference import gated_silu, quantise
from bough.kernels.rows import RowOps

log = logging.getLogger(__name__)

_MAX_ROWS = 512  # rows of one product: the self-test covers exactly the sizes up to here
_TEST_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 48, 64, 65, 100, 128, 200, 256, 384, 512)
_MULTIPLES = (1, 2, 4, 8, 16, 32)

Product = Callable[[torch.Tensor], torch.Tensor]
Maker = Callable[[torch.Tensor, "torch.Tensor | None"], "Product | None"]


class Linear:
    """y = x Wᵀ + b on packed weights, where the library's products depend on the number of rows.

    `row_multiple` rows are computed at a time (zero rows fill up), the smallest number for which a row's bits are the
    same in a batch of any size; `plan` found it. Weights packed by oneDNN are 1.5 to 4 times faster than F.linear in
    bfloat16 and up to 10 times in float32 (where MKL serves F.linear), so they are used wherever they pass the test.
    """

    def __init__(self, product: Product, row_multiple: int) -> None:
        self._product = product
        self._multiple = row_multiple

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, out_size) for x (num_rows, in_size), in x's dtype."""
        return _apply(self._product, x, self._multiple)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, plan: LinearPlan) -> Product:
    """Return y = x Wᵀ + b for weight (out_size, in_size) in the way that `plan_linear` found."""
    if plan.kind == "native":
        native = bfloat16_linear(weight, bias)
        assert native is not None, "the plan was made where it works"
        return native
    return Linear(_packed(weight, bias) if plan.kind == "packed" else _plain(weight, bias), plan.row_multiple)


class GatedProduct:
    """silu(gate) · up of a product whose first outputs are the gate's, in two steps."""

    def __init__(self, product: Product, rows: RowOps) -> None:
        self._product = product
        self._rows = rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, size) for x (num_rows, in_size), in x's dtype."""
        return self._rows.gated_silu(self._product(x))


def make_gated(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """Return the same for weight (2 size, in_size) in one step, where `plan_linear` found "native"; None if it cannot.

    Its results are rounded once.
    """
    return gated_linear(weight, bias) if _native_gate_is_right() else None


@functools.cache
def _native_gate_is_right() -> bool:
    """Tell whether the compiled gate agrees with float64's definition."""
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((7, 64), (192, 64), (192,)))
    x[0] *= 30  # gates far out
    product = gated_linear(weight, bias)
    if product is None:
        return False
    exact = gated_silu(x.double() @ weight.double().T + bias.double())
    limit = 2 * torch.finfo(torch.bfloat16).eps
    return torch.allclose(product(x).double(), exact, rtol=limit, atol=limit)


class DeviceLinear:
    """y = x Wᵀ + b by a GPU's library (cuBLAS), which chooses a kernel by the number of rows.

    fixed_rows: None, or every product has exactly so many rows, filled up with zeros: then it is one kernel, and a
    row's bits are the same in a batch of any size. 128 rows cost a decode of an 8B model little, since its weights are
    read once anyway; prompts are several times as slow.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fixed_rows: int | None = None) -> None:
        self._product = _plain(weight, bias)
        self._fixed_rows = fixed_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, out_size) for x (num_rows, in_size), in x's dtype."""
        rows = self._fixed_rows
        if rows is None:
            return self._product(x)
        parts = torch.split(x, rows)
        done = [self._product(F.pad(part, (0, 0, 0, rows - len(part))))[: len(part)] for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)


class LinearPlan(NamedTuple):
    """How products of one weight shape and dtype are computed on this machine.

    kind: "native" (our compiled code), "packed" (oneDNN's) or "plain" (F.linear). row_multiple: in how many rows.
    """

    kind: Literal["native", "packed", "plain"]
    row_multiple: int = 1


def plan_linear(out_size: int, in_size: int, dtype: torch.dtype) -> LinearPlan:
    """Try the ways to multiply by an (out_size, in_size) matrix and return the fastest that is right and exact.

    Right: agrees with float64. Exact: bit-equal rows at every number of rows. Measured on Zen 4: our compiled products
    are 1.4 to 2 times as fast as oneDNN's packed ones at 1 to 8 rows, and no slower at 512. Those are exact but for one
    row alone when in_size is large or no power of two; MKL's need multiples of 4. Where the processor multiplies tiles
    (AMX), oneDNN's are several times as fast.
    """
    generator = torch.Generator().manual_seed(0)
    # The second half of each sum takes back the first: what is left is rounding, which shows any change of order.
    x = torch.randn(_MAX_ROWS, in_size // 2, generator=generator).repeat(1, 2)
    w = torch.randn(out_size, in_size // 2, generator=generator).repeat(1, 2)
    w[:, in_size // 2 :].neg_()
    if in_size % 2:
        x, w = F.pad(x, (0, 1)), F.pad(w, (0, 1))
    x, w = x.to(dtype), w.to(dtype)
    native = None if _has_tiles() else bfloat16_linear(w, None)
    if native is not None and _is_right(bfloat16_linear, out_size, in_size, dtype) and _exact_multiple(native, x) == 1:
        return LinearPlan("native")
    if _is_right(_packed, out_size, in_size, dtype):
        multiple = _exact_multiple(_packed(w, None), x)
        if multiple is not None:
            return LinearPlan("packed", multiple)
    multiple = _exact_multiple(_plain(w, None), x)
    if multiple is None:
        log.warning("results of a (%d, %d) %s layer depend on the batch size here", out_size, in_size, dtype)
    return LinearPlan("plain", multiple or _MULTIPLES[-1])


def _has_tiles() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return check is not None and bool(check())


def _is_right(make: Maker, out_size: int, in_size: int, dtype: torch.dtype) -> bool:
    """Tell whether a product can be made here and agrees with float64's."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, in_size, generator=generator).to(dtype)
    w, b = torch.randn(out_size, in_size, generator=generator).to(dtype), torch.randn(out_size, generator=generator)
    try:
        product = make(w, b.to(dtype))
        if product is None:
            return False
        found = product(x).double()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("%s is not available: %s", make.__name__, error)
        return False
    exact = x.double() @ w.double().T + b.to(dtype).double()
    return bool((found - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max())


def _exact_multiple(product: Product, x: torch.Tensor) -> int | None:
    """Return the smallest row multiple at which the last m rows of x give the same bits for every m tested."""
    for multiple in _MULTIPLES:
        whole = _apply(product, x, multiple)
        if all(torch.equal(_apply(product, x[-m:], multiple), whole[-m:]) for m in _TEST_ROWS):
            return multiple
    return None


def _apply(product: Product, x: torch.Tensor, multiple: int) -> torch.Tensor:
    if len(x) > _MAX_ROWS:
        return torch.cat([_apply(product, part, multiple) for part in torch.split(x, _MAX_ROWS)])
    short = _num_rows(len(x), multiple) - len(x)
    return product(F.pad(x, (0, 0, 0, short)))[: len(x)] if short else product(x)


def _num_rows(count: int, multiple: int) -> int:
    """Return how many rows are computed for `count` rows: one of some thirty sizes, at most a third more.

    oneDNN compiles a product for each size and keeps 1,024 of them: 2.7 ms and 0.57 MB each (192 to 1,280 wide, bf16).
    With every size from 1 to 512 a runtime grew by 880 MB over its first hours and paused at each new size.
    """
    if count > 8:
        step = max(4, 1 << (count - 1).bit_length() - 3)
        count = -(-count // step) * step
    return -(-count // multiple) * multiple


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # one packing serves every number of rows
    run = torch.ops.mkldnn._linear_pointwise

    def product(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = run(x, packed, bias, "none", [], "")
        return out

    return product


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


class Int8Linear:
    """y = x Wᵀ + b with int8 weights, a float32 scale per output channel, and x quantised row by row as it comes.

    scale = max|values| / 127 of a weight row or an x row. The products' sums are integers, which have one value in any
    order: a row's bits do not depend on the batch. Half the memory of bfloat16.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        units, scales = quantise(weight, torch.int8)
        self._product: Product | None = None
        if _native_int8_is_right(weight.shape[1]):
            self._product = int8_linear(units, scales, bias)
        if self._product is None:
            self._product = quantising(_choose_int8(*weight.shape)(units.contiguous(), scales), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, out_size) for x (num_rows, in_size), in x's dtype."""
        assert self._product is not None, "a way to multiply was found"
        return self._product(x)


def quantising(product: Product, bias: torch.Tensor | None) -> Product:
    """Return x -> x Wᵀ + b by a product of x's units (uint8, 128 more than the number)."""
    wide_bias = None if bias is None else bias.float()

    def whole(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scales = wide.abs().amax(-1, keepdim=True).div_(127)
        units = (wide / scales.where(scales > 0, 1.0)).round_().add_(128).to(torch.uint8)
        out = _apply(product, units, 1).mul_(scales)  # a row that is not finite has such a scale
        return (out if wide_bias is None else out.add_(wide_bias)).to(x.dtype)

    return whole


Int8Product = Callable[[torch.Tensor, torch.Tensor], Product]


@functools.cache
def _native_int8_is_right(in_size: int) -> bool:
    """Tell whether the compiled int8 product is there and gives, to rounding, what the definition does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, in_size, generator=generator) for n in (33, 70))
    units, scales = quantise(weight, torch.int8)
    x[0], units[0] = 1.0, 127
    native = int8_linear(units, scales, None)
    exact = quantising(_int8_exact(units, scales), None)(x)
    return native is not None and torch.allclose(native(x), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@functools.cache
def _choose_int8(out_size: int, in_size: int) -> Int8Product:
    """Return the fastest of the int8 products that is right here.

    For processors without our compiled one. Right: within rounding of the exact one at every number of rows, at the
    largest sums too, where processors without VNNI saturate; the same bits for a row in all of them. Measured on Zen 4
    (512 to 2,816, 32 rows): oneDNN's 193 us, torch._int_mm 296, bfloat16 308; `_weight_int8pack_mm` 1,266, hence no
    weight-only product.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (_MAX_ROWS, in_size), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (out_size, in_size), generator=generator, dtype=torch.int8)
    x[-2:], weight[-1] = 255, 127
    scales = torch.rand(out_size, generator=generator) + 0.1
    exact = _int8_exact(weight, scales)(x)
    for make in (_int8_onednn, _int8_torch):
        try:
            product = make(weight, scales)
            whole = product(x)
            if torch.allclose(whole, exact, rtol=1e-6, atol=1e-3) and _exact_multiple(product, x) == 1:
                return make
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            log.info("%s is not available: %s", make.__name__, error)
    return _int8_exact


def _int8_onednn(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    run = torch.ops.onednn.qlinear_pointwise

    def product(x: torch.Tensor) -> torch.Tensor:
        # x stands for x - 128, times 1; the result is float32
        out: torch.Tensor = run(x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return out

    return product


def _int8_torch(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    def product(x: torch.Tensor) -> torch.Tensor:
        units = (x.to(torch.int16) - 128).to(torch.int8)
        return torch._int_mm(units, weight.T).float().mul_(scales)

    return product


def _int8_exact(weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """The definition: integers below 2^53 are exact in float64."""

    def product(x: torch.Tensor) -> torch.Tensor:
        return ((x.double() - 128) @ weight.double().T).float() * scales

    return product
