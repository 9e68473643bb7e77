"""Logits -> tokens on the device: what `runtime.sampler` does, in the same order and with the same uniform numbers.

Rows without top-k, top-p and min-p take three kernels (penalties, masks and temperature, the draw) and one copy of
the tokens back. The others' filters are `runtime.sampler`'s, in PyTorch, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.draw import draw
from bough.kernels.logits import penalise, prepare_logits
from bough.runtime import sampler
from bough.runtime.batch import SampleRequest
from bough.runtime.grammar.masks import Masks
from bough.runtime.rng import uniforms

_ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for a pointer that is not a multiple of 16


def sample(logits: torch.Tensor, requests: Sequence[SampleRequest], masks: Masks) -> list[sampler.Draw]:
    """Draw one token per row. Arguments, order of operations and errors: see `sampler.sample`."""
    params = [request.params for request in requests]
    finite = (logits.amax(-1) - logits.amin(-1)).isfinite()
    logprobs = sampler.row_logprobs(logits, [i for i, p in enumerate(params) if p.logprobs is not None])
    _penalise(logits, requests)
    words, mask_rows = _masks(requests, masks, logits.shape[1])
    temperatures = np.array([p.temperature for p in params], dtype=np.float32)
    points = uniforms([r.seed for r in requests], [r.position for r in requests])
    on_device = upload([points, temperatures, mask_rows, words], logits.device)
    prepared, largest, total, likeliest = prepare_logits(logits, on_device[3], on_device[2], on_device[1])
    tokens = draw(prepared, largest, total, likeliest, on_device[1], on_device[0])
    drawn = torch.stack([tokens, finite.to(torch.int32)]).cpu().numpy()
    _check(drawn)
    ids: npt.NDArray[np.int64] = drawn[0].astype(np.int64)
    filtered = [i for i, p in enumerate(params) if p.temperature > 0 and sampler.is_filtered(p)]
    if filtered:
        probs = sampler.filtered_probs(prepared[filtered].softmax(-1), [params[i] for i in filtered])
        ids[filtered] = sampler.invert(probs, points[filtered]).cpu().numpy()
    return [sampler.result(int(ids[i]), logprobs.get(i), params[i].logprobs) for i in range(len(requests))]


def _check(drawn: npt.NDArray[np.int32]) -> None:
    """Raise FloatingPointError for the first row without finite logits, or without a token to draw."""
    for row in np.flatnonzero(drawn[1] == 0):
        raise FloatingPointError(f"the model gave logits that are not finite in row {row}")
    for row in np.flatnonzero(drawn[0] < 0):
        raise FloatingPointError(f"every token is forbidden in row {row}")


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
