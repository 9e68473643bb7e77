"""The definition of every kernel in plain PyTorch: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

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
) -> torch.Tensor:
    """Attend each query to the keys at its own and earlier positions of its sequence.

    q: (num_tokens, num_heads, head_dim); sequence b owns queries qo_indptr[b]:qo_indptr[b+1], which stand at the last
    positions of its kv_lens[b] tokens. k_pages, v_pages: (num_pages, page_size, num_kv_heads, head_dim); page i of
    sequence b is kv_indices[kv_indptr[b] + i] and holds positions [i * page_size, (i + 1) * page_size). Query head h
    reads key/value head h // (num_heads / num_kv_heads).

        out[i] = softmax(scale * q[i] · K[:p_i + 1]ᵀ) · V[:p_i + 1]        p_i the position of query i

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
            scores = torch.einsum("hd,lhd->hl", q[i], keys[:length]) * scale
            out[i] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[:length])
    return out
