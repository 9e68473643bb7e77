"""From shared segments to work items: what one step of decode reads, once per segment and not once per sequence.

    segments --fold--> runs --split, tile--> items --> partial results --merge--> tokens

A *run* is a stretch of keys read for a set of query rows; a segment becomes a run where reading it once saves more than
the partial results cost, else it is read as a part of each branch's run. Runs are cut into chunks so that all programs
have equal shares, and their rows into tiles. All of it is arithmetic on small integers: no torch, no device.

In exact mode (`Options.exact_split`) chunks end at multiples of a fixed number of positions, a run that is shared ends
at such a multiple and its rest is read by each branch, and all rows go through tiles of one size. Then the order of
every sum depends on positions only: a sequence gets the same bits alone, in any batch and beside any tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bough.kernels.segments import Segment

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
class Options:
    """What a plan is made for.

    num_programs, wide_programs: how many programs of narrow and of wide items run at a time (a few per
    multiprocessor). group: query heads per KV head.
    narrow_rows, wide_rows: rows of the two tile sizes; an item's tokens times `group` fill them. block_n: keys of a
    tile, which chunks are multiples of. min_split: shortest chunk, in tokens. exact_split: see the module; a multiple
    of block_n. window: keys that a query sees at most, None for all.

    Costs, in tokens of KV read for one KV head (to be measured on each device): item_tokens, starting an item;
    partial_tokens, writing and merging one more partial result of one token's group of heads, 8 in bytes for heads of
    16 bits. min_shared_tokens: shorter segments are never shared, whatever they save. share=False reads every
    sequence by itself, for comparison.
    """

    num_kv_heads: int
    group: int
    num_programs: int
    wide_programs: int
    narrow_rows: int = 16
    wide_rows: int = 64
    block_n: int = 64
    min_split: int = 128
    exact_split: int | None = None
    window: int | None = None
    item_tokens: float = 64.0
    partial_tokens: float = 8.0
    min_shared_tokens: int = 64
    share: bool = True

    def __post_init__(self) -> None:
        if self.exact_split is not None and self.exact_split % self.block_n:
            raise ValueError(f"exact_split {self.exact_split} is not a multiple of block_n {self.block_n}")
        if self.min_split % self.block_n:
            raise ValueError(f"min_split {self.min_split} is not a multiple of block_n {self.block_n}")


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


@dataclass(frozen=True, slots=True)
class Run:
    """Positions [begin, end) of sequence seqs[0], read for all of `seqs`; is_open where it grows with them."""

    begin: int
    end: int
    seqs: tuple[int, ...]
    is_open: bool


def plan_tree(
    segments: Sequence[Segment], qo_indptr: Int32Array, kv_indptr: Int32Array, kv_lens: Int32Array, options: Options
) -> TreePlan:
    """Return the plan for the sequences in `segments`, whose tokens are qo_indptr[b]:qo_indptr[b + 1].

    Tokens of other sequences have no partial results. kv_lens includes the new tokens.
    """
    runs = fold(segments, kv_lens, options)
    if options.window is not None:
        runs = [run for run in (_trimmed(run, qo_indptr, kv_lens, options) for run in runs) if run is not None]
    num_rows = [sum(int(qo_indptr[seq + 1] - qo_indptr[seq]) for seq in run.seqs) for run in runs]
    is_wide = [options.exact_split is None and rows * options.group > options.narrow_rows for rows in num_rows]
    builder = _Builder(qo_indptr, kv_indptr, options)
    narrow_runs = [run for run, wide in zip(runs, is_wide, strict=True) if not wide]
    wide_runs = [run for run, wide in zip(runs, is_wide, strict=True) if wide]
    narrow = builder.items(narrow_runs, options.narrow_rows, options.num_programs)
    wide = builder.items(wide_runs, options.wide_rows, options.wide_programs)
    merge_indptr, merge_indices = builder.merges(np.concatenate([narrow, wide]), int(qo_indptr[-1]))
    return TreePlan(
        _longest_first(narrow),
        _longest_first(wide),
        builder.rows(),
        merge_indptr,
        merge_indices,
        builder.num_partials,
        _growth(runs, kv_lens, options),
    )


def fold(segments: Sequence[Segment], kv_lens: Int32Array, options: Options) -> list[Run]:
    """Return the runs that cover every position of every sequence once; which segments are shared is decided here."""
    children: list[list[int]] = [[] for _ in segments]
    for index, segment in enumerate(segments):
        if segment.parent >= 0:
            children[segment.parent].append(index)
    begins = [0] * len(segments)  # where a segment's run begins: earlier than the segment if the parent is not shared
    runs = []
    for index, segment in enumerate(segments):
        begin = begins[index]
        going_on = {seq for child in children[index] for seq in segments[child].seqs}
        ended = tuple(seq for seq in segment.seqs if seq not in going_on)
        end = _shared_end(segment, begin, len(children[index]) + len(ended), kv_lens, options)
        if end > begin:
            runs.append(Run(begin, end, segment.seqs, is_open=len(segment.seqs) == 1))
        for child in children[index]:
            begins[child] = end
        runs.extend(Run(end, int(kv_lens[seq]), (seq,), True) for seq in ended if kv_lens[seq] > end)
    return runs


def _shared_end(segment: Segment, begin: int, num_branches: int, kv_lens: Int32Array, options: Options) -> int:
    """Return where the run of a segment ends; `begin` if it is not worth one and its branches read it themselves."""
    if len(segment.seqs) == 1:
        return segment.end
    end = segment.end
    if options.exact_split is not None:
        end -= end % options.exact_split
    length = end - begin
    saved = (num_branches - 1) * length
    if not options.share or length < options.min_shared_tokens or saved <= options.partial_tokens * len(segment.seqs):
        return begin
    return end


def _trimmed(run: Run, qo_indptr: Int32Array, kv_lens: Int32Array, options: Options) -> Run | None:
    """Return the run without the chunks that lie before every query's window, None if that is all of it."""
    assert options.window is not None
    first = min(int(kv_lens[seq]) - int(qo_indptr[seq + 1] - qo_indptr[seq]) + 1 for seq in run.seqs) - options.window
    step = options.exact_split or options.block_n
    begin = max(run.begin, first // step * step)
    return Run(begin, run.end, run.seqs, run.is_open) if begin < run.end else None


def choose_split(
    lengths: npt.NDArray[np.int64], num_tiles: npt.NDArray[np.int64], num_programs: int, options: Options
) -> int:
    """Return the chunk length, in tokens, at which programs finish soonest by the costs given.

    lengths, num_tiles: (num_runs,), tokens and row tiles of each run. Estimated time: rounds of items over the
    programs, each the mean item plus the cost of starting it, and not less than the longest item.
    """
    longest = int(lengths.max())
    best, best_time = options.min_split, float("inf")
    split = options.min_split
    while True:
        chunks = -(-lengths // split)
        count = int((chunks * num_tiles).sum()) * options.num_kv_heads
        mean = float((lengths * num_tiles).sum()) * options.num_kv_heads / count
        time = max(-(-count // num_programs) * (mean + options.item_tokens), min(split, longest))
        if time < best_time:
            best, best_time = split, time
        if split >= longest:
            return best
        step = max(options.block_n, split // 4 // options.block_n * options.block_n)
        split += step


class _Builder:
    """Collects the rows and partial results of one plan while its items are made."""

    def __init__(self, qo_indptr: Int32Array, kv_indptr: Int32Array, options: Options) -> None:
        self._qo_indptr, self._kv_indptr, self._options = qo_indptr, kv_indptr, options
        self._rows: list[int] = []
        self.num_partials = 0

    def items(self, runs: Sequence[Run], tile_rows: int, num_programs: int) -> Int32Array:
        """Return the items of runs whose rows go into tiles of one size: (num_items, ITEM_FIELDS)."""
        if not runs:
            return np.zeros((0, ITEM_FIELDS), dtype=np.int32)
        per_tile = max(1, tile_rows // self._options.group)
        tiles = []  # (run, first row, number of rows)
        for index, run in enumerate(runs):
            first = len(self._rows)
            for seq in run.seqs:
                self._rows.extend(range(int(self._qo_indptr[seq]), int(self._qo_indptr[seq + 1])))
            tiles += [
                (index, row, min(per_tile, len(self._rows) - row)) for row in range(first, len(self._rows), per_tile)
            ]
        return self._cut(runs, np.array(tiles, dtype=np.int64), num_programs)

    def _cut(self, runs: Sequence[Run], tiles: npt.NDArray[np.int64], num_programs: int) -> Int32Array:
        """Return one item for each tile and chunk; chunks of a run are equal, or end at fixed positions."""
        begins = np.array([run.begin for run in runs], dtype=np.int64)
        lengths = np.array([run.end for run in runs], dtype=np.int64) - begins
        options = self._options
        if options.exact_split is not None:
            chunk_len = np.full(len(runs), options.exact_split, dtype=np.int64)
        else:
            num_tiles = np.bincount(tiles[:, 0], minlength=len(runs))
            count = -(-lengths // choose_split(lengths, num_tiles, num_programs, options))
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
