"""What speculation gains where texts repeat one another, and what it costs where they do not.

The scheduler and the runner in this process, the same requests with and without drafts in turns (so that a busy moment
hits both), and the same tokens: that is asserted. Workloads:

siblings  the bundled model writes JSON records with the same keys and different values, greedy
copy      the bundled model repeats a sentence of its prompt, greedy
random    the 30M shape with random weights, temperature 1, prompts that share nothing: nothing repeats, so what is left
          is the loss

Written for each workload and batch: milliseconds of decoding per token of both, the gain with its spread over rounds,
the share of drafted tokens that came true, how many were drafted for each token drawn, and the processor time of plan
and commit per sequence and step of both, which a busy machine disturbs least.

    python benchmarks/bench_speculation.py [--quick] [--batch 1 8 32] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from models import FIRST_WORD, VOCAB_SIZE, llama_30m

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.models.folder import resolve_model
from bough.runtime.protocol import SamplingParams
from bough.runtime.row_cost import measure_row_cost
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.text.tokenizer import load_tokenizer
from bough.runtime.vector import IntArray

PAGES: Final = 4096
PAGE_SIZE: Final = 16
MOST_NEW: Final = 96
RECORD: Final = "Extract name, age, city, job as JSON.\n{name}, {age}, lives in {city} and works as a {job}."
REPEAT: Final = "Repeat: {name} lives in {city}, works as a {job}, is {age} years old and likes the {city} of today."
NAMES: Final = ("Ann", "Bob", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Liam", "Mia")
CITIES: Final = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "London", "Oslo", "Lisbon", "Athens", "Dublin")
JOBS: Final = ("baker", "teacher", "nurse", "driver", "painter", "doctor", "singer", "farmer", "pilot", "lawyer")


@dataclass
class Machine:
    """A scheduler over the one runner, without sockets; what it took so far."""

    runner: Runner
    speculator: Speculator | None
    eos: int | None
    seconds: float = 0.0
    host_s: float = 0.0
    num_planned: int = 0  # sequences, summed over steps
    drafted: int = 0
    accepted: int = 0
    times: list[float] = field(default_factory=list)

    def generate(self, prompts: list[IntArray], temperature: float) -> list[list[int]]:
        """Return what each prompt is continued with; adds the milliseconds of decoding per token to `times`."""
        speculator = self.speculator
        cache = PrefixCache(PAGES, PAGE_SIZE)
        scheduler = Scheduler(cache, token_budget=1024, max_running=64, speculator=speculator)
        params = SamplingParams(max_tokens=MOST_NEW, temperature=temperature, ignore_eos=self.eos is None)
        sequences = [Sequence(prompt, params=params, seed=i) for i, prompt in enumerate(prompts)]
        for sequence in sequences:
            scheduler.submit(sequence)
        self.seconds = 0.0
        while scheduler.has_work:
            self._step(scheduler)
        self.drafted += scheduler.counters.drafted_tokens
        self.accepted += scheduler.counters.accepted_tokens
        said = [sequence.generated.tolist() for sequence in sequences]
        self.times.append(1e3 * self.seconds / sum(len(ids) - 1 for ids in said))
        return said

    def _step(self, scheduler: Scheduler) -> None:
        begin, host = time.perf_counter(), time.thread_time()
        step = scheduler.plan()
        assert step is not None, "what has work has a plan"
        is_decode = all(row.sample is not None and len(row.sample.generated) for row in step.batch.rows)
        self.host_s += (time.thread_time() - host) * is_decode
        results = self.runner.execute(step.batch)
        host = time.thread_time()
        outcomes = scheduler.commit(step, results)
        self.host_s += (time.thread_time() - host) * is_decode
        self.num_planned += len(step.sequences) * is_decode
        for outcome in outcomes:
            drawn = outcome.sequence.generated.tolist()
            if self.eos in drawn:
                scheduler.cut(outcome.sequence, drawn.index(self.eos) + 1)
            if self.eos in drawn or len(drawn) == MOST_NEW:
                scheduler.finish(outcome.sequence)
        self.seconds += (time.perf_counter() - begin) * is_decode


class Asked:
    """Prompts for the bundled model."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._tokenizer = load_tokenizer(resolve_model("pocket"))
        (self.eos,) = self._tokenizer.encode("<|im_end|>", special=True)

    def prompts(self, count: int, seed: int) -> list[IntArray]:
        """Return as many prompts that differ in what they say."""
        rng = Random(seed)
        return [self._prompt(rng) for _ in range(count)]

    def _prompt(self, rng: Random) -> IntArray:
        words = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
        asked = self._template.format(**words, age=rng.randint(20, 90))
        text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        return np.array(self._tokenizer.encode(text, special=True), dtype=np.int32)


class Noise:
    """Prompts that share nothing."""

    eos = None

    def prompts(self, count: int, seed: int) -> list[IntArray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(FIRST_WORD, VOCAB_SIZE - 2, 128).astype(np.int32) for _ in range(count)]


def measure(runner: Runner, row_cost: float, workload: str, batch: int, rounds: int) -> dict[str, Any]:
    """Run one workload in turns; return its line."""
    source = Noise() if workload == "random" else Asked(RECORD if workload == "siblings" else REPEAT)
    machines = (
        Machine(runner, None, source.eos),
        Machine(runner, Speculator(runner.context_len, row_cost=row_cost), source.eos),
    )
    for turn in range(rounds + 1):
        prompts = source.prompts(batch, seed=100 * turn + batch)
        said = {
            i: machines[i].generate(prompts, 1.0 if workload == "random" else 0.0) for i in ((0, 1), (1, 0))[turn % 2]
        }
        assert said[0] == said[1], "speculation changed a text"
    plain, fast = (machine.times[1:] for machine in machines)  # the first turn warms up
    gains = [one / other for one, other in zip(plain, fast, strict=True)]
    drafting = machines[1]
    num_drawn = sum(len(ids) for ids in said[1])
    return {
        "workload": workload,
        "batch": batch,
        "row_cost": round(row_cost, 3),
        "plain_ms_per_token": round(statistics.median(plain), 3),
        "speculating_ms_per_token": round(statistics.median(fast), 3),
        "gain": round(statistics.median(gains), 3),
        "gain_spread": [round(min(gains), 3), round(max(gains), 3)],
        "drafted_per_token": round(drafting.drafted / (rounds + 1) / num_drawn, 3),
        "accepted_share": round(drafting.accepted / max(drafting.drafted, 1), 3),
        "host_us_per_sequence": [round(1e6 * m.host_s / m.num_planned, 1) for m in machines],
    }


def main() -> None:
    """Print one JSON line per workload and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workload", nargs="+", default=["siblings", "copy", "random"])
    parser.add_argument("--models", type=Path, default=Path("~/.cache/bough/benchmarks"), help="where models are made")
    parser.add_argument("--quick", action="store_true", help="3 rounds: see that it works; not figures to quote")
    options = parser.parse_args()
    for workload in options.workload:
        folder = llama_30m(options.models) if workload == "random" else resolve_model("pocket")
        runner = load_runner(folder, dtype="bfloat16", page_size=PAGE_SIZE, num_pages=PAGES)
        assert runner.exact, "speculation needs attention whose bits do not tell how a token was computed"
        runner.warm_up()
        row_cost = measure_row_cost(runner)
        for batch in options.batch:
            rounds = 3 if options.quick else options.rounds
            print(json.dumps(measure(runner, row_cost, workload, batch, rounds)), flush=True)


if __name__ == "__main__":
    main()
