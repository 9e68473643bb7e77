"""How a GPU's memory is divided: the arithmetic, and what is said when a model does not fit."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model

from bough.runtime.cuda.memory import DeviceMemory, pool_tokens, step_bytes, weight_bytes
from bough.runtime.models.config import ModelConfig
from bough.runtime.protocol import RequestError

GB = 1 << 30
STEP = {"token_budget": 1024, "max_running": 64}


def config() -> ModelConfig:
    return ModelConfig.from_folder(tiny_model())


def test_the_pool_takes_what_weights_steps_and_others_leave_of_the_fraction() -> None:
    tokens = pool_tokens(config(), DeviceMemory(6 * GB, 8 * GB), 2, mem_fraction=0.75, **STEP)
    left = 6 * GB - 2 * GB - weight_bytes(config(), 2) - step_bytes(config(), 2, 1024, 64)
    token = 2 * config().num_layers * config().num_kv_heads * config().head_dim * 2
    assert tokens == left // token
    assert pool_tokens(config(), DeviceMemory(6 * GB, 8 * GB), 2, mem_fraction=0.75, max_total_tokens=77, **STEP) == 77


def test_weights_are_counted_as_the_checkpoint_holds_them() -> None:
    from safetensors import safe_open

    with safe_open(tiny_model() / "model.safetensors", framework="np") as file:
        count = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert weight_bytes(config(), 2) == 2 * count


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    memory = DeviceMemory(GB, GB)
    with pytest.raises(RequestError, match=r"does not fit: 0.5 of 1.07 GB is 0.54 GB; less 0.00 GB in use") as caught:
        pool_tokens(config(), memory, 2, mem_fraction=0.5, max_total_tokens=10**9, **STEP)
    assert caught.value.kind == "resource_exhausted"
    assert caught.value.details["field"] == "mem_fraction"
    with pytest.raises(RequestError, match="one context of 256 tokens needs"):
        pool_tokens(config(), memory, 2, mem_fraction=0.1, **STEP)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_a_fraction_out_of_range_is_named(fraction: float) -> None:
    with pytest.raises(RequestError, match=f"mem_fraction must be above 0 and at most 1, got {fraction}"):
        pool_tokens(config(), DeviceMemory(GB, GB), 2, mem_fraction=fraction, **STEP)
