"""How a device's memory is divided: weights, what a step needs, and the KV pool, which takes the rest. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from bough.runtime.models.config import ModelConfig
from bough.runtime.models.weights import expected_tensors
from bough.runtime.protocol import RequestError

DEFAULT_FRACTION = 0.9
_LIBRARIES_BYTES = 512 << 20  # cuBLAS's workspaces, compiled kernels and CUDA graphs


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device's memory as its driver counts them; what is not free is others'."""

    free_bytes: int
    total_bytes: int


def weight_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Return the bytes of all weights in a dtype of `element_bytes`."""
    total = 0
    for shape in expected_tensors(config).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total * element_bytes


def step_bytes(config: ModelConfig, element_bytes: int, token_budget: int, max_running: int) -> int:
    """Return what one step may need beside weights and pool: activations, logits and the sampler's copies of them."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    widest = 6 * config.hidden_size + 2 * q_size + 2 * kv_size + 3 * config.mlp_size
    logits = config.vocab_size * 4 * max(max_running, 128)  # 128 rows are scored at a time
    # The logits, the prepared ones, the float64 of those whose log-probabilities are asked for; the ids that pass.
    return token_budget * widest * element_bytes + 5 * logits + _LIBRARIES_BYTES


def pool_tokens(
    config: ModelConfig,
    memory: DeviceMemory,
    element_bytes: int,
    *,
    mem_fraction: float,
    token_budget: int,
    max_running: int,
    max_total_tokens: int | None = None,
    kv_head_bytes: int | None = None,
) -> int:
    """Return how many tokens the KV pool holds on a device of `memory`, looked at before weights are loaded.

    mem_fraction: of the device's memory that this process may use, what others use already counted in; None of
    max_total_tokens takes all that is left. kv_head_bytes: of one key of one head, if it is not in the weights' dtype.
    Raises RequestError("resource_exhausted"), with the arithmetic, if that is
    less than the tokens asked for, or than one whole context where nothing was asked for.
    """
    if not 0 < mem_fraction <= 1:
        raise RequestError(
            "invalid_request",
            f"mem_fraction must be above 0 and at most 1, got {mem_fraction}",
            field="mem_fraction",
            value=mem_fraction,
        )
    allowed = int(memory.total_bytes * mem_fraction)
    taken = memory.total_bytes - memory.free_bytes
    weights = weight_bytes(config, element_bytes)
    step = step_bytes(config, element_bytes, token_budget, max_running)
    token = 2 * config.num_layers * config.num_kv_heads * (kv_head_bytes or config.head_dim * element_bytes)
    left = allowed - taken - weights - step
    wanted = max_total_tokens if max_total_tokens is not None else config.context_len
    if left < wanted * token:
        what = "max_total_tokens" if max_total_tokens is not None else "one context"
        raise RequestError(
            "resource_exhausted",
            f"the model does not fit: {mem_fraction:g} of {_gb(memory.total_bytes)} is {_gb(allowed)}; less "
            f"{_gb(taken)} in use already, {_gb(weights)} of weights and {_gb(step)} for a step, {_gb(left)} are left, "
            f"but {what} of {wanted} tokens needs {_gb(wanted * token)} ({token} bytes each): raise mem_fraction, "
            "lower max_total_tokens or token_budget, or take a smaller dtype",
            field="mem_fraction",
            value=mem_fraction,
            left_bytes=left,
            needed_bytes=wanted * token,
        )
    return wanted if max_total_tokens is not None else left // token


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
