"""What does the host do in a decode step beside the model, and what of it does each row cost?

Branches of one prompt decode greedily in an engine in this process, as the server runs it but for sockets: results are
taken in, replies encoded, the next step planned and launched. Each part is timed by itself in the middle of whole steps
of a real model, so that the processor's caches are as they are then; a part's time is without the parts it calls.

    plan      choose rows, see to their pages, make the batch       inputs    the batch as tensors; attention's plan
    model     all layers, logits and draws                          results   of each row, from what was drawn
    commit    advance, append, publish                              settle    text, stops, deltas, what is complete
    send      one message of replies per client

    python benchmarks/bench_step.py [--quick] [--save] [--model 30m|pocket] [--widths 1,8,32]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import harness
import numpy as np
from harness import Summary
from models import FIRST_WORD, llama_30m

from bough.runtime import runner as runner_module
from bough.runtime import sampler
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.inflight import InFlight
from bough.runtime.models.folder import resolve_model
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    Extend,
    Fork,
    Generate,
    Open,
    Release,
    SamplingParams,
    Tokens,
    encode_replies,
    encode_tokens,
)
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.session import Session
from bough.runtime.text.tokenizer import load_tokenizer

PROMPT: Final = 1024
WIDTHS: Final = (1, 8, 32, 64, 256)
PARTS: Final = ("plan", "inputs", "results", "commit", "settle", "send")


class Watch:
    """Times parts that call one another, each without those it calls."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._open: list[list[float]] = []  # begin, and the time of the parts called

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call`, timed as that part."""

        def timed(*arguments: Any, **options: Any) -> Any:
            frame = [time.perf_counter(), 0.0]
            self._open.append(frame)
            try:
                return call(*arguments, **options)
            finally:
                self._open.pop()
                took = time.perf_counter() - frame[0]
                self.spent_s[name] = self.spent_s.get(name, 0.0) + took - frame[1]
                if self._open:
                    self._open[-1][1] += took

        return timed


class Host:
    """An engine on a runner, and the one client it has."""

    def __init__(self, runner: Runner, folder: Path, most: int) -> None:
        self.watch = Watch()
        self._runner = runner
        scheduler = Scheduler(
            PrefixCache(runner.num_pages, runner.page_size),
            token_budget=4096,
            max_running=most,
        )
        prompter = Prompter(load_tokenizer(folder), None, "benchmark")
        vocab_size, context_len = runner.vocab_size, runner.context_len
        composer = Composer(prompter, vocab_size=vocab_size, context_len=context_len, seed=1, credit=1 << 20)
        self._time("plan", scheduler, "plan")
        self._time("commit", scheduler, "commit")
        self._time("model", runner.model, "forward", "raw_logits", "logits")
        self._time("results", runner, "execute")
        in_flight = InFlight(scheduler, runner, credit=1 << 20)
        self.engine = Engine(RuntimeConfig(max_running=most), scheduler, in_flight, composer, epoch=1)
        self._time("settle", self.engine, "step")
        self._session = Session(b"one", "", "benchmark", 0.0)
        self._encode = self.watch.part("send", encode_replies)
        self._ops = 0

    def _time(self, part: str, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self.watch.part(part, getattr(owner, name)))

    @contextmanager
    def inner_parts(self) -> Any:
        """Time what the runner's module calls, too."""
        parts = {"inputs": (runner_module, "build_inputs"), "model": (sampler, "greedy")}
        before = [(owner, name, getattr(owner, name)) for owner, name in parts.values()]
        try:
            for part, (owner, name) in parts.items():
                self._time(part, owner, name)
            yield
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)

    def _send(self, kind: Any, *, buffers: Sequence[bytes] = (), **fields: Any) -> None:
        self._ops += 1
        self.engine.handle(self._session, kind(op=self._ops, **fields), buffers)

    def begin(self, width: int, prompt: Sequence[int], steps: int, params: SamplingParams, *, stream: bool) -> None:
        """Fork `width` branches off a prompt and let each generate; returns when all of them decode."""
        self._send(Open, branch=0)
        self._send(Extend, branch=0, parts=[Tokens(0)], buffers=[encode_tokens(prompt)])
        self._send(Fork, branch=0, children=list(range(1, width + 1)))
        for child in range(1, width + 1):
            own = [prompt[child % len(prompt)], prompt[(7 * child) % len(prompt)]]
            self._send(Extend, branch=child, parts=[Tokens(0)], buffers=[encode_tokens(own)])
            self._send(Generate, branch=child, params=params, stream=stream)
        while len(self.engine.scheduler.running) < width or any(s.is_prefilling for s in self.engine.scheduler.running):
            self.step()

    def step(self) -> None:
        """One turn of the server's loop."""
        self.engine.step()
        for message in self._session.take_outbox():
            self._encode(message.replies, message.buffers)

    def end(self, width: int) -> None:
        """Run to the end and forget it all."""
        while self.engine.has_work:
            self.step()
        self._send(Release, branches=list(range(width + 1)))
        self._session.take_outbox()
        self.engine.scheduler.cache.flush()


def measured(host: Host, width: int, prompt: Sequence[int], steps: int, *, stream: bool) -> dict[str, float]:
    """Return the microseconds that each part of a step of `width` rows took, the median step of the middle half."""
    params = SamplingParams(max_tokens=2 * steps, temperature=0.0, ignore_eos=True)
    host.begin(width, prompt, steps, params, stream=stream)
    taken: list[dict[str, float]] = []
    for _ in range(steps):
        host.watch.spent_s.clear()
        host.step()
        taken.append(dict(host.watch.spent_s))
    host.end(width)
    found = {name: float(np.median([step.get(name, 0.0) for step in taken])) * 1e6 for name in (*PARTS, "model")}
    found["host"] = float(np.median([sum(step.get(name, 0.0) for name in PARTS) for step in taken])) * 1e6
    return found


def main() -> None:
    """Measure and report."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="30m", choices=("30m", "pocket"))
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--no-stream", action="store_true", help="nobody reads the text as it comes")
    options = parser.parse_args()
    environment = harness.environment()
    widths = [int(width) for width in options.widths.split(",")]
    reps, steps = options.reps or (1 if options.quick else 5), 16 if options.quick else 32
    folder = resolve_model("pocket") if options.model == "pocket" else llama_30m(options.models_dir)
    room = PROMPT + 256 + max(widths) * (2 * steps + 64)
    runner = load_runner(folder, dtype="bfloat16", max_total_tokens=room)
    host = Host(runner, folder, max(widths))
    first, length = (FIRST_WORD, PROMPT) if options.model == "30m" else (300, min(PROMPT, runner.context_len // 2))
    prompt = np.random.default_rng(0).integers(first, first + 600, length).tolist()
    with host.inner_parts():
        cases = {
            str(width): lambda width=width: measured(host, width, prompt, steps, stream=not options.no_stream)
            for width in widths
        }
        found = harness.interleaved(cases, reps)
    results: dict[str, Any] = {}
    rows = []
    for width, figures in found.items():
        parts = {name: Summary.of(figure[name] for figure in figures) for name in (*PARTS, "host", "model")}
        parts["host_per_row"] = Summary.of(figure["host"] / int(width) for figure in figures)
        results[width] = parts
        rows.append([width, *(parts[name] for name in (*PARTS, "host", "host_per_row", "model"))])
    headers = ("rows, µs of a step", *PARTS, "host in all", "of it per row", "model")
    harness.report("bench_step", options, environment, results, [harness.table(headers, rows)])


if __name__ == "__main__":
    main()
