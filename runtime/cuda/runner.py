"""`CudaRunner`: executes batches on a GPU, and how one is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from bough.kernels.attention import Attention
from bough.kernels.calibration import calibrate
from bough.kernels.paged_kv import QUANTISED_DTYPES
from bough.kernels.triton_rows import TritonRows
from bough.runtime.batch import Batch, Row, RowResult, SampleRequest
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.cuda.memory import DEFAULT_FRACTION, DeviceMemory, pool_tokens
from bough.runtime.cuda.sampler import Drawing, Scoring, begin, begin_scores
from bough.runtime.cuda.step import GRAPH_SIZES, Carried, EagerSteps, GraphSteps
from bough.runtime.inputs import StepInputs, build_inputs
from bough.runtime.models.config import ModelConfig
from bough.runtime.models.llama import DeviceParts, Llama
from bough.runtime.models.weights import OnProgress, Weights
from bough.runtime.protocol import RequestError, SamplingParams
from bough.runtime.runner import Runner, attention_of, row_result, score_chunks, split_scores
from bough.runtime.sampler import Draw

log = logging.getLogger(__name__)

_MOST_STEP_TOKENS: Final = 131_072
_FIXED_ROWS: Final = 128  # rows of every product in exact mode
_EXACT_SPLIT: Final = 512  # positions whose partial sums are merged in exact mode


class CudaRunner(Runner):
    """Executes batches on one GPU: small steps as CUDA graphs, others kernel by kernel; draws tokens there.

    What a step needs of the host is planned in numpy and brought over in one copy; back come the tokens, in one more.
    Arguments as `Runner`'s; attention must be a GPU's. cuda_graphs: whether steps are captured. max_running: up to how
    many sequences `warm_up` captures steps.

    `launch` only enqueues, so that the next step can be planned and launched while this one runs: rows may go on from
    tokens that are still on the device (`Row.drawn_by`), where they are copied into the next step's inputs. All runs in
    one stream, in the order of launches: the buffers of a step's inputs, and a graph's result, are written again only
    behind what reads them. Host memory that is copied from has two places and an event for each.
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

    def execute(self, batch: Batch) -> list[RowResult]:
        """As `Runner.execute`: launch a step and wait for it."""
        return self.launch(batch).result()

    @torch.inference_mode()
    def launch(self, batch: Batch, previous: CudaStep | None = None) -> CudaStep:
        """Have a step computed after all that were launched before, without waiting for it.

        previous: the step launched last, from whose tokens rows may go on. The batch is read in this call only.
        """
        self.pool.copy_pages(batch.copies)
        if not batch.rows:
            return CudaStep(batch, ())
        inputs = build_inputs(batch, self.page_size, self.attention.plan, token_by_token=self._token_by_token)
        hidden = self._run(inputs, None if previous is None else previous.carried_to(batch))
        num_draws = len(inputs.sample_rows)
        requests = [request for row in batch.rows for request in row.draws()]
        drawing = begin(self.model.logits(hidden[:num_draws]), requests, self._masks) if requests else None
        scores = self._begin_scores(hidden[num_draws:], batch, inputs)
        return CudaStep(batch, inputs.sample_rows, drawing, inputs.score_rows, scores)

    def _run(self, inputs: StepInputs, carried: Carried | None) -> torch.Tensor:
        if self.graphs is not None and self.graphs.serves(inputs):
            return self.graphs.run(inputs, carried)
        return self._eager.run(inputs, carried)

    def _begin_scores(self, hidden: torch.Tensor, batch: Batch, inputs: StepInputs) -> list[Scoring]:
        ids = [ids for i in inputs.score_rows if (ids := batch.rows[i].score_ids) is not None]
        parts: list[Scoring] = []
        for chunk in score_chunks(len(hidden), inputs.score_hidden) if ids else ():
            logits = self.model.logits(hidden[chunk.hidden])
            parts.append(begin_scores(logits, np.concatenate(ids)[chunk.scores], chunk.rows))
        return parts


class CudaStep:
    """A step that was launched: its draws and scores are on their way to the host."""

    def __init__(
        self,
        batch: Batch,
        sample_rows: tuple[int, ...],
        drawing: Drawing | None = None,
        score_rows: tuple[int, ...] = (),
        scores: Sequence[Scoring] = (),
    ) -> None:
        self._rows = batch.rows
        self._sample_rows = sample_rows
        self._drawing = drawing
        self._score_rows = score_rows
        self._scores = scores

    def carried_to(self, batch: Batch) -> Carried | None:
        """Return which tokens of the next step are drawn here."""
        ends = np.cumsum([len(row.token_ids) for row in batch.rows]) - 1
        index = {row: draw for draw, row in enumerate(self._sample_rows)}
        pairs = [
            (end, index[row.drawn_by]) for end, row in zip(ends, batch.rows, strict=True) if row.drawn_by is not None
        ]
        if not pairs:
            return None
        assert self._drawing is not None, "a step that draws nothing is followed by no row of its tokens"
        at, source = np.array(pairs, dtype=np.int32).T
        return Carried(at, source, self._drawing.tokens)

    def result(self) -> list[RowResult]:
        """Wait for the step; one result per row. Raises FloatingPointError if a row's logits are not finite."""
        draws: dict[int, list[Draw]] = {}
        for row, draw in zip(self._sample_rows, self._drawing.result() if self._drawing else (), strict=True):
            draws.setdefault(row, []).append(draw)
        scores = split_scores(self._rows, self._score_rows, [part.result() for part in self._scores])
        return [row_result(row, draws.get(i), scores.get(i)) for i, row in enumerate(self._rows)]


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
        # Of this thread: Triton, graphs and events take the current device, not that of a tensor.
        torch.cuda.set_device(device)
        check_kv_dtype(kv_dtype, torch.cuda.get_device_capability(device))
    split = _EXACT_SPLIT if exact else None
    attention = attention_of(
        config, dtype, device, "triton", share=share_prefixes, exact_split=split, kv_dtype=kv_dtype
    )
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
        attention=_calibrated(attention, pool, dtype),
        cuda_graphs=cuda_graphs,
        max_running=max_running,
    )


def _calibrated(attention: Attention, pool: KVPool, dtype: torch.dtype) -> Attention:
    """Return the attention with the costs of this device, which plans, and so captured steps, depend on."""
    kernels = attention.kernels
    assert kernels is not None
    costs = calibrate(kernels, pool.layers[0], dtype)
    return replace(attention, kernels=replace(kernels, options=replace(kernels.options, costs=costs)))


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
