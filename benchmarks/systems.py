"""bough as one of the suite's systems: a runtime process, spoken to as any client does, with parts switched off."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final

import vllm_system
from asks import Ask, Trace
from baselines import ContinuousBatching, Generate
from calls import Call, Run, num_different
from clients import System, carry_out, forget_peak, peak_bytes
from hosting import Hosted
from models import text_of

from bough import Generation, RuntimeClient
from bough.life import RuntimeLife
from bough.runtime.protocol import SamplingParams, Selected, Text

POOL_TOKENS: Final = 65_536
"""What every system's KV cache holds, where that can be set."""


class Bough:
    """A runtime with these options of `bough serve`; its memory is the runtime process's.

    It does not speculate: random weights write loops, which are easy to guess, so that drafts would flatter it.
    """

    def __init__(self, model: Path, options: Sequence[str] = (), start_timeout: float = 300.0) -> None:
        options = ["--max-total-tokens", str(POOL_TOKENS), "--no-speculate", *options]
        self._life = RuntimeLife(str(model), options, start_timeout)
        try:
            self._life.start()
        except BaseException:
            self._life.end()
            raise
        self._client = RuntimeClient.over(self._life.link)

    def run(self, trace: Trace) -> Run:
        """Carry the trace out."""
        self._client.flush_cache()
        forget_peak(self._life.pid)
        return carry_out(trace, self._start)

    def peak_bytes(self) -> int | None:
        """Return the runtime's peak since the run began."""
        return peak_bytes(self._life.pid)

    def close(self) -> None:
        """Stop the runtime."""
        self._client.close()
        self._life.end()

    def _start(self, prompt: list[int], ask: Ask) -> Future[Call]:
        client, done = self._client, Future[Call]()
        call = Call(time.perf_counter(), [prompt + list(choice[:-1]) for choice in ask.choices] or [prompt])
        branch = client.open()
        client.extend(branch, [Text(text_of(prompt))])

        def generated(future: Future[Generation]) -> None:
            if (error := future.exception()) is not None:
                done.set_exception(error)
                return
            result = future.result()
            call.answer, call.cached_tokens = list(result.token_ids), result.usage.cached_tokens
            client.release([branch])
            done.set_result(call)

        def selected(future: Future[Selected]) -> None:
            if (error := future.exception()) is not None:
                done.set_exception(error)
                return
            result = future.result()
            call.answer, call.cached_tokens = [result.index], result.usage.cached_tokens
            call.num_given = len(prompt) + num_different([ids[len(prompt) :] for ids in call.prompts])
            client.release([branch])
            done.set_result(call)

        if ask.choices:
            texts = [text_of(choice) for choice in ask.choices]
            client.select(branch, texts, "token_length_normalized").add_done_callback(selected)
        else:
            params = SamplingParams(max_tokens=ask.num_tokens, temperature=0.0, ignore_eos=True)
            on_delta = partial(_note_time, call.token_times)
            client.generate(branch, params, on_delta=on_delta).add_done_callback(generated)
        return done


def _note_time(times: list[float], _: object) -> None:
    times.append(time.perf_counter())


BOUGH: Final = "bough"
NO_RADIX: Final = "bough, no radix"
NO_TREE: Final = "bough, no tree decode"
GENERATE: Final = "transformers generate"
CONTINUOUS: Final = "transformers continuous"
VLLM: Final = "vllm"
SYSTEMS: Final = (BOUGH, NO_RADIX, NO_TREE, GENERATE, CONTINUOUS, VLLM)


def start(name: str, model: Path, vllm_python: str = sys.executable) -> System:
    """Start a system by its name; vllm_python: the interpreter of the environment that has vLLM.

    Raises NotInstalled, saying how to install it, or why it does not start.
    """
    match name:
        case "bough":
            return Bough(model)
        case "bough, no radix":
            return Bough(model, ["--no-radix-cache"])
        case "bough, no tree decode":
            return Bough(model, ["--no-tree-decode"])
        case "transformers generate":
            return Hosted(Generate, model)
        case "transformers continuous":
            return Hosted(partial(ContinuousBatching, pool_tokens=POOL_TOKENS), model)
        case "vllm":
            make = partial(vllm_system.Vllm, pool_tokens=POOL_TOKENS)
            return Hosted(make, model, vllm_python, vllm_system.environment(vllm_python))
    raise ValueError(f"there is no system {name!r}; there are {', '.join(SYSTEMS)}")
