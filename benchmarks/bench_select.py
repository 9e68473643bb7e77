"""How much faster is a select, which scores all choices as one trie, than one request per choice?

The same runtime, the same prompt and the same choices, prompt cached in both cases. `k requests`: a fork per choice and
a score of that choice alone on each, all sent at once, as a client without select would; the runtime may share what the
cache allows. The log-probabilities of both are compared before anything is timed. Computed tokens are the runtime's own
count; the bound is what a trie has to compute: its different tokens that another follows, and the prompt's last token.

    python benchmarks/bench_select.py [--quick] [--reps N] [--save]
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import harness
from harness import Summary, ratio
from models import llama_30m
from workloads import Writer

from bough import Runtime
from bough.runtime.protocol import Selected, Text

_WAIT_S: Final = 600.0
_Sample = tuple[float, int]  # ms, computed tokens


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__).parse_args()
    environment = harness.environment()
    reps = options.reps or (2 if options.quick else 9)
    prefix = 128 if options.quick else 1024
    shapes = [(4, 4), (16, 4)] if options.quick else [(2, 1), (4, 4), (16, 4), (128, 4), (2000, 4)]
    results: dict[str, object] = {}
    rows: list[list[object]] = []
    with Runtime(llama_30m(options.models_dir), max_total_tokens=65_536) as runtime:
        for count, length in shapes:
            figures, row = _shape(runtime, prefix, count, length, min(reps, 3) if count > 1000 else reps)
            results[str(row[0])] = figures
            rows.append(row)
    headers = ("choices", "k requests, ms", "select, ms", "k / select", "computed, k", "computed, select", "bound")
    harness.report("bench_select", options, environment, results, [harness.table(headers, rows)])


def _shape(runtime: Runtime, prefix: int, count: int, length: int, reps: int) -> tuple[dict[str, object], list[object]]:
    prompt, choices, bound = _texts(prefix, count, length)
    warm = runtime.open()
    runtime.extend(warm, [Text(prompt)])
    _compare(runtime, warm, choices)
    cases: dict[str, Callable[[], _Sample]] = {
        "k_requests": partial(_requests, runtime, warm, choices, prompt),
        "select": partial(_select, runtime, warm, choices, prompt),
    }
    samples = harness.interleaved(cases, reps)
    runtime.release([warm])
    times = {name: [taken for taken, _ in many] for name, many in samples.items()}
    computed = {name: max(tokens for _, tokens in many) for name, many in samples.items()}
    gain = ratio(times["k_requests"], times["select"])
    shape = f"{count} of {length} after {prefix}"
    figures = {name: Summary.of(many) for name, many in times.items()}
    row: list[object] = [shape, figures["k_requests"], figures["select"], gain]
    row += [computed["k_requests"], computed["select"], bound]
    return {**figures, "gain": gain, "computed": computed, "bound": bound}, row


def _texts(prefix: int, count: int, length: int) -> tuple[str, list[str], int]:
    """Return a prompt, choices that share beginnings as names or labels do, and the tokens their trie must compute.

    The model's words are one token each. Each position has few words to choose from, so that early ones are shared.
    """
    writer, pick = Writer(count), random.Random(count)
    width = max(2, round((2 * count) ** (1 / length)))
    words = [[writer.text(1) for _ in range(width)] for _ in range(length)]
    chosen: dict[tuple[str, ...], None] = {}
    while len(chosen) < count:
        chosen[tuple(pick.choice(column) for column in words)] = None
    followed = {choice[:end] for choice in chosen for end in range(1, length)}
    return Writer(0).text(prefix), ["".join(choice) for choice in chosen], 1 + len(followed)


def _compare(runtime: Runtime, branch: int, choices: Sequence[str]) -> None:
    """Check that both ways say the same, and leave the prompt in the cache."""
    together = runtime.score(branch, choices, "sum").result(_WAIT_S)
    alone = [runtime.score(branch, [choice], "sum").result(_WAIT_S) for choice in choices[:20]]
    worst = max(abs(one.scores[0] - score) for one, score in zip(alone, together.scores, strict=False))
    assert worst < 1e-3 * abs(min(together.scores)), f"the two ways differ by {worst}"


def _select(runtime: Runtime, warm: int, choices: Sequence[str], prompt: str) -> _Sample:
    _prepare(runtime, prompt)
    begin = time.perf_counter()
    done = runtime.score(warm, choices, "sum").result(_WAIT_S)
    return (time.perf_counter() - begin) * 1e3, done.usage.computed_tokens


def _requests(runtime: Runtime, warm: int, choices: Sequence[str], prompt: str) -> _Sample:
    _prepare(runtime, prompt)
    begin = time.perf_counter()
    branches = runtime.fork(warm, len(choices))
    asked = [runtime.score(branch, [choice], "sum") for branch, choice in zip(branches, choices, strict=True)]
    done: list[Selected] = [future.result(_WAIT_S) for future in asked]
    taken = (time.perf_counter() - begin) * 1e3
    runtime.release(branches)
    return taken, sum(one.usage.computed_tokens for one in done)


def _prepare(runtime: Runtime, prompt: str) -> None:
    """Leave nothing but the prompt in the cache."""
    runtime.flush_cache()
    branch = runtime.open()
    runtime.extend(branch, [Text(prompt)])
    runtime.score(branch, [" the"], "sum").result(_WAIT_S)
    runtime.release([branch])


if __name__ == "__main__":
    main()
