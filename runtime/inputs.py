"""`Batch` -> the tensors of one step: everything that layers share is made here, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.attention import Plan
from bough.kernels.layout import PagedLayout
from bough.runtime.batch import Batch, Row

Narrow = Callable[[Plan, npt.NDArray[np.int64]], "Plan | None"]
"""From the plan of a step to that of some of its tokens alone, ascending; None where there is none."""


@dataclass(frozen=True, slots=True)
class LastLayer:
    """Of which tokens the last layer is computed: no later layer reads the others, whose KV is all that is needed.

    tokens: (num_kept,) int64 ascending, each token wanted once. wanted: (num_wanted,) int64, which of these each of
    `StepInputs.wanted` is. attention: the plan of these alone, or None where only all can be attended together.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor
    attention: Plan | None


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model computes in one step, all rows after one another.

    token_ids, positions, slots: (num_tokens,) int64; slot = page * page_size + offset in the pool. end_position:
    above every position. attention: the plan all layers share. wanted: (num_wanted,) int64, the tokens whose final
    hidden states are needed: first one for each draw, then those of each row that scores, each once.
    sample_rows: the row of each draw; score_rows: the rows that score; both in the order of `wanted`.
    score_hidden: (num_scores,) int64 ascending, which of the hidden states that are for scores each score is read from.
    last: of which tokens the last layer is computed, None: of all. is_decode: each row computes one token and draws the
    next, so that `wanted` and `sample_rows` are simply all.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    end_position: int
    attention: Plan
    wanted: torch.Tensor
    sample_rows: tuple[int, ...]
    score_rows: tuple[int, ...]
    score_hidden: npt.NDArray[np.int64]
    last: LastLayer | None = None
    is_decode: bool = False


def build_inputs(
    batch: Batch,
    page_size: int,
    plan: Callable[[PagedLayout], Plan],
    narrow: Narrow | None = None,
    *,
    token_by_token: bool = False,
) -> StepInputs:
    """Return the tensors of a batch with at least one row, each with at least one new token.

    plan: how attention is planned. narrow: how for some tokens alone; None: the last layer computes all tokens.
    token_by_token: attend every token as a decode does, so that a token's bits do not tell whether it was prefilled or
    drawn; for attention where they would.
    """
    rows = batch.rows
    if not token_by_token and all(map(_is_plain_decode, rows)):
        return _decode_inputs(rows, page_size, plan)
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
    slots = (starts - layout.qo_indptr[:-1])[owner] + np.arange(len(owner))  # counted in the row's pages
    positions = slots.copy()
    tries = [(i, row.trie) for i, row in enumerate(rows) if row.trie is not None]
    for i, trie in tries:
        nodes = slice(layout.qo_indptr[i + 1] - len(trie.slots), layout.qo_indptr[i + 1])
        slots[nodes], positions[nodes] = trie.slots, trie.context_len + trie.depths
    page, offset = np.divmod(slots, page_size)
    page = layout.kv_indices[layout.kv_indptr[owner] + page].astype(np.int64)
    sample_rows = tuple(i for i, row in enumerate(rows) if row.sample is not None for _ in range(1 + row.draft))
    score_rows = tuple(i for i, row in enumerate(rows) if row.score_ids is not None and len(row.score_ids))
    wanted, score_hidden = _wanted(rows, layout.qo_indptr, score_rows)
    if tries:
        layout = slot_layout(rows, layout)
    attention = plan(_token_by_token(layout) if token_by_token else layout)
    return StepInputs(
        token_ids=torch.from_numpy(np.concatenate([row.token_ids for row in rows]).astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(page * page_size + offset),
        end_position=int(positions.max()) + 1,
        attention=attention,
        wanted=torch.from_numpy(wanted),
        sample_rows=sample_rows,
        score_rows=score_rows,
        score_hidden=score_hidden,
        last=None if narrow is None else _last_layer(attention, wanted, len(positions), narrow),
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all steps have in common in which so many rows decode; nobody may change it."""

    qo_indptr: npt.NDArray[np.int32]
    is_decode: npt.NDArray[np.bool_]
    all_tokens: torch.Tensor
    all_rows: tuple[int, ...]
    no_scores: npt.NDArray[np.int64]


@functools.lru_cache(maxsize=512)
def _frame(num_rows: int) -> _Frame:
    qo_indptr, is_decode = np.arange(num_rows + 1, dtype=np.int32), np.ones(num_rows, dtype=np.bool_)
    qo_indptr.flags.writeable = is_decode.flags.writeable = False
    none = np.zeros(0, dtype=np.int64)
    return _Frame(qo_indptr, is_decode, torch.arange(num_rows), tuple(range(num_rows)), none)


def _is_plain_decode(row: Row) -> bool:
    """Whether a row is a decode (see `is_decode`), draws the next token, and nothing else."""
    sample = row.sample
    if sample is None or len(row.token_ids) != 1 or row.draft or row.score_ids is not None or row.trie is not None:
        return False
    return row.drawn_by is not None or (len(sample.generated) > 0 and not sample.is_forced)


def _decode_inputs(rows: tuple[Row, ...], page_size: int, plan: Callable[[PagedLayout], Plan]) -> StepInputs:
    """Return what `build_inputs` does where every row is a plain decode: most steps, in a third of the time."""
    frame = _frame(len(rows))
    pages = [row.pages for row in rows]
    first = [row.start for row in rows]
    starts = np.array(first, dtype=np.int64)
    kv_indptr = np.array([0, *accumulate(map(len, pages))], dtype=np.int32)
    layout = PagedLayout(
        qo_indptr=frame.qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=np.concatenate(pages),
        kv_lens=(starts + 1).astype(np.int32),
        is_decode=frame.is_decode,
        page_size=page_size,
        all_decode=True,
    )
    page, offset = np.divmod(starts, page_size)
    slots = layout.kv_indices[kv_indptr[:-1] + page].astype(np.int64) * page_size + offset
    return StepInputs(
        token_ids=torch.from_numpy(np.concatenate([row.token_ids for row in rows]).astype(np.int64)),
        positions=torch.from_numpy(starts),
        slots=torch.from_numpy(slots),
        end_position=max(first) + 1,
        attention=plan(layout),
        wanted=frame.all_tokens,
        sample_rows=frame.all_rows,
        score_rows=(),
        score_hidden=frame.no_scores,
        is_decode=True,
    )


def _last_layer(attention: Plan, wanted: npt.NDArray[np.int64], num_tokens: int, narrow: Narrow) -> LastLayer | None:
    if len(wanted) == num_tokens:  # in a decode all are; that some may be there twice costs a prefill a little
        return None
    tokens, places = np.unique(wanted, return_inverse=True)
    return LastLayer(torch.from_numpy(tokens), torch.from_numpy(places), narrow(attention, tokens))


def slot_layout(rows: tuple[Row, ...], layout: PagedLayout) -> PagedLayout:
    """Return the layout by slots, in pages of one, in which each segment of a trie is a sequence of its own.

    Pages cannot tell what a node attends to: its path lies scattered among the other nodes, and its first page may be
    the prompt's last. A row without a trie stays one sequence.
    """
    parts = [_sequences(row, bool(is_decode)) for row, is_decode in zip(rows, layout.is_decode, strict=True)]
    owner = np.repeat(np.arange(len(rows)), [len(part.num_new) for part in parts])
    kv_lens = np.concatenate([part.kv_lens for part in parts])
    own_lens = np.concatenate([part.own_lens for part in parts])
    own_slots = np.concatenate([part.own_slots for part in parts])
    kv_indptr = _indptr(kv_lens)
    positions = np.arange(kv_indptr[-1], dtype=np.int32) - np.repeat(kv_indptr[:-1], kv_lens)
    # Below what it shares with the others a sequence's positions are its slots; the last ones have slots of their own.
    is_own = positions >= np.repeat(kv_lens - own_lens, kv_lens)
    slots = positions
    slots[is_own] = own_slots
    page, offset = np.divmod(slots, np.int32(layout.page_size))
    page += np.repeat(layout.kv_indptr[owner], kv_lens)
    return PagedLayout(
        qo_indptr=_indptr(np.concatenate([part.num_new for part in parts])),
        kv_indptr=kv_indptr,
        kv_indices=layout.kv_indices[page] * np.int32(layout.page_size) + offset,
        kv_lens=kv_lens.astype(np.int32),
        is_decode=np.concatenate([part.is_decode for part in parts]),
        page_size=1,
    )


@dataclass(frozen=True, slots=True)
class _Sequences:
    """A row as sequences: new tokens, KV, and how many of the last positions lie in own_slots (all after one another).

    num_new, kv_lens, own_lens, is_decode: (num_sequences,). own_slots: (sum of own_lens,) int32, in the row's pages.
    """

    num_new: npt.NDArray[np.int64]
    kv_lens: npt.NDArray[np.int64]
    own_lens: npt.NDArray[np.int64]
    own_slots: npt.NDArray[np.int32]
    is_decode: npt.NDArray[np.bool_]


def _sequences(row: Row, is_decode: bool) -> _Sequences:
    num_nodes = 0 if row.trie is None else len(row.trie.slots)
    num_linear = len(row.token_ids) - num_nodes
    linear = np.array([num_linear] if num_linear else [], dtype=np.int64)
    kind = np.full(len(linear), is_decode)
    own = np.zeros(len(linear), dtype=np.int64)
    if row.trie is None:
        return _Sequences(linear, linear + row.start, own, np.zeros(0, dtype=np.int32), kind)
    path_lens = np.diff(row.trie.path_indptr).astype(np.int64)
    return _Sequences(
        num_new=np.concatenate([linear, np.diff(row.trie.bounds)]),
        kv_lens=np.concatenate([linear + row.start, row.trie.context_len + path_lens]),
        own_lens=np.concatenate([own, path_lens]),
        own_slots=row.trie.path_slots,
        is_decode=np.concatenate([kind, row.trie.is_decode]),
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
    sample = row.sample
    if row.drawn_by is not None:
        return True
    return len(row.token_ids) == 1 and sample is not None and len(sample.generated) > 0 and not sample.is_forced


def _indptr(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _wanted(
    rows: tuple[Row, ...],
    qo_indptr: npt.NDArray[np.int32],
    score_rows: tuple[int, ...],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the tokens whose hidden states are needed, and for each score which of those for scores it needs."""
    sampled = np.array(
        [
            end - 1 - later
            for row, end in zip(rows, qo_indptr[1:].tolist(), strict=True)
            if row.sample is not None
            for later in range(row.draft, -1, -1)
        ],
        dtype=np.int64,
    )
    if not score_rows:
        return sampled, np.zeros(0, dtype=np.int64)
    scored = []
    for i in score_rows:
        at = rows[i].score_at
        assert at is not None, "a row that scores says where"
        assert 0 <= at[0] <= at[-1] < len(rows[i].token_ids), "scores are read from the row's own tokens"
        scored.append(int(qo_indptr[i]) + at.astype(np.int64))
    unique, score_hidden = np.unique(np.concatenate(scored), return_inverse=True)
    return np.concatenate([sampled, unique]), score_hidden
