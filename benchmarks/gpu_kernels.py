"""The report's sections on kernels alone: right or wrong, the device's ceilings, each small kernel."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_report import Clock, Row

from bough.kernels import reference
from bough.kernels.attention import choose_attention
from bough.kernels.calibration import calibrate, cooling
from bough.kernels.cuda_attention import Capacity, Kernels, Launches, PlanBuffers, choose_kernels, plan_step, run
from bough.kernels.draw import draw
from bough.kernels.filtered_draw import draw_filtered
from bough.kernels.gated_silu import gated_silu
from bough.kernels.layout import PagedLayout
from bough.kernels.logits import BLOCK, penalise, prepare_logits
from bough.kernels.paged_kv import PagedKV
from bough.kernels.rms_norm import rms_norm
from bough.kernels.rope import HeadNorm, rotate_and_store
from bough.kernels.tree_costs import ESTIMATED, TreeCosts

PAGE_SIZE = 16

Run = Callable[[Clock], Iterator[Row]]


def about(device: torch.device) -> Iterator[Row]:
    """Tell what the device is."""
    if device.type == "cpu":
        yield {"device": "cpu, interpreted: no figure means anything"}
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    if (properties.major, properties.minor) < (8, 0):
        raise RuntimeError(f"the kernels need compute capability 8.0, {properties.name} has {properties.major}")
    yield {
        "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count, "free_gb": free / 1e9, "total_gb": total / 1e9,
    }  # fmt: skip


def medians_us(
    works: dict[str, Callable[[], object]], device: torch.device, repetitions: int = 15, *, cold: bool = False
) -> dict[str, float]:
    """Return the median microseconds of each, measured in turn after two warm-up calls each.

    cold: with the second-level cache full of something else, as attention finds it in every layer of a step. A prefix
    of 8,192 tokens of one layer, 34 MB, stays there from one repetition to the next otherwise.
    """
    for work in works.values():
        work()
        work()
    before = cooling(device) if cold else _nothing
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions if device.type == "cuda" else 1):
        for name, work in works.items():
            found[name].append(_timed_us(work, device, before))
    return {name: statistics.median(values) for name, values in found.items()}


def _nothing() -> None:
    pass


def _timed_us(work: Callable[[], object], device: torch.device, before: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6
    cuda: Any = torch.cuda
    begin_event, end_event = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(4_000_000)  # some 2 ms, in which the host runs ahead: launches are not part of the time
    before()
    begin_event.record()
    work()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) * 1e3


def some(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the same normal numbers every time; many of them are made where they are wanted."""
    if device.type == "cuda" and math.prod(shape) > 1 << 22:
        return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def layout_of(lengths: Sequence[int], num_new: Sequence[int], shared: int) -> PagedLayout:
    """Return sequences of `lengths` tokens, the last num_new new, whose first `shared` lie in the same pages."""
    assert shared % PAGE_SIZE == 0, "whole pages are shared"
    common = np.arange(shared // PAGE_SIZE, dtype=np.int32)
    pages, free = [], len(common)
    for length in lengths:
        own = -(-length // PAGE_SIZE) - len(common)
        pages.append(np.concatenate([common, np.arange(free, free + own, dtype=np.int32)]))
        free += own
    indptr = [np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32) for sizes in (num_new, [len(p) for p in pages])]
    return PagedLayout(
        indptr[0],
        indptr[1],
        np.concatenate(pages),
        np.array(lengths, dtype=np.int32),
        np.array(num_new) == 1,
        PAGE_SIZE,
    )


def prepared(
    layout: PagedLayout, kernels: Kernels, heads: int, dim: int, device: torch.device
) -> tuple[PlanBuffers, Launches]:
    """Return a plan on the device."""
    plan = plan_step(layout, kernels)
    buffers = PlanBuffers(Capacity.of(plan), heads, dim, device)
    buffers.write(plan)
    return buffers, Launches.of(plan)


def attention_of(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    share: bool,
    costs: TreeCosts = ESTIMATED,
) -> Kernels:
    """Return the kernels of a shape on this device, planned by `costs`."""
    chosen = choose_attention(heads, kv_heads, dim, dtype, device, "triton", share=share).kernels
    assert chosen is not None
    return replace(chosen, options=replace(chosen.options, costs=costs))


def measured_costs(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> TreeCosts:
    """Return what tree attention costs, as a runtime finds it when it loads a model of these heads."""
    num_pages = 64 if device.type == "cpu" else 6400  # some hundred MB: more than the second-level cache
    pages = torch.zeros(2, num_pages, PAGE_SIZE, kv_heads, dim, dtype=dtype, device=device)
    return calibrate(attention_of(heads, kv_heads, dim, dtype, device, True), PagedKV(pages[0], pages[1]), dtype)


# ------------------------------------------------------------------------------------------------ right or wrong


def correctness(device: torch.device) -> dict[str, Run]:
    """Return what compares kernels with their definitions, part by part; errors are relative to the largest value."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    eight_b = (32, 8, 128)
    shapes: dict[str, list[Any]]
    if device.type == "cpu":
        shapes = {"attention": [((4, 2, 64), fp32, None, {})], "keys": [((4, 2, 64), fp32, torch.int8, {})]}
        dtypes: tuple[torch.dtype, ...] = (fp32,)
    else:
        shapes = {
            "8B bf16": [(eight_b, bf16, None, {})],
            "8B fp16": [(eight_b, fp16, None, {})],
            "8B fp32": [(eight_b, fp32, None, {})],
            "int8 keys": [(eight_b, bf16, torch.int8, {})],
            "fp8 keys": [(eight_b, bf16, torch.float8_e4m3fn, {})],
            "heads of 64, 80": [((4, 4, 64), bf16, None, {}), ((8, 1, 80), bf16, None, {})],
            "heads of 96, 256": [((6, 2, 96), bf16, None, {}), ((4, 1, 256), bf16, None, {})],
            "window, soft cap": [(eight_b, bf16, None, {"window": 300}), (eight_b, bf16, None, {"soft_cap": 20.0})],
        }
        dtypes = (bf16, fp16, fp32)

    def attention(cases: list[Any], clock: Clock) -> Iterator[Row]:
        for heads, dtype, kv_dtype, options in cases:
            for what, error in _attention_errors(heads, dtype, kv_dtype, options, device):
                yield _checked(f"attention {what}", dtype, error)
                if clock.is_out:
                    return

    def rows(clock: Clock) -> Iterator[Row]:
        for dtype in dtypes:
            for what, error in _row_errors(dtype, device):
                yield _checked(f"rows {what}", dtype, error)
        for kv_dtype, limit in _quantised_limits(device):
            name = {"kernel": f"head norms and {str(kv_dtype)[6:]} kv write", "dtype": str(dtypes[0])[6:]}
            yield name | _verdict(_quantised_write_error(dtypes[0], kv_dtype, device), limit)
        for what, error in _draw_errors(device):
            yield {"kernel": what, "dtype": "float32"} | _verdict(error, 0.0)

    return {"rows": rows, **{name: partial(attention, cases) for name, cases in shapes.items()}}


def _checked(kernel: str, dtype: torch.dtype, error: float) -> Row:
    return {"kernel": kernel, "dtype": str(dtype)[6:]} | _verdict(error, 2e-5 if dtype == torch.float32 else 2e-2)


def _verdict(error: float, limit: float) -> Row:
    return {"error": error, "limit": limit, "right": error <= limit}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.cpu().double()
    difference = (found.cpu().double() - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(float("inf")))


def _row_errors(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float]]:
    x, residual, weight = (some(*shape, dtype=dtype, device=device) for shape in ((5, 320), (5, 320), (320,)))
    expected = reference.rms_norm(x.cpu(), weight.cpu(), 1e-6, residual.cpu())[1]
    yield "norm", _error(rms_norm(x, weight, 1e-6, residual.clone()), expected)
    gate_up = some(5, 2 * 352, dtype=dtype, device=device)
    yield "gate", _error(gated_silu(gate_up), reference.gated_silu(gate_up.cpu()))
    qkv = some(5, 8, 64, dtype=dtype, device=device)
    angles = torch.rand(9, 32, generator=torch.Generator().manual_seed(1))
    positions, slots = torch.tensor([0, 3, 8, 1, 2], dtype=torch.int32), torch.tensor([4, 9, 0, 31, -1])
    pages = torch.zeros(2, 16, 2, 64, dtype=dtype, device=device)
    kv = PagedKV(pages, pages.clone())
    tables = (angles.cos().to(device), angles.sin().to(device))
    found = rotate_and_store(qkv.clone(), 4, kv, positions.to(device), *tables, slots.to(device, torch.int32))
    turned = reference.rotate(qkv.cpu(), angles.cos()[positions.long()], angles.sin()[positions.long()])
    yield "rotation", _error(found, turned[:, :4])
    kept = kv.k.view(-1, 2, 64)[slots[:4].to(device)]
    yield "kv write", _error(kept, turned[:4, 4:6])


def _attention_errors(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    limits: dict[str, Any],
    device: torch.device,
) -> Iterator[tuple[str, float]]:
    """Decodes of a tree, and decodes beside extends and prefills; split freely and in exact mode; outputs start as NaN.

    Against the definition in float64, on what quantised keys and values stand for.
    """
    small = device.type == "cpu"
    shared = 64 if small else 512
    num_heads, num_kv_heads, dim = heads
    properties = None if small else torch.cuda.get_device_properties(device)
    arch, num_sms = ((9, 0), 2) if properties is None else (
        (properties.major, properties.minor), properties.multi_processor_count
    )  # fmt: skip
    for name, new in (("decode", [1, 1, 1]), ("mixed", [1, 7, 40])):
        layout = layout_of([shared + extra for extra in (45, 60, 41)], new, shared)
        num_pages = int(layout.kv_indices.max()) + 1
        q = some(sum(new), num_heads, dim, dtype=dtype, device=device)
        k = some(num_pages, PAGE_SIZE, num_kv_heads, dim, dtype=dtype, device=device)
        kv = PagedKV(k, k.flip(0).contiguous())
        meant = (kv.k.cpu().double(), kv.v.cpu().double())
        if kv_dtype is not None:
            (k, k_scales), (v, v_scales) = (reference.quantise(side.cpu(), kv_dtype) for side in (kv.k, kv.v))
            meant = reference.dequantised(PagedKV(k, v, k_scales, v_scales))
            kv = PagedKV(*(side.to(device) for side in (k, v, k_scales, v_scales)))
        arrays = (layout.qo_indptr, layout.kv_indptr, layout.kv_indices, layout.kv_lens)
        indptr, pages_indptr, indices, lens = (torch.from_numpy(array) for array in arrays)
        expected = reference.paged_attention(
            q.cpu().double(), *meant, indptr, pages_indptr, indices, lens, dim**-0.5, **limits
        )
        for split in (None, 512):
            if split is not None and small:
                continue
            kernels = choose_kernels(
                num_heads, num_kv_heads, dim, kv.k.dtype, arch, num_sms, exact_split=split, dtype=dtype, **limits
            )  # fmt: skip
            buffers, launches = prepared(layout, kernels, num_heads, dim, device)
            buffers.part_out.fill_(torch.nan)
            out = torch.full_like(q, torch.nan)
            run(q, kv, buffers, launches, kernels, dim**-0.5, out)
            kind = "" if kv_dtype is None else f" {str(kv_dtype)[6:]} keys"
            options = "".join(f" {option}={value}" for option, value in limits.items())
            yield f"{name} {num_heads}/{num_kv_heads}x{dim}{kind}{options} split={split}", _error(out, expected)


def _quantised_limits(device: torch.device) -> list[tuple[torch.dtype, float]]:
    """Return the dtypes of 8 bits that this device writes, and a little more than one unit of each."""
    if device.type != "cuda":
        return [(torch.int8, 1e-2)]
    has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    return [(torch.int8, 1e-2), *([(torch.float8_e4m3fn, 8e-2)] if has_fp8 else [])]


def _quantised_write_error(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> float:
    """Return how far queries, keys and values are off after head norms, rotation and a write as 8 bits."""
    num_tokens, heads, kv_heads, dim = 5, 4, 2, 64
    qkv = some(num_tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q_weight = some(dim, dtype=dtype, device=device)
    k_weight = q_weight.flip(0).contiguous()
    angles = torch.rand(num_tokens, dim // 2, generator=torch.Generator().manual_seed(1))
    places = torch.arange(num_tokens, dtype=torch.int32)
    pages, scales = torch.zeros(1, PAGE_SIZE, kv_heads, dim), torch.zeros(1, PAGE_SIZE, kv_heads)
    sides = [part.to(device) for part in (pages.to(kv_dtype), pages.to(kv_dtype), scales, scales.clone())]
    kv = PagedKV(*sides)
    tables = (angles.cos().to(device), angles.sin().to(device))
    on_device = places.to(device)
    norm = HeadNorm(q_weight, k_weight, 1e-6)
    found = rotate_and_store(qkv.clone(), heads, kv, on_device, *tables, on_device, norm)
    parts = torch.split(qkv.cpu(), [heads, kv_heads, kv_heads], dim=1)
    normed = [reference.rms_norm(parts[i], (q_weight, k_weight)[i].cpu(), 1e-6)[1] for i in range(2)]
    turned = reference.rotate(torch.cat(normed, dim=1), angles.cos(), angles.sin())
    k, v = reference.dequantised(PagedKV(*(side.cpu() for side in sides)))
    written = (k[0, :num_tokens], turned[:, heads:]), (v[0, :num_tokens], parts[2])
    return max(_error(found, turned[:, :heads]), *(_error(here, meant) for here, meant in written))


def _draw_errors(device: torch.device) -> Iterator[tuple[str, float]]:
    """Compare penalties, draws and draws among filtered tokens: how many rows are other than the definition's."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 3000, generator=generator) * 3
    ids, counts = torch.arange(8 * 20, dtype=torch.int32) * 7, torch.arange(8 * 20, dtype=torch.int32) % 4 - 1
    ones = torch.ones(8)
    indptr, biases = torch.arange(9, dtype=torch.int32) * 20, torch.randn(8 * 20, generator=generator)
    entries = (indptr, ids, counts, biases, 1.3 * ones, 0.2 * ones, 0.1 * ones)
    changed = logits.clone().to(device)
    penalise(changed, *(tensor.to(device) for tensor in entries))
    expected = reference.penalise(logits, *entries)
    yield "penalties", float(((changed.cpu() - expected).abs() > 1e-4).any(1).sum())
    temperatures = torch.tensor([0.0, 1.0] * 4)
    points = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    masks, rows = torch.full((1, 94), 0x55555555, dtype=torch.int32), torch.tensor([-1, 0] * 4, dtype=torch.int32)
    prepared = reference.prepare_logits(logits, masks, rows, temperatures)
    there = [tensor.to(device) for tensor in (logits, masks, rows, temperatures)]
    out, *blocks = prepare_logits(*there)
    tokens = draw(out, *blocks, there[3], points.to(device))  # type: ignore[call-arg]
    yield "draw", float((tokens.cpu() != reference.draw(prepared, temperatures, points)).sum())
    top_k = torch.tensor([3000, 5, 3000, 900, 1, 3000, 40, 3000], dtype=torch.int32)
    top_p = torch.tensor([0.9, 2.0, 0.5, 0.99, 2.0, 2.0, 0.7, 1e-9], dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.3, 0.01, 0.0])
    every, *filters = (t.to(device) for t in (torch.arange(8, dtype=torch.int32), top_k, top_p, min_p, points, tokens))
    draw_filtered(out, blocks[0], blocks[1], every, *filters)
    expected = reference.draw_filtered(prepared, top_k, top_p, min_p, points)
    yield "draw among filtered tokens", float((filters[-1].cpu() != expected).sum())


# ------------------------------------------------------------------------------------------------ ceilings, kernels


def ceilings(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Copy bandwidth (read + write) and matrix products."""
    tiny = device.type == "cpu"
    yield {"what": "copy", "tb_per_s": copy_bandwidth(device, tiny) / 1e12}
    for rows in (64,) if tiny else (8192, 64, 512):
        if clock.is_out:
            return
        size = 64 if tiny else 8192
        dtype = torch.float32 if tiny else torch.bfloat16
        a, b = some(rows, size, dtype=dtype, device=device), some(size, size, dtype=dtype, device=device)
        us = medians_us({"matmul": partial(torch.matmul, a, b)}, device)["matmul"]
        yield {"what": f"matmul {rows}x{size}x{size}", "us": us, "tflop_per_s": 2 * rows * size * size / us / 1e6}


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Return bytes per second, read and written, of a large copy; of random numbers, for zeros may travel faster."""
    source = torch.empty((1 << 18) if tiny else (1 << 30), dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    us = medians_us({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / us * 1e6


def kernels(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Time each small kernel at an 8B model's widths; bytes are those it must move."""
    tiny = device.type == "cpu"
    bandwidth = copy_bandwidth(device, tiny)
    dtype = torch.float32 if tiny else torch.bfloat16
    hidden, mlp, vocab = (64, 96, 2100) if tiny else (4096, 14336, 128256)
    for rows in (2,) if tiny else (1, 64, 1024):
        if clock.is_out:
            return
        x, residual = (some(rows, hidden, dtype=dtype, device=device) for _ in range(2))
        weight, gate_up = some(hidden, dtype=dtype, device=device), some(rows, 2 * mlp, dtype=dtype, device=device)
        works: dict[str, tuple[Callable[[], object], int]] = {
            "norm": (partial(rms_norm, x, weight, 1e-6, residual), 4 * x.nbytes),
            "gate": (partial(gated_silu, gate_up), gate_up.nbytes * 3 // 2),
            "rotation": _rotation(rows, dtype, device, tiny),
        }
        if rows <= 64:
            works |= _drawing(rows, vocab, device)
        times = medians_us({name: work for name, (work, _) in works.items()}, device)
        for name, (_, num_bytes) in works.items():
            share = num_bytes / times[name] * 1e6 / bandwidth
            yield {"kernel": name, "rows": rows, "us": times[name], "bytes": num_bytes, "share_of_copy": share}


def _rotation(rows: int, dtype: torch.dtype, device: torch.device, tiny: bool) -> tuple[Callable[[], object], int]:
    """Return rotary embedding with the KV write, and its bytes: every head read and written once."""
    heads, kv_heads, dim = (4, 2, 16) if tiny else (32, 8, 128)
    qkv = some(rows, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    pages = torch.zeros(-(-rows // PAGE_SIZE), PAGE_SIZE, kv_heads, dim, dtype=dtype, device=device)
    angles = torch.rand(rows, dim // 2, device=device)
    places = torch.arange(rows, dtype=torch.int32, device=device)
    kv = PagedKV(pages, pages.clone())
    work = partial(rotate_and_store, qkv, heads, kv, places, angles.cos(), angles.sin(), places)
    return work, 2 * qkv.nbytes


def _drawing(rows: int, vocab: int, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """Return masks and temperature over all logits, and drawing, which reads each block's sums and one block."""
    logits = some(rows, vocab, dtype=torch.float32, device=device)
    masks = torch.full((1, -(-vocab // 32)), -1, dtype=torch.int32, device=device)
    at, ones = torch.zeros(rows, dtype=torch.int32, device=device), torch.ones(rows, device=device)
    # Prepared logits are the same logits at temperature 1: preparing them again and again changes nothing.
    found, largest, sums, likeliest = prepare_logits(logits, masks, at, ones)
    points = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
    num_bytes = largest.nbytes + sums.nbytes + likeliest.nbytes + rows * 4 * min(BLOCK, vocab)
    return {
        "logits": (partial(prepare_logits, logits, masks, at, ones), 2 * logits.nbytes),
        "draw": (partial(draw, found, largest, sums, likeliest, ones, points), num_bytes),
    }
