"""The Llama family (Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3) as one decoder: ragged batch, paged KV pool."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bough.kernels import native_attention
from bough.kernels.attention import Plan, paged_attention
from bough.kernels.linear import NativeLinear
from bough.kernels.native_step import Kept, LayerParts, NativeStep
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rows import HeadNorms, NativeRows, Rotation, RowOps, choose_rows
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.inputs import LastLayer, StepInputs
from bough.runtime.models.config import ModelConfig
from bough.runtime.models.layers import (
    DeviceLinear,
    GatedProduct,
    Int8Linear,
    LinearPlan,
    Product,
    make_gated,
    make_linear,
    plan_linear,
)
from bough.runtime.models.rope import RopeTable
from bough.runtime.models.weights import Weights


class DeviceParts(NamedTuple):
    """What a model on a GPU is made with: its row operations, and the fixed rows of its products (`DeviceLinear`)."""

    rows: RowOps
    fixed_rows: int | None


class Llama:
    """The decoder: token ids -> hidden states -> logits. Holds weights only; the KV pool is the caller's.

    int8: the linear layers have int8 weights. Embeddings, norms and the head stay: the first two are read a few rows at
    a time, and the head's errors would go straight into the choice of the token. parts: for a GPU; by default
    those of the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        parts: DeviceParts | None = None,
        device: torch.device | None = None,
        *,
        int8: bool = False,
    ) -> None:
        self.config = config
        self.int8 = int8
        build = _Builder(config, weights, parts, int8=int8)
        self._embedding = weights.take("model.embed_tokens.weight")
        self._layers = [build.layer(index) for index in range(config.num_layers)]
        self._norm = build.norm("model.norm")
        self._rows = build.rows
        self._head = build.head(self._embedding)
        self._native_step = _native_step(config, self._layers, self._rows)
        self._rope = RopeTable(config.rope, config.head_dim, device)
        if parts is not None:
            self._rope.reserve(config.context_len)

    def forward(self, inputs: StepInputs, pool: KVPool) -> torch.Tensor:
        """Compute the step's tokens and write their KV into the pool.

        Returns the final, normalised hidden states of the tokens `inputs.wanted`: (num_wanted, hidden_size).
        """
        x = self._embedding.index_select(0, inputs.token_ids)
        rotation = Rotation(*self._rope.lookup(inputs.positions, inputs.end_position), inputs.slots)
        done = self._forward_at_once(x, rotation, inputs, pool)
        x, delta = (done, None) if done is not None else self._forward_layers(x, rotation, inputs, pool)
        if not inputs.is_decode:
            wanted = inputs.wanted if inputs.last is None else inputs.last.wanted
            x, delta = x.index_select(0, wanted), None if delta is None else delta.index_select(0, wanted)
        return self._rows.add_norm(x, delta, self._norm, self.config.rms_eps)[1]

    def _forward_at_once(
        self, x: torch.Tensor, rotation: Rotation, inputs: StepInputs, pool: KVPool
    ) -> torch.Tensor | None:
        """Return the last layer's output by one call of compiled code; None where something is not compiled."""
        plan, last = inputs.attention, inputs.last
        if self._native_step is None or not isinstance(plan, native_attention.Plan):
            return None
        if last is None:
            return self._native_step.run(x, rotation, plan, pool.layers)
        assert isinstance(last.attention, native_attention.Plan), "a native plan can be narrowed"
        return self._native_step.run(x, rotation, plan, pool.layers, Kept(last.tokens, last.attention))

    def _forward_layers(
        self, x: torch.Tensor, rotation: Rotation, inputs: StepInputs, pool: KVPool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        delta: torch.Tensor | None = None
        for index, (layer, kv) in enumerate(zip(self._layers, pool.layers, strict=True), 1):
            only = inputs.last if index == len(self._layers) else None
            x, delta = layer.forward(x, delta, rotation, inputs.attention, kv, only)
        assert delta is not None, "a model has layers"
        return x, delta

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, vocab_size) float32 logits of hidden states (num_rows, hidden_size)."""
        return self._head(hidden).float()

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `logits` in the model's dtype."""
        return self._head(hidden)


class _LayerWeights(NamedTuple):
    """One decoder layer's weights; norms (hidden_size,) before attention and before the MLP. gated: silu(gate) · up."""

    norms: tuple[torch.Tensor, torch.Tensor]
    qkv: Product
    head_norms: HeadNorms | None
    out: Product
    gated: Product
    down: Product


class _Layer:
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, weights: _LayerWeights, rows: RowOps) -> None:
        self._eps = config.rms_eps
        self._scale = config.head_dim**-0.5
        self._weights = weights
        self._rows = rows

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        rotation: Rotation,
        plan: Plan,
        kv: PagedKV,
        only: LastLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x, delta), whose sum (num_tokens, hidden_size) is the layer's output; its input is likewise a sum.

        The sum is left to the next norm, which reads it anyway. Writes the tokens' KV into the pages. only: the tokens
        whose output is needed; by default all.
        """
        w, rows, eps = self._weights, self._rows, self._eps
        x, normed = rows.add_norm(x, delta, w.norms[0], eps)
        q = rows.split_rotate_store(w.qkv(normed), kv, rotation, w.head_norms, eps)
        if only is None:
            attended = paged_attention(q, kv, plan, self._scale)
        else:
            x, attended = x.index_select(0, only.tokens), self._attend(q, kv, plan, only)
            if not len(x):
                return x, x
        x, normed = rows.add_norm(x, w.out(attended.flatten(1)), w.norms[1], eps)
        return x, w.down(w.gated(normed))

    def _attend(self, q: torch.Tensor, kv: PagedKV, plan: Plan, only: LastLayer) -> torch.Tensor:
        if only.attention is None:
            return paged_attention(q, kv, plan, self._scale).index_select(0, only.tokens)
        return paged_attention(q.index_select(0, only.tokens), kv, only.attention, self._scale)

    def native_parts(self) -> LayerParts | None:
        """Return the weights, if all products are compiled ones in bfloat16."""
        w = self._weights
        products = [p for p in (w.qkv, w.out, w.gated, w.down) if isinstance(p, NativeLinear) and p.is_bfloat16]
        if len(products) < 4 or not products[2].is_gated:
            return None
        qkv, out, gated, down = products
        return LayerParts(w.norms, qkv, w.head_norms, out, gated, down)


def _native_step(config: ModelConfig, layers: list[_Layer], rows: RowOps) -> NativeStep | None:
    """Return compiled code's way through all layers at once, None where parts of them are not compiled."""
    parts = [part for layer in layers if (part := layer.native_parts()) is not None]
    if not isinstance(rows, NativeRows) or len(parts) < len(layers):
        return None
    return NativeStep(parts, config.head_dim, config.rms_eps, config.head_dim**-0.5)


class _Builder:
    """Makes a model's parts from its weights; matrices of one shape share the plan that was found for the first."""

    def __init__(self, config: ModelConfig, weights: Weights, parts: DeviceParts | None, *, int8: bool) -> None:
        self._config = config
        self._weights = weights
        self._int8 = int8
        self._parts = parts
        self._plans: dict[tuple[int, int], LinearPlan] = {}
        sizes = (config.hidden_size, config.mlp_size)
        self.rows = choose_rows(sizes, config.head_dim, weights.dtype) if parts is None else parts.rows

    def layer(self, index: int) -> _Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        has_head_norms = self._config.qk_norm
        weights = _LayerWeights(
            norms=(self.norm(f"{prefix}input_layernorm"), self.norm(f"{prefix}post_attention_layernorm")),
            qkv=self._linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            head_norms=HeadNorms(self.norm(f"{attention}q_norm"), self.norm(f"{attention}k_norm"))
            if has_head_norms
            else None,
            out=self._linear(f"{attention}o_proj"),
            gated=self._gated(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self._linear(f"{mlp}down_proj"),
        )
        return _Layer(self._config, weights, self.rows)

    def norm(self, name: str) -> torch.Tensor:
        return self._weights.take(f"{name}.weight").contiguous()

    def head(self, embedding: torch.Tensor) -> Product:
        weight = embedding if self._config.tie_embeddings else self._weights.take("lm_head.weight")
        return self._product(weight, None)

    def _linear(self, *names: str) -> Product:
        """Return one layer for matrices that share their input, stacked in this order."""
        weight, bias = self._take(names)
        return Int8Linear(weight, bias) if self._int8 else self._product(weight, bias)

    def _gated(self, *names: str) -> Product:
        """Return silu(gate) · up of two matrices."""
        weight, bias = self._take(names)
        if self._int8:
            return GatedProduct(Int8Linear(weight, bias), self.rows)
        gated = None
        if self._parts is None and self._plan(weight).kind == "native":
            gated = make_gated(weight, bias)
        return gated or GatedProduct(self._product(weight, bias), self.rows)

    def _take(self, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = self._weights.take(*(f"{name}.weight" for name in names))
        biases = [f"{name}.bias" for name in names]
        return weight, self._weights.take(*biases) if self._weights.has(biases[0]) else None

    def _product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        if self._parts is not None:
            return DeviceLinear(weight, bias, self._parts.fixed_rows)
        return make_linear(weight, bias, self._plan(weight))

    def _plan(self, weight: torch.Tensor) -> LinearPlan:
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self._plans:
            self._plans[shape] = plan_linear(*shape, weight.dtype)
        return self._plans[shape]
