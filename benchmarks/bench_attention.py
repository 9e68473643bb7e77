"""What does decode attention cost where branches share a prefix, and where does a step's time go?

Attention: one layer, bfloat16, 8 query and 4 KV heads of 64, `width` sequences of one query with `prefix` tokens in
common and 64 of their own: tree (what is shared is read once), unshared (each reads all of its KV) and PyTorch (gather
and SDPA). The plan is made once, as for all layers of a step. Then the same two without anything in common: what
looking for a tree costs where there is none. Step: the 30M model's decode step, its linears and its attention.

    python benchmarks/bench_attention.py [--quick] [--save]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import harness
import numpy as np
import torch
from harness import Summary, ratio
from models import FIRST_WORD, llama_30m

from bough.kernels import native_attention
from bough.kernels.attention import Attention, PagedLayout, paged_attention
from bough.kernels.paged_kv import PagedKV
from bough.runtime.batch import Batch, Row
from bough.runtime.inputs import build_inputs
from bough.runtime.runner import Runner, load_runner

HEADS: Final = (8, 4, 64)
PAGE: Final = 16
OWN: Final = 64
POINTS: Final = ((2, 128), (4, 256), (2, 1024), (16, 512), (16, 1024), (16, 4096), (32, 1024), (64, 4096))


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__).parse_args()
    if not native_attention.works(*HEADS, torch.bfloat16):
        sys.exit("bench_attention: the compiled kernels do not work here: install bough again with a C compiler")
    environment = harness.environment()
    reps = options.reps or (3 if options.quick else 9)
    points = ((4, 256), (8, 256)) if options.quick else POINTS
    results: dict[str, Any] = {"attention": {}, "step": {}}
    rows, steps = [], []
    for width, prefix in points:
        figures = _attention(width, prefix, reps)
        results["attention"][f"{width} x {prefix}"] = figures
        columns = ("tree", "unshared", "torch", "unshared_by_tree", "torch_by_tree", "tree_loss_unshared")
        rows.append([f"({width}, {prefix})", *(figures[name] for name in columns)])
    runner = load_runner(llama_30m(options.models_dir), dtype="bfloat16", max_total_tokens=65_536)
    for width in (1, 8, 32):
        figures = _step(runner, width, 512, reps)
        results["step"][str(width)] = figures
        steps.append([width, *(figures[name] for name in ("step", "linears", "attention", "rest_share"))])
    tables = [
        harness.table(
            ("one layer, ms", "tree", "unshared", "torch", "unshared / tree", "torch / tree", "no prefix: on / off"),
            rows,
        ),
        harness.table(("decode step, batch", "step, ms", "linears, ms", "attention, ms", "rest, share"), steps),
    ]
    harness.report("bench_attention", options, environment, results, tables)


def _layout(width: int, prefix: int, *, shared: bool) -> PagedLayout:
    """Return sequences of `prefix` + OWN tokens that have the prefix in common, or nothing."""
    common, own = prefix // PAGE, OWN // PAGE
    pages = [
        np.concatenate(
            [
                np.arange(common) + (0 if shared else i * (common + own)),
                np.arange(own) + (common + i * own if shared else i * (common + own) + common),
            ]
        )
        for i in range(width)
    ]
    counts = np.arange(width + 1)
    return PagedLayout(
        qo_indptr=counts.astype(np.int32),
        kv_indptr=(counts * (common + own)).astype(np.int32),
        kv_indices=np.concatenate(pages).astype(np.int32),
        kv_lens=np.full(width, prefix + OWN, dtype=np.int32),
        is_decode=np.ones(width, dtype=np.bool_),
        page_size=PAGE,
    )


def _attention(width: int, prefix: int, reps: int) -> dict[str, Summary]:
    num_heads, num_kv_heads, dim = HEADS
    generator = torch.Generator().manual_seed(0)
    num_pages = width * (prefix + OWN) // PAGE
    k, v = (torch.randn(num_pages, PAGE, num_kv_heads, dim, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(width, num_heads, dim, generator=generator).bfloat16()
    cases: dict[str, Callable[[], float]] = {}
    for name, implementation, share, shared in (
        ("tree", "native", True, True),
        ("unshared", "native", False, True),
        ("torch", "torch", False, True),
        ("alone_on", "native", True, False),
        ("alone_off", "native", False, False),
    ):
        attention = Attention(*HEADS, "torch" if implementation == "torch" else "native", share)
        plan = attention.plan(_layout(width, prefix, shared=shared))
        cases[name] = partial(_ms, partial(paged_attention, q, PagedKV(k, v), plan, dim**-0.5))
    with torch.inference_mode():
        times = harness.interleaved(cases, reps)
    figures = {name: Summary.of(many) for name, many in times.items()}
    figures["unshared_by_tree"] = ratio(times["unshared"], times["tree"])
    figures["torch_by_tree"] = ratio(times["torch"], times["tree"])
    return figures | {"tree_loss_unshared": ratio(times["alone_on"], times["alone_off"])}


def _step(runner: Runner, width: int, context: int, reps: int) -> dict[str, Summary]:
    """Time a decode step of `width` sequences that share nothing, its linears alone and its attention alone."""
    pages = context // PAGE
    token = np.array([FIRST_WORD], dtype=np.int32)
    batch = Batch(
        tuple(
            Row(token, context - 1, np.arange(i * pages, (i + 1) * pages, dtype=np.int32), None) for i in range(width)
        )
    )
    model: Any = runner.model
    layers, config = model._layers, runner.config
    hidden = torch.randn(width, config.hidden_size).bfloat16()
    wide = torch.randn(width, config.mlp_size).bfloat16()
    q = torch.randn(width, config.num_heads, config.head_dim).bfloat16()
    heads = q.flatten(1)

    def step() -> None:
        inputs = build_inputs(batch, runner.page_size, runner.attention.plan)
        model.forward(inputs, runner.pool)
        model.logits(hidden).argmax(-1)

    def linears() -> None:
        for layer in layers:
            w = layer._weights
            w.qkv(hidden), w.out(heads), w.gated(hidden), w.down(wide)
        model.logits(hidden)

    plan = build_inputs(batch, runner.page_size, runner.attention.plan).attention

    def attention() -> None:
        for kv in runner.pool.layers:
            paged_attention(q, kv, plan, config.head_dim**-0.5)

    parts = {"step": step, "linears": linears, "attention": attention}
    with torch.inference_mode():
        times = harness.interleaved({name: partial(_ms, part) for name, part in parts.items()}, reps)
    rest = [
        max(0.0, 1 - (linear + attended) / whole)
        for whole, linear, attended in zip(times["step"], times["linears"], times["attention"], strict=True)
    ]
    return {name: Summary.of(many) for name, many in times.items()} | {"rest_share": Summary.of(rest)}


def _ms(work: Callable[[], object], number: int = 5) -> float:
    """Return the milliseconds of one of a few calls in a row."""
    begin = time.perf_counter()
    for _ in range(number):
        work()
    return (time.perf_counter() - begin) / number * 1e3


if __name__ == "__main__":
    main()
