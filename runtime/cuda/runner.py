"""`CudaRunner`: executes batches on a GPU, and how one is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from bough.kernels.attention import Attention
from bough.kernels.paged_kv import QUANTISED_DTYPES
from bough.kernels.triton_rows import TritonRows
from bough.runtime import sampler
from bough.runtime.batch import Batch, Row, SampleRequest
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.cuda.memory import DEFAULT_FRACTION, DeviceMemory, pool_tokens
from bough.runtime.cuda.sampler import sample
from bough.runtime.cuda.step import GRAPH_SIZES, EagerSteps, GraphSteps
from bough.runtime.inputs import StepInputs
from bough.runtime.models.config import ModelConfig
from bough.runtime.models.llama import DeviceParts, Llama
from bough.runtime.models.weights import OnProgress, Weights
from bough.runtime.protocol import RequestError, SamplingParams
from bough.runtime.runner import Runner, attention_of

log = logging.getLogger(__name__)

_MOST_STEP_TOKENS: Final = 131_072
_FIXED_ROWS: Final = 128  # rows of every product in exact mode
_EXACT_SPLIT: Final = 512  # positions whose partial sums are merged in exact mode


class CudaRunner(Runner):
    """Executes batches on one GPU: small steps as CUDA graphs, others kernel by kernel; draws tokens there.

    What a step needs of the host is planned in numpy and brought over in one copy; back come the tokens, in one more.
    Arguments as `Runner`'s; attention must be a GPU's. cuda_graphs: whether steps are captured. max_running: up to how
    many sequences `warm_up` captures steps.

    A seam for planning step k + 1 while step k runs: `execute` waits for the device in one place, where the sampler
    copies the tokens back. All before it only enqueues. To overlap, the scheduler would have to plan a step whose
    decode rows have token ids that are still on the device (their count and positions are known, their values are not
    needed to plan), and to commit one step late, with text, stops and grammars a step behind.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool = False,
        attention: Attention,
        cuda_graphs: bool = True,
        max_running: int = 0,
    ) -> None:
        super().__init__(model, pool, dtype, device, exact=exact, attention=attention)
        self._max_running = max_running

        def forward(inputs: StepInputs) -> torch.Tensor:
            return self.model.forward(inputs, self.pool)

        self._eager = EagerSteps(forward, attention, device)
        end, page_size = self.context_len, self.page_size
        self.graphs = GraphSteps(forward, attention, device, end, page_size) if cuda_graphs else None

    def warm_up(self) -> None:
        """As `Runner.warm_up`; and compile what only longer prompts need, and capture decodes of up to max_running.

        Writes the slots of the first pages.
        """
        super().warm_up()
        assert self.attention.kernels is not None
        longest = self.attention.kernels.max_extend_tokens + 1  # in tiles; one token less as rows of an item
        pages = np.arange(-(-longest // self.page_size), dtype=np.int32)
        if longest <= self.context_len and len(pages) <= self.num_pages:
            rows = (Row(np.zeros(count, dtype=np.int32), 0, pages) for count in {longest, max(1, longest - 1)})
            self.execute(Batch(tuple(rows)))
        if self.graphs is not None and self.device == "cuda":
            one, none = np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.int32)
            row = Row(one, 0, pages[:1], SampleRequest(SamplingParams(temperature=0.0), 0, 1, one, none, ()))
            for size in (size for size in GRAPH_SIZES if size <= self._max_running):
                self.execute(Batch((row,) * size))  # all write the same keys and values

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        if self.graphs is not None and self.graphs.serves(inputs):
            return self.graphs.run(inputs)
        return self._eager.run(inputs)

    def _draw(self, logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[sampler.Draw]:
        return sample(logits, requests, self._masks)


def load_cuda_runner(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    page_size: int,
    num_pages: int | None,
    max_total_tokens: int | None,
    on_progress: OnProgress | None,
    *,
    exact: bool,
    share_prefixes: bool,
    mem_fraction: float | None,
    token_budget: int,
    max_running: int,
    cuda_graphs: bool,
) -> CudaRunner:
    """Return the runner of a checkpoint on a GPU; arguments and errors as `runner.load_runner`'s."""
    if device.type == "cuda":
        torch.cuda.set_device(
            device
        )  # of this thread: Triton, graphs and events take the current device, not a tensor's
        check_kv_dtype(kv_dtype, torch.cuda.get_device_capability(device))
    split = _EXACT_SPLIT if exact else None
    attention = attention_of(config, kv_dtype, device, "triton", share=share_prefixes, exact_split=split)
    if num_pages is None:
        tokens = pool_tokens(
            config,
            memory_of(device),
            dtype.itemsize,
            mem_fraction=DEFAULT_FRACTION if mem_fraction is None else mem_fraction,
            token_budget=token_budget,
            max_running=max_running,
            kv_head_bytes=config.head_dim * kv_dtype.itemsize + (4 if kv_dtype in QUANTISED_DTYPES else 0),
            max_total_tokens=_asked(max_total_tokens, config, device),
        )
        num_pages = -(-tokens // page_size) if max_total_tokens is not None else tokens // page_size
    begin = time.perf_counter()
    parts = DeviceParts(TritonRows(_MOST_STEP_TOKENS, device), _FIXED_ROWS if exact else None)
    with torch.inference_mode(), Weights(folder, config, dtype, on_progress, device) as weights:
        model = Llama(config, weights, parts, device)
    pool = KVPool(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, kv_dtype, device)
    log.info(
        "loaded %s (%s, %s) on %s in %.1f s; %d pages of %d tokens, %.0f MB",
        *(folder, config.architecture, dtype, device, time.perf_counter() - begin, num_pages, page_size),
        num_pages * pool.bytes_per_page / 1e6,
    )
    return CudaRunner(
        model,
        pool,
        dtype,
        device,
        exact=exact,
        attention=attention,
        cuda_graphs=cuda_graphs,
        max_running=max_running,
    )


def check_kv_dtype(kv_dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Raise RequestError("invalid_request") if a device of this compute capability cannot read keys of `kv_dtype`."""
    if kv_dtype == torch.float8_e4m3fn and capability < (8, 9):
        major, minor = capability
        message = f"kv_dtype='fp8' needs compute capability 8.9, the device has {major}.{minor}: take int8"
        raise RequestError("invalid_request", message, field="kv_dtype", value="fp8")


def memory_of(device: torch.device) -> DeviceMemory:
    """Return a device's memory; on a CPU, where kernels are interpreted, an imagined GPU's of 16 GB."""
    if device.type != "cuda":
        return DeviceMemory(16 << 30, 16 << 30)
    return DeviceMemory(*torch.cuda.mem_get_info(device))


def _asked(tokens: int | None, config: ModelConfig, device: torch.device) -> int | None:
    """Return the tokens asked for; where kernels are interpreted, few unless asked: nobody waits for more."""
    if tokens is not None and tokens < 1:
        raise RequestError(
            "invalid_request", f"max_total_tokens must be at least 1, got {tokens}", field="max_total_tokens"
        )
    return 64 * config.context_len if tokens is None and device.type != "cuda" else tokens
