"""int8 keys and values, and int8 weights: what they take and change, and that nobody mistakes one for another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import logits, random_ids, texts, tiny_model

import bough as bo
from bough.runtime.batch import PageCopy
from bough.runtime.models.layers import Int8Linear, Int8Product, _int8_exact, _int8_onednn, _int8_torch
from bough.runtime.protocol import RequestError
from bough.runtime.runner import Runner, load_runner

PAGE_SIZE = 8


def runner(kv_dtype: str | None = None, weights: str | None = None) -> Runner:
    folder = tiny_model("qwen3")
    return load_runner(folder, dtype="float32", page_size=PAGE_SIZE, num_pages=120, kv_dtype=kv_dtype, weights=weights)


def test_a_token_takes_a_byte_a_channel_and_a_float_a_head() -> None:
    quantised, plain = runner(kv_dtype="int8"), runner()
    layers, kv_heads, head_dim = 3, 2, 32
    assert quantised.pool.bytes_per_page == PAGE_SIZE * 2 * layers * kv_heads * (head_dim + 4)
    assert plain.pool.bytes_per_page == PAGE_SIZE * 2 * layers * kv_heads * head_dim * 4
    assert (quantised.kv_dtype, plain.kv_dtype) == ("int8", "float32")


def test_logits_are_near_those_of_float_pages_and_not_the_same() -> None:
    ids = random_ids(120, seed=3)
    found = []
    for device in (runner(), runner(kv_dtype="int8")):
        (text,) = texts(device, [ids])
        found.append(logits(device, text.row(PAGE_SIZE)))
    exact, quantised = found
    error = (quantised - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.02


def test_copies_of_pages_take_their_scales_along() -> None:
    device = runner(kv_dtype="int8")
    stem, tail = random_ids(21, seed=2), random_ids(9, seed=4)
    whole, parent, own = texts(device, [np.concatenate([stem, tail]), stem, tail])
    expected = logits(device, whole.row(PAGE_SIZE))[21:]
    logits(device, parent.row(PAGE_SIZE))
    device.pool.poison(own.pages.tolist())
    device.pool.copy_pages([PageCopy(int(parent.pages[2]), int(own.pages[0]), 5)])
    whole.pages, whole.done = np.concatenate([parent.pages[:2], own.pages[:2]]), 21
    assert torch.equal(logits(device, whole.row(PAGE_SIZE)), expected)


@pytest.mark.parametrize("make", [_int8_onednn, _int8_torch])
def test_int8_products_are_the_definition_at_the_largest_sums(make: Int8Product) -> None:
    x, weight = torch.full((3, 200), 255, dtype=torch.uint8), torch.full((40, 200), -127, dtype=torch.int8)
    x[1], weight[3:] = 1, 127
    scales = torch.arange(1.0, 41)
    try:
        found = make(weight, scales)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip("not on this machine")
    torch.testing.assert_close(found, _int8_exact(weight, scales)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_size", "in_size"), [(96, 64), (70, 192), (512, 1408)])
def test_an_int8_layer_is_near_the_float_one_and_the_same_for_a_row_in_any_batch(
    out_size: int, in_size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, in_size, generator=generator).to(dtype) for n in (600, out_size))
    bias = torch.randn(out_size, generator=generator).to(dtype)
    x[5] = 0
    layer = Int8Linear(weight, bias)
    whole, exact = layer(x), x.double() @ weight.double().T + bias.double()
    assert (whole.double() - exact).square().mean().sqrt() < 0.02 * exact.std()
    assert torch.equal(whole[5], bias)
    for count in (1, 2, 7, 33, 512):
        assert torch.equal(layer(x[-count:]), whole[-count:])
    x[3, 1] = torch.nan
    assert layer(x)[3].isnan().all()


def test_int8_weights_change_logits_a_little() -> None:
    found = []
    for device in (runner(), runner(weights="int8")):
        (text,) = texts(device, [random_ids(120, seed=3)])
        found.append(logits(device, text.row(PAGE_SIZE)))
    assert 0 < (found[1] - found[0]).square().mean().sqrt() / found[0].std() < 0.06


@pytest.mark.parametrize("name", ["int4", "float8", ""])
def test_an_unknown_type_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"kv_dtype must be one of auto, int8, fp8, got '{name}'"):
        runner(kv_dtype=name)
    with pytest.raises(bo.InvalidRequest, match="kv_dtype must be one of auto, int8, fp8"):
        bo.Runtime(kv_dtype=name)
    with pytest.raises(RequestError, match=f"weights must be one of auto, int8, got '{name}'"):
        runner(weights=name)
    with pytest.raises(bo.InvalidRequest, match="weights must be one of auto, int8"):
        bo.Runtime(weights=name)


def test_fp8_keys_are_refused_on_a_cpu_by_name() -> None:
    with pytest.raises(RequestError, match=r"kv_dtype='fp8' is for GPUs .*, not the CPU: take int8") as caught:
        runner(kv_dtype="fp8")
    assert (caught.value.kind, caught.value.details["field"]) == ("invalid_request", "kv_dtype")
    with pytest.raises(bo.InvalidRequest, match="kv_dtype='fp8' is for GPUs"):
        bo.Runtime(kv_dtype="fp8")


def test_int8_weights_are_refused_on_a_gpu_by_name() -> None:
    with pytest.raises(RequestError, match="weights='int8' is the CPU's so far, not a GPU's") as caught:
        load_runner(tiny_model("qwen3"), attention="triton", weights="int8")
    assert caught.value.kind == "invalid_request"


def test_the_bundled_model_says_the_same_in_int8_and_its_runtime_tells() -> None:
    """17 of 20 sums at least: where two answers are almost equally likely the last bits decide."""

    @bo.function
    def add(s: bo.State, a: int, b: int) -> None:
        s += bo.user(f"What is {a} + {b}?")
        s += bo.assistant(bo.gen("sum", max_tokens=16, temperature=0))

    questions = [{"a": 7 + 3 * i, "b": 91 - 4 * i} for i in range(20)]
    said = []
    for kind in (None, "int8"):
        with bo.Runtime(kv_dtype=kind, weights=kind, max_total_tokens=4096) as runtime:
            info = runtime.server_info()
            assert {info["kv_dtype"], info["weights"]} == {kind or info["dtype"]}
            said.append([state["sum"] for state in add.run_batch(questions, backend=runtime)])
    assert len(set(said[0])) > 10
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 17
