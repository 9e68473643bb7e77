"""Attention over paged KV on the CPU, with a fixed order of summation.

The bits of a query's result depend on its position and its sequence's tokens only: not on the batch, not on how a
prefill was cut into chunks, not on whether earlier KV was computed in this step or lay in the pool. Both paths get
there by doing every piece of work in a shape that absolute positions fix:

    prefill   queries in blocks [16 j, 16 j + 16), absent ones as zero rows, over keys [0, 16 j + 16) under the causal
              mask, one call of PyTorch's flash attention per block. It costs the same per row at 16 rows as at 256
              (27 to 29 us a row at 1,024 keys, 8 heads of 64, one core), so a small block wastes least.
    decode    keys in chunks [128 c, 128 c + 128), each one item of a batched product of fixed shape, then the chunks
              of a sequence are merged in order. All sequences at once: batched products were bit-equal at every batch
              size tried (1 to 97), and are 5 times faster than flash attention with one query row.

Positions that a block or chunk has beyond the sequence's end read the slot of its last token and are masked: nothing
stale is ever read, so nothing (0 * NaN) can leak. Prefill and decode do not agree bit by bit with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.paged_kv import PagedKV

QUERY_BLOCK = 16
KEY_CHUNK = 128
_GROUP_ELEMENTS = 1 << 19  # keys' elements gathered at a time: 2 MB of float32, which stay in the cache
_MERGE_WIDTH = 16  # the chunk axis is padded to this, so that a vectorised softmax sums it in one order

_Int32Array = npt.NDArray[np.int32]
_Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence's prefill: queries [token, token + num_new) stand at positions start, start + 1, ...

    slots: (padded length,) int64, the slot of every key position up to the end of the last query block.
    """

    token: int
    num_new: int
    start: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Decode:
    """All decode sequences of a step, cut into items of KEY_CHUNK key positions.

    tokens: (num_seqs,) int64, the query of each sequence. owner: (num_items,) int64, an item's sequence.
    slots: (num_items, KEY_CHUNK) int64.
    bias: (num_items, 1, KEY_CHUNK) float32, 0 or -inf beyond the end.
    merge: (num_seqs, padded chunks) int64, the items of a sequence in order; num_items where there is none.
    num_chunks: most items of a sequence.
    """

    tokens: torch.Tensor
    owner: torch.Tensor
    slots: torch.Tensor
    bias: torch.Tensor
    merge: torch.Tensor
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The index tensors of one step; `mask` is the causal mask of a query block, aligned to its right edge."""

    num_heads: int
    num_kv_heads: int
    prefills: tuple[_Prefill, ...]
    mask: torch.Tensor
    decode: _Decode | None


def make_plan(
    qo_indptr: _Int32Array,
    kv_indptr: _Int32Array,
    kv_indices: _Int32Array,
    kv_lens: _Int32Array,
    is_decode: npt.NDArray[np.bool_],
    page_size: int,
    num_heads: int,
    num_kv_heads: int,
) -> Plan:
    """Return the plan of a step; arguments as in `attention.PagedLayout`."""
    prefills = []
    for b in np.flatnonzero(~is_decode):
        num_new, kv_len = int(qo_indptr[b + 1] - qo_indptr[b]), int(kv_lens[b])
        end = _round_up(kv_len, QUERY_BLOCK)
        seqs, positions = np.full(end, b, dtype=np.int64), np.arange(end, dtype=np.int64)
        slots = _slots(seqs, positions, kv_indptr, kv_indices, kv_lens, page_size)
        prefills.append(_Prefill(int(qo_indptr[b]), num_new, kv_len - num_new, torch.from_numpy(slots)))
    decode = np.flatnonzero(is_decode)
    return Plan(
        num_heads,
        num_kv_heads,
        tuple(prefills),
        _block_mask(max((len(prefill.slots) for prefill in prefills), default=0), num_heads // num_kv_heads),
        _plan_decode(decode, qo_indptr, kv_indptr, kv_indices, kv_lens, page_size) if len(decode) else None,
    )


def _slots(
    seqs: _Int64Array,
    positions: _Int64Array,
    kv_indptr: _Int32Array,
    kv_indices: _Int32Array,
    kv_lens: _Int32Array,
    page_size: int,
) -> _Int64Array:
    """Return the slot of each (sequence, position); positions beyond the end give the last token's slot."""
    inside = np.minimum(positions, kv_lens[seqs].astype(np.int64) - 1)
    page, offset = np.divmod(inside, page_size)
    slots: _Int64Array = kv_indices[kv_indptr[seqs] + page].astype(np.int64) * page_size + offset
    return slots


def _block_mask(longest: int, group: int) -> torch.Tensor:
    """Return (group * QUERY_BLOCK, longest) float32: row (g, i) may see all but the columns right of its own."""
    mask = torch.zeros(group * QUERY_BLOCK, longest)
    if longest:
        corner = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf")).triu(1)
        mask[:, -QUERY_BLOCK:] = corner.repeat(group, 1)
    return mask


def _plan_decode(
    seqs: npt.NDArray[np.intp],
    qo_indptr: _Int32Array,
    kv_indptr: _Int32Array,
    kv_indices: _Int32Array,
    kv_lens: _Int32Array,
    page_size: int,
) -> _Decode:
    lens = kv_lens[seqs].astype(np.int64)
    chunks = -(-lens // KEY_CHUNK)
    owner = np.repeat(np.arange(len(seqs)), chunks)
    first_item = np.cumsum(chunks) - chunks
    chunk_of_item = np.arange(len(owner)) - first_item[owner]
    positions = chunk_of_item[:, None] * KEY_CHUNK + np.arange(KEY_CHUNK)
    slots = _slots(np.asarray(seqs)[owner][:, None], positions, kv_indptr, kv_indices, kv_lens, page_size)
    bias = np.where(positions < lens[owner][:, None], np.float32(0), np.float32("-inf"))
    width = _round_up(int(chunks.max()), _MERGE_WIDTH)
    column = np.arange(width)
    merge = np.where(column < chunks[:, None], first_item[:, None] + column, len(owner))
    return _Decode(
        torch.from_numpy(qo_indptr[seqs].astype(np.int64)),
        torch.from_numpy(owner),
        torch.from_numpy(slots),
        torch.from_numpy(bias[:, None, :]),
        torch.from_numpy(merge),
        int(chunks.max()),
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def run(q: torch.Tensor, kv: PagedKV, plan: Plan, scale: float) -> torch.Tensor:
    """Compute one layer's attention; arguments as in `attention.paged_attention`."""
    out = torch.empty_like(q)
    for prefill in plan.prefills:
        end = prefill.token + prefill.num_new
        out[prefill.token : end] = _prefill(q[prefill.token : end], kv, prefill, plan, scale)
    if plan.decode is not None:
        tokens = plan.decode.tokens
        out[tokens] = _decode(q[tokens], kv, plan.decode, plan, scale)
    return out


def _prefill(q: torch.Tensor, kv: PagedKV, prefill: _Prefill, plan: Plan, scale: float) -> torch.Tensor:
    num_kv_heads, head_dim = plan.num_kv_heads, q.shape[-1]
    group = plan.num_heads // num_kv_heads
    first = prefill.start // QUERY_BLOCK  # the block that holds the first new position
    num_blocks = len(prefill.slots) // QUERY_BLOCK - first
    skipped = prefill.start - first * QUERY_BLOCK
    rows = q.new_zeros(num_blocks * QUERY_BLOCK, num_kv_heads, group, head_dim)
    rows[skipped : skipped + len(q)] = q.view(-1, num_kv_heads, group, head_dim)
    # (block, kv head, group * row, channel): the heads that share keys are rows of one product
    blocks = rows.view(num_blocks, QUERY_BLOCK, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    blocks = blocks.reshape(num_blocks, num_kv_heads, group * QUERY_BLOCK, head_dim)
    keys, values = (
        _of_slots(*stored, prefill.slots, q.dtype).transpose(0, 1).unsqueeze(0)
        for stored in ((kv.k, kv.k_scales), (kv.v, kv.v_scales))
    )
    out = torch.empty_like(blocks)
    for j in range(num_blocks):
        end = (first + j + 1) * QUERY_BLOCK
        out[j] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            blocks[j : j + 1], keys[:, :, :end], values[:, :, :end], attn_mask=plan.mask[:, -end:], scale=scale
        )[0][0]
    out = out.view(num_blocks, num_kv_heads, group, QUERY_BLOCK, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(-1, plan.num_heads, head_dim)[skipped : skipped + len(q)]


def _of_slots(
    pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return what some slots hold, (num_slots, num_kv_heads, head_dim) in `dtype`."""
    read = pages.flatten(0, 1).index_select(0, slots)
    return read if scales is None else (read * scales.flatten(0, 1).index_select(0, slots).unsqueeze(-1)).to(dtype)


def _decode(q: torch.Tensor, kv: PagedKV, decode: _Decode, plan: Plan, scale: float) -> torch.Tensor:
    """Attend one query per sequence: (num_seqs, num_heads, head_dim), all sums in float32."""
    num_kv_heads, head_dim = plan.num_kv_heads, q.shape[-1]
    group, num_items = plan.num_heads // num_kv_heads, len(decode.owner)
    # (kv head, item, group): the items of one head have one stride in the gathered keys, so each head is one product
    queries = (q.float() * scale).view(len(q), num_kv_heads, group, head_dim).transpose(0, 1)
    queries = queries.index_select(1, decode.owner)
    parts = _Parts.empty(num_kv_heads, num_items, group, head_dim)
    step = max(1, _GROUP_ELEMENTS // (KEY_CHUNK * num_kv_heads * head_dim))
    gathered = _Gathered(kv, min(step, num_items))
    for begin in range(0, num_items, step):
        end = min(begin + step, num_items)
        slots, bias = decode.slots[begin:end], decode.bias[begin:end]
        _attend_items(queries[:, begin:end], gathered, slots, bias, parts.slice(begin, end))
    # With one chunk each, merging would multiply by exactly 1.
    out = parts.means[:, :-1] if decode.num_chunks == 1 else _merge(parts, decode)
    return out.transpose(0, 1).reshape(len(q), plan.num_heads, head_dim).to(q.dtype)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What each item contributes, float32; the last one stands for chunks that a sequence does not have.

    means: (num_kv_heads, num_items + 1, group, head_dim), the weighted values. largest, sums: (num_kv_heads,
    num_items + 1, group), the largest score and the sum of exp(score - largest).
    """

    means: torch.Tensor
    largest: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, num_kv_heads: int, num_items: int, group: int, head_dim: int) -> _Parts:
        means = torch.empty(num_kv_heads, num_items + 1, group, head_dim)
        parts = cls(means, torch.empty(means.shape[:3]), torch.empty(means.shape[:3]))
        parts.means[:, -1], parts.largest[:, -1], parts.sums[:, -1] = 0.0, float("-inf"), 0.0
        return parts

    def slice(self, begin: int, end: int) -> _Parts:
        return _Parts(self.means[:, begin:end], self.largest[:, begin:end], self.sums[:, begin:end])


class _Gathered:
    """Reads the slots of some items into float32, in memory that the items of a layer take turns in.

    Fresh memory for each would be mapped and cleared by the kernel each time: 31 against 14 ms at 32 items a turn.
    """

    def __init__(self, kv: PagedKV, most_items: int) -> None:
        self._kv = kv
        self._shape = (KEY_CHUNK, kv.num_kv_heads, kv.head_dim)
        self._raw = torch.empty(most_items * KEY_CHUNK, *self._shape[1:], dtype=kv.k.dtype)
        self._wide = self._raw if kv.k.dtype == torch.float32 else torch.empty(self._raw.shape)

    def keys(self, slots: torch.Tensor) -> torch.Tensor:
        """Return (num_items, KEY_CHUNK, num_kv_heads, head_dim) float32, valid until the next call."""
        return self._read(self._kv.k, self._kv.k_scales, slots.view(-1))

    def values(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the values like `keys`."""
        return self._read(self._kv.v, self._kv.v_scales, slots.view(-1))

    def _read(self, pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        raw, wide = self._raw[: len(slots)], self._wide[: len(slots)]
        torch.index_select(pages.flatten(0, 1), 0, slots, out=raw)
        if raw.dtype != torch.float32:
            wide.copy_(raw)
        if scales is not None:
            wide.mul_(scales.flatten(0, 1).index_select(0, slots).unsqueeze(-1))
        return wide.view(-1, *self._shape)


def _attend_items(
    queries: torch.Tensor, gathered: _Gathered, slots: torch.Tensor, bias: torch.Tensor, parts: _Parts
) -> None:
    """Attend within each item and write `parts`. queries: (num_kv_heads, num_items, group, head_dim), scaled."""
    scores = torch.empty(*queries.shape[:3], KEY_CHUNK)
    keys = gathered.keys(slots)
    for head in range(len(queries)):
        torch.bmm(queries[head], keys[:, :, head].transpose(1, 2), out=scores[head])
    scores.add_(bias)
    weights = scores.softmax(-1)
    torch.amax(scores, -1, out=parts.largest)
    # The largest weight is exp(0) / sum: its inverse is the sum, without a second pass of exp.
    torch.reciprocal(weights.amax(-1), out=parts.sums)
    values = gathered.values(slots)
    for head in range(len(queries)):
        torch.bmm(weights[head], values[:, :, head], out=parts.means[head])


def _merge(parts: _Parts, decode: _Decode) -> torch.Tensor:
    """Merge the items of each sequence, in the order of positions: (num_kv_heads, num_seqs, group, head_dim)."""

    def per_sequence(part: torch.Tensor, width: int) -> torch.Tensor:
        index = decode.merge[:, :width]
        return part.index_select(1, index.reshape(-1)).view(len(part), *index.shape, *part.shape[2:])

    width = decode.merge.shape[1]
    largest = per_sequence(parts.largest, width).transpose(2, 3).contiguous()
    # Sums run chunk by chunk, absent chunks adding exact zeros: a longer neighbour in the batch changes no bit.
    shares = largest.softmax(-1).transpose(2, 3) * per_sequence(parts.sums, width)
    total = shares[:, :, 0]
    for c in range(1, decode.num_chunks):
        total = total + shares[:, :, c]
    shares = (shares / total.unsqueeze(2)).unsqueeze(-1)
    means = per_sequence(parts.means, decode.num_chunks)
    out = means[:, :, 0] * shares[:, :, 0]
    for c in range(1, decode.num_chunks):
        out = out + means[:, :, c] * shares[:, :, c]
    return out
