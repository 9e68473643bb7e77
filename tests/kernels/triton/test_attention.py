"""Prefill, decode and tree decode on Triton kernels against the definition in float64; every output starts as NaN."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_cases import PagedCase, Path, make_case

from bough.kernels import reference
from bough.kernels.cuda_attention import Capacity, Kernels, Launches, PlanBuffers, choose_kernels, plan_step, run
from bough.kernels.decode import attend_items
from bough.kernels.layout import PagedLayout
from bough.kernels.merge import merge_partials
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import dequantised, quantise
from bough.kernels.reference import paged_attention as definition
from bough.kernels.tree_costs import TreeCosts

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ATOL = 2e-6 if IS_INTERPRETED else 1e-5  # a GPU's exp2 is 2 units in the last place off, numpy's is not
ROOT, LEFT, RIGHT, LEAF = ("root", 36), ("left", 20), ("right", 15), ("leaf", 17)
# (path, new tokens): two forks below one root, one of them forked again; strangers; one token.
TREE: list[tuple[Path, int]] = [
    ((ROOT, LEFT, ("a", 5)), 1),
    ((ROOT, LEFT, ("b", 13)), 1),
    ((ROOT, RIGHT, ("c", 1)), 1),
    ((ROOT, RIGHT, LEAF, ("d", 2)), 1),
    ((ROOT, RIGHT, LEAF, ("e", 9)), 1),
    ((("stranger", 70),), 1),
    ((("one", 1),), 1),
]
# Short extends of a shared prefix, which are rows of one item; a cold prompt; a long extend of what is cached.
MIXED: list[tuple[Path, int]] = [
    *TREE[:3],
    ((ROOT, LEFT, ("f", 6)), 6),
    ((ROOT, LEFT, ("g", 7)), 3),
    ((("cold", 19),), 19),
    ((ROOT, ("extend", 20)), 17),
    ((("alone", 1),), 1),
]
# Of a device that starts and merges for nothing, so that all is cut and shared that can be.
FREE = TreeCosts(0.0, 0.0, 0.1, 1.0, 0.0, 0.0)
FEW = [MIXED[0], MIXED[2], *MIXED[4:6]]


def kernels_for(case: PagedCase, exact_split: int | None = None, **options: object) -> Kernels:
    """Return kernels as for a tiny device, so that the few keys of a test are cut into several chunks."""
    chosen = choose_kernels(
        case.q.shape[1], case.k_pages.shape[2], case.q.shape[2], case.k_pages.dtype, (9, 0), 2,
        exact_split=exact_split and 8 * exact_split, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    narrow, wide = (replace(config, block_n=16) for config in (chosen.narrow, chosen.wide))
    prefill = replace(chosen.prefill, block_m=32, block_n=16, num_warps=4)
    smaller = replace(
        chosen.options, block_n=16, min_split=32, min_shared_tokens=16, exact_split=exact_split, costs=FREE
    )
    return replace(chosen, narrow=narrow, wide=wide, prefill=prefill, options=smaller)


def run_kernels(case: PagedCase, kernels: Kernels, device: torch.device, kv: PagedKV | None = None) -> torch.Tensor:
    """Return what the kernels make of a case, on the CPU; what they leave unwritten is NaN."""
    plan = plan_step(case.layout, kernels)
    buffers = PlanBuffers(Capacity.of(plan), case.q.shape[1], case.q.shape[2], device)
    buffers.part_out.fill_(torch.nan)
    buffers.part_lse.fill_(torch.nan)
    buffers.write(plan)
    q = case.q.to(device)
    if kv is None:
        kv = PagedKV(case.k_pages.to(device), case.v_pages.to(device))
    out = torch.full_like(q, torch.nan)
    return run(q, kv, buffers, Launches.of(plan), kernels, q.shape[-1] ** -0.5, out).cpu()


def run_definition(case: PagedCase, window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
    layout = case.layout
    qo_indptr, kv_indptr = torch.from_numpy(layout.qo_indptr), torch.from_numpy(layout.kv_indptr)
    kv_indices, kv_lens = torch.from_numpy(layout.kv_indices), torch.from_numpy(layout.kv_lens)
    q, k, v = case.q.double(), case.k_pages.double(), case.v_pages.double()
    scale = q.shape[-1] ** -0.5
    return definition(q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, scale, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (3, 1, 96), (8, 2, 128), (2, 1, 256)], ids=str)
def test_a_tree_with_extends_and_prefills_agrees_with_the_definition(
    heads: tuple[int, int, int], device: torch.device
) -> None:
    case = make_case(MIXED if heads[0] == 6 else FEW, heads)
    found = run_kernels(case, kernels_for(case), device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("share", [True, False])
def test_sharing_changes_nothing_but_rounding(page_size: int, share: bool, device: torch.device) -> None:
    case = make_case(TREE, page_size=page_size)
    found = run_kernels(case, kernels_for(case, share=share), device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=ATOL, rtol=0)


def test_exact_bits_do_not_depend_on_the_costs(device: torch.device) -> None:
    """Where everything that can be is shared, and where nothing is."""
    case = make_case(TREE)
    chosen = kernels_for(case, 32)
    outputs = []
    for costs in (FREE, replace(FREE, partial_tokens=1e6)):
        options = replace(chosen.options, costs=costs)
        outputs.append(run_kernels(case, replace(chosen, options=options), device))
    assert torch.equal(outputs[0], outputs[1])


def test_a_group_of_more_heads_than_a_tile_has_rows_takes_several(device: torch.device) -> None:
    case = make_case([TREE[0], TREE[2], MIXED[5]], (19, 1, 64))
    found = run_kernels(case, kernels_for(case), device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2, 64), (7, 1, 80)], ids=str)
def test_16_bit_numbers_agree_with_the_definition(
    heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    case = make_case(FEW, heads, dtype=dtype)
    found = run_kernels(case, kernels_for(case), device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_keys_and_values_are_read_with_their_scales(
    dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    """Against the definition on what the quantised pages stand for, whatever was lost on the way there."""
    case = make_case(FEW, (4, 2, 48), dtype=dtype)
    is_token = ~case.k_pages[..., :1].isnan()
    (k, k_scales), (v, v_scales) = (quantise(pages, kv_dtype) for pages in (case.k_pages, case.v_pages))
    kv = PagedKV(*(x.to(device) for x in (k, v, k_scales, v_scales)))
    meant = [pages.where(is_token, torch.nan) for pages in dequantised(PagedKV(k, v, k_scales, v_scales))]
    found = run_kernels(case, kernels_for(replace(case, k_pages=k)), device, kv)
    expected = run_definition(replace(case, k_pages=meant[0], v_pages=meant[1]))
    # On a GPU queries and weights are rounded to 10 bits beside keys and values of 8 (`dot_precision`).
    atol, rtol = (ATOL if IS_INTERPRETED else 2e-3, 0.0) if dtype == torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


def test_partial_results_and_their_merge_agree_with_their_definitions(device: torch.device) -> None:
    case = make_case([((("x", 40),), 16), *TREE[:3]])
    kernels = kernels_for(case)
    plan = plan_step(case.layout, kernels)
    buffers = PlanBuffers(Capacity.of(plan), case.q.shape[1], case.q.shape[2], device)
    buffers.write(plan)
    buffers.part_out.fill_(torch.nan)
    buffers.part_lse.fill_(torch.nan)
    kv, q = PagedKV(case.k_pages.to(device), case.v_pages.to(device)), case.q.to(device)
    scale = 32**-0.5
    for items, count, config in (
        (buffers.narrow, buffers.num_narrow, kernels.narrow),
        (buffers.wide, buffers.num_wide, kernels.wide),
    ):
        attend_items(
            q, kv, buffers.kv_indices, buffers.visible_lens, items, count, buffers.rows,
            buffers.part_out, buffers.part_lse, scale, config, 3,
        )  # fmt: skip
    items = torch.from_numpy(np.concatenate([plan.tree.narrow, plan.tree.wide]))
    visible_lens, rows = torch.from_numpy(plan.visible_lens), torch.from_numpy(plan.tree.rows)
    out, lse = reference.attend_items(
        case.q.double(), case.k_pages.double(), case.v_pages.double(), torch.from_numpy(plan.kv_indices),
        visible_lens, items, rows, plan.tree.num_partials, scale,
    )  # fmt: skip
    assert bool(lse.isneginf().any()), "some extended token does not see the last keys of its item"
    torch.testing.assert_close(buffers.part_out.cpu().double(), out.nan_to_num(), atol=ATOL, rtol=0)
    torch.testing.assert_close(buffers.part_lse.cpu().double(), lse, atol=2 * ATOL, rtol=0)
    found = torch.full_like(q, torch.nan)
    merge_partials(buffers.part_out, buffers.part_lse, buffers.merge_indptr, buffers.merge_indices, found)
    indptr, indices = torch.from_numpy(plan.tree.merge_indptr), torch.from_numpy(plan.tree.merge_indices)
    expected = reference.merge_partials(out.nan_to_num(), lse, indptr, indices)
    torch.testing.assert_close(found.cpu().double(), expected, atol=ATOL, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("window", "soft_cap"), [(20, None), (None, 2.0), (50, 5.0)])
def test_a_window_and_a_soft_cap(window: int | None, soft_cap: float | None, device: torch.device) -> None:
    case = make_case(MIXED)
    found = run_kernels(case, kernels_for(case, window=window, soft_cap=soft_cap), device)
    torch.testing.assert_close(found.double(), run_definition(case, window, soft_cap), atol=ATOL, rtol=0)


@pytest.mark.parametrize("window", [None, 40])
def test_exact_mode_gives_a_sequence_the_same_bits_alone_and_in_any_tree(
    window: int | None, device: torch.device
) -> None:
    whole = make_case(MIXED)
    expected = run_kernels(whole, kernels_for(whole, exact_split=32, window=window), device)
    torch.testing.assert_close(expected.double(), run_definition(whole, window), atol=ATOL, rtol=0)
    ends = whole.layout.qo_indptr
    for b, sequence in list(enumerate(MIXED))[2:]:
        alone = make_case([sequence])
        alone.q.copy_(whole.q[ends[b] : ends[b + 1]])
        part = run_kernels(alone, kernels_for(alone, exact_split=32, window=window), device)
        assert torch.equal(part, expected[ends[b] : ends[b + 1]])


def test_exact_mode_gives_a_prefill_the_same_bits_in_any_chunks(device: torch.device) -> None:
    path: Path = (("cold", 50),)
    whole = make_case([(path, 50)])
    expected = run_kernels(whole, kernels_for(whole, exact_split=32), device)
    for begin, end in [(0, 7), (7, 39), (39, 50), (49, 50)]:
        layout = replace(
            whole.layout,
            qo_indptr=np.array([0, end - begin], dtype=np.int32),
            kv_lens=np.array([end], dtype=np.int32),
            is_decode=np.array([False]),
        )
        part = run_kernels(
            replace(whole, layout=layout, q=whole.q[begin:end]), kernels_for(whole, exact_split=32), device
        )
        assert torch.equal(part, expected[begin:end])


def test_a_plan_serves_while_sequences_grow(device: torch.device) -> None:
    """As a captured graph is replayed: the plan of a shorter step, with only the visible lengths moved on."""
    grown = make_case([(path, 1) for path, _ in TREE[:2]])
    kernels = kernels_for(grown)
    plan = plan_step(replace(grown.layout, kv_lens=grown.layout.kv_lens - 3), kernels)
    assert plan.tree.growth >= 3
    buffers = PlanBuffers(Capacity.of(plan), grown.q.shape[1], grown.q.shape[2], device)
    buffers.write(plan)
    buffers.visible_lens.copy_(torch.from_numpy(grown.layout.kv_lens))
    kv = PagedKV(grown.k_pages.to(device), grown.v_pages.to(device))
    found = run(grown.q.to(device), kv, buffers, Launches.of(plan), kernels, grown.q.shape[-1] ** -0.5)
    torch.testing.assert_close(found.cpu().double(), run_definition(grown), atol=ATOL, rtol=0)


def test_buffers_and_launches_larger_than_a_plan_leave_other_tokens_alone(device: torch.device) -> None:
    case = make_case(TREE)
    kernels = kernels_for(case)
    plan = plan_step(case.layout, kernels)
    needed = Capacity.of(plan)
    larger = Capacity(*(getattr(needed, name) + 5 for name in Capacity.__slots__))
    buffers = PlanBuffers(larger, case.q.shape[1], case.q.shape[2], device)
    launches = Launches(narrow=True, wide=True, num_tiles=3, page_size=case.layout.page_size)
    assert launches.cover(Launches.of(plan))
    rows = torch.cat([case.q, torch.full_like(case.q[:4], torch.nan)]).to(device)
    kv = PagedKV(case.k_pages.to(device), case.v_pages.to(device))
    for _ in range(3):  # the host's two buffers take turns
        buffers.write(plan)
        out = run(rows, kv, buffers, launches, kernels, 32**-0.5, torch.full_like(rows, torch.nan)).cpu()
        torch.testing.assert_close(out[: len(case.q)].double(), run_definition(case), atol=ATOL, rtol=0)
        assert out[len(case.q) :].isnan().all()
    small = PlanBuffers(replace(needed, num_narrow=0), case.q.shape[1], case.q.shape[2], device)
    with pytest.raises(ValueError, match=f"num_narrow is {needed.num_narrow}, the buffers hold 0"):
        small.write(plan)


def test_queries_may_be_a_part_of_wider_rows(device: torch.device) -> None:
    case = make_case(MIXED)
    fused = torch.cat([case.q, torch.full_like(case.q, torch.nan)], dim=1)
    found = run_kernels(replace(case, q=fused[:, : case.q.shape[1]]), kernels_for(case), device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=ATOL, rtol=0)


def test_pages_whose_numbers_lie_beyond_31_bits_are_found(device: torch.device) -> None:
    """As in a pool of 8 GB and more. Of the memory that is asked for here only the pages in use are ever touched."""
    case = make_case(MIXED, (4, 2, 64), dtype=torch.bfloat16)
    num_pages, page = len(case.k_pages), case.k_pages.shape[1:]
    first = 2**31 // page.numel() + 1
    pool = torch.empty(first + 2 * num_pages, *page, dtype=torch.bfloat16, device=device)
    pool[first:] = torch.cat([case.k_pages, case.v_pages]).to(device)
    far = replace(case, layout=replace(case.layout, kv_indices=case.layout.kv_indices + np.int32(first)))
    kv = PagedKV(pool[: first + num_pages], pool[num_pages:])
    kernels = kernels_for(case)
    assert torch.equal(run_kernels(far, kernels, device, kv), run_kernels(case, kernels, device))


def test_a_sequence_of_128k_tokens(device: torch.device) -> None:
    """Decoded over many chunks, and prefilled by one token; interpreted in wide tiles of keys, to be quick."""
    kv_len, head_dim = 131_072, 16
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(kv_len // 16, 16, 1, head_dim, generator=generator) for _ in range(2))
    q = torch.randn(2, 1, head_dim, generator=generator)
    pages = np.random.default_rng(0).permutation(kv_len // 16).astype(np.int32)
    layout = PagedLayout(
        np.array([0, 1, 2], np.int32),
        np.array([0, len(pages), 2 * len(pages)], np.int32),
        np.concatenate([pages, pages]),
        np.array([kv_len, kv_len - 5], np.int32),
        np.array([True, False]),
        16,
    )
    case = PagedCase(layout, q, k, v)
    kernels = kernels_for(case, exact_split=16_384)
    if IS_INTERPRETED:  # a GPU has no room for such tiles
        narrow, prefill = (replace(config, block_n=1024) for config in (kernels.narrow, kernels.prefill))
        kernels = replace(kernels, narrow=narrow, prefill=prefill)
    found = run_kernels(case, kernels, device)
    torch.testing.assert_close(found.double(), run_definition(case), atol=2e-6, rtol=0)
