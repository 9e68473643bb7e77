"""The suite's peers of `transformers`: generate and continuous batching; the same weights, ids and counts.

Each runs in a process of its own (hosting.py) and is told token ids, so none pays for a wire or a tokenizer.
"""

from __future__ import annotations

import inspect
import logging as python_logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

from asks import Ask, Program, Trace
from calls import Call, Run
from clients import NotPossible, carry_out, peak_bytes

_BATCH: Final = 32


class Generate:
    """`transformers` generate: whatever is ready of all programs goes as batches of up to 32, padded on the left.

    It keeps nothing between calls: every prompt is computed from its beginning. A batch runs as long as its longest
    answer, the tokens past a row's own count are not counted. Peak memory is the process's, torch included.
    """

    def __init__(self, model: Path) -> None:
        self._torch, self._model = _load(model)

    def run(self, trace: Trace) -> Run:
        """Carry the trace out: programs in groups of `concurrency`, each group ask by ask."""
        calls: list[Call] = []
        program_s: list[float] = []
        begin = time.perf_counter()
        with self._torch.inference_mode():
            for at in range(0, len(trace.programs), trace.concurrency):
                group_begin = time.perf_counter()
                group = trace.programs[at : at + trace.concurrency]
                calls += self._group(group)
                program_s += [time.perf_counter() - group_begin] * len(group)
        return Run(time.perf_counter() - begin, program_s, calls)

    def peak_bytes(self) -> int | None:
        """Return this process's peak."""
        return peak_bytes()

    def close(self) -> None:
        """Nothing is left running."""

    def _group(self, programs: Sequence[Program]) -> list[Call]:
        answers: list[dict[int, list[int]]] = [{} for _ in programs]
        calls: list[Call] = []
        while True:
            ready = [
                (i, place, ask)
                for i, program in enumerate(programs)
                for place, ask in enumerate(program)
                if place not in answers[i] and all(before in answers[i] for before in ask.after)
            ]
            if not ready:
                return calls
            now = time.perf_counter()  # all of a wave were asked now; those of its later batches wait
            asked = [(i, place, ask, ask.prompt(answers[i])) for i, place, ask in ready]
            asked.sort(key=lambda one: (one[2].num_tokens, len(one[3])))  # batches of like lengths waste least
            for at in range(0, len(asked), _BATCH):
                batch = asked[at : at + _BATCH]
                for (i, place, _, _), call in zip(batch, self._answer(now, batch), strict=True):
                    answers[i][place] = call.answer
                    calls.append(call)

    def _answer(self, now: float, batch: Sequence[tuple[int, int, Ask, list[int]]]) -> list[Call]:
        if any(ask.choices for _, _, ask, _ in batch):
            return [self._select(now, prompt, ask) for _, _, ask, prompt in batch]
        calls = [Call(now, [prompt]) for *_, prompt in batch]
        most = max(ask.num_tokens for _, _, ask, _ in batch)
        ids, mask = self._padded([prompt for *_, prompt in batch])
        clock = _Clock()
        length = {"max_new_tokens": most, "min_new_tokens": most}
        done = self._model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, streamer=clock, **length)
        answers = done[:, ids.shape[1] :].tolist()
        for call, (_, _, ask, _), answer in zip(calls, batch, answers, strict=True):
            call.answer, call.token_times = answer[: ask.num_tokens], clock.times[1 : 1 + ask.num_tokens]
        return calls

    def _select(self, now: float, prompt: list[int], ask: Ask) -> Call:
        """Score all choices in one batch padded on the right, logits for the choices only."""
        torch, longest = self._torch, max(map(len, ask.choices))
        rows = [prompt + list(choice) + [0] * (longest - len(choice)) for choice in ask.choices]
        ids = torch.tensor(rows)
        logits = self._model(ids[:, :-1], logits_to_keep=longest, use_cache=False).logits.float()
        scores = logits.log_softmax(-1).gather(2, ids[:, -longest:, None])[:, :, 0]
        sizes = torch.tensor([len(choice) for choice in ask.choices])
        means = (scores * (torch.arange(longest) < sizes[:, None])).sum(1) / sizes
        prompts = [prompt + list(choice[:-1]) for choice in ask.choices]
        return Call(now, prompts, answer=[int(means.argmax())])

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Any, Any]:
        torch, longest = self._torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids, mask


class _Clock:
    """A streamer that keeps the time of each step; the first is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All was put."""


class ContinuousBatching:
    """The continuous batching of `transformers`, with its sharing of prefix blocks, and its pages as small as bough's.

    A manager per run, so that each begins cold; making it is not timed. It scores no choices and says nothing of hits.
    model: a checkpoint, or torch and a network that is there already. cuda_graphs: None leaves it to the library.
    """

    def __init__(
        self, model: Path | tuple[Any, Any], *, pool_tokens: int, page_size: int = 16, cuda_graphs: bool | None = False
    ) -> None:
        self._torch, self._model = _load(model) if isinstance(model, Path) else model
        self._cuda_graphs = cuda_graphs
        self._ends_at: float | None = None
        self._pool_tokens, self._page_size = pool_tokens, page_size
        self._manager: Any = None
        self._numbers = count()
        self._open: dict[str, tuple[Call, Future[Call]]] = {}

    def run(self, trace: Trace, seconds: float | None = None) -> Run:
        """Carry the trace out. Raises RuntimeError if it takes longer than `seconds`."""
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        if trace.selects:
            raise NotPossible("continuous batching scores no choices")
        known = inspect.signature(ContinuousBatchingConfig).parameters
        pages = "page_size" if "page_size" in known else "block_size"  # in older versions
        graphs = {} if self._cuda_graphs is None else {"use_cuda_graph": self._cuda_graphs}
        num_blocks = self._pool_tokens // self._page_size
        options: dict[str, Any] = {pages: self._page_size, "num_blocks": num_blocks, "max_batch_tokens": 1024, **graphs}
        config = ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})
        self._open.clear()
        library: Any = transformers  # parts of it have no types
        greedy = library.GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = self._model.init_continuous_batching(greedy, config)
        self._manager.start()
        reader = threading.Thread(target=self._read, daemon=True)
        try:
            self._warm_up()
            self._ends_at = None if seconds is None else time.monotonic() + seconds
            reader.start()
            done = carry_out(trace, self._start)
        except BaseException:
            self._stop(at_once=True)
            raise
        self._stop()
        return done

    def peak_bytes(self) -> int | None:
        """Return this process's peak."""
        return peak_bytes()

    def close(self) -> None:
        """Nothing is left running: a run stops its manager."""

    def _stop(self, *, at_once: bool = False) -> None:
        """Wait until the manager has stopped: after it answered all that was asked, or at once where it can."""
        knows = at_once and "hard_stop" in inspect.signature(self._manager.stop).parameters
        self._manager.stop(block=True, **({"hard_stop": True} if knows else {}))

    def _warm_up(self) -> None:
        """Wait until the manager has its memory and answered once. Raises RuntimeError if it cannot."""
        self._manager.add_request([1, 2, 3], max_new_tokens=1, eos_token_id=-1)
        while (result := self._manager.get_result(timeout=60.0)) is not None and not result.is_finished():
            pass
        if result is None or result.error is not None:
            raise RuntimeError(f"continuous batching answers nothing: {result.error if result else self._fatal()}")

    def _fatal(self) -> object:
        return self._manager.background_thread_status.fatal_error

    def _start(self, prompt: list[int], ask: Ask) -> Future[Call]:
        call, done, name = Call(time.perf_counter(), [prompt]), Future[Call](), f"ask-{next(self._numbers)}"
        self._open[name] = call, done
        taken = self._manager.add_request(
            prompt, request_id=name, max_new_tokens=ask.num_tokens, streaming=True, eos_token_id=-1
        )
        if taken is None:  # it has stopped, and nobody else will answer
            self._fail(f"continuous batching takes no request: {self._fatal()}")
        return done

    def _read(self) -> None:
        """Take results as they come, until the manager has stopped."""
        manager = self._manager
        while manager.is_running():
            result = manager.get_result(timeout=0.05)
            if self._ends_at is not None and time.monotonic() >= self._ends_at:
                # Again and again: one more may be asked between two answers.
                self._fail(f"not done: {len(self._open)} requests were left when its time was over")
                continue
            if result is None:
                if (error := self._fatal()) is not None:
                    self._fail(f"continuous batching stopped: {error}")
                    return
                continue
            call, done = self._open[result.request_id]
            new = len(result.generated_tokens) - len(call.token_times)
            call.token_times += [time.perf_counter()] * new
            if result.error is not None:
                self._fail(result.error)
            elif result.is_finished():
                call.answer = list(result.generated_tokens)
                del self._open[result.request_id]
                done.set_result(call)
        self._fail("continuous batching stopped")

    def _fail(self, message: str) -> None:
        while self._open:  # two threads may do so
            with suppress(KeyError):
                self._open.popitem()[1][1].set_exception(RuntimeError(message))


def _load(model: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    python_logging.getLogger("ContinuousBatchingLogger").setLevel("CRITICAL")  # it asks for psutil at every run
    return torch, AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
