"""What speculation gains where texts repeat one another, and what it costs where they do not.

The scheduler and the runner in this process, greedy, random weights of a Llama shape, two machines in turns (so that a
busy moment hits both): plain and speculating. Workloads:

repeat   prompts are continued that were continued before, as retries and majority votes do: the
         tree knows what each will say
random   prompts that share nothing, sampled at temperature 1: nothing repeats, so the loss is all there is to see

With random weights how often a draft comes true says nothing of real text; `repeat` is the best case, `random` the
worst. Written: tokens per second of both, their ratio with its spread, tokens drafted and accepted, and the processor
time of plan and commit per step of both, which a busy machine disturbs least.

    python -m benchmarks.bench_speculation [--hidden 512] [--layers 8] [--batch 1 8 32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.vector import IntArray

VOCAB, PAGES, PAGE_SIZE, PROMPT, NEW = 8192, 4096, 16, 128, 96


def model_folder(hidden: int, layers: int) -> Path:
    """Write a random checkpoint of the shape; return its folder."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="bough-bench-"))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 1),
        max_position_embeddings=4096,
        initializer_range=0.06,
    )
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    return folder


class Machine:
    """A scheduler over the one runner, without sockets."""

    def __init__(self, runner: Runner, *, speculate: bool) -> None:
        self.runner = runner
        self.host_s, self.num_steps = 0.0, 0
        self.scheduler = Scheduler(
            PrefixCache(PAGES, PAGE_SIZE),
            token_budget=1024,
            max_running=64,
            speculator=Speculator(runner.context_len) if speculate else None,
        )

    def generate(self, prompts: list[IntArray], temperature: float) -> tuple[list[list[int]], float]:
        """Return what each prompt is continued with, and the seconds that decoding took."""
        params = SamplingParams(max_tokens=NEW, temperature=temperature, ignore_eos=True)
        sequences = [Sequence(prompt, params=params, seed=i) for i, prompt in enumerate(prompts)]
        for sequence in sequences:
            self.scheduler.submit(sequence)
        seconds = 0.0
        while self.scheduler.has_work:
            begin, host = time.perf_counter(), time.thread_time()
            step = self.scheduler.plan()
            assert step is not None
            is_decode = all(row.sample is not None and len(row.sample.generated) for row in step.batch.rows)
            self.host_s += time.thread_time() - host
            results = self.runner.execute(step.batch)
            host = time.thread_time()
            outcomes = self.scheduler.commit(step, results)
            self.host_s += time.thread_time() - host
            self.num_steps += 1
            for outcome in outcomes:
                if len(outcome.sequence.generated) == NEW:
                    self.scheduler.finish(outcome.sequence)
            seconds += (time.perf_counter() - begin) * is_decode
        return [sequence.generated.tolist() for sequence in sequences], seconds


def random_prompts(count: int, seed: int) -> list[IntArray]:
    """Return prompts that share nothing."""
    rng = np.random.default_rng(seed)
    return [rng.integers(10, VOCAB, PROMPT).astype(np.int32) for _ in range(count)]


def measure(runner: Runner, workload: str, batch: int, rounds: int) -> dict[str, object]:
    """Run one workload in turns; return its line."""
    machines = [Machine(runner, speculate=False), Machine(runner, speculate=True)]
    temperature = 1.0 if workload == "random" else 0.0
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        prompts = random_prompts(batch, seed=100 * turn + batch)
        order = (0, 1) if turn % 2 else (1, 0)
        said: list[list[list[int]]] = [[], []]
        for i in order:
            if workload == "repeat":
                machines[i].generate(prompts, temperature)  # the first sibling
            said[i], seconds = machines[i].generate(prompts, temperature)
            if turn:  # the first turn warms up
                times[i].append(seconds)
        assert said[0] == said[1], "speculation changed a text"
    gains = [plain / fast for plain, fast in zip(*times, strict=True)]
    counters = machines[1].scheduler.counters
    return {
        "workload": workload,
        "batch": batch,
        "plain_tokens_per_s": round(batch * (NEW - 1) / statistics.median(times[0]), 1),
        "speculating_tokens_per_s": round(batch * (NEW - 1) / statistics.median(times[1]), 1),
        "gain": round(statistics.median(gains), 3),
        "gain_spread": [round(min(gains), 3), round(max(gains), 3)],
        "drafted": counters.drafted_tokens,
        "accepted": counters.accepted_tokens,
        "host_us_per_step": [round(machine.host_s / machine.num_steps * 1e6, 1) for machine in machines],
    }


def main() -> None:
    """Print one JSON line per workload and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workload", nargs="+", default=["repeat", "random"])
    options = parser.parse_args()
    folder = model_folder(options.hidden, options.layers)
    runner = load_runner(folder, dtype="bfloat16", page_size=PAGE_SIZE, num_pages=PAGES)
    assert runner.exact, "speculation needs attention whose bits do not tell how a token was computed"
    for workload in options.workload:
        for batch in options.batch:
            print(json.dumps(measure(runner, workload, batch, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
