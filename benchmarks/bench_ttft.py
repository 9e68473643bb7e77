"""How much sooner does the first token come when the prefix is cached, and what does the cache cost when nothing is?

Cached: 64 new tokens behind 1,024 that an earlier request left in the cache, against the same 1,088 tokens cold; one
runtime, flushed between, other text in each repetition. On the client's clock, from sending the text to having the
token. The bound is what a runtime would get if only the 64 tokens cost anything, cold time * 64 / 1,088.

Zero hits: the same random prompts on two runtimes, radix cache on and off, prefilled and decoded for a while; the ratio
of their times is within noise when the cache costs nothing. So the cache's calls (match, lease, insert, evict, release)
are timed one by one, too, in a full pool of this process: their share of such a run's time, which the noise of the rest
hardly touches. bench_cache.py has the bookkeeping alone, in microseconds.

    python benchmarks/bench_ttft.py [--quick] [--reps N] [--save]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Final

import harness
from bookkeeping import Bookkeeping
from calls import Run
from drivers import Bough
from harness import Summary, ratio, short
from models import llama_30m
from workloads import Writer, unshared

from bough import Runtime
from bough.runtime.protocol import SamplingParams, Text, Usage

FIRST_TOKEN: Final = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
NEW_TOKENS: Final = 64


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__).parse_args()
    environment = harness.environment()
    reps = options.reps or (3 if options.quick else 11)
    prefix = 256 if options.quick else 1024
    model = llama_30m(options.models_dir)
    with ExitStack() as stack:
        systems: dict[str, Bough] = {}
        for name in ("on", "off"):
            systems[name] = Bough(model, radix_cache=name == "on")
            stack.callback(systems[name].runtime.shutdown)
        first_token, row = _first_token(systems["on"].runtime, prefix, reps)
        zero_hits, rows = _zero_hits(systems, reps, options.quick)
    shares = _shares(Bookkeeping(model), reps, options.quick)
    tables = [
        harness.table(("first token, ms", "cold", "cached", "cold / cached", "bound"), [row]),
        harness.table(("no hits", "cache off, s", "cache on, s", "on / off"), rows),
        harness.table(("no hits, in a full pool", "the cache's calls, % of the time"), shares.items()),
    ]
    results = {"first_token": first_token, "zero_hits": zero_hits, "bookkeeping_percent": shares}
    harness.report("bench_ttft", options, environment, results, tables)


def _first_token(runtime: Runtime, prefix: int, reps: int) -> tuple[dict[str, object], list[object]]:
    """Time the first token of the same prompt, cold and behind its cached prefix."""
    numbers = count()

    def prompts() -> tuple[str, str]:
        writer = Writer(next(numbers))
        shared = writer.text(prefix)
        return shared, shared + writer.text(NEW_TOKENS)

    def cold() -> float:
        runtime.flush_cache()
        taken, usage = _ask(runtime, prompts()[1])
        assert usage.cached_tokens == 0, usage
        return taken

    def cached() -> float:
        runtime.flush_cache()
        shared, whole = prompts()
        _ask(runtime, shared)
        taken, usage = _ask(runtime, whole)
        assert usage.cached_tokens == prefix, usage
        return taken

    times = harness.interleaved({"cold": cold, "cached": cached}, reps)
    gain = ratio(times["cold"], times["cached"])
    bound = (prefix + NEW_TOKENS) / NEW_TOKENS
    results: dict[str, object] = {name: Summary.of(many) for name, many in times.items()}
    shape = f"{NEW_TOKENS} new on {prefix}"
    row = [shape, results["cold"], results["cached"], gain, short(bound)]
    return {"shape": shape, **results, "gain": gain, "bound": bound}, row


def _ask(runtime: Runtime, text: str) -> tuple[float, Usage]:
    """Return the milliseconds until the first token after `text`, and its cost."""
    begin = time.perf_counter()
    branch = runtime.open()
    runtime.extend(branch, [Text(text)])
    usage = runtime.generate(branch, FIRST_TOKEN).result(60.0).usage
    taken = (time.perf_counter() - begin) * 1e3
    runtime.release([branch])
    return taken, usage


def _shares(bookkeeping: Bookkeeping, reps: int, quick: bool) -> dict[str, Summary]:
    """Return the percentage of the time that the cache's calls take, by shape."""
    shapes = [(8, 512, 16), (32, 128, 64)] if not quick else [(8, 512, 8), (16, 64, 16)]
    return {
        f"{prompts} × {prompt} → {answer}": Summary.of(  # noqa: RUF001
            100 * share for share in [bookkeeping.run(prompts, prompt, answer) for _ in range(reps + 2)][2:]
        )
        for prompts, prompt, answer in shapes
    }


def _zero_hits(
    systems: dict[str, Bough], reps: int, quick: bool
) -> tuple[dict[str, dict[str, Summary]], list[list[object]]]:
    """Run random prompts with the cache on and off."""
    shapes = [(8, 512, 1), (32, 16, 64)] if not quick else [(4, 128, 1), (8, 16, 16)]
    results, rows = {}, []
    for prompts, prompt, answer in shapes:
        workload = unshared(prompts, prompt, answer)
        cases: dict[str, Callable[[], Run]] = {name: partial(s.run, workload) for name, s in systems.items()}
        runs = harness.interleaved(cases, reps)
        times = {name: [run.wall_s for run in many] for name, many in runs.items()}
        figures = {name: Summary.of(many) for name, many in times.items()}
        figures["on_off_ratio"] = ratio(times["on"], times["off"])
        results[workload.shape] = figures
        rows.append([workload.shape, figures["off"], figures["on"], figures["on_off_ratio"]])
    return results, rows


if __name__ == "__main__":
    main()
