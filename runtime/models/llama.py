"""The Llama family (Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3) as one decoder: ragged batch, paged KV pool."""

from __future__ import annotations

import torch

from bough.kernels.attention import paged_attention, store_kv
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.inputs import StepInputs
from bough.runtime.models.config import ModelConfig
from bough.runtime.models.layers import Linear, LinearPlan, RMSNorm, gated_silu, plan_linear
from bough.runtime.models.rope import RopeTable, rotate
from bough.runtime.models.weights import Weights


class Llama:
    """The decoder: token ids -> hidden states -> logits. Holds weights only; the KV pool is the caller's."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        build = _Builder(config, weights)
        self._embedding = weights.take("model.embed_tokens.weight")
        self._layers = [build.layer(index) for index in range(config.num_layers)]
        self._norm = build.norm("model.norm")
        self._head = build.head(self._embedding)
        self._rope = RopeTable(config.rope, config.head_dim)

    def forward(self, inputs: StepInputs, pool: KVPool) -> torch.Tensor:
        """Compute the step's tokens and write their KV into the pool.

        Returns the final, normalised hidden states of the tokens `inputs.wanted`: (num_wanted, hidden_size).
        """
        x = self._embedding.index_select(0, inputs.token_ids)
        cos, sin = self._rope.lookup(inputs.positions, inputs.end_position)
        for layer, k_pages, v_pages in zip(self._layers, pool.k, pool.v, strict=True):
            x = layer.forward(x, cos, sin, inputs, k_pages, v_pages)
        return self._norm(x.index_select(0, inputs.wanted))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, vocab_size) float32 logits of hidden states (num_rows, hidden_size)."""
        return self._head(hidden).float()


class _Layer:
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        norms: tuple[RMSNorm, RMSNorm],
        qkv: Linear,
        head_norms: tuple[RMSNorm, RMSNorm] | None,
        out: Linear,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self._scale = config.head_dim**-0.5
        self._norms, self._qkv, self._head_norms = norms, qkv, head_norms
        self._out, self._gate_up, self._down = out, gate_up, down

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        inputs: StepInputs,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> torch.Tensor:
        """Return the layer's output (num_tokens, hidden_size); writes the tokens' KV into the pages."""
        q, k, v = self._project(self._norms[0](x), cos, sin)
        store_kv(k, v, k_pages, v_pages, inputs.slots)
        attended = paged_attention(q, k_pages, v_pages, inputs.attention, self._scale)
        x = x + self._out(attended.flatten(1))
        return x + self._down(gated_silu(self._gate_up(self._norms[1](x))))

    def _project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k (rotated) and v as (num_tokens, heads, head_dim)."""
        num_heads, num_kv_heads, head_dim = self._heads
        heads = self._qkv(x).view(len(x), num_heads + 2 * num_kv_heads, head_dim)
        turned, v = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if self._head_norms is not None:
            q, k = torch.split(turned, [num_heads, num_kv_heads], dim=1)
            turned = torch.cat([self._head_norms[0](q), self._head_norms[1](k)], dim=1)
        q, k = torch.split(rotate(turned, cos, sin), [num_heads, num_kv_heads], dim=1)
        return q.contiguous(), k, v


class _Builder:
    """Makes a model's parts from its weights; matrices of one shape share the plan that was found for the first."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        self._weights = weights
        self._plans: dict[tuple[int, int], LinearPlan] = {}

    def layer(self, index: int) -> _Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        has_head_norms = self._config.qk_norm
        return _Layer(
            self._config,
            (self.norm(f"{prefix}input_layernorm"), self.norm(f"{prefix}post_attention_layernorm")),
            self._linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            (self.norm(f"{attention}q_norm"), self.norm(f"{attention}k_norm")) if has_head_norms else None,
            self._linear(f"{attention}o_proj"),
            self._linear(f"{mlp}gate_proj", f"{mlp}up_proj"),
            self._linear(f"{mlp}down_proj"),
        )

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._weights.take(f"{name}.weight"), self._config.rms_eps)

    def head(self, embedding: torch.Tensor) -> Linear:
        weight = embedding if self._config.tie_embeddings else self._weights.take("lm_head.weight")
        return Linear(weight, None, self._plan(weight))

    def _linear(self, *names: str) -> Linear:
        """Return one layer for matrices that share their input, stacked in this order."""
        weight = self._weights.take(*(f"{name}.weight" for name in names))
        biases = [f"{name}.bias" for name in names]
        bias = self._weights.take(*biases) if self._weights.has(biases[0]) else None
        return Linear(weight, bias, self._plan(weight))

    def _plan(self, weight: torch.Tensor) -> LinearPlan:
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self._plans:
            self._plans[shape] = plan_linear(*shape, weight.dtype)
        return self._plans[shape]
