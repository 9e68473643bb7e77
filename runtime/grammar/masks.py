"""Masks of all rows of a step, on the logits: filled one after another or side by side, applied as one sum."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import llguidance
import numpy as np
import numpy.typing as npt
import torch

from bough.runtime.batch import SampleRequest
from bough.runtime.grammar.constraint import Words
from bough.runtime.grammar.matching import GrammarConstraint

# Handing masks to threads costs 0.2 ms; one after another, 32 take 0.11 ms. With two CPUs threads gain nothing.
_THREADED_ROWS = 64
_THREADED_CPUS = 4


class Masks:
    """Fills and applies the masks of a step; keeps room for them. One caller.

    What is added to the logits is looked up for each byte of the masks, anew in each step: 0.03 ms for 32 rows of
    8,192, as long as it takes to find such rows among kept ones.
    """

    def __init__(self) -> None:
        self._executor: llguidance.LLExecutor | None = None
        self._bias: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)

    def apply(self, logits: torch.Tensor, requests: Sequence[SampleRequest]) -> None:
        """Set the logits of ids that may not be drawn to -inf. logits: (num_rows, vocab_size) float32, in place."""
        rows = [i for i, request in enumerate(requests) if request.constraint is not None]
        if not rows:
            return
        vocab_size = logits.shape[1]
        bias = self._biases(self.fill([requests[i] for i in rows], vocab_size))[:, :vocab_size]
        if len(rows) == len(requests):
            logits += bias
        else:
            logits.index_add_(0, torch.tensor(rows), bias)

    def fill(self, requests: Sequence[SampleRequest], vocab_size: int) -> Words:
        """Return (num_rows, ceil(vocab_size / 32)) uint32 masks of rows that have a constraint."""
        words = np.zeros((len(requests), -(-vocab_size // 32)), dtype=np.uint32)
        together = []
        for i, request in enumerate(requests):
            constraint = request.constraint
            assert constraint is not None
            if isinstance(constraint, GrammarConstraint) and constraint.needs_matcher:
                together.append((constraint.matcher, i))
            else:
                constraint.fill(words[i], request.forbidden)
        self._compute(together, words)
        for _, i in together:
            constraint = requests[i].constraint
            assert isinstance(constraint, GrammarConstraint)
            constraint.finish_mask(words[i], requests[i].forbidden)
        # A matcher that gave up writes nothing. What is drawn then is refused when it is taken in, in that row alone.
        words[~words.any(axis=1)] = 0xFFFFFFFF
        return words

    def _compute(self, matchers: list[tuple[llguidance.LLMatcher, int]], words: Words) -> None:
        """Write the masks of matchers into the rows named with them."""
        start, row_bytes = words.ctypes.data, words.strides[0]
        if len(matchers) < _THREADED_ROWS or (os.cpu_count() or 1) < _THREADED_CPUS:
            for matcher, i in matchers:
                matcher.unsafe_compute_mask_ptr(start + i * row_bytes, row_bytes)
            return
        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        self._executor.unsafe_compute_mask_ptr(matchers, start, row_bytes, len(words))

    def _biases(self, words: Words) -> torch.Tensor:
        """Return (num_rows, 32 * words.shape[1]) float32, 0 or -inf; it is written again by the next call."""
        num_bytes = words.nbytes
        if len(self._bias) < num_bytes * 8:
            self._bias = np.empty(num_bytes * 8, dtype=np.float32)
        out = self._bias[: num_bytes * 8].reshape(num_bytes, 8)
        # mode="clip" writes into `out` at once; every byte is within the table anyway.
        np.take(_table(), words.view(np.uint8).reshape(-1), axis=0, out=out, mode="clip")
        return torch.from_numpy(out.reshape(len(words), -1))


@cache
def _table() -> npt.NDArray[np.float32]:
    """(256, 8) float32: for each byte of a mask, what is added to the logits of its eight ids, lowest bit first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table: npt.NDArray[np.float32] = np.where(bits, np.float32(0), np.float32(-np.inf))
    return table
