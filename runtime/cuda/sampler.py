"""Logits -> tokens on the device: what `runtime.sampler` does, in the same order and with the same uniform numbers.

Three kernels (penalties, masks and temperature, the draw) and one copy of the tokens back; three more where rows have
top-k, top-p or min-p. `begin` and `begin_scores` only enqueue, whatever the requests ask for: they wait neither for the
device nor for what it finds out. What comes back is copied behind the kernels that make it, and an event says when it
is there, so that what is launched later does not delay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.draw import draw
from bough.kernels.filtered_draw import draw_filtered
from bough.kernels.logits import penalise, prepare_logits
from bough.runtime import sampler
from bough.runtime.batch import SampleRequest
from bough.runtime.grammar.masks import Masks
from bough.runtime.protocol import SamplingParams
from bough.runtime.rng import uniforms

_ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for a pointer that is not a multiple of 16


class Download:
    """A tensor on its way from the device to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._host.copy_(tensor, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> npt.NDArray[Any]:
        """Return the tensor, once it is here."""
        if self._event is not None:
            self._event.synchronize()
        numbers: npt.NDArray[Any] = self._host.numpy()
        return numbers


class Drawing:
    """One token per row, on its way to the host.

    tokens: (num_rows,) int32 on the device, the same for the next step's inputs; where nothing could be drawn they are
    ids of the vocabulary all the same.
    """

    def __init__(
        self, tokens: torch.Tensor, outcome: Download, logprobs: Download | None, requests: Sequence[SampleRequest]
    ) -> None:
        self.tokens = tokens
        self._outcome = outcome  # (3, num_rows) int32: token, whether logits are finite, whether one was possible
        self._logprobs = logprobs  # (rows that want any, 2 + 2 * most) float64: of the token, entropy, values, ids
        self._wanted = [request.params.logprobs for request in requests]

    def result(self) -> list[sampler.Draw]:
        """Wait for the tokens. Raises FloatingPointError as `sampler.sample` does."""
        drawn = self._outcome.wait()
        _check(drawn)
        rows = iter(()) if self._logprobs is None else iter(self._logprobs.wait().tolist())
        tokens = drawn[0].tolist()
        return [
            sampler.Draw(token) if num_top is None else _with_logprobs(token, num_top, next(rows))
            for token, num_top in zip(tokens, self._wanted, strict=True)
        ]


def _with_logprobs(token: int, num_top: int, numbers: list[float]) -> sampler.Draw:
    most = (len(numbers) - 2) // 2
    pairs = ((value, int(other)) for value, other in zip(numbers[2 : 2 + most], numbers[2 + most :], strict=True))
    top = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:num_top]
    return sampler.Draw(token, numbers[0], tuple(top), numbers[1])


def sample(logits: torch.Tensor, requests: Sequence[SampleRequest], masks: Masks) -> list[sampler.Draw]:
    """Draw one token per row. Arguments, order of operations and errors: see `sampler.sample`."""
    return begin(logits, requests, masks).result()


def begin(logits: torch.Tensor, requests: Sequence[SampleRequest], masks: Masks) -> Drawing:
    """Have one token per row drawn; arguments as `sampler.sample`'s. Requests are read in this call only."""
    params = [request.params for request in requests]
    finite = (logits.amax(-1) - logits.amin(-1)).isfinite()
    telling = [i for i, p in enumerate(params) if p.logprobs is not None]
    before = _log_softmax(_rows(logits, telling)) if telling else None  # of the unmodified distribution
    _penalise(logits, requests)
    words, mask_rows = _masks(requests, masks, logits.shape[1])
    temperatures = np.array([p.temperature for p in params], dtype=np.float32)
    points = uniforms([r.seed for r in requests], [r.position for r in requests])
    arrays: list[npt.NDArray[np.generic]] = [points, temperatures, mask_rows, words, *_filters(params, logits.shape[1])]
    on_points, on_temperatures, on_mask_rows, on_masks, *filters = upload(arrays, logits.device)
    prepared, largest, total, likeliest = prepare_logits(logits, on_masks, on_mask_rows, on_temperatures)
    tokens = draw(prepared, largest, total, likeliest, on_temperatures, on_points)
    if filters:
        rows, top_k, top_p, min_p = filters
        draw_filtered(prepared, largest, total, rows, top_k, top_p, min_p, on_points, tokens)
    is_possible = tokens >= 0
    tokens = tokens.clamp(0, logits.shape[1] - 1)
    logprobs = None
    if before is not None:
        most = max(p.logprobs or 0 for p in params)
        logprobs = Download(_told(before, _rows(tokens, telling), most))
    outcome = torch.stack([tokens, finite.to(torch.int32), is_possible.to(torch.int32)])
    return Drawing(tokens, Download(outcome), logprobs, requests)


def _filters(params: Sequence[SamplingParams], vocab_size: int) -> list[npt.NDArray[np.generic]]:
    """Return which rows are filtered, and every row's top_k, top_p and min_p as `draw_filtered` takes them."""
    filtered = [i for i, p in enumerate(params) if p.temperature > 0 and sampler.is_filtered(p)]
    if not filtered:
        return []
    return [
        np.array(filtered, dtype=np.int32),
        np.array([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], dtype=np.int32),
        # 1 is off: rounding in the sum must not cut the tail.
        np.array([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=np.float64),
        np.array([p.min_p for p in params], dtype=np.float32),
    ]


def _told(logprobs: torch.Tensor, tokens: torch.Tensor, most: int) -> torch.Tensor:
    """Return (num_rows, 2 + 2 * most): each token's of `logprobs`, the entropy, the `most` largest and their ids."""
    values, ids = logprobs.topk(min(most, logprobs.shape[1]))
    shares = logprobs.exp()
    entropy = -torch.special.xlogy(shares, shares).sum(-1, keepdim=True)
    return torch.cat([logprobs.gather(1, tokens.long().unsqueeze(1)), entropy, values, ids.double()], 1)


def _check(drawn: npt.NDArray[np.int32]) -> None:
    """Raise FloatingPointError for the first row without finite logits, or without a token to draw."""
    for row in np.flatnonzero(drawn[1] == 0):
        raise FloatingPointError(f"the model gave logits that are not finite in row {row}")
    for row in np.flatnonzero(drawn[2] == 0):
        raise FloatingPointError(f"every token is forbidden in row {row}")


class Scoring:
    """Log-probabilities of given ids, on their way to the host."""

    def __init__(self, chosen: torch.Tensor, finite: torch.Tensor) -> None:
        self._num_ids = len(chosen)
        self._numbers = Download(torch.cat([chosen, finite.double()]))

    def result(self) -> npt.NDArray[np.float64]:
        """Wait for them: (num_ids,). Raises FloatingPointError naming the row if its logits are not finite."""
        numbers = self._numbers.wait()
        for row in np.flatnonzero(numbers[self._num_ids :] == 0):
            raise FloatingPointError(f"the model gave logits that are not finite in row {row}")
        return numbers[: self._num_ids]


def begin_scores(logits: torch.Tensor, token_ids: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> Scoring:
    """Have the log-probabilities of token_ids[i] under logits[rows[i]] computed; see `sampler.score`."""
    finite = (logits.amax(-1) - logits.amin(-1)).isfinite()
    ids, at = upload([token_ids.astype(np.int32), rows.astype(np.int32)], logits.device)
    return Scoring(_log_softmax(logits)[at.long(), ids.long()], finite)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float64)


def _index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return upload([np.array(rows, dtype=np.int32)], device)[0]


def _rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return these rows of a tensor; no copy if they are all."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, _index(rows, tensor.device))


def _masks(
    requests: Sequence[SampleRequest], masks: Masks, vocab_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the masks of the rows that have one, at least one row of words, and which mask each row has or -1."""
    rows = [i for i, request in enumerate(requests) if request.constraint is not None]
    mask_rows = np.full(len(requests), -1, dtype=np.int32)
    if not rows:
        return np.zeros((1, -(-vocab_size // 32)), dtype=np.int32), mask_rows
    mask_rows[rows] = np.arange(len(rows))
    return masks.fill([requests[i] for i in rows], vocab_size).view(np.int32), mask_rows


def _penalise(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> None:
    """Apply penalties, biases and forbidden ids, in place; rows without any have no entries."""
    if not any(sampler.is_modified(request) for request in requests):
        return
    parts = [_entries(request) for request in requests]
    lengths = [len(ids) for ids, _, _ in parts]
    params = [request.params for request in requests]
    arrays: list[npt.NDArray[np.generic]] = [
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        *(np.concatenate([part[i] for part in parts]) for i in range(3)),
        np.array([p.repetition_penalty for p in params], dtype=np.float32),
        np.array([p.frequency_penalty for p in params], dtype=np.float32),
        np.array([p.presence_penalty for p in params], dtype=np.float32),
    ]
    penalise(logits, *upload(arrays, logits.device))


def _entries(
    request: SampleRequest,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return token ids, how often each was generated (see `penalise`), and what is added to its logit."""
    p = request.params
    forbidden = np.array(request.forbidden if request.constraint is None else (), dtype=np.int64)
    biased = np.array(list(p.logit_bias or ()), dtype=np.int64)
    is_penalised = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
    none = np.zeros(0, dtype=np.int64)
    generated, times = np.unique(request.generated, return_counts=True) if is_penalised else (none, none)
    prompt = np.unique(request.prompt) if p.repetition_penalty != 1 else none
    ids = np.unique(np.concatenate([generated, prompt, biased, forbidden]).astype(np.int32))
    counts = np.full(len(ids), -1, dtype=np.int32)
    counts[np.searchsorted(ids, prompt)] = 0
    counts[np.searchsorted(ids, generated)] = times
    biases = np.zeros(len(ids), dtype=np.float32)
    biases[np.searchsorted(ids, biased)] = list((p.logit_bias or {}).values())
    biases[np.searchsorted(ids, forbidden)] = -np.inf
    return ids, counts, biases


def upload(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[torch.Tensor]:
    """Return the arrays on the device, brought there in one copy."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    packed = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_dtype_of(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def _dtype_of(array: npt.NDArray[np.generic]) -> torch.dtype:
    return {"int32": torch.int32, "float32": torch.float32, "float64": torch.float64}[array.dtype.name]
