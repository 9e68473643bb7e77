"""The CUDA runner of a small model with the kernels of an H100, where there is none: nothing of it can be run."""

from __future__ import annotations

import torch

from bough.kernels.attention import Attention
from bough.kernels.cuda_attention import choose_kernels
from bough.kernels.triton_rows import TritonRows
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.cuda.runner import CudaRunner
from bough.runtime.models.config import ModelConfig, RopeConfig
from bough.runtime.models.llama import DeviceParts, Llama
from bough.runtime.models.weights import expected_tensors

VOCAB_SIZE = 2112


class Zeros:
    """Weights of a shape, all 0."""

    dtype = torch.bfloat16

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._shapes = expected_tensors(config)
        self._device = device

    def has(self, name: str) -> bool:
        return name in self._shapes

    def take(self, *names: str) -> torch.Tensor:
        shape = (sum(self._shapes[name][0] for name in names), *self._shapes[names[0]][1:])
        return torch.zeros(shape, dtype=self.dtype, device=self._device)


def runner_on_an_h100(kv_dtype: torch.dtype, device: torch.device, *, cuda_graphs: bool = True) -> CudaRunner:
    """Return a runner whose tensors are on `device`, the CPU or PyTorch's "meta"; its kernels can be noted there."""
    config = ModelConfig(
        "LlamaForCausalLM", 128, 2, 8, 2, 128, 192, VOCAB_SIZE, 1e-5, RopeConfig(theta=1e4),
        True, False, False, False, False, 4096, (1,), 0, "bfloat16",
    )  # fmt: skip
    attention = Attention(8, 2, 128, "triton", True, choose_kernels(8, 2, 128, kv_dtype, (9, 0), 132))
    parts = DeviceParts(TritonRows(4096, device), None)
    model = Llama(config, Zeros(config, device), parts, device)  # type: ignore[arg-type]
    pool = KVPool(2, 600, 16, 2, 128, kv_dtype, device)
    return CudaRunner(model, pool, torch.bfloat16, device, attention=attention, cuda_graphs=cuda_graphs)
