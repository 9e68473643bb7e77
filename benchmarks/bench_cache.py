"""What do the cache and the scheduler cost without a model?

On an engine whose runner computes nothing, so that only bookkeeping is timed:

fork         64 children of a branch of 4,096 and of 131,072 tokens, through the engine: must not depend on the length
match        a cached prefix of 32,768 tokens, stored as one edge and as 64
eviction     per page, with 1,000 / 10,000 / 100,000 leaves: must not depend on how many there are
request      acquire, publish, release of a random 1,024-token prompt, cache on and off: the cost of a miss
step         plan and commit with 64 sequences decoding; and the engine's whole step, which also turns tokens into text
queue        plan with 256 waiting: behind 4,096 cached tokens, 16 of their own, of which a step admits 64; and all
             for a prompt of 4,600 tokens that is in its last chunk, so that each is looked at and none admitted

    python benchmarks/bench_cache.py [--quick] [--reps N] [--save]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final

import harness
import numpy as np
from harness import Summary, timed_us

from bough.runtime import protocol
from bough.runtime.batch import Batch, RowResult
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.inflight import InFlight
from bough.runtime.models.folder import resolve_model
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import Extend, Fork, Generate, Ok, Open, SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence as Running
from bough.runtime.session import Session
from bough.runtime.text.tokenizer import load_tokenizer
from bough.runtime.vector import IntArray

PAGE: Final = 16
VOCAB: Final = 1000
WIDTH: Final = 64
WAITING: Final = 256
POCKET: Final = resolve_model("pocket")
TOKENIZER: Final = load_tokenizer(POCKET)
TOKEN: Final = TOKENIZER.encode(" a")[-1]
GREEDY: Final = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)


class NullRunner:
    """Draws the same token for every row, and computes nothing."""

    def execute(self, batch: Batch) -> list[RowResult]:
        return [RowResult(token=TOKEN if row.sample is not None else None) for row in batch.rows]


class Process:
    """The runtime process without sockets and model: an engine and one session."""

    def __init__(self, num_tokens: int) -> None:
        config = RuntimeConfig(max_running=WIDTH)
        cache = PrefixCache(num_tokens // PAGE, PAGE)
        self.scheduler = Scheduler(cache, token_budget=config.token_budget, max_running=WIDTH)
        composer = Composer(
            Prompter(TOKENIZER, None, "none"), vocab_size=VOCAB, context_len=num_tokens, seed=1, credit=config.credit
        )
        in_flight = InFlight(self.scheduler, NullRunner(), credit=config.credit)
        self.engine = Engine(config, self.scheduler, in_flight, composer, epoch=1)
        self.session = Session(b"id", "local", "benchmark", 0.0)
        self.ids = count(1)

    def send(self, request: Any, *buffers: bytes) -> None:
        self.engine.handle(self.session, request, buffers)

    def branch(self, token_ids: IntArray) -> int:
        """Open a branch that holds `token_ids`."""
        branch = next(self.ids)
        self.send(Open(next(self.ids), branch))
        self.send(Extend(next(self.ids), branch, [protocol.Tokens(0)]), token_ids.tobytes())
        self.replies()
        return branch

    def replies(self) -> list[Any]:
        replies = [reply for message in self.session.take_outbox() for reply in message.replies]
        assert not any(isinstance(reply, protocol.Failed) for reply in replies), replies
        return replies


def tokens(num: int, seed: int = 0) -> IntArray:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, num).astype(np.int32)


def fill(cache: PrefixCache, ids: IntArray) -> None:
    """Put a prefix into the cache, as a sequence that ends does."""
    lease = cache.acquire("local", ids, len(ids), headroom=0)
    assert lease is not None
    cache.publish(lease, ids)
    cache.release(lease)


# ---------------------------------------------------------------------------------------------- what is measured


def fork(num_tokens: int, reps: int) -> Summary:
    """Microseconds of a fork into 64 children."""
    process = Process(2 * num_tokens)
    parent = process.branch(tokens(num_tokens))
    times = []
    for _ in range(reps):
        children = [next(process.ids) for _ in range(WIDTH)]
        request = Fork(next(process.ids), parent, children)
        times.append(timed_us(lambda request=request: process.send(request)))  # type: ignore[misc]
        assert isinstance(process.replies()[-1], Ok)
        process.send(protocol.Release(next(process.ids), children))
        process.replies()
    return Summary.of(times)


def match(num_tokens: int, num_edges: int, reps: int) -> Summary:
    """Microseconds of a match whose path has `num_edges` edges."""
    cache = PrefixCache(4 * num_tokens // PAGE, PAGE)
    ids = tokens(num_tokens)
    fill(cache, ids)
    for cut in np.linspace(0, num_tokens, num_edges, endpoint=False)[1:].astype(int):
        fill(cache, np.append(ids[:cut], np.int32(VOCAB)))
    assert cache.matched_len("local", ids) == num_tokens
    return Summary.of(timed_us(lambda: cache.matched_len("local", ids), 10) for _ in range(reps))


def evict(num_leaves: int, reps: int) -> Summary:
    """Microseconds per page evicted, 64 at a time, from a tree of `num_leaves` leaves of one page."""
    cache = PrefixCache(num_leaves + 64, PAGE)
    prompt = np.zeros(PAGE, dtype=np.int32)
    for leaf in range(num_leaves):
        prompt[0] = leaf
        fill(cache, prompt.copy())
    assert cache.tree.num_nodes == num_leaves
    return Summary.of(timed_us(lambda: cache.tree.evict(64)) / 64 for _ in range(min(reps, num_leaves // 64 - 1)))


def request(enabled: bool, reps: int) -> Callable[[], float]:
    """Return what times one random prompt of 1,024 tokens, in a full cache: match, evict, publish, release."""
    cache = PrefixCache(65_536 // PAGE, PAGE, enabled=enabled)
    prompts: Iterator[IntArray] = iter([tokens(1024, seed) for seed in range(reps + 66)])
    for _ in range(64):
        fill(cache, next(prompts))
    return lambda: timed_us(lambda: fill(cache, next(prompts)))


def step(reps: int) -> dict[str, Summary]:
    """Microseconds of plan, commit and the engine's whole step, 64 sequences decoding behind 512 tokens each."""
    scheduler = Process(1 << 18).scheduler
    for seed in range(WIDTH):
        scheduler.submit(Running(tokens(512, seed), params=GREEDY))
    runner = NullRunner()
    times: dict[str, list[float]] = {"plan": [], "commit": [], "engine step": []}
    while len(times["plan"]) < reps:
        planned: list[Any] = []
        plan_us = timed_us(lambda into=planned: into.append(scheduler.plan()))  # type: ignore[misc]
        drawn = runner.execute(planned[0].batch)
        commit_us = timed_us(lambda step=planned[0], drawn=drawn: scheduler.commit(step, drawn))  # type: ignore[misc]
        if all(len(row.token_ids) == 1 for row in planned[0].batch.rows) and len(drawn) == WIDTH:
            times["plan"].append(plan_us)
            times["commit"].append(commit_us)
    process = Process(1 << 18)
    for seed in range(WIDTH):
        branch = process.branch(tokens(512, seed))
        process.send(Generate(next(process.ids), branch, GREEDY))
    while any(sequence.is_prefilling for sequence in process.scheduler.running) or process.scheduler.num_waiting:
        process.engine.step()
    times["engine step"] = [timed_us(process.engine.step) for _ in range(reps)]
    return {name: Summary.of(many) for name, many in times.items()}


def queue(reps: int) -> dict[str, Summary]:
    """Microseconds of plan with 256 sequences waiting."""
    prefix, prompt = tokens(4096), tokens(4600)
    times: dict[str, list[float]] = {"own prompts": [], "one prompt": []}
    for _ in range(reps):
        scheduler = Process(1 << 18).scheduler
        fill(scheduler.cache, prefix)
        for seed in range(WAITING):
            scheduler.submit(Running(np.concatenate([prefix, tokens(16, seed)]), namespace="local", params=GREEDY))
        times["own prompts"].append(timed_us(scheduler.plan))
        scheduler = Process(1 << 18).scheduler
        for seed in range(1 + WAITING):
            scheduler.submit(Running(np.concatenate([prompt, tokens(1, seed)]), params=GREEDY))
        while not scheduler.running or len(prompt) - scheduler.running[0].num_computed > RuntimeConfig().token_budget:
            planned = scheduler.plan()
            assert planned is not None
            scheduler.commit(planned, NullRunner().execute(planned.batch))
        times["one prompt"].append(timed_us(scheduler.plan))
        assert scheduler.num_waiting == WAITING, "all wait for what the first computes"
    return {name: Summary.of(many) for name, many in times.items()}


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__, needs_model=False).parse_args()
    environment = harness.environment()
    reps = options.reps or (20 if options.quick else 200)
    lengths = (4096, 16_384) if options.quick else (4096, 131_072)
    leaves = (1000, 10_000) if options.quick else (1000, 10_000, 100_000)
    figures: dict[str, tuple[Summary, str]] = {}
    for length in lengths:
        figures[f"fork × {WIDTH} of {length:,} tokens"] = fork(length, reps), "≤ 20"  # noqa: RUF001
    for edges in (1, 64):
        figures[f"match of 32,768 tokens, edges: {edges}"] = match(32_768, edges, reps), "≤ 215"
    for num in leaves:
        figures[f"evict a page, leaves: {num:,}"] = evict(num, reps), "≤ 20"
    misses = harness.interleaved({name: request(name == "on", reps) for name in ("on", "off")}, reps)
    for name, times in misses.items():
        figures[f"random 1,024-token prompt, cache {name}"] = Summary.of(times), ""
    steps = step(reps)
    figures["plan, 64 decoding"] = steps["plan"], ""
    figures["commit, 64 decoding"] = steps["commit"], ""
    figures["engine's whole step, 64 decoding"] = steps["engine step"], "≤ 300"
    queues = queue(reps)
    figures["plan, 256 waiting, own prompts"] = queues["own prompts"], ""
    figures["plan, 256 waiting for one prompt"] = queues["one prompt"], ""
    rows = [(name, figure, aim) for name, (figure, aim) in figures.items()]
    tables = [harness.table(("bookkeeping", "µs", "aim"), rows)]
    harness.report("bench_cache", options, environment, {name: f for name, (f, _) in figures.items()}, tables)


if __name__ == "__main__":
    main()
