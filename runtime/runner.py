"""`Runner`: owns the device, the model and the KV pool; executes a batch.

The runner knows nothing of sequences: it receives plain arrays and returns plain values, rows in the order given.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.attention import Attention, Implementation, choose_attention
from bough.kernels.paged_kv import QUANTISED_DTYPES
from bough.runtime import sampler
from bough.runtime.batch import Batch, Row, RowResult, SampleRequest
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.grammar.masks import Masks
from bough.runtime.inputs import StepInputs, build_inputs
from bough.runtime.models.config import ModelConfig
from bough.runtime.models.llama import Llama
from bough.runtime.models.weights import OnProgress, Weights
from bough.runtime.protocol import RequestError, SamplingParams

log = logging.getLogger(__name__)

_SCORE_ROWS = 128  # logits are made for this many scored tokens at a time: 128 rows of 128k words are 64 MB
_MOST_TOKENS = 131_072
_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
_DEVICE_DTYPES = {**_DTYPES, "float16": "float16", "fp16": "float16"}


class Runner:
    """Executes batches on one device.

    config: the model's. num_pages, page_size: of the pool. vocab_size, context_len: the model's limits. dtype, device:
    names, such as "bfloat16" and "cpu"; kv_dtype, weights: likewise. model, pool: the parts, for tests and tools;
    only `execute` writes the pool.
    exact: what was drawn and is computed again (after its KV was evicted, or in a new runtime) has the same bits.
    Native attention gives that anyway; otherwise prefill then attends as decode does, token by token.
    """

    def __init__(
        self,
        model: Llama,
        pool: KVPool,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool = False,
        attention: Attention | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.num_pages = pool.num_pages
        self.page_size = pool.page_size
        self.vocab_size = model.config.vocab_size
        self.context_len = model.config.context_len
        self.dtype = str(dtype).removeprefix("torch.")
        self.kv_dtype = str(pool.dtype).removeprefix("torch.")
        self.weights = "int8" if model.int8 else self.dtype
        self.device = device.type
        self.model = model
        self.pool = pool
        self.attention = attention or attention_of(model.config, dtype, device)
        self.exact = exact or self.attention.implementation == "native"
        self._token_by_token = exact and self.attention.implementation != "native"
        self._masks = Masks()

    def figures(self) -> dict[str, int | float | str]:
        """Return what is known of the device, for the runtime's stats: what its planner counts with."""
        kernels = self.attention.kernels
        return {} if kernels is None else kernels.options.costs.figures()

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[RowResult]:
        """Carry out the copies, compute all rows in one forward pass, sample and score.

        Returns one result per row, in order. Raises FloatingPointError if a row's logits are not finite.
        """
        self.pool.copy_pages(batch.copies)
        if not batch.rows:
            return []
        inputs = build_inputs(
            batch, self.page_size, self.attention.plan, self.attention.narrow, token_by_token=self._token_by_token
        )
        hidden = self._forward(inputs)
        if inputs.is_decode:
            requests = [row.sample for row in batch.rows if row.sample is not None]
            return list(map(_drawn, self._drawn_tokens(hidden, requests)))
        draws = self._sample(hidden[: len(inputs.sample_rows)], batch, inputs)
        scores = self._score(hidden[len(inputs.sample_rows) :], batch, inputs)
        return [row_result(row, draws.get(i), scores.get(i)) for i, row in enumerate(batch.rows)]

    def warm_up(self) -> None:
        """Run a small prefill, a decode step and a score with every option of the sampler.

        The first request then does not pay for first calls, and no library imports anything later on.

        Writes the slots of the first page; call it before any page is in use.
        """
        count = min(self.page_size, self.context_len)
        tokens, page, none = np.zeros(count, dtype=np.int32), np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.int32)
        every_option = SamplingParams(
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            frequency_penalty=0.1,
            repetition_penalty=1.1,
            logit_bias={0: 1.0},
            logprobs=1,
        )
        prefill = SampleRequest(SamplingParams(), 0, count, generated=none, prompt=none, forbidden=())
        decode = SampleRequest(every_option, 0, count, generated=tokens[:1], prompt=tokens, forbidden=(1,))
        self.execute(Batch((Row(tokens, 0, page, prefill),)))
        self.execute(Batch((Row(tokens[:1], count - 1, page, decode),)))
        self.execute(Batch((Row(tokens[:1], 0, page, None, score_ids=tokens[:1], score_at=tokens[:1]),)))

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Return the hidden states of the tokens wanted: (num_wanted, hidden_size)."""
        return self.model.forward(inputs, self.pool)

    def _draw(self, logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[sampler.Draw]:
        return sampler.sample(logits, requests, self._masks)

    def _sample(self, hidden: torch.Tensor, batch: Batch, inputs: StepInputs) -> dict[int, list[sampler.Draw]]:
        draws: dict[int, list[sampler.Draw]] = {}
        requests = [request for row in batch.rows for request in row.draws()]
        for i, draw in zip(inputs.sample_rows, self._drawn_tokens(hidden, requests), strict=True):
            draws.setdefault(i, []).append(draw)
        return draws

    def _drawn_tokens(self, hidden: torch.Tensor, requests: Sequence[SampleRequest]) -> list[sampler.Draw]:
        """Return the draw of each row of hidden (num_requests, hidden_size)."""
        if not requests:
            return []
        if all(map(sampler.is_greedy, requests)):
            return sampler.greedy(self.model.raw_logits(hidden))
        return self._draw(self.model.logits(hidden), requests)

    def _score(self, hidden: torch.Tensor, batch: Batch, inputs: StepInputs) -> dict[int, npt.NDArray[np.float64]]:
        ids = [ids for i in inputs.score_rows if (ids := batch.rows[i].score_ids) is not None]
        if not ids:
            return {}
        joined = np.concatenate(ids)
        parts = []
        for chunk in score_chunks(len(hidden), inputs.score_hidden):
            logits = self.model.logits(hidden[chunk.hidden])
            parts.append(sampler.score(logits, joined[chunk.scores], chunk.rows))
        return split_scores(batch.rows, inputs.score_rows, parts)


class ScoreChunk(NamedTuple):
    """Hidden states whose logits are made together, which scores are read from them, and from which row of them each.

    rows: (number of these scores,) int64.
    """

    hidden: slice
    scores: slice
    rows: npt.NDArray[np.int64]


def score_chunks(num_hidden: int, score_hidden: npt.NDArray[np.int64]) -> Iterator[ScoreChunk]:
    """Cut `num_hidden` hidden states that are for scores into chunks; score_hidden: see `StepInputs`."""
    for at in range(0, num_hidden, _SCORE_ROWS):
        first, last = np.searchsorted(score_hidden, (at, at + _SCORE_ROWS))
        yield ScoreChunk(slice(at, at + _SCORE_ROWS), slice(first, last), score_hidden[first:last] - at)


def split_scores(
    rows: Sequence[Row], score_rows: Sequence[int], parts: Sequence[npt.NDArray[np.float64]]
) -> dict[int, npt.NDArray[np.float64]]:
    """Return the scores of each of `score_rows`; parts: of all of them, after one another."""
    if not parts:
        return {}
    ends = np.cumsum([len(ids) for i in score_rows if (ids := rows[i].score_ids) is not None])
    return dict(zip(score_rows, np.split(np.concatenate(parts), ends[:-1]), strict=True))


def row_result(row: Row, draws: list[sampler.Draw] | None, scores: npt.NDArray[np.float64] | None) -> RowResult:
    """Return a row's result: its draws as far as a draft came true, and its scores."""
    if scores is None and row.score_ids is not None:
        scores = np.zeros(0)
    if draws is None:
        return RowResult(score_logprobs=scores)
    if not row.draft:
        return _drawn(draws[0], scores)
    drafted = row.token_ids[len(row.token_ids) - row.draft :].tolist()
    num_true = next((i for i, token in enumerate(drafted) if draws[i].token != token), row.draft)
    further = tuple(_drawn(draw) for draw in draws[1 : 1 + num_true])
    return _drawn(draws[0], scores, further)


def _drawn(
    draw: sampler.Draw, scores: npt.NDArray[np.float64] | None = None, further: tuple[RowResult, ...] = ()
) -> RowResult:
    return RowResult(draw.token, draw.logprob, draw.top, scores, draw.entropy, further)


def attention_of(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    implementation: Implementation | None = None,
    *,
    share: bool = True,
    exact_split: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Attention:
    """Return the attention of a model; arguments as in `choose_attention`. Raises RequestError("invalid_request")."""
    try:
        return choose_attention(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            dtype,
            device,
            implementation,
            share=share,
            exact_split=exact_split,
            kv_dtype=kv_dtype,
        )
    except ValueError as error:
        raise RequestError("invalid_request", str(error), field="attention", value=implementation) from None


def load_runner(
    folder: Path,
    dtype: str | None = None,
    device: str | None = None,
    page_size: int = 16,
    num_pages: int | None = None,
    max_total_tokens: int | None = None,
    on_progress: OnProgress | None = None,
    *,
    exact: bool = False,
    attention: Implementation | None = None,
    share_prefixes: bool = True,
    kv_dtype: str | None = None,
    weights: str | None = None,
    mem_fraction: float | None = None,
    token_budget: int = 1024,
    max_running: int = 64,
    cuda_graphs: bool = True,
) -> Runner:
    """Load a checkpoint's folder and return its runner, not yet warm.

    Set the number of torch threads first: how linear layers are computed is tried out here, on these threads.

    dtype: "float32" ("fp32"), "bfloat16" ("bf16"), or None: bfloat16 where the checkpoint is 16-bit and this CPU
    multiplies bfloat16, else float32. device: "cpu" or None, or "cuda", "cuda:1" and so on: there also "float16"
    ("fp16"), and None takes the checkpoint's dtype. num_pages: of the pool; None takes ceil(max_total_tokens /
    page_size). max_total_tokens None: a quarter of the memory available now, but at most 64 * context_len and 131,072
    tokens, and at least one whole context. One token takes 2 (K and V) * num_layers * num_kv_heads * head_dim * bytes
    of dtype. kv_dtype: "int8" stores keys and values as int8 with a float32 scale for each token and head, (head_dim +
    4) bytes; "fp8" as float8_e4m3fn with such a scale, on GPUs of compute capability 8.9 and later; None or "auto": in
    dtype.
    on_progress(done_bytes, total_bytes) is called while weights load. exact: a token's bits do not tell whether it was
    prefilled or drawn. attention: "native", "torch" or None for what works here. share_prefixes: attend what sequences
    have in common once for all of them. weights: "int8" keeps the linear layers' in int8 with a scale per output
    channel (`layers.Int8Linear`); None or "auto": in dtype.

    Of a GPU only: mem_fraction, the share of its memory this process may use (default 0.9), of which the pool takes
    what is left; token_budget, max_running: most tokens and sequences of a step, which needs memory of its own;
    cuda_graphs: whether small steps are captured.

    Raises RequestError: "unsupported_model" for the checkpoint, "invalid_request" for an argument,
    "resource_exhausted" with the arithmetic if the model does not fit the device's memory.
    """
    config = ModelConfig.from_folder(folder)
    torch_device = _device(device)
    int8 = _is_int8("weights", weights)
    if torch_device.type == "cuda" or attention == "triton":
        if int8:
            raise RequestError("invalid_request", "weights='int8' is the CPU's so far, not a GPU's", field="weights")
        from bough.runtime.cuda.runner import load_cuda_runner

        on_gpu = torch_dtype_of(dtype, config, on_gpu=True)
        return load_cuda_runner(
            folder,
            config,
            on_gpu,
            kv_dtype_of(kv_dtype, on_gpu, on_gpu=True),
            torch_device,
            page_size,
            num_pages,
            max_total_tokens,
            on_progress,
            exact=exact,
            share_prefixes=share_prefixes,
            mem_fraction=mem_fraction,
            token_budget=token_budget,
            max_running=max_running,
            cuda_graphs=cuda_graphs,
        )
    if mem_fraction is not None:
        raise RequestError(
            "invalid_request", "mem_fraction is of a GPU's memory; on a CPU give max_total_tokens", field="mem_fraction"
        )
    torch_dtype = torch_dtype_of(dtype, config)
    kv = kv_dtype_of(kv_dtype, torch_dtype)
    if num_pages is None:
        num_pages = -(-_total_tokens(max_total_tokens, config, kv) // page_size)
    begin = time.perf_counter()
    with torch.inference_mode(), Weights(folder, config, torch_dtype, on_progress) as tensors:
        model = Llama(config, tensors, int8=int8)
    pool = KVPool(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, kv, torch_device)
    log.info(
        "loaded %s (%s, %s) in %.1f s; %d pages of %d tokens, %.0f MB when all are used",
        *(folder, config.architecture, torch_dtype, time.perf_counter() - begin, num_pages, page_size),
        num_pages * pool.bytes_per_page / 1e6,
    )
    chosen = attention_of(config, torch_dtype, torch_device, attention, share=share_prefixes)
    log.info("attention: %s", chosen.implementation)
    return Runner(model, pool, torch_dtype, torch_device, exact=exact, attention=chosen)


def _device(name: str | None) -> torch.device:
    if name is None or name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        reason = "it is not known"
    elif not torch.cuda.is_available():
        reason = f"PyTorch {torch.__version__} finds no CUDA device here"
    elif int(number or 0) >= torch.cuda.device_count():
        reason = f"there are {torch.cuda.device_count()} CUDA devices, counted from 0"
    else:
        return torch.device("cuda", int(number or 0))
    raise RequestError(
        "invalid_request", f"device must be 'cpu' or 'cuda', got {name!r}: {reason}", field="device", value=name
    )


def torch_dtype_of(name: str | None, config: ModelConfig, *, on_gpu: bool = False) -> torch.dtype:
    """Return the dtype called `name`, by default what the checkpoint and the device suggest."""
    known = _DEVICE_DTYPES if on_gpu else _DTYPES
    if name is None and on_gpu:
        name = config.dtype
    elif name is None:
        name = "bfloat16" if config.dtype in ("float16", "bfloat16") and _multiplies_bfloat16() else "float32"
    if name not in known:
        where = "; float16 needs a GPU" if name in _DEVICE_DTYPES else ""
        raise RequestError(
            "invalid_request",
            f"dtype must be one of {', '.join(known)}, got {name!r}{where}",
            field="dtype",
            value=name,
        )
    dtype: torch.dtype = getattr(torch, known[name])
    return dtype


def kv_dtype_of(name: str | None, dtype: torch.dtype, *, on_gpu: bool = False) -> torch.dtype:
    """Return the dtype of keys and values called `name`; by default that of the model, `dtype`."""
    if name in ("fp8", "fp8_e4m3"):
        if on_gpu:
            return torch.float8_e4m3fn
        message = f"kv_dtype={name!r} is for GPUs (compute capability 8.9 and later), not the CPU: take int8"
        raise RequestError("invalid_request", message, field="kv_dtype", value=name)
    return torch.int8 if _is_int8("kv_dtype", name, "auto", "int8", "fp8") else dtype


def _is_int8(field: str, name: str | None, *known: str) -> bool:
    known = known or ("auto", "int8")
    if name is not None and name not in known:
        raise RequestError(
            "invalid_request", f"{field} must be one of {', '.join(known)}, got {name!r}", field=field, value=name
        )
    return name == "int8"


def _multiplies_bfloat16() -> bool:
    """Tell whether this CPU has bfloat16 products; without them bfloat16 is emulated and slower than float32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def _total_tokens(asked: int | None, config: ModelConfig, dtype: torch.dtype) -> int:
    if asked is not None:
        if asked < 1:
            raise RequestError(
                "invalid_request", f"max_total_tokens must be at least 1, got {asked}", field="max_total_tokens"
            )
        return asked
    scale_bytes = torch.float32.itemsize if dtype in QUANTISED_DTYPES else 0
    token_bytes = 2 * config.num_layers * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale_bytes)
    most = min(_available_bytes() // 4 // token_bytes, 64 * config.context_len, _MOST_TOKENS)
    return max(most, config.context_len)


def _available_bytes() -> int:
    """Return the memory that can be had without swapping: Linux's own estimate, else the free pages."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
