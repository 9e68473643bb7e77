"""From shared segments to work items: what one step of decode reads, once per segment and not once per sequence.

    segments --share--> runs --split, tile--> items --> partial results --merge--> tokens

A *run* is a stretch of keys read for a set of query rows: a segment where reading it once pays, by the device's costs,
or all that a branch reads by itself (`tree_runs`). Runs are cut into chunks so that all programs have equal shares, and
their rows into tiles. All of it is arithmetic on small integers: no torch, no device.

In exact mode (`Options.exact_split`) chunks end at multiples of a fixed number of positions, a run that is shared ends
at such a multiple and its rest is read by each branch, and all rows go through tiles of one size. Then the order of
every sum depends on positions only: a sequence gets the same bits alone, in any batch, beside any tree and whatever
the costs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bough.kernels.segments import Segment
from bough.kernels.tree_runs import Options, Run, shortest, tokens_per_tile

ITEM_FIELDS = 8  # numbers of an item in memory: Item's six and two of padding, 32 bytes
OPEN_END = 2**31 - 1  # the end of a run that grows with its sequence; kernels stop at the tokens there are

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Item:
    """A work item, as its columns lie in `TreePlan.narrow` and `.wide`.

    Query tokens rows[row_begin : row_begin + num_rows] attend to positions [begin, end) of the sequence whose first
    page is kv_indices[page_begin]; row i writes partial result part_begin + i.
    """

    row_begin: int
    num_rows: int
    page_begin: int
    begin: int
    end: int
    part_begin: int


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The work of one step; all arrays int32.

    narrow, wide: (num_items, ITEM_FIELDS), see `Item`, longest first. rows: token indices. merge_indptr:
    (num_tokens + 1,) into merge_indices, the partial results of each token in the order of positions. growth: by how
    many tokens every sequence may grow until the plan must be made anew; nothing but `visible_lens` and new page ids
    changes meanwhile.
    """

    narrow: Int32Array
    wide: Int32Array
    rows: Int32Array
    merge_indptr: Int32Array
    merge_indices: Int32Array
    num_partials: int
    growth: int


def plan_tree(
    segments: Sequence[Segment], qo_indptr: Int32Array, kv_indptr: Int32Array, kv_lens: Int32Array, options: Options
) -> TreePlan:
    """Return the plan for the sequences in `segments`, whose tokens are qo_indptr[b]:qo_indptr[b + 1].

    Tokens of other sequences have no partial results. kv_lens includes the new tokens.
    """
    draft = shortest(segments, qo_indptr, kv_lens, options)
    builder = _Builder(qo_indptr, kv_indptr, options)
    narrow = builder.items(draft.narrow, draft.narrow_split, is_wide=False)
    wide = builder.items(draft.wide, draft.wide_split, is_wide=True)
    merge_indptr, merge_indices = builder.merges(np.concatenate([narrow, wide]), int(qo_indptr[-1]))
    return TreePlan(
        _longest_first(narrow),
        _longest_first(wide),
        builder.rows(),
        merge_indptr,
        merge_indices,
        builder.num_partials,
        _growth((*draft.narrow, *draft.wide), kv_lens, options),
    )


class _Builder:
    """Collects the rows and partial results of one plan while its items are made."""

    def __init__(self, qo_indptr: Int32Array, kv_indptr: Int32Array, options: Options) -> None:
        self._qo_indptr, self._kv_indptr, self._options = qo_indptr, kv_indptr, options
        self._rows: list[int] = []
        self.num_partials = 0

    def items(self, runs: Sequence[Run], split: int, *, is_wide: bool) -> Int32Array:
        """Return the items of runs whose rows go into tiles of one size, in chunks of about `split` tokens:
        (num_items, ITEM_FIELDS)."""
        if not runs:
            return np.zeros((0, ITEM_FIELDS), dtype=np.int32)
        per_tile = tokens_per_tile(self._options, is_wide=is_wide)
        tiles = []  # (run, first row, number of rows)
        for index, run in enumerate(runs):
            first = len(self._rows)
            for seq in run.seqs:
                self._rows.extend(range(int(self._qo_indptr[seq]), int(self._qo_indptr[seq + 1])))
            tiles += [
                (index, row, min(per_tile, len(self._rows) - row)) for row in range(first, len(self._rows), per_tile)
            ]
        return self._cut(runs, np.array(tiles, dtype=np.int64), split)

    def _cut(self, runs: Sequence[Run], tiles: npt.NDArray[np.int64], split: int) -> Int32Array:
        """Return one item for each tile and chunk; chunks of a run are equal, or end at fixed positions."""
        begins = np.array([run.begin for run in runs], dtype=np.int64)
        lengths = np.array([run.end for run in runs], dtype=np.int64) - begins
        options = self._options
        if options.exact_split is not None:
            chunk_len = np.full(len(runs), options.exact_split, dtype=np.int64)
        else:
            count = -(-lengths // split)
            chunk_len = -(-lengths // count // options.block_n) * options.block_n
        # a shared run in exact mode begins at a multiple of the split, so chunks counted from there end at such ones
        num_chunks = -(-lengths // chunk_len)
        run_of_tile = tiles[:, 0]
        tile = np.repeat(np.arange(len(tiles)), num_chunks[run_of_tile])
        run = run_of_tile[tile]
        first_of_tile = np.cumsum(num_chunks[run_of_tile]) - num_chunks[run_of_tile]
        chunk = np.arange(len(tile)) - first_of_tile[tile]
        is_last = chunk == num_chunks[run] - 1
        is_open = np.array([r.is_open for r in runs])[run]
        ends = begins[run] + (chunk + 1) * chunk_len[run]
        closed = np.minimum(ends, np.array([r.end for r in runs])[run])
        num_rows = tiles[tile, 2]
        items = np.zeros((len(tile), ITEM_FIELDS), dtype=np.int32)
        items[:, 0] = tiles[tile, 1]
        items[:, 1] = num_rows
        items[:, 2] = self._kv_indptr[np.array([r.seqs[0] for r in runs])[run]]
        items[:, 3] = begins[run] + chunk * chunk_len[run]
        open_end = ends if options.exact_split is not None else OPEN_END
        items[:, 4] = np.where(is_last & is_open, open_end, closed)
        items[:, 5] = self.num_partials + np.cumsum(num_rows) - num_rows
        self.num_partials += int(num_rows.sum())
        return items

    def rows(self) -> Int32Array:
        return np.array(self._rows, dtype=np.int32)

    def merges(self, items: Int32Array, num_tokens: int) -> tuple[Int32Array, Int32Array]:
        """Return merge_indptr and merge_indices: the partial results of each token in the order of positions."""
        item = np.repeat(np.arange(len(items)), items[:, 1])
        offset = np.arange(len(item)) - (np.cumsum(items[:, 1]) - items[:, 1])[item]
        token = self.rows()[items[item, 0] + offset] if len(item) else np.zeros(0, dtype=np.int32)
        order = np.lexsort((items[item, 3], token))
        indptr = np.zeros(num_tokens + 1, dtype=np.int32)
        np.cumsum(np.bincount(token, minlength=num_tokens), out=indptr[1:])
        return indptr, (items[item, 5] + offset)[order].astype(np.int32)


def _longest_first(items: Int32Array) -> Int32Array:
    """Return the items so that programs, which take them in turn, end at nearly the same time."""
    ends = np.where(items[:, 4] == OPEN_END, items[:, 3].astype(np.int64), items[:, 4])
    return np.ascontiguousarray(items[np.argsort(items[:, 3] - ends, kind="stable")])


def _growth(runs: Sequence[Run], kv_lens: Int32Array, options: Options) -> int:
    """Return by how many tokens sequences may grow: none may pass the end of its last run or chunk."""
    open_seqs = {run.seqs[0]: run for run in runs if run.is_open}
    growth = options.min_split
    for seq in {seq for run in runs for seq in run.seqs}:
        if seq not in open_seqs:
            return 0
        if options.exact_split is not None:
            growth = min(growth, -int(kv_lens[seq]) % options.exact_split)
    return growth
