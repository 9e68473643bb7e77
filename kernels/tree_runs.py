"""Which stretches of keys a step reads once for several sequences: the shortest of a few ways, by a device's costs.

A segment becomes a run where reading it once saves more than that costs, else it is read as a part of each branch's
run. Then the step as a whole is compared with reading every sequence by itself, and the shorter way is taken: so tree
decode falls back to decode branch by branch where it would lose. Numbers only: no torch, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bough.kernels.segments import Segment
from bough.kernels.tree_costs import ESTIMATED, TreeCosts

_Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Options:
    """What a plan is made for.

    num_programs, wide_programs: how many programs of narrow and of wide items run at a time (a few per
    multiprocessor). group: query heads per KV head.
    narrow_rows, wide_rows: rows of the two tile sizes; an item's tokens times `group` fill them. block_n: keys of a
    tile, which chunks are multiples of. min_split: shortest chunk, in tokens. exact_split: see the module; a multiple
    of block_n. window: keys that a query sees at most, None for all.

    costs: what the device takes for the parts, by which ways to read are compared; measured where a model is loaded.
    min_shared_tokens: shorter segments are never shared, whatever they save. share=False reads every sequence by
    itself, for comparison.
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
    costs: TreeCosts = ESTIMATED
    min_shared_tokens: int = 64
    share: bool = True

    def __post_init__(self) -> None:
        if self.exact_split is not None and self.exact_split % self.block_n:
            raise ValueError(f"exact_split {self.exact_split} is not a multiple of block_n {self.block_n}")
        if self.min_split % self.block_n:
            raise ValueError(f"min_split {self.min_split} is not a multiple of block_n {self.block_n}")


@dataclass(frozen=True, slots=True)
class Run:
    """Positions [begin, end) of sequence seqs[0], read for all of `seqs`; is_open where it grows with them."""

    begin: int
    end: int
    seqs: tuple[int, ...]
    is_open: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A way to read a step's keys: runs of either tile, the chunk lengths, and how long it takes, in tokens."""

    narrow: list[Run]
    wide: list[Run]
    narrow_split: int
    wide_split: int
    duration: float


def shortest(segments: Sequence[Segment], qo_indptr: _Int32Array, kv_lens: _Int32Array, options: Options) -> Draft:
    """Return the shortest of: sharing what is worth it, the same without the wide tile's kernel, sharing nothing."""
    num_unique = sum(segment.end - segment.begin for segment in segments)

    def draft(runs: list[Run], *, narrow_only: bool = False) -> Draft:
        return _drafted(runs, qo_indptr, num_unique, options, narrow_only or options.exact_split is not None)

    runs = _in_window(fold(segments, qo_indptr, kv_lens, options), qo_indptr, kv_lens, options)
    shared = draft(runs)
    if all(len(run.seqs) == 1 for run in runs):
        return shared
    others = [draft(runs, narrow_only=True)] if shared.wide else []
    # Not even tried, for it takes time, where reading all alone would take longer on programs that never wait.
    alone = _alone(segments, qo_indptr, kv_lens, options)
    num_alone = sum(run.end - run.begin for run in alone)
    if shared.duration > num_alone * _read_cost(num_unique, num_alone, options) * _least_share(options):
        others.append(draft(alone))
    return min((shared, *others), key=lambda draft: draft.duration)


def _alone(segments: Sequence[Segment], qo_indptr: _Int32Array, kv_lens: _Int32Array, options: Options) -> list[Run]:
    """Return a run for each sequence."""
    seqs = dict.fromkeys(seq for segment in segments if segment.parent < 0 for seq in segment.seqs)
    return _in_window([Run(0, int(kv_lens[seq]), (seq,), True) for seq in seqs], qo_indptr, kv_lens, options)


def _in_window(runs: list[Run], qo_indptr: _Int32Array, kv_lens: _Int32Array, options: Options) -> list[Run]:
    if options.window is None:
        return runs
    return [run for run in (_trimmed(run, qo_indptr, kv_lens, options) for run in runs) if run is not None]


def _least_share(options: Options) -> float:
    """Return how long all programs together take to read a token, of all KV heads, in the cheaper tile."""
    shares = (1 / options.num_programs, options.costs.wide_token / options.wide_programs)
    return options.num_kv_heads * min(shares)


def _read_cost(num_unique: int, num_read: int, options: Options) -> float:
    """Return what reading a token costs on average: read again, it comes from the second-level cache."""
    fresh = min(num_unique, num_read)
    return (fresh + (num_read - fresh) * options.costs.again_token) / max(num_read, 1)


def _drafted(runs: list[Run], qo_indptr: _Int32Array, num_unique: int, options: Options, narrow_only: bool) -> Draft:
    """Return a way to read `runs`, of whose tokens num_unique are different ones."""
    costs = options.costs
    rows = [_num_rows(run.seqs, qo_indptr) for run in runs]
    is_wide = [not narrow_only and _is_wide(count, options) for count in rows]
    lengths = np.array([run.end - run.begin for run in runs], dtype=np.int64)
    num_rows, wide = np.array(rows, dtype=np.int64), np.array(is_wide, dtype=np.bool_)
    per_tile = np.where(wide, tokens_per_tile(options, is_wide=True), tokens_per_tile(options, is_wide=False))
    num_tiles = -(-num_rows // per_tile)
    read_cost = _read_cost(num_unique, int((lengths * num_tiles).sum()), options)
    splits, duration = [options.min_split, options.min_split], 0.0
    for index, (chosen, programs, token, item) in enumerate((
        (~wide, options.num_programs, read_cost, costs.item_tokens),
        (wide, options.wide_programs, read_cost * costs.wide_token, costs.wide_item_tokens),
    )):  # fmt: skip
        if chosen.any():
            work = (lengths[chosen], num_tiles[chosen], num_rows[chosen])
            splits[index], taken = choose_split(*work, programs, options, token=token, item=item)
            duration += taken + costs.launch_tokens
    narrow_runs = [run for run, wide in zip(runs, is_wide, strict=True) if not wide]
    wide_runs = [run for run, wide in zip(runs, is_wide, strict=True) if wide]
    return Draft(narrow_runs, wide_runs, splits[0], splits[1], duration)


def _num_rows(seqs: Sequence[int], qo_indptr: _Int32Array) -> int:
    if len(seqs) == 1:
        return int(qo_indptr[seqs[0] + 1] - qo_indptr[seqs[0]])
    places = np.array(seqs)
    return int((qo_indptr[places + 1] - qo_indptr[places]).sum())


def _is_wide(num_rows: int, options: Options) -> bool:
    return options.exact_split is None and num_rows * options.group > options.narrow_rows


def tokens_per_tile(options: Options, *, is_wide: bool) -> int:
    """Return how many tokens' rows a tile holds."""
    return max(1, (options.wide_rows if is_wide else options.narrow_rows) // options.group)


def fold(segments: Sequence[Segment], qo_indptr: _Int32Array, kv_lens: _Int32Array, options: Options) -> list[Run]:
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
        end = _shared_end(segment, begin, len(children[index]) + len(ended), qo_indptr, options)
        if end > begin:
            runs.append(Run(begin, end, segment.seqs, is_open=len(segment.seqs) == 1))
        for child in children[index]:
            begins[child] = end
        runs.extend(Run(end, int(kv_lens[seq]), (seq,), True) for seq in ended if kv_lens[seq] > end)
    return runs


def _shared_end(segment: Segment, begin: int, num_branches: int, qo_indptr: _Int32Array, options: Options) -> int:
    """Return where the run of a segment ends; `begin` if it is not worth one and its branches read it themselves.

    Reading it once per tile of rows, with a start of an item and a partial result of each row, must cost less than
    reading it once per branch.
    """
    if len(segment.seqs) == 1:
        return segment.end
    end = segment.end
    if options.exact_split is not None:
        end -= end % options.exact_split
    length = end - begin
    if not options.share or length < options.min_shared_tokens:
        return begin
    costs, num_rows = options.costs, _num_rows(segment.seqs, qo_indptr)
    is_wide = _is_wide(num_rows, options)
    num_tiles = -(-num_rows // tokens_per_tile(options, is_wide=is_wide))
    token, item = (costs.wide_token, costs.wide_item_tokens) if is_wide else (1.0, costs.item_tokens)
    if is_wide:  # fewer programs of it run at a time, so that each is a greater share of the device
        token, item = (cost * options.num_programs / options.wide_programs for cost in (token, item))
    by_branches = length * (1 + (num_branches - 1) * costs.again_token)
    together = length * token * (1 + (num_tiles - 1) * costs.again_token)
    extra = num_tiles * item + costs.partial_tokens * num_rows
    return end if together + extra < by_branches else begin


def _trimmed(run: Run, qo_indptr: _Int32Array, kv_lens: _Int32Array, options: Options) -> Run | None:
    """Return the run without the chunks that lie before every query's window, None if that is all of it."""
    assert options.window is not None
    first = min(int(kv_lens[seq]) - int(qo_indptr[seq + 1] - qo_indptr[seq]) + 1 for seq in run.seqs) - options.window
    step = options.exact_split or options.block_n
    begin = max(run.begin, first // step * step)
    return Run(begin, run.end, run.seqs, run.is_open) if begin < run.end else None


def choose_split(
    lengths: npt.NDArray[np.int64],
    num_tiles: npt.NDArray[np.int64],
    num_rows: npt.NDArray[np.int64],
    num_programs: int,
    options: Options,
    *,
    token: float = 1.0,
    item: float | None = None,
) -> tuple[int, float]:
    """Return the chunk length, in tokens, at which a step is done soonest by the costs given, and the time it takes.

    lengths, num_tiles, num_rows: (num_runs,), tokens, row tiles and rows of each run. token, item: what reading a token
    and starting an item cost. Estimated time: rounds of items over the programs, each the mean item plus the cost of
    starting it, and not less than the longest item; then the merge of all partial results. In exact mode the chunk
    length is given.
    """
    costs = options.costs
    item = costs.item_tokens if item is None else item
    longest = int(lengths.max())
    fixed = options.exact_split
    splits = np.array([fixed], dtype=np.int64) if fixed is not None else _splits(longest, options)
    chunks = -(-lengths // splits[:, None])
    count = chunks @ num_tiles * options.num_kv_heads
    mean = float((lengths * num_tiles).sum()) * options.num_kv_heads / count
    reading = np.maximum(-(-count // num_programs) * (mean * token + item), np.minimum(splits, longest) * token + item)
    merging = chunks @ num_rows * (options.num_kv_heads * costs.partial_tokens / num_programs)
    times = reading + merging
    best = int(times.argmin())
    return int(splits[best]), float(times[best])


def _splits(longest: int, options: Options) -> npt.NDArray[np.int64]:
    """Return the chunk lengths tried: each a quarter longer than the one before, until the longest run is one chunk."""
    splits = [options.min_split]
    while splits[-1] < longest:
        splits.append(splits[-1] + max(options.block_n, splits[-1] // 4 // options.block_n * options.block_n))
    return np.array(splits, dtype=np.int64)
