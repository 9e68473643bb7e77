"""Sequences over shuffled pages that share what their paths share, with NaN in every slot that holds no token."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from bough.kernels.attention import PagedLayout

Path = tuple[tuple[str, int], ...]  # (name of a piece of text, its tokens), from the root


@dataclass(frozen=True)
class PagedCase:
    """A layout with queries and KV; `layout.kv_indices` may name pages that several sequences share."""

    layout: PagedLayout
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor


def make_case(
    paths: list[tuple[Path, int]],
    heads: tuple[int, int, int] = (4, 2, 32),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedCase:
    """Return the case of sequences (path, number of new tokens at its end); heads: query heads, KV heads, channels.

    Sequences whose paths begin alike share the full pages of what is alike; the page in which they part is copied.
    """
    num_heads, num_kv_heads, head_dim = heads
    page_of: dict[tuple[tuple[str, int], ...], int] = {}
    rows = [_page_keys(path, page_size) for path, _ in paths]
    for key in (key for row in rows for key in row):
        page_of.setdefault(key, len(page_of))
    shuffled = np.random.default_rng(seed).permutation(len(page_of) + 3).astype(np.int32)
    shape = (len(page_of) + 3, page_size, num_kv_heads, head_dim)
    k_pages, v_pages = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    for key, index in page_of.items():
        for offset, (name, place) in enumerate(
            key[-page_size:] if len(key) % page_size == 0 else _last(key, page_size)
        ):
            k, v = _token(f"{seed} {name} {place}", num_kv_heads, head_dim)
            k_pages[shuffled[index], offset], v_pages[shuffled[index], offset] = k.to(dtype), v.to(dtype)
    kv_lens = np.array([sum(length for _, length in path) for path, _ in paths], dtype=np.int32)
    num_new = np.array([count for _, count in paths])
    queries = torch.Generator().manual_seed(seed)
    layout = PagedLayout(
        _indptr(num_new),
        _indptr(np.array([len(row) for row in rows])),
        np.array([shuffled[page_of[key]] for row in rows for key in row], dtype=np.int32),
        kv_lens,
        num_new == 1,
        page_size,
    )
    q = torch.randn(int(num_new.sum()), num_heads, head_dim, generator=queries).to(dtype)
    return PagedCase(layout, q, k_pages, v_pages)


def _page_keys(path: Path, page_size: int) -> list[tuple[tuple[str, int], ...]]:
    """Return what each page of a sequence stands for: the text up to its end."""
    text = tuple((name, place) for name, length in path for place in range(length))
    return [text[: start + page_size] for start in range(0, len(text), page_size)]


def _last(key: tuple[tuple[str, int], ...], page_size: int) -> tuple[tuple[str, int], ...]:
    return key[len(key) // page_size * page_size :]


def _token(name: str, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    k, v = torch.randn(2, num_kv_heads, head_dim, generator=generator)
    return k, v


def _indptr(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
