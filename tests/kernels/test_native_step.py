"""All layers in one call of compiled code: the bits of its parts, called one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bough.kernels import native_attention
from bough.kernels.layout import PagedLayout
from bough.kernels.linear import NativeLinear, bfloat16_linear, gated_linear
from bough.kernels.native_library import native_library
from bough.kernels.native_step import Kept, LayerParts, NativeStep
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rows import HeadNorms, NativeRows, Rotation
from bough.kernels.units import plan_units

HIDDEN, HEADS, KV_HEADS, DIM, MLP, LAYERS, PAGE = 128, 4, 2, 32, 192, 3, 16
BLOCK = 14
LARGE = BLOCK * torch.get_num_threads() + 50  # rows are taken in blocks
PAGES = 3 * -(-(LARGE + 30) // PAGE)
EPS, SCALE = 1e-6, DIM**-0.5

pytestmark = pytest.mark.skipif(
    native_library() is None or bfloat16_linear(torch.zeros(64, HIDDEN, dtype=torch.bfloat16), None) is None,
    reason="this machine has no compiled products in bfloat16",
)


class Decoder:
    """Random layers and pages, and both ways through them."""

    def __init__(self, *, head_norms: bool, bias: bool, kv_dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(3)
        self._kv_dtype = kv_dtype
        self.layers = [self._layer(head_norms, bias) for _ in range(LAYERS)]
        self.step = NativeStep(self.layers, DIM, EPS, SCALE, BLOCK)

    def some(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).bfloat16()

    def pages(self) -> list[PagedKV]:
        shape = (PAGES, PAGE, KV_HEADS, DIM)
        if self._kv_dtype == torch.int8:
            return [
                PagedKV(*torch.zeros(2, *shape, dtype=torch.int8), *torch.zeros(2, *shape[:3])) for _ in self.layers
            ]
        return [PagedKV(*torch.zeros(2, *shape, dtype=torch.bfloat16)) for _ in self.layers]

    def one_by_one(
        self, x: torch.Tensor, rotation: Rotation, plan: native_attention.Plan, kv: list[PagedKV]
    ) -> torch.Tensor:
        rows, delta = NativeRows(), None
        for layer, pages in zip(self.layers, kv, strict=True):
            x, normed = rows.add_norm(x, delta, layer.norms[0], EPS)
            q = rows.split_rotate_store(layer.qkv(normed), pages, rotation, layer.head_norms, EPS)
            attended = native_attention.run(q, pages, plan, SCALE)
            x, normed = rows.add_norm(x, layer.out(attended.flatten(1)), layer.norms[1], EPS)
            delta = layer.down(layer.gated(normed))
        assert delta is not None
        return x + delta

    def _layer(self, head_norms: bool, bias: bool) -> LayerParts:
        def product(out_size: int, in_size: int) -> NativeLinear:
            made = bfloat16_linear(self.some(out_size, in_size) / in_size**0.5, self.some(out_size) if bias else None)
            assert made is not None
            return made

        return LayerParts(
            norms=(self.some(HIDDEN), self.some(HIDDEN)),
            qkv=product((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            head_norms=HeadNorms(self.some(DIM), self.some(DIM)) if head_norms else None,
            out=product(HIDDEN, HEADS * DIM),
            gated=self._gated(bias),
            down=product(HIDDEN, MLP),
        )

    def _gated(self, bias: bool) -> NativeLinear:
        weight = self.some(2 * MLP, HIDDEN) / HIDDEN**0.5
        made = gated_linear(weight, self.some(2 * MLP) if bias else None)
        assert made is not None
        return made


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("head_norms", "bias"), [(False, False), (True, True)])
def test_one_call_gives_the_bits_of_many(head_norms: bool, bias: bool, kv_dtype: torch.dtype) -> None:
    decoder = Decoder(head_norms=head_norms, bias=bias, kv_dtype=kv_dtype)
    one, many = decoder.pages(), decoder.pages()
    for num_tokens, kept in ((1, None), (BLOCK, None), (7, [0, 1, 6]), (LARGE, None), (LARGE, [2, 60]), (LARGE, [])):
        layout = PagedLayout(
            qo_indptr=np.array([0, num_tokens], dtype=np.int32),
            kv_indptr=np.array([0, PAGES // 3], dtype=np.int32),
            kv_indices=np.arange(PAGES // 3, dtype=np.int32) * 3,
            kv_lens=np.array([num_tokens + 30], dtype=np.int32),
            is_decode=np.array([False]),
            page_size=PAGE,
        )
        plan = native_attention.make_plan(layout, plan_units(layout), HEADS, KV_HEADS, DIM)
        positions = torch.arange(30, 30 + num_tokens)
        slots = positions // PAGE * 3 * PAGE + positions % PAGE
        angles = torch.rand(num_tokens, DIM // 2, generator=decoder._generator)
        rotation, x = Rotation(angles.cos(), angles.sin(), slots), decoder.some(num_tokens, HIDDEN)
        expected = decoder.one_by_one(x.clone(), rotation, plan, many)
        only = None
        if kept is not None:
            expected = expected[kept]
            only = Kept(torch.tensor(kept, dtype=torch.int64), native_attention.narrow(plan, np.array(kept, np.int64)))
        assert torch.equal(decoder.step.run(x, rotation, plan, one, only), expected)
        for a, b in zip(one, many, strict=True):
            assert torch.equal(a.k, b.k)
            assert torch.equal(a.v, b.v)
