"""CPU attention against its definition in float64, at odd shapes, over scattered pages with NaN in every other slot.

Every test runs on both implementations, the compiled one and PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bough.kernels import native_attention
from bough.kernels.attention import Implementation, PagedLayout, choose_attention, paged_attention, store_kv
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import dequantised
from bough.kernels.reference import paged_attention as definition

CPU = torch.device("cpu")
HEADS = [(4, 4, 16), (4, 2, 32), (8, 1, 64), (14, 2, 64), (6, 2, 80)]  # multi-head, grouped, multi-query
# (tokens of the sequence, new ones), around the sizes of query blocks (16), key chunks (128) and pages
SEQUENCES = [
    (1, 1),
    (15, 15),
    (16, 16),
    (17, 17),
    (40, 3),
    (128, 1),
    (129, 1),
    (300, 1),
    (300, 37),
    (1000, 1),
    (33, 33),
]


@dataclass
class Case:
    layout: PagedLayout
    q: torch.Tensor
    kv: PagedKV


def make_case(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int, int] = (4, 2, 32),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> Case:
    """Return sequences (kv_len, new tokens) over shuffled pages; their content depends on seed and place."""
    num_heads, num_kv_heads, head_dim = heads
    num_pages = [-(-kv_len // page_size) for kv_len, _ in sequences]
    order = np.random.default_rng(seed).permutation(sum(num_pages) + 3).astype(np.int32)[: sum(num_pages)]
    shape = (sum(num_pages) + 3, page_size, num_kv_heads, head_dim)
    kv = nan_pages(shape, kv_dtype or dtype)
    kv_indptr = np.concatenate([[0], np.cumsum(num_pages)]).astype(np.int32)
    queries = []
    for b, (kv_len, num_new) in enumerate(sequences):
        generator = torch.Generator().manual_seed(1000 * seed + b)
        k, v = (torch.randn(kv_len, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        queries.append(torch.randn(kv_len, num_heads, head_dim, generator=generator).to(dtype)[kv_len - num_new :])
        positions = np.arange(kv_len)
        slots = order[kv_indptr[b] + positions // page_size].astype(np.int64) * page_size + positions % page_size
        store_kv(k, v, kv, torch.from_numpy(slots))
    layout = PagedLayout(
        np.concatenate([[0], np.cumsum([n for _, n in sequences])]).astype(np.int32),
        kv_indptr,
        order,
        np.array([kv_len for kv_len, _ in sequences], dtype=np.int32),
        np.array([n == 1 for _, n in sequences]),
        page_size,
    )
    return Case(layout, torch.cat(queries), kv)


def nan_pages(shape: tuple[int, ...], dtype: torch.dtype) -> PagedKV:
    """Return pages in which every slot is NaN, or every scale of int8 pages."""
    if dtype == torch.int8:
        return PagedKV(*torch.full((2, *shape), 99, dtype=dtype), *torch.full((2, *shape[:3]), torch.nan))
    return PagedKV(*torch.full((2, *shape), torch.nan, dtype=dtype))


@pytest.fixture(params=["native", "torch"])
def how(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "native" and not native_attention.works(4, 2, 64, torch.float32):
        pytest.skip("the compiled attention was not built here")
    chosen: Implementation = request.param
    return chosen


def run(case: Case, how: Implementation, *, share: bool = True) -> torch.Tensor:
    num_heads, num_kv_heads, head_dim = case.q.shape[1], case.kv.num_kv_heads, case.kv.head_dim
    attention = choose_attention(num_heads, num_kv_heads, head_dim, case.q.dtype, CPU, how, share=share)
    return paged_attention(case.q, case.kv, attention.plan(case.layout), case.q.shape[-1] ** -0.5)


def run_definition(case: Case) -> torch.Tensor:
    layout = case.layout
    qo_indptr, kv_indptr = torch.from_numpy(layout.qo_indptr), torch.from_numpy(layout.kv_indptr)
    kv_indices, kv_lens = torch.from_numpy(layout.kv_indices), torch.from_numpy(layout.kv_lens)
    q, (k, v) = case.q.double(), dequantised(case.kv)
    return definition(q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_float32_agrees_with_the_definition(heads: tuple[int, int, int], page_size: int, how: Implementation) -> None:
    case = make_case(SEQUENCES, heads, page_size)
    torch.testing.assert_close(run(case, how).double(), run_definition(case), atol=2e-6, rtol=0)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_bfloat16_agrees_with_the_definition(heads: tuple[int, int, int], how: Implementation) -> None:
    """The result is rounded to 8 bits; inputs of the definition are the same rounded ones."""
    case = make_case(SEQUENCES, heads, dtype=torch.bfloat16)
    torch.testing.assert_close(run(case, how).double(), run_definition(case), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_int8_pages_agree_with_the_definition_on_what_they_stand_for(
    heads: tuple[int, int, int], dtype: torch.dtype, how: Implementation
) -> None:
    case = make_case(SEQUENCES, heads, page_size=5, dtype=dtype, kv_dtype=torch.int8)
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(run(case, how).double(), run_definition(case), atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_pages_stand_for_what_was_stored_to_half_a_step(dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    k[2], v[3, 1] = 0, k[0, 1] * 1e30
    kv, slots = nan_pages((3, 4, 2, 32), torch.int8), torch.tensor([11, 0, 5, 7, 2, 1])
    store_kv(k, v, kv, slots)
    for found, given in zip(dequantised(kv), (k, v), strict=True):
        steps = given.double().abs().amax(-1, keepdim=True) / 127
        assert ((found.flatten(0, 1)[slots] - given.double()).abs() <= 0.5001 * steps).all()
    assert kv.k_scales is not None
    assert kv.k_scales.flatten(0, 1)[[3, 4, 6, 8, 9, 10]].isnan().all(), "other slots are left alone"


def test_the_definition_is_scaled_dot_product_attention() -> None:
    case = make_case([(50, 50)], (4, 4, 16))
    pages = torch.from_numpy(case.layout.kv_indices).long()
    k, v = (x[pages].flatten(0, 1)[:50].transpose(0, 1).double() for x in (case.kv.k, case.kv.v))
    expected = torch.nn.functional.scaled_dot_product_attention(case.q.transpose(0, 1).double(), k, v, is_causal=True)
    torch.testing.assert_close(run_definition(case), expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(
    heads: tuple[int, int, int], dtype: torch.dtype, how: Implementation
) -> None:
    whole = run(make_case(SEQUENCES, heads, dtype=dtype), how)
    ends = np.cumsum([n for _, n in SEQUENCES])
    for count in (1, 2, 5, 8):
        part = run(make_case(SEQUENCES[:count], heads, dtype=dtype), how)
        assert torch.equal(part, whole[: ends[count - 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_gives_the_same_bits_in_batches_of_1_to_40(
    heads: tuple[int, int, int], dtype: torch.dtype, how: Implementation
) -> None:
    sequences = [(1 + 37 * i % 700, 1) for i in range(40)]
    whole = run(make_case(sequences, heads, dtype=dtype), how)
    for count in range(1, 40, 3):
        assert torch.equal(run(make_case(sequences[:count], heads, dtype=dtype), how), whole[:count])


def tensors_of(kv: PagedKV) -> list[torch.Tensor]:
    return [tensor for tensor in (kv.k, kv.v, kv.k_scales, kv.v_scales) if tensor is not None]


@pytest.mark.parametrize("kind", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.int8)], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_prefill_gives_the_same_bits_in_any_chunks(
    heads: tuple[int, int, int], kind: tuple[torch.dtype, torch.dtype], how: Implementation
) -> None:
    """A chunk sees only the slots written so far: the keys that its last block lacks are NaN here."""
    dtype, kv_dtype = kind
    whole = make_case([(200, 200)], heads, dtype=dtype, kv_dtype=kv_dtype)
    expected = run(whole, how)
    for chunk in (1, 7, 16, 50, 199):
        written = nan_pages(tuple(whole.kv.k.shape), kv_dtype)
        for start in range(0, 200, chunk):
            end = min(start + chunk, 200)
            pages = whole.layout.kv_indices[: -(-end // 16)]
            positions = np.arange(start, end)
            slots = pages[positions // 16].astype(np.int64) * 16 + positions % 16
            for to, source in zip(tensors_of(written), tensors_of(whole.kv), strict=True):
                to.flatten(0, 1)[slots] = source.flatten(0, 1)[slots]
            layout = PagedLayout(
                np.array([0, end - start], dtype=np.int32),
                np.array([0, len(pages)], dtype=np.int32),
                pages,
                np.array([end], dtype=np.int32),
                np.array([False]),
                16,
            )
            part = run(Case(layout, whole.q[start:end], written), how)
            assert torch.equal(part, expected[start:end])


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no kernels for device 'meta'"):
        choose_attention(4, 2, 64, torch.float32, torch.device("meta"))


def test_native_attention_that_was_asked_for_and_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"native attention does not work here for heads of 24 in torch\.float32"):
        choose_attention(4, 2, 24, torch.float32, CPU, "native")
