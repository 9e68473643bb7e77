"""Rotary position embedding: the frequencies of each scaling rule, and cos/sin tables that grow with the positions."""

from __future__ import annotations

import math

import torch

from bough.runtime.models.config import RopeConfig

_GROWTH = 4096  # positions added at a time


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return (head_dim / 2,) float32 radians per position, as transformers computes them (modeling_rope_utils)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.rope_type:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, head_dim)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, interpolate between."""
    wavelength = 2 * math.pi / plain
    longest_kept = rope.original_context_len / rope.high_freq_factor
    shortest_stretched = rope.original_context_len / rope.low_freq_factor
    stretched = torch.where(wavelength > shortest_stretched, plain / rope.factor, plain)
    smooth = (rope.original_context_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    return torch.where((wavelength >= longest_kept) & (wavelength <= shortest_stretched), between, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Interpolate channels that turn less than beta_slow times over the trained context, keep those above beta_fast."""

    def channel(turns: float) -> float:
        return head_dim * math.log(rope.original_context_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # no division by zero
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return (1.0 / (rope.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


class RopeTable:
    """cos and sin of position times frequency, float32, made in whole pieces of 4,096 positions as they are needed.

    The angle is the float32 product that transformers uses; its cos and sin are taken in float64, so that the rounded
    value does not depend on how many positions were computed in one call.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | None = None) -> None:
        self._device = device
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._scale = rope.attention_factor
        self._cos = self._sin = torch.empty(0, head_dim // 2, device=device)

    def lookup(self, positions: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each (num_tokens, head_dim / 2) float32, of int64 `positions`, all below `end`."""
        self.reserve(end)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def reserve(self, end: int) -> None:
        """Make the tables for all positions below `end`; they do not move before a higher one is asked for."""
        if end > len(self._cos):
            self._grow(-(-end // _GROWTH) * _GROWTH)

    def _grow(self, end: int) -> None:
        positions = torch.arange(len(self._cos), end, dtype=torch.float32)
        angles = torch.outer(positions, self._frequencies).double()
        self._cos = torch.cat([self._cos, (angles.cos().float() * self._scale).to(self._device)])
        self._sin = torch.cat([self._sin, (angles.sin().float() * self._scale).to(self._device)])
