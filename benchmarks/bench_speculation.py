"""What does speculation gain where texts repeat one another, and what does it cost where they do not?

Two schedulers over one runner in this process answer the same prompts, one with drafts and one without, a step of the
one and a step of the other in turns, first and second changing places: whatever else the machine does in those
milliseconds hits both. That they say the same is asserted. Workloads (`repeating.py`):

siblings  records with the same keys and other values, each prompt another
copying   what is said stands in the prompt, to the word or nearly
random    nothing repeats: what is left is the loss

by the bundled model, whose step takes a millisecond, and by the 30M shape. A round is some sequences, so many of them
at a time, the next begins as one ends. Counted are steps that decode for that many and do nothing else (planning,
computing, sampling, committing) and the tokens drawn in them. Told are the milliseconds per token of both, the gain
(the median of the rounds' ratios, with the interval that holds the median at 95 %, and the extremes), how many tokens
were drafted for each token drawn and what share of them came true, and the processor time of plan and commit per
sequence and step of both.

    python benchmarks/bench_speculation.py [--quick] [--save] [--model pocket 30m] [--batch 1 8] [--budget 8]
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

import harness
from harness import Summary, short
from models import llama_30m
from repeating import TEXT_LEN, WORKLOADS, Ask, Asked, Scripted, Told, Workload

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.draft_costs import measure_draft_costs
from bough.runtime.drafts import DraftCosts
from bough.runtime.models.folder import resolve_model
from bough.runtime.pipeline import Executor
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator

PAGES: Final = 2048  # half of them for each of two machines
PAGE_SIZE: Final = 16
MOST_ROUNDS: Final = 60
WAVES: Final = 2  # times as many sequences in a round as at once


@dataclass
class Machine:
    """A scheduler over half of the one runner's pages, without sockets; what it took so far."""

    half: int
    speculator: Speculator | None
    eos: int | None
    seconds: float = 0.0
    host_s: float = 0.0
    num_planned: int = 0  # sequences, summed over steps
    num_drawn: int = 0
    drafted: int = 0
    accepted: int = 0
    said: list[list[int]] = field(default_factory=list)

    def begin(self, executor: Executor, asks: list[Ask], batch: int, temperature: float) -> None:
        """Take in the prompts of a round."""
        self.seconds, self.num_drawn = 0.0, 0
        cache = PrefixCache(PAGES, PAGE_SIZE)
        held = cache.allocator.allocate(PAGES) or []
        cache.allocator.release([page for page in held if page % 2 == self.half])
        self.executor, self.batch = executor, batch
        self.scheduler = Scheduler(cache, token_budget=1024, max_running=batch, speculator=self.speculator)
        self.sequences = []
        for seed, ask in enumerate(asks):
            length = TEXT_LEN if ask.text is None else len(ask.text)
            params = SamplingParams(max_tokens=length, temperature=temperature, ignore_eos=self.eos is None)
            self.sequences.append(Sequence(ask.prompt, params=params, seed=seed))
            self.scheduler.submit(self.sequences[-1])

    def end(self) -> None:
        """Keep what was said and counted."""
        self.said += [sequence.generated.tolist() for sequence in self.sequences]
        self.drafted += self.scheduler.counters.drafted_tokens
        self.accepted += self.scheduler.counters.accepted_tokens

    def step(self) -> bool:
        """Run a step, unless all is said."""
        if not self.scheduler.has_work:
            return False
        begin, host = time.perf_counter(), time.thread_time()
        step = self.scheduler.plan()
        assert step is not None, "what has work has a plan"
        is_decode = all(row.sample is not None and len(row.sample.generated) for row in step.batch.rows)
        is_decode = is_decode and len(step.sequences) == self.batch
        planned = time.thread_time() - host
        results = self.executor.execute(step.batch)
        host = time.thread_time()
        outcomes = self.scheduler.commit(step, results)
        for outcome in outcomes:
            self._end_if_done(outcome.sequence)
        if is_decode:
            self.host_s += planned + time.thread_time() - host
            self.num_planned += len(step.sequences)
            self.num_drawn += sum(len(outcome.tokens) for outcome in outcomes)
            self.seconds += time.perf_counter() - begin
        return True

    def _end_if_done(self, sequence: Sequence) -> None:
        assert sequence.params is not None, "all of them generate"
        drawn = sequence.generated.tolist()
        if self.eos in drawn:
            self.scheduler.cut(sequence, drawn.index(self.eos) + 1)
        if self.eos in drawn or len(drawn) == sequence.params.max_tokens:
            self.scheduler.finish(sequence)


@dataclass
class Case:
    """A workload of so many sequences at once; what came out of its rounds: ms per token of both machines."""

    runner: Runner
    source: Asked | Told
    workload: Workload
    batch: int
    machines: tuple[Machine, Machine]
    ms_per_token: list[tuple[float, float]] = field(default_factory=list)

    def round(self, number: int) -> None:
        """Answer the round's prompts on both machines."""
        rng = Random(f"{self.workload} {self.batch} {number}")
        asks = self.source.asks(self.workload, WAVES * self.batch, rng)
        texts = [ask.text for ask in asks if ask.text is not None]
        executor: Executor = Scripted(self.runner, texts) if texts else self.runner
        for machine in self.machines:
            machine.begin(executor, asks, self.batch, 1.0 if self.workload == "random" else 0.0)
        running, turn = True, number
        while running:
            order = self.machines if turn % 2 == 0 else self.machines[::-1]
            running = any([machine.step() for machine in order])
            turn += 1
        for machine in self.machines:
            machine.end()
        plain, fast = self.machines
        assert plain.said == fast.said, "speculation changed a text"
        self.ms_per_token.append((1e3 * plain.seconds / plain.num_drawn, 1e3 * fast.seconds / fast.num_drawn))

    def run(self, rounds: int, budget_s: float) -> None:
        """Run up to so many rounds, none begun after that long, after one that warms up; at least three."""
        self.round(-1)
        self.ms_per_token.clear()
        begin = time.monotonic()
        for number in range(rounds):
            if number >= 3 and time.monotonic() - begin > budget_s:
                break
            gc.collect()
            gc.disable()
            try:
                self.round(number)
            finally:
                gc.enable()

    def figures(self) -> dict[str, Any]:
        """Return the case's line."""
        plain, fast = zip(*self.ms_per_token, strict=True)
        gains = [one / other for one, other in self.ms_per_token]
        drafting = self.machines[1]
        num_drawn = sum(len(ids) for ids in drafting.said)
        return {
            "workload": self.workload,
            "batch": self.batch,
            "plain_ms_per_token": Summary.of(plain),
            "speculating_ms_per_token": Summary.of(fast),
            "gain": Summary.of(gains),
            "gain_interval": interval(gains),
            "drafted_per_token": round(drafting.drafted / num_drawn, 3),
            "accepted_share": round(drafting.accepted / max(drafting.drafted, 1), 3),
            "tokens_per_text": round(median(map(len, drafting.said)), 1),
            "host_us_per_sequence": [round(1e6 * m.host_s / m.num_planned, 1) for m in self.machines],
        }


def interval(values: list[float]) -> tuple[float, float]:
    """Return two of the values between which the median lies with 95 %, whatever they are distributed like."""
    ordered, num = sorted(values), len(values)
    below = max(int(num / 2 - 0.98 * num**0.5), 0)
    return ordered[below], ordered[num - 1 - below]


def measure(model: str, options: argparse.Namespace, rounds: int, budget_s: float) -> list[dict[str, Any]]:
    """Return the lines of a model's cases."""
    folder: Path = resolve_model("pocket") if model == "pocket" else llama_30m(options.models_dir)
    runner = load_runner(folder, dtype="bfloat16", page_size=PAGE_SIZE, num_pages=PAGES)
    assert runner.exact, "speculation needs attention whose bits do not tell how a token was computed"
    runner.warm_up()
    costs = measure_draft_costs(runner)
    source = Asked() if model == "pocket" else Told()
    lines = []
    for workload in options.workload:
        for batch in options.batch:
            machines = Machine(0, None, source.eos), Machine(1, Speculator(runner.context_len, costs=costs), source.eos)
            case = Case(runner, source, workload, batch, machines)
            case.run(rounds, budget_s)
            lines.append({"model": model, **case.figures(), "costs": rounded(costs)})
    return lines


def rounded(costs: DraftCosts) -> dict[str, float]:
    """Return the costs as the document keeps them."""
    return {name: round(value, 4) for name, value in asdict(costs).items()}


def row(line: dict[str, Any]) -> list[object]:
    """Return a line of the table."""
    low, high = line["gain_interval"]
    gain: Summary = line["gain"]
    return [
        *(line["model"], line["workload"], line["batch"]),
        short(line["plain_ms_per_token"].median),
        short(line["speculating_ms_per_token"].median),
        f"**{gain.median:.3f}** ({low:.3f}–{high:.3f})",  # noqa: RUF001
        f"{gain.least:.2f}–{gain.most:.2f}",  # noqa: RUF001
        gain.num,
        *(short(line["drafted_per_token"]), short(line["accepted_share"])),
        " → ".join(map(short, line["host_us_per_sequence"])),
    ]


def main() -> None:
    """Measure and report."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=("pocket", "30m"), default=["pocket", "30m"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", type=float, default=8.0, help="seconds after which a case begins no further round")
    options = parser.parse_args()
    environment = harness.environment()
    budget_s = 0.5 if options.quick else options.budget
    lines = [line for model in options.model for line in measure(model, options, options.reps or MOST_ROUNDS, budget_s)]
    headers = ["model", "workload", "batch", "plain, ms per token", "speculating", "gain (median at 95 %)", "rounds"]
    headers += ["n", "drafted per token", "came true", "host, µs per sequence and step"]
    harness.report("bench_speculation", options, environment, lines, [harness.table(headers, map(row, lines))])


if __name__ == "__main__":
    main()
