"""How close does the scheduler come to the best hit rate possible, and how long can a request wait?

Drives the real scheduler and prefix cache with a runner that computes nothing and a clock that a cost model moves, so
that 100,000 requests of the SGLang paper's eleven workload shapes (shapes.py) take minutes and need no model.

A batch job of programs, 64 at a time (the default of the paper's benchmarks), issues its requests; a program's next
request comes `client_delay` after the ones it waits for. The pool is that of the paper's device by default (an A10G
with Llama-2-7B: 24 GB at 0.9, less 13.5 GB of weights and some workspace, at 0.5 MB a token), or a share of what 64
programs need together.

    ratio      hit rate / optimum; the optimum is that of a cache that never forgets (shapes.optimum)
    again      tokens computed a second time after a preemption, per prompt token; ratio* counts them as misses
    waits      from issue to first admission, in model seconds; overtaken: how many later requests were admitted before
    span       model seconds of the whole job: a schedule that hits more must not take longer
    starve     one request that hits nothing against an endless stream of hits, more than can run: its wait is bounded

    python benchmarks/simulate.py [--requests 100000] [--policies lpm,fcfs] [--pools a10g,0.25,0.5,1] [--save]
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect, insort
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import count
from multiprocessing import get_context
from typing import Final

import harness
from calls import percentile
from shapes import SHAPES, Program, Request, Writer, join, longest_request, optimum, working_set

from bough.runtime.batch import Batch, RowResult
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.policies import OVERDUE
from bough.runtime.protocol import SamplingParams
from bough.runtime.scheduler import Outcome, Scheduler, Step
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie

PAPER_POOL: Final = 15_360


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step: linear in what it computes and reads. The defaults are Llama-2-7B in fp16 on an A10G.

    step: weights read once, 13.5 GB at 600 GB/s. prefill_token: 13.4 GFLOP at 70 TFLOP/s. decode: sampling and so on,
    per sequence. kv_token: 0.5 MB read per token of context at 600 GB/s.
    """

    step: float = 22e-3
    prefill_token: float = 0.19e-3
    decode: float = 0.05e-3
    kv_token: float = 0.87e-6

    def seconds(self, batch: Batch) -> float:
        """Return how long a step takes."""
        num_decodes = sum(len(row.token_ids) == 1 for row in batch.rows)
        num_tokens = sum(len(row.token_ids) for row in batch.rows)
        read = sum(row.start for row in batch.rows)
        return (
            self.step
            + self.prefill_token * (num_tokens - num_decodes)
            + self.decode * num_decodes
            + self.kv_token * read
        )


@dataclass(frozen=True)
class Setting:
    """What a simulation runs on. pool_tokens: slots of KV; client_delay: seconds from a result to the next request."""

    policy: str = "lpm"
    pool_tokens: int = PAPER_POOL
    concurrency: int = 64
    max_running: int = 64
    token_budget: int = 1024
    page_size: int = 16
    client_delay: float = 1e-3
    cost: CostModel = CostModel()


@dataclass(frozen=True)
class Report:
    """What came out. Times are the model's, in seconds, but for `us_per_step`, which is this machine's."""

    policy: str
    pool_tokens: int
    requests: int
    prompt_tokens: int
    hit_rate: float
    optimum: float
    paper_optimum: float
    again: float
    p99_wait: float
    longest_wait: float
    most_overtaken: int
    most_waiting: int
    preemptions: int
    evictions: int
    steps: int
    makespan: float
    us_per_step: float

    @property
    def ratio(self) -> float:
        return self.hit_rate / self.optimum if self.optimum else 1.0

    @property
    def strict_ratio(self) -> float:
        return (self.hit_rate - self.again) / self.optimum if self.optimum else 1.0


class Clock:
    """Model time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Client:
    """Issues the requests of a list of programs, `concurrency` programs at a time, in the order given."""

    def __init__(self, programs: list[Program], concurrency: int, delay: float) -> None:
        self._programs = programs
        self._delay = delay
        self._next = iter(range(len(programs)))
        self._missing: dict[tuple[int, int], int] = {}
        self._left: dict[int, int] = {}
        self._due: list[tuple[float, int, int, int]] = []
        self._tie = count()
        for _ in range(concurrency):
            self._open(0.0)

    def _open(self, now: float) -> None:
        number = next(self._next, None)
        if number is None:
            return
        self._left[number] = len(self._programs[number])
        for i, request in enumerate(self._programs[number]):
            self._missing[number, i] = len(request.after)
            if not request.after:
                heapq.heappush(self._due, (now, next(self._tie), number, i))

    def take(self, now: float) -> Iterator[tuple[tuple[int, int], Request]]:
        """Yield what is due."""
        while self._due and self._due[0][0] <= now:
            _, _, number, i = heapq.heappop(self._due)
            yield (number, i), self._programs[number][i]

    @property
    def next_time(self) -> float | None:
        return self._due[0][0] if self._due else None

    def done(self, key: tuple[int, int], now: float) -> None:
        """Take note that a request has finished."""
        number, finished = key
        for i, request in enumerate(self._programs[number]):
            if finished in request.after:
                self._missing[number, i] -= 1
                if not self._missing[number, i]:
                    heapq.heappush(self._due, (now + self._delay, next(self._tie), number, i))
        self._left[number] -= 1
        if not self._left[number]:
            self._open(now + self._delay)


class Simulation:
    """One run of a list of programs."""

    def __init__(self, programs: list[Program], setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self.cache = PrefixCache(setting.pool_tokens // setting.page_size, setting.page_size)
        self.scheduler = Scheduler(
            self.cache,
            token_budget=setting.token_budget,
            max_running=setting.max_running,
            policy=setting.policy,
            clock=self.clock,
        )
        self._client = Client(programs, setting.concurrency, setting.client_delay)
        self._live: dict[Sequence, tuple[tuple[int, int], Request]] = {}
        self._issued: dict[Sequence, float] = {}  # those never admitted yet
        self._admitted: list[int] = []  # arrivals of those admitted, in order of arrival
        self.waits: list[float] = []
        self.overtaken: list[int] = []
        self.most_waiting = 0
        self.own_seconds = 0.0

    def run(self) -> None:
        """Run to the end."""
        while True:
            begin = time.perf_counter()
            self._submit()
            step = self.scheduler.plan()
            assert not self.scheduler.take_exhausted(), "the pool is too small for one request"
            self.own_seconds += time.perf_counter() - begin
            if step is None:
                assert not self.scheduler.has_work, "work, but no step"
                if self._client.next_time is None:
                    return
                self.clock.now = max(self.clock.now, self._client.next_time)
                continue
            self._note_admissions(step)
            self.clock.now += self.setting.cost.seconds(step.batch)
            results = [self._result(sequence) for sequence in self._drawing(step)]
            begin = time.perf_counter()
            outcomes = self.scheduler.commit(step, results)
            finished = [outcome.sequence for outcome in outcomes if self._is_done(outcome)]
            for sequence in finished:
                self.scheduler.finish(sequence)
            self.own_seconds += time.perf_counter() - begin
            for sequence in finished:
                self._client.done(self._live.pop(sequence)[0], self.clock.now)

    def _submit(self) -> None:
        for key, request in self._client.take(self.clock.now):
            if request.output is None:
                start = request.score_start
                sequence = Sequence(request.prompt[:start], trie=TokenTrie([request.prompt[start:].tolist()]))
            else:
                sequence = Sequence(request.prompt, params=SamplingParams(max_tokens=len(request.output)))
            self._live[sequence] = key, request
            self._issued[sequence] = self.clock.now
            self.scheduler.submit(sequence)
        self.most_waiting = max(self.most_waiting, self.scheduler.num_waiting)

    def _note_admissions(self, step: Step) -> None:
        new = [sequence for sequence in step.sequences if sequence in self._issued]
        for sequence in new:
            self.waits.append(self.clock.now - self._issued.pop(sequence))
            self.overtaken.append(len(self._admitted) - bisect(self._admitted, sequence.arrival))
            insort(self._admitted, sequence.arrival)

    def _drawing(self, step: Step) -> Iterator[Sequence | None]:
        for sequence, row in zip(step.sequences, step.batch.rows, strict=True):
            yield sequence if row.sample is not None else None

    def _result(self, sequence: Sequence | None) -> RowResult:
        if sequence is None:
            return RowResult()
        output = self._live[sequence][1].output
        assert output is not None
        return RowResult(token=int(output[len(sequence.tokens) - sequence.prompt_len]))

    def _is_done(self, outcome: Outcome) -> bool:
        sequence = outcome.sequence
        if sequence.params is None:
            return sequence.num_computed == sequence.goal
        return len(sequence.generated) == sequence.params.max_tokens

    def report(self, best: float, paper: float) -> Report:
        """Return the figures of a run that has ended."""
        counters = self.scheduler.counters
        return Report(
            policy=self.setting.policy,
            pool_tokens=self.setting.pool_tokens,
            requests=len(self.waits),
            prompt_tokens=counters.prompt_tokens,
            hit_rate=counters.cached_tokens / counters.prompt_tokens,
            optimum=best,
            paper_optimum=paper,
            again=counters.recomputed_tokens / counters.prompt_tokens,
            p99_wait=percentile(self.waits, 0.99),
            longest_wait=max(self.waits),
            most_overtaken=max(self.overtaken),
            most_waiting=self.most_waiting,
            preemptions=counters.preemptions,
            evictions=self.cache.num_evictions,
            steps=counters.steps,
            makespan=self.clock.now,
            us_per_step=self.own_seconds / counters.steps * 1e6,
        )


def simulate(programs: list[Program], setting: Setting, bounds: tuple[float, float] | None = None) -> Report:
    """Run the programs; return the figures. bounds: `shapes.optimum(programs)` where it is known already."""
    simulation = Simulation(programs, setting)
    simulation.run()
    return simulation.report(*(bounds or optimum(programs)))


# ---------------------------------------------------------------------------------------------- the two questions


def starvation(policy: str, num_hits: int, concurrency: int = 256) -> Report:
    """Run one miss among requests that all share a cached prefix, `concurrency` of them outstanding at any time."""
    writer = Writer(1)
    prefix = writer.text(2000)
    programs: list[Program] = [(Request(join(prefix, writer.text(8)), writer.text(8)),) for _ in range(num_hits)]
    programs.insert(concurrency, (Request(writer.text(1000), writer.text(8)),))
    return simulate(programs, Setting(policy=policy, concurrency=concurrency))


@dataclass(frozen=True)
class Job:
    """One shape on one setting. pool: "a10g", or a share of what the programs that run at once need together."""

    shape: int
    policy: str
    pool: str
    num_requests: int

    def run(self) -> Report:
        """Make the trace and run it."""
        programs = SHAPES[self.shape].programs(self.num_requests)
        setting = Setting(policy=self.policy)
        if self.pool != "a10g":
            pool = int(float(self.pool) * working_set(programs, setting.concurrency))
            setting = replace(setting, pool_tokens=max(pool, 2 * longest_request(programs)))
        return simulate(programs, setting)


def columns(report: Report) -> list[object]:
    """Return a table's row, but for the shape's name."""
    return [
        f"{report.pool_tokens:,}",
        f"{report.hit_rate:.3f}",
        f"{report.optimum:.3f}",
        f"{report.ratio:.3f}",
        f"{report.strict_ratio:.3f}",
        f"{report.longest_wait:.1f} ({report.p99_wait:.1f})",
        report.most_overtaken,
        report.preemptions,
        f"{report.evictions:,}",
        f"{report.makespan:,.0f}",
        f"{report.us_per_step:,.0f}",
    ]


HEADERS: Final = (
    "shape",
    "pool",
    "hit",
    "optimum",
    "ratio",
    "ratio*",
    "longest wait (p99), s",
    "overtaken",
    "preempted",
    "evicted",
    "span, s",
    "µs/step",
)


def summary(reports: list[Report]) -> str:
    """Return mean and least ratio."""
    ratios, strict = [r.ratio for r in reports], [r.strict_ratio for r in reports]
    text = f"ratio mean {sum(ratios) / len(ratios):.4f}, least {min(ratios):.4f}; "
    return text + f"ratio* mean {sum(strict) / len(strict):.4f}, least {min(strict):.4f}"


def main() -> None:
    """Run every shape on every setting and report."""
    parser = harness.parser(__doc__, needs_model=False)
    parser.add_argument("--requests", type=int, help="over all shapes (default 100,000; 5,500 with --quick)")
    parser.add_argument("--policies", default="lpm", help="with commas; lpm, fcfs")
    parser.add_argument("--pools", default="a10g", help="with commas; a10g, or shares of the working set such as 0.25")
    parser.add_argument("--processes", type=int, default=2, help="simulations at the same time")
    options = parser.parse_args()
    environment = harness.environment()
    num_requests = -(-(options.requests or (5500 if options.quick else 100_000)) // len(SHAPES))
    settings = [(policy, pool) for pool in options.pools.split(",") for policy in options.policies.split(",")]
    jobs = [Job(i, policy, pool, num_requests) for policy, pool in settings for i in range(len(SHAPES))]
    # Longest first, so that no core waits for the last one.
    order = sorted(jobs, key=lambda job: SHAPES[job.shape].name != "multi-turn long")
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as executor:
        reports = dict(zip(order, executor.map(Job.run, order), strict=True))
    tables, results = [], {}
    for policy, pool in settings:
        mine = [reports[Job(i, policy, pool, num_requests)] for i in range(len(SHAPES))]
        rows = [[shape.name, *columns(report)] for shape, report in zip(SHAPES, mine, strict=True)]
        title = f"{policy}, pool {pool}, {sum(r.requests for r in mine):,} requests: {summary(mine)}"
        tables.append(f"{title}\n\n{harness.table(HEADERS, rows)}")
        results[f"{policy} {pool}"] = {s.name: asdict(r) for s, r in zip(SHAPES, mine, strict=True)}
    for policy in options.policies.split(","):
        report = starvation(policy, num_requests)
        bound = f"{OVERDUE} × {report.most_waiting} = {OVERDUE * report.most_waiting}"  # noqa: RUF001
        tables.append(
            f"{policy}: a miss among {report.requests:,} hits was overtaken by {report.most_overtaken:,} "
            f"(bound {bound}) and waited {report.longest_wait:.1f} of {report.makespan:.1f} s."
        )
        results[f"{policy} starvation"] = asdict(report)
    harness.report("simulate", options, environment, results, tables)


if __name__ == "__main__":
    main()
