"""The definition of every kernel in plain PyTorch: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import math

import torch


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attend each query to the keys at its own and earlier positions of its sequence.

    q: (num_tokens, num_heads, head_dim); sequence b owns queries qo_indptr[b]:qo_indptr[b+1], which stand at the last
    positions of its kv_lens[b] tokens. k_pages, v_pages: (num_pages, page_size, num_kv_heads, head_dim); page i of
    sequence b is kv_indices[kv_indptr[b] + i] and holds positions [i * page_size, (i + 1) * page_size). Query head h
    reads key/value head h // (num_heads / num_kv_heads).

        out[i] = softmax(scale * q[i] · K[:p_i + 1]ᵀ) · V[:p_i + 1]        p_i the position of query i

    With `window` only the last `window` of these keys are seen, the query's own among them; with `soft_cap` a score x
    becomes soft_cap * tanh(x / soft_cap), as in Gemma 2.

    Returns (num_tokens, num_heads, head_dim) in q's dtype; all sums in q's dtype. Slots beyond kv_lens are not read.
    """
    page_size, num_kv_heads = k_pages.shape[1:3]
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    for b in range(len(kv_lens)):
        begin, end, kv_len = int(qo_indptr[b]), int(qo_indptr[b + 1]), int(kv_lens[b])
        pages = kv_indices[int(kv_indptr[b]) : int(kv_indptr[b + 1])].long()
        assert len(pages) * page_size >= kv_len, "a sequence has fewer slots than tokens"
        keys = k_pages[pages].flatten(0, 1)[:kv_len].to(q.dtype).repeat_interleave(group, dim=1)
        values = v_pages[pages].flatten(0, 1)[:kv_len].to(q.dtype).repeat_interleave(group, dim=1)
        for i in range(begin, end):
            length = kv_len - (end - 1 - i)
            first = max(0, length - window) if window is not None else 0
            scores = _scores(q[i], keys[first:length], scale, soft_cap)
            out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[first:length])
    return out


def _scores(q: torch.Tensor, keys: torch.Tensor, scale: float, soft_cap: float | None) -> torch.Tensor:
    """Return (num_heads, length) scores of one query (num_heads, head_dim) with keys (length, num_heads, head_dim)."""
    scores = torch.einsum("hd,lhd->hl", q, keys) * scale
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def attend_items(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    kv_indices: torch.Tensor,
    visible_lens: torch.Tensor,
    items: torch.Tensor,
    rows: torch.Tensor,
    num_partials: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial results of work items (see `tree_plan.Item`): out and lse, NaN where no item writes.

    Row i of an item is token t = rows[row_begin + i]; it attends to positions [begin, min(end, visible_lens[t])) and
    gives the weighted mean of their values and lse = log2(sum(exp(score))); 0 and -inf if there are none.
    """
    page_size, num_kv_heads = k_pages.shape[1:3]
    out = torch.full((num_partials, *q.shape[1:]), torch.nan, dtype=q.dtype)
    lse = torch.full((num_partials, q.shape[1]), torch.nan, dtype=q.dtype)
    for row_begin, num_rows, page_begin, begin, end, part_begin, *_ in items.tolist():
        for i in range(num_rows):
            token = int(rows[row_begin + i])
            positions = torch.arange(begin, max(begin, min(end, int(visible_lens[token]))))
            slots = kv_indices[page_begin + positions // page_size].long() * page_size + positions % page_size
            group = q.shape[1] // num_kv_heads
            keys = k_pages.flatten(0, 1)[slots].to(q.dtype).repeat_interleave(group, dim=1)
            values = v_pages.flatten(0, 1)[slots].to(q.dtype).repeat_interleave(group, dim=1)
            scores = _scores(q[token], keys, scale, None)
            out[part_begin + i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values)
            lse[part_begin + i] = scores.logsumexp(-1) / math.log(2)
    return out, lse


def merge_partials(
    part_out: torch.Tensor, part_lse: torch.Tensor, merge_indptr: torch.Tensor, merge_indices: torch.Tensor
) -> torch.Tensor:
    """Return (num_tokens, num_heads, head_dim): sum_p 2^lse[p] · part_out[p] / sum_p 2^lse[p] over a token's partials.

    Arguments as in `merge.merge_partials`. A token without partials gives NaN.
    """
    out = part_out.new_full((len(merge_indptr) - 1, *part_out.shape[1:]), torch.nan)
    for token in range(len(out)):
        parts = merge_indices[int(merge_indptr[token]) : int(merge_indptr[token + 1])].long()
        if len(parts):
            weights = (part_lse[parts] * math.log(2)).softmax(0)
            out[token] = (weights.unsqueeze(-1) * part_out[parts]).sum(0)
    return out
