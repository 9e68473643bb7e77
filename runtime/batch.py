"""`Batch`: what one step computes, as plain arrays; `RowResult`: what came out. No torch, no sequences.

The scheduler makes a `Batch` and forgets the device; the runner executes it and forgets the sequences. Rows are in
the same order everywhere. A row is one sequence's share of the step::

    tokens of the sequence   [0 ............ start)            [start .. start + num_new)      [...
                             KV lies in the pages already      KV is computed in this step

Structs rather than dataclasses: 64 rows are made per step, and a frozen dataclass costs 0.9 us more each.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from bough.runtime.protocol import SamplingParams

IntArray = npt.NDArray[np.int32]


class PageCopy(msgspec.Struct, frozen=True):
    """Copy the first `num_slots` slots of page `source` to page `target`, in every layer, before the step computes."""

    source: int
    target: int
    num_slots: int


class SampleRequest(msgspec.Struct, frozen=True):
    """How to draw the next token of a row: parameters, and what they refer to.

    seed keys the counter-based generator together with the position of the drawn token (`position`), so that a draw
    does not depend on the batch. generated: the ids this operation has drawn so far; prompt: the ids before them
    (given only when repetition_penalty asks for it). forbidden: ids that must not be drawn now (min_tokens).
    """

    params: SamplingParams
    seed: int
    position: int
    generated: IntArray
    prompt: IntArray
    forbidden: tuple[int, ...]


class Row(msgspec.Struct, frozen=True):
    """One sequence's share of a step.

    token_ids: (num_new,) int32, the tokens whose KV is computed; they stand at positions start, start + 1, ...
    pages: (ceil((start + num_new) / page_size),) int32, page i holds positions [i * page_size, (i + 1) * page_size).
    sample: draw the token after the last new one, or None in the middle of a prefill.
    score_ids: (k,) int32 or None; the log-probability of score_ids[j] is read from the logits that follow
    token_ids[score_from + j].
    """

    token_ids: IntArray
    start: int
    pages: IntArray
    sample: SampleRequest | None = None
    score_ids: IntArray | None = None
    score_from: int = 0


class Batch(msgspec.Struct, frozen=True):
    """One step. `copies` are carried out first, then all rows at once."""

    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()


class RowResult(msgspec.Struct, frozen=True):
    """What one row produced.

    token: the drawn id, None if the row asked for none. logprob: its natural-log probability under the model's
    unmodified distribution; top: likelier-first (logprob, id) alternatives; both only if params.logprobs was given.
    score_logprobs: (k,) float64 for score_ids.
    """

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[float, int], ...] = ()
    score_logprobs: npt.NDArray[np.float64] | None = None
