"""`Batch` -> the tensors of one step: everything that layers share is made here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bough.kernels.attention import Plan
from bough.kernels.layout import PagedLayout
from bough.runtime.batch import Batch, Row


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model computes in one step, all rows after one another.

    token_ids, positions, slots: (num_tokens,) int64; slot = page * page_size + offset in the pool. end_position:
    above every position. attention: the plan all layers share. wanted: (num_wanted,) int64, the tokens whose final
    hidden states are needed: first one for each row that samples, then those of each row that scores.
    sample_rows: the rows that sample; score_rows: the rows that score; both in the order of `wanted`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    end_position: int
    attention: Plan
    wanted: torch.Tensor
    sample_rows: tuple[int, ...]
    score_rows: tuple[int, ...]


def build_inputs(
    batch: Batch, page_size: int, plan: Callable[[PagedLayout], Plan], *, token_by_token: bool = False
) -> StepInputs:
    """Return the tensors of a batch with at least one row, each with at least one new token.

    plan: how attention is planned. token_by_token: attend every token as a decode does, so that a token's bits do not
    tell whether it was prefilled or drawn; for attention where they would.
    """
    rows = batch.rows
    num_new = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    assert num_new.min() > 0, "a row computes at least one token"
    layout = PagedLayout(
        qo_indptr=_indptr(num_new),
        kv_indptr=_indptr(np.array([len(row.pages) for row in rows], dtype=np.int64)),
        kv_indices=np.concatenate([row.pages for row in rows]),
        kv_lens=(starts + num_new).astype(np.int32),
        is_decode=np.array([is_decode(row) for row in rows]),
        page_size=page_size,
    )
    owner = np.repeat(np.arange(len(rows)), num_new)
    offsets = np.arange(len(owner)) - layout.qo_indptr[owner]
    positions = starts[owner] + offsets
    page = layout.kv_indices[layout.kv_indptr[owner] + positions // page_size].astype(np.int64)
    sample_rows = tuple(i for i, row in enumerate(rows) if row.sample is not None)
    score_rows = tuple(i for i, row in enumerate(rows) if row.score_ids is not None and len(row.score_ids))
    return StepInputs(
        token_ids=torch.from_numpy(np.concatenate([row.token_ids for row in rows]).astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(page * page_size + positions % page_size),
        end_position=int(layout.kv_lens.max()),
        attention=plan(_token_by_token(layout) if token_by_token else layout),
        wanted=torch.from_numpy(_wanted(rows, layout.qo_indptr, sample_rows, score_rows)),
        sample_rows=sample_rows,
        score_rows=score_rows,
    )


def _token_by_token(layout: PagedLayout) -> PagedLayout:
    """Return the layout in which every new token is a sequence of its own, that ends with it."""
    num_new = np.diff(layout.qo_indptr)
    owner = np.repeat(np.arange(len(num_new)), num_new)
    later = layout.qo_indptr[owner + 1] - 1 - np.arange(len(owner))  # new tokens of the sequence after this one
    kv_lens = (layout.kv_lens[owner] - later).astype(np.int32)
    num_pages = -(-kv_lens // layout.page_size)
    pages = [layout.kv_indices[layout.kv_indptr[b] :][:count] for b, count in zip(owner, num_pages, strict=True)]
    return PagedLayout(
        qo_indptr=np.arange(len(owner) + 1, dtype=np.int32),
        kv_indptr=_indptr(num_pages.astype(np.int64)),
        kv_indices=np.concatenate(pages),
        kv_lens=kv_lens,
        is_decode=np.ones(len(owner), dtype=np.bool_),
        page_size=layout.page_size,
    )


def is_decode(row: Row) -> bool:
    """Tell whether a row is one step of generation: its token was drawn by the operation that draws the next.

    A prompt's last token is prefill even when it comes alone, so that a prompt gives the same bits however much of it
    was cached or however it was cut into chunks.
    """
    return len(row.token_ids) == 1 and row.sample is not None and len(row.sample.generated) > 0


def _indptr(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _wanted(
    rows: tuple[Row, ...],
    qo_indptr: np.ndarray[tuple[int], np.dtype[np.int32]],
    sample_rows: tuple[int, ...],
    score_rows: tuple[int, ...],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    parts = [np.array([qo_indptr[i + 1] - 1 for i in sample_rows], dtype=np.int64)]
    for i in score_rows:
        row = rows[i]
        assert row.score_ids is not None
        first = int(qo_indptr[i]) + row.score_from
        assert row.score_from + len(row.score_ids) <= len(row.token_ids), "scores are read from the row's own tokens"
        parts.append(np.arange(first, first + len(row.score_ids), dtype=np.int64))
    return np.concatenate(parts)
