"""A step's way to a GPU, in plain Python: buffers that grow, padding, what is uploaded together, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("triton")

from bough.kernels.attention import choose_attention
from bough.runtime.batch import Batch, PageCopy, Row
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.cuda import step
from bough.runtime.cuda.runner import check_kv_dtype
from bough.runtime.cuda.sampler import upload
from bough.runtime.inputs import StepInputs, build_inputs
from bough.runtime.protocol import RequestError

CPU = torch.device("cpu")


def test_what_is_uploaded_together_is_aligned_alike_whatever_its_lengths() -> None:
    """Triton compiles a kernel for pointers that are multiples of 16 and another for those that are not."""
    for rows in range(1, 20):
        arrays: list[npt.NDArray[Any]] = [
            np.arange(rows, dtype=np.float64), np.arange(rows, dtype=np.float32), np.arange(7, dtype=np.int32),
            np.zeros(0, dtype=np.int32), np.arange(rows, dtype=np.float64),
        ]  # fmt: skip
        there = upload(arrays, CPU)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in there)
        for tensor, array in zip(there, arrays, strict=True):
            assert tensor.tolist() == array.tolist()


class Recorder:
    """A forward pass that notes what it was given."""

    def __init__(self) -> None:
        self.given: list[StepInputs] = []

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        self.given.append(inputs)
        return torch.arange(len(inputs.token_ids), dtype=torch.float32).unsqueeze(1)


def decode_of(width: int, context: int) -> Batch:
    pages = -(-context // 16)
    token = np.array([3], dtype=np.int32)
    return Batch(
        tuple(Row(token, context - 1, np.arange(i * pages, (i + 1) * pages, dtype=np.int32)) for i in range(width))
    )


def test_captured_steps_pad_without_writing_and_are_captured_anew_when_buffers_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs of moved buffers are dropped, and so is their memory pool: PyTorch takes none that has lost its graphs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a CPU may plan for an imagined GPU
    pools: list[object] = []
    used: list[object] = []

    def memory_pool(device: torch.device) -> object:
        pools.append(object())
        return pools[-1]

    def capture(work: Callable[[], torch.Tensor], device: torch.device, pool: object) -> Callable[[], torch.Tensor]:
        used.append(pool)
        return work

    monkeypatch.setattr(step, "_memory_pool", memory_pool)
    monkeypatch.setattr(step, "_capture", capture)
    attention = choose_attention(4, 2, 16, torch.float32, CPU, "triton")
    forward = Recorder()
    steps = step.GraphSteps(forward, attention, CPU, 4096, 16)

    def run(width: int, context: int) -> torch.Tensor:
        inputs = build_inputs(decode_of(width, context), 16, attention.plan)
        assert steps.serves(inputs)
        return steps.run(inputs)

    for _ in range(2):
        run(3, 100)
    assert (steps.num_graphs, steps.num_replays, used) == (1, 1, pools[:1])
    padded = forward.given[-1]
    assert padded.slots.tolist()[3:] == [-1], "a row of padding would write keys"
    assert padded.positions.tolist() == [99, 99, 99, 0]
    moved = padded.slots.data_ptr()
    run(256, 257 * 16)  # more pages than there was room for
    assert steps.num_graphs == 1
    assert len(pools) == 2
    assert used == pools
    assert forward.given[-1].slots.data_ptr() != moved
    run(3, 100)
    assert steps.num_graphs == 2
    assert used[-1] is pools[-1]


def test_fp8_keys_need_a_device_that_has_them() -> None:
    check_kv_dtype(torch.float8_e4m3fn, (8, 9))
    check_kv_dtype(torch.int8, (8, 0))
    with pytest.raises(
        RequestError, match=r"kv_dtype='fp8' needs compute capability 8.9, the device has 8.0"
    ) as caught:
        check_kv_dtype(torch.float8_e4m3fn, (8, 0))
    assert (caught.value.kind, caught.value.details["field"]) == ("invalid_request", "kv_dtype")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_pages_of_every_dtype_are_copied_with_their_scales(dtype: torch.dtype) -> None:
    pool = KVPool(2, 4, 8, 3, 16, dtype, CPU)
    pool.poison([3])
    for layer, kv in enumerate(pool.layers):
        source = torch.randn(8, 3, 16, generator=torch.Generator().manual_seed(layer)).mul(20).to(dtype)
        for pages, scales in ((kv.k, kv.k_scales), (kv.v, kv.v_scales)):
            pages[1] = source
            if scales is not None:
                scales[1] = layer + 1.5
    pool.copy_pages([PageCopy(1, 3, 5)])
    for kv in pool.layers:
        for pages, scales in ((kv.k, kv.k_scales), (kv.v, kv.v_scales)):
            assert torch.equal(pages[3, :5].float(), pages[1, :5].float())
            assert scales is None or torch.equal(scales[3, :5], scales[1, :5])
            rest = (pages if scales is None else scales)[3, 5:]
            assert bool(rest.float().isnan().all())
