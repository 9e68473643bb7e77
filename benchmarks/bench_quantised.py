"""What int8 weights and int8 KV cost in accuracy, and what they save in memory and time.

On `pocket` the texts are chats of its own held-out tasks, on the 30M shape (random weights) random words. Errors are
taken after every token of a text that all kinds are given alike: the root mean square of the logits' difference from
the unquantised runner in the same dtype over the logits' standard deviation, and the share of positions where the
greedy token is the same. Times are those of a decode step of 32 sequences of 512 tokens, and of a prefill of 512.

What to expect where the processor has AVX512_VNNI (Zen 4, the linears alone, one thread): int8 weights take 0.5 to 0.7
of bfloat16's time at 1, 8, 32 and 512 rows, from the 30M shape on. Elsewhere PyTorch quantises activations in several
calls, and there is nothing to gain below a hidden size of 1,024. int8 KV saves time where attention reads memory: 0.6
of bfloat16's attention at 32 sequences of 4,096; within a cache it costs a tenth more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from harness import Summary, environment, interleaved, parser, ratio, report, table
from models import llama_30m, token_ids
from workloads import Writer

from bough.runtime.batch import Batch, Row
from bough.runtime.inputs import build_inputs
from bough.runtime.runner import Runner, load_runner

Ids = npt.NDArray[np.int32]

# kind -> (KV, weights)
KINDS: Final = {
    "plain": (None, None),
    "KV int8": ("int8", None),
    "weights int8": (None, "int8"),
    "both": ("int8", "int8"),
}
TASKS: Final = ("arithmetic", "labels (chat)", "tips", "json", "facts", "small talk")
DTYPES: Final = ("float32", "bfloat16")
PAGE_SIZE: Final = 16
CONTEXT: Final = 512


def main() -> None:
    """Measure and report."""
    options = parser(__doc__).parse_args()
    start = environment()
    count = 4 if options.quick else 40
    texts = {"pocket": (_pocket(), list(_chats(count))), "30M": (llama_30m(options.models_dir), _random(count))}
    rows = []
    for name, (folder, ids) in texts.items():
        for dtype in DTYPES:
            rows += _measure(name, folder, dtype, ids, options.reps or (2 if options.quick else 7))
    headers = (
        "model",
        "dtype",
        "kind",
        "logit error",
        "same greedy token",
        "KV bytes/token",
        "decode speed",
        "prefill speed",
    )
    lines = [
        (
            *(r["model"], r["dtype"], r["kind"], f"{r['error']:.4f}", f"{r['agreement']:.4f}"),
            *(r["bytes_per_token"], r["decode"], r["prefill"]),
        )
        for r in rows
    ]
    report("bench_quantised", options, start, rows, [table(headers, lines)])


def _measure(name: str, folder: Path, dtype: str, texts: list[Ids], reps: int) -> list[dict[str, Any]]:
    """Compare the kinds in one dtype; speeds are those of `plain`'s time over theirs."""
    runners = {
        kind: load_runner(
            folder, dtype=dtype, page_size=PAGE_SIZE, max_total_tokens=33 * CONTEXT, kv_dtype=kv_dtype, weights=weights
        )
        for kind, (kv_dtype, weights) in KINDS.items()
    }
    exact = [_logits(runners["plain"], ids) for ids in texts]
    cases: dict[str, Callable[[], float]] = {}
    for kind, runner in runners.items():
        decode, prefill = _steps(runner)
        cases[f"{kind} decode"], cases[f"{kind} prefill"] = _timed(runner, decode), _timed(runner, prefill)
    times = interleaved(cases, reps)
    results = []
    for kind, runner in runners.items():
        found = [_logits(runner, ids) for ids in texts]
        squares = sum(float((a - b).double().square().sum()) for a, b in zip(found, exact, strict=True))
        same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(found, exact, strict=True)]
        num = sum(a.numel() for a in exact)
        speeds = {
            step: ratio(times[f"plain {step}"], times[f"{kind} {step}"]) if kind != "plain" else Summary.of([1.0])
            for step in ("decode", "prefill")
        }
        results.append(
            {
                "model": name,
                "dtype": dtype,
                "kind": kind,
                "error": (squares / num) ** 0.5 / float(torch.cat(exact).double().std()),
                "agreement": float(torch.cat(same).double().mean()),
                "positions": len(torch.cat(same)),
                "bytes_per_token": runner.pool.bytes_per_page // PAGE_SIZE,
                **speeds,
            }
        )
    return results


def _logits(runner: Runner, ids: Ids) -> torch.Tensor:
    """Return (num_tokens, vocab_size) logits after every token of a text."""
    pages = np.arange(-(-len(ids) // PAGE_SIZE), dtype=np.int32)
    row = Row(ids, 0, pages, None, score_ids=ids, score_at=np.arange(len(ids), dtype=np.int32))
    with torch.inference_mode():
        inputs = build_inputs(Batch((row,)), runner.page_size, runner.attention.plan)
        return runner.model.logits(runner.model.forward(inputs, runner.pool))


def _steps(runner: Runner) -> tuple[Batch, Batch]:
    """Return a decode of 32 sequences and a prefill of one; the decodes' KV is written by prefills here."""
    per_row = CONTEXT // PAGE_SIZE
    ids = np.random.default_rng(0).integers(0, runner.vocab_size, CONTEXT).astype(np.int32)
    prefills = [Row(ids, 0, np.arange(i * per_row, (i + 1) * per_row, dtype=np.int32), None) for i in range(32)]
    for row in prefills:
        runner.execute(Batch((row,)))
    decodes = tuple(msgspec.structs.replace(row, token_ids=ids[-1:], start=CONTEXT - 1) for row in prefills)
    return Batch(decodes), Batch((prefills[0],))


def _timed(runner: Runner, batch: Batch) -> Callable[[], float]:
    def case() -> float:
        begin = time.perf_counter()
        runner.execute(batch)
        return time.perf_counter() - begin

    return case


def _pocket() -> Path:
    from bough.runtime.models.folder import resolve_model

    return resolve_model("pocket")


def _chats(count: int) -> Iterator[Ids]:
    """Return prompts of pocket's held-out tasks with the right answers, as tokens."""
    from tokenizers import Tokenizer

    from bough.runtime.pocket import tasks
    from bough.runtime.pocket.evaluate import prompts_of

    bpe = Tokenizer.from_file(str(_pocket() / "tokenizer.json"))
    for name in TASKS:
        for index, example in enumerate(tasks.evaluation(name, max(1, count // len(TASKS)))):
            for prompt in prompts_of(index, example, bpe):
                yield np.array([*prompt.ids, *bpe.encode(prompt.expected).ids][:CONTEXT], dtype=np.int32)


def _random(count: int) -> list[Ids]:
    return [np.array(token_ids(Writer(i).text(256)), dtype=np.int32) for i in range(max(1, count // 4))]


if __name__ == "__main__":
    main()
