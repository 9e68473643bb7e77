"""The report's section on open questions of the kernels' design: figures to choose by, no checks."""

from __future__ import annotations

import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import attention_of, medians_us, prepared
from gpu_report import ROOT, Clock, Row
from gpu_tree import Case

from bough.kernels.cuda_attention import Kernels, run
from bough.kernels.decode import attend_items
from bough.kernels.merge import merge_partials

_CARRIED = """        slots = slots_of(pages, positions, PAGE_SIZE)
        pages = page_ids(kv_indices, page_begin, positions + BLOCK_N, end, PAGE_SIZE)
"""
_IN_LOOP = """        pages = page_ids(kv_indices, page_begin, positions, end, PAGE_SIZE)
        slots = slots_of(pages, positions, PAGE_SIZE)
"""


def questions(device: torch.device, clock: Clock) -> Iterator[Row]:
    """Answer them one by one."""
    tiny = device.type == "cpu"
    decodes = [Case(2, 0, device, 80)] if tiny else [Case(width, 0, device, 8192) for width in (1, 8, 64)]
    asked: list[tuple[str, Callable[[], Row]]] = [
        *(("stages", partial(_stages_and_indices, case)) for case in decodes),
        *(("programs", partial(_programs, case)) for case in decodes),
    ]
    if not tiny:
        asked.append(("kernel in a graph", partial(_launch_gap, device)))
        asked += (("streams", partial(_two_streams, width, device)) for width in (16, 64))
    for question, ask in asked:
        if clock.is_out:
            return
        try:
            yield ask()
        except Exception as error:  # it costs no other question its answer
            traceback.print_exc()
            yield {"question": question, "no": f"{type(error).__name__}: {error}"[:120]}


def _kernels(case: Case) -> Kernels:
    return attention_of(case.heads, case.kv.num_kv_heads, case.kv.head_dim, case.dtype, case.device, True)


def _work(case: Case, kernels: Kernels) -> Callable[[], object]:
    buffers, launches = prepared(case.layout, kernels, case.heads, case.kv.head_dim, case.device)
    return partial(run, case.q, case.kv, buffers, launches, kernels, case.kv.head_dim**-0.5)


def _row(question: str, case: Case, times: dict[str, float]) -> Row:
    num_bytes = (case.prefix + case.width * case.own) * case.token_bytes
    best = min(times, key=lambda name: times[name])
    figures = {f"{name}_us": us for name, us in times.items()}
    return {"question": question, "width": case.width, "best": best, **figures,
            "best_tb_per_s": num_bytes / times[best] / 1e6}  # fmt: skip


def _stages_and_indices(case: Case) -> Row:
    """Ask how deep loads should be ahead, and what carrying the next tile's pages gains."""
    kernels = _kernels(case)
    works = {}
    for stages in (2, 3, 4, 5):
        deeper = replace(kernels, narrow=replace(kernels.narrow, num_stages=stages))
        works[f"stages {stages}"] = _work(case, deeper)
    works["pages in the loop"] = _in_loop(case, kernels)
    return _row("stages, and pages looked up in the loop", case, medians_us(works, case.device, 9, cold=True))


def _in_loop(case: Case, kernels: Kernels) -> Callable[[], object]:
    """Return decode by kernels whose loop looks a tile's pages up when it needs them: our source, one line moved."""
    folder = Path(tempfile.mkdtemp(prefix="bough-in-loop-"))
    tile, decode = ((ROOT / "kernels" / name).read_text() for name in ("tile.py", "decode.py"))
    if _CARRIED not in tile:
        raise RuntimeError("kernels/tile.py has changed: mend this question's text")
    (folder / "tile_in_loop.py").write_text(tile.replace(_CARRIED, _IN_LOOP))
    (folder / "decode_in_loop.py").write_text(decode.replace("bough.kernels.tile", "tile_in_loop"))
    sys.path.insert(0, str(folder))
    attend: Any = importlib.import_module("decode_in_loop").attend_items
    buffers, _ = prepared(case.layout, kernels, case.heads, case.kv.head_dim, case.device)
    out = torch.empty_like(case.q)

    def work() -> torch.Tensor:
        attend(
            case.q, case.kv, buffers.kv_indices, buffers.visible_lens, buffers.narrow, buffers.num_narrow, buffers.rows,
            buffers.part_out, buffers.part_lse, case.kv.head_dim**-0.5, kernels.narrow, kernels.options.num_programs,
        )  # fmt: skip
        merge_partials(buffers.part_out, buffers.part_lse, buffers.merge_indptr, buffers.merge_indices, out)
        return out

    expected = _work(case, kernels)()
    assert isinstance(expected, torch.Tensor)
    # Not bit by bit: compiled otherwise, products may sum in another order.
    difference = float((work() - expected).abs().max() / expected.abs().max())
    if not difference <= 2e-2:
        raise RuntimeError(f"the other order gives other numbers, {difference:.3g} off")
    return work


def _programs(case: Case) -> Row:
    """Ask how many programs of the fixed grid a multiprocessor should have."""
    kernels = _kernels(case)
    num_sms = kernels.options.num_programs // kernels.narrow.per_sm
    works = {
        f"{k} per multiprocessor": _work(
            case, replace(kernels, options=replace(kernels.options, num_programs=k * num_sms))
        )
        for k in (1, 2, 3, 4)
    }
    return _row("programs", case, medians_us(works, case.device, 9, cold=True))


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    cuda: Any = torch.cuda
    work()
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()
    replay: Callable[[], object] = graph.replay
    return replay


def _launch_gap(device: torch.device) -> Row:
    """Ask what a kernel of a graph costs that does nothing."""
    number = torch.zeros(1, device=device)

    def work() -> None:
        for _ in range(1000):
            number.add_(1)

    return {"question": "kernel in a graph", "us": medians_us({"graph": _captured(work)}, device)["graph"] / 1000}


def _two_streams(width: int, device: torch.device) -> Row:
    """Ask whether shared prefixes and tails should be computed side by side: the same kernels, in one graph each."""
    cuda: Any = torch.cuda
    case = Case(width, 8192, device)
    kernels = _kernels(case)
    options, scale = kernels.options, case.kv.head_dim**-0.5
    buffers, launches = prepared(case.layout, kernels, case.heads, case.kv.head_dim, case.device)
    out, side = torch.empty_like(case.q), cuda.Stream()

    def attend(is_wide: bool) -> None:
        items, count, config, programs = (
            (buffers.wide, buffers.num_wide, kernels.wide, options.wide_programs)
            if is_wide
            else (buffers.narrow, buffers.num_narrow, kernels.narrow, options.num_programs)
        )
        attend_items(
            case.q, case.kv, buffers.kv_indices, buffers.visible_lens, items, count, buffers.rows,
            buffers.part_out, buffers.part_lse, scale, config, programs,
        )  # fmt: skip

    def two() -> None:
        current = cuda.current_stream()
        side.wait_stream(current)
        with cuda.stream(side):
            attend(True)
        attend(False)
        current.wait_stream(side)
        merge_partials(buffers.part_out, buffers.part_lse, buffers.merge_indptr, buffers.merge_indices, out)

    one = partial(run, case.q, case.kv, buffers, launches, kernels, scale, out)
    return _row("streams", case, medians_us({"one": _captured(one), "two": _captured(two)}, case.device, 9, cold=True))
