"""The definition of every kernel in plain PyTorch: slow, obvious, and what the fast ones are tested against."""

from __future__ import annotations

import math

import torch

from bough.kernels.paged_kv import QUANTISED_DTYPES, PagedKV


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


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s = x + residual (x without one) and s / sqrt(mean(s²) + eps) · weight over the last axis, in x's dtype.

    Computed in float32; s is rounded before the norm, and the norm before the weight, as transformers does.
    """
    s = x if residual is None else x + residual
    wide = s.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return s, normed.to(x.dtype) * weight


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up for gate_up (num_tokens, 2 * size), silu in float32 and rounded to the dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(up.dtype) * up


def quantise(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values (..., head_dim) in int8 or float8_e4m3fn and their scales (...,) float32.

    scale = max|values| / largest number of the dtype; a value is quantised · scale. Integers: nearest, halves up.
    """
    wide = values.float()
    scales = wide.abs().amax(-1) / QUANTISED_DTYPES[dtype]
    units = wide / scales.where(scales > 0, 1.0).unsqueeze(-1)
    return (units + 0.5).floor().to(dtype) if dtype == torch.int8 else units.to(dtype), scales


def dequantised(kv: PagedKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values that the pages stand for, float64."""
    if kv.k_scales is None or kv.v_scales is None:
        return kv.k.double(), kv.v.double()
    return kv.k.double() * kv.k_scales.unsqueeze(-1), kv.v.double() * kv.v_scales.unsqueeze(-1)


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: PagedKV, slots: torch.Tensor) -> None:
    """Write k, v (num_tokens, num_kv_heads, head_dim) into slots (num_tokens,), in place; skip negative slots."""
    stored = slots >= 0
    for values, pages, scales in ((k, kv.k, kv.k_scales), (v, kv.v, kv.v_scales)):
        written = values[stored]
        if scales is not None:
            written, row_scales = quantise(written, pages.dtype)
            scales.flatten(0, 1)[slots[stored]] = row_scales
        pages.flatten(0, 1)[slots[stored]] = written.to(pages.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return heads (num_tokens, num_heads, head_dim), channel pairs (i, i + head_dim / 2) turned, in their dtype.

    cos, sin: (num_tokens, head_dim / 2) float32 of each token's angles. Computed in float32.
    """
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)


def penalise(
    logits: torch.Tensor,
    indptr: torch.Tensor,
    token_ids: torch.Tensor,
    counts: torch.Tensor,
    biases: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Return logits (num_rows, vocab_size) with penalties and biases; arguments as in `logits.penalise`.

    In this order: a seen token's positive logit is divided and a negative one multiplied by `repetition`; a generated
    token's loses frequency · count + presence; the bias is added.
    """
    out = logits.clone()
    for row in range(len(logits)):
        for entry in range(int(indptr[row]), int(indptr[row + 1])):
            token, count = int(token_ids[entry]), int(counts[entry])
            value = out[row, token]
            if count >= 0:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            if count > 0:
                value = value - (frequency[row] * count + presence[row])
            out[row, token] = value + biases[entry]
    return out


def prepare_logits(
    logits: torch.Tensor, masks: torch.Tensor, mask_rows: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """Return logits (num_rows, vocab_size) in float32, -inf where a row's mask forbids, divided by its temperature.

    Bit i % 32 of word i // 32 of masks[mask_rows[row]] is set where token i is allowed; row -1 allows all. Temperature
    0 divides by nothing.
    """
    tokens = torch.arange(logits.shape[1])
    bits = (masks[:, tokens // 32] >> (tokens % 32)) & 1
    allowed = torch.where((mask_rows < 0).unsqueeze(1), True, bits[mask_rows.clamp(min=0)] != 0)
    masked = logits.float().masked_fill(~allowed, float("-inf"))
    return masked / temperatures.where(temperatures > 0, 1.0).unsqueeze(1)


def draw(logits: torch.Tensor, temperatures: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return (num_rows,) ids: argmax at temperature 0, else the first whose cumulative share is above the point.

    logits: prepared, (num_rows, vocab_size). points: (num_rows,) in [0, 1). -1 where every token is forbidden.
    """
    ends = logits.double().softmax(-1).cumsum(-1)
    inverted = torch.searchsorted(ends, points.unsqueeze(1), right=True).squeeze(1)
    chosen = torch.where(temperatures > 0, inverted, logits.argmax(-1))
    return torch.where(logits.isneginf().all(-1), -1, chosen)


def draw_filtered(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, points: torch.Tensor
) -> torch.Tensor:
    """Return (num_rows,) ids, drawn as `draw` does among the tokens that pass all of a row's filters.

    logits: prepared, (num_rows, vocab_size). Tokens rank by probability, equals by id: the first top_k of them pass,
    those before which less than top_p of the whole ranks, and those of at least min_p times the largest probability.
    """
    probs, order = logits.double().softmax(-1).sort(stable=True, dim=-1, descending=True)
    before = probs.cumsum(-1) - probs
    passes = (torch.arange(logits.shape[1]) < top_k.unsqueeze(1)) & (before < top_p.unsqueeze(1))
    passes &= probs >= min_p.unsqueeze(1).double() * probs[:, :1]
    kept = torch.zeros_like(probs).scatter(1, order, probs.where(passes, 0.0))
    ends = kept.cumsum(-1)
    return torch.searchsorted(ends, points.unsqueeze(1) * ends[:, -1:], right=True).squeeze(1)
