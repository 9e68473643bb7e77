"""Carries a workload out and records what a client sees: on a bough runtime, and on `transformers` generate.

Both get the same weights, the same token ids and the same counts, and decode greedily past any end of text. A program's
pieces are carried out in order and each answer is awaited before the next text is given, as a chat does; the branches
of a fork go on at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from calls import Call, Run, num_different
from models import token_ids
from workloads import Fork, Gen, Piece, Program, Select, Text, Workload

import bough
from bough.runtime.protocol import SamplingParams
from bough.runtime.protocol import Text as TextPart

_WAIT_S: Final = 600.0
_BATCH: Final = 32
_SPENT: Final = ("prompt_tokens", "cached_tokens")


class Bough:
    """A runtime of its own; starts cold for every run."""

    def __init__(self, model: Path, *, radix_cache: bool) -> None:
        self.runtime = bough.Runtime(model, radix_cache=radix_cache, max_total_tokens=65_536, speculate=False)

    def run(self, workload: Workload) -> Run:
        """Carry the workload out."""
        self.runtime.flush_cache()
        before = self.runtime.stats()
        begin = time.perf_counter()
        with ThreadPoolExecutor(workload.concurrency) as pool:
            done = list(pool.map(self._program, workload.programs))
        run = Run(time.perf_counter() - begin, [t for t, _ in done], [call for _, calls in done for call in calls])
        spent = {name: int(value) - int(before[name]) for name, value in self.runtime.stats().items() if name in _SPENT}
        expected = {"prompt_tokens": run.prompt_tokens, "cached_tokens": run.cached_tokens}
        assert spent == expected, f"the runtime counted {spent}, the client {expected}"
        return run

    def _program(self, program: Program) -> tuple[float, list[Call]]:
        begin = time.perf_counter()
        branch = self.runtime.open()
        calls: list[Call] = []
        self._walk(branch, program, calls)
        self.runtime.release([branch])
        return time.perf_counter() - begin, calls

    def _walk(self, branch: int, program: Program, calls: list[Call]) -> None:
        runtime, ids, asked_at = self.runtime, list[int](), time.perf_counter()
        for piece in program:
            match piece:
                case Text(text):
                    asked_at = time.perf_counter()
                    runtime.extend(branch, [TextPart(text)])
                    ids = ids + token_ids(text)
                case Gen():
                    calls.append(Call(asked_at, [ids]))
                    _finish(calls[-1], piece, self._generate(branch, piece, calls[-1]))
                    ids = ids + calls[-1].answer
                case Select(choices):
                    calls.append(Call(asked_at, [ids + token_ids(choice)[:-1] for choice in choices]))
                    selected = runtime.select(branch, choices, "token_length_normalized").result(_WAIT_S)
                    calls[-1].answer, calls[-1].cached_tokens = [selected.index], selected.usage.cached_tokens
                    calls[-1].num_given = len(ids) + num_different([p[len(ids) :] for p in calls[-1].prompts])
                case Fork(branches):
                    self._fork(branch, branches, ids, calls)

    def _fork(self, branch: int, branches: Sequence[tuple[Text, Gen]], ids: list[int], calls: list[Call]) -> None:
        children = self.runtime.fork(branch, len(branches))
        pending = []
        for child, (text, gen) in zip(children, branches, strict=True):
            call = Call(time.perf_counter(), [ids + token_ids(text.text)])
            self.runtime.extend(child, [TextPart(text.text)])
            pending.append((call, gen, self._generate(child, gen, call)))
        for call, gen, future in pending:
            _finish(call, gen, future)
            calls.append(call)
        self.runtime.release(children)

    def _generate(self, branch: int, gen: Gen, call: Call) -> Future[bough.Generation]:
        params = SamplingParams(max_tokens=gen.num_tokens, temperature=0.0, ignore_eos=True)
        return self.runtime.generate(branch, params, on_delta=lambda _: call.token_times.append(time.perf_counter()))


def _finish(call: Call, gen: Gen, future: Future[bough.Generation]) -> None:
    """Wait for the generation; take its tokens and cost in."""
    done = future.result(_WAIT_S)
    call.answer, call.cached_tokens = list(done.token_ids), done.usage.cached_tokens
    assert len(call.token_times) == len(call.answer) == gen.num_tokens, "a token without a time of its own"


class Transformers:
    """`transformers` generate on the same checkpoint: what runs at once is one batch, of at most 32 rows.

    It keeps nothing between calls: every turn of a chat is computed from its beginning, as is every branch of a fork.
    """

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch: Any = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    def run(self, workload: Workload) -> Run:
        """Carry the workload out, piece by piece for all programs of a batch: their shapes are the same."""
        programs = [flat for program in workload.programs for flat in _flat(program)]
        calls: list[Call] = []
        program_s: list[float] = []
        begin = time.perf_counter()
        with self._torch.inference_mode():
            for at in range(0, len(programs), _BATCH):
                batch, batch_begin = programs[at : at + _BATCH], time.perf_counter()
                rows: list[list[int]] = [[] for _ in batch]
                for column in zip(*batch, strict=True):
                    calls += self._piece(column, rows)
                program_s += [time.perf_counter() - batch_begin] * len(batch)
        return Run(time.perf_counter() - begin, program_s, calls)

    def _piece(self, column: Sequence[Piece], rows: list[list[int]]) -> list[Call]:
        """Carry out one piece of each program; `rows` are their ids so far."""
        now, kind = time.perf_counter(), column[0]
        if isinstance(kind, Text):
            for row, piece in zip(rows, column, strict=True):
                assert isinstance(piece, Text)
                row += token_ids(piece.text)
            return []
        if isinstance(kind, Gen):
            calls = [Call(now, [list(row)]) for row in rows]
            for call, row, answer in zip(calls, rows, self._generate(rows, kind.num_tokens, calls), strict=True):
                call.answer = answer
                row += answer
            return calls
        assert all(isinstance(piece, Select) for piece in column)
        return [
            self._select(now, row, piece) for row, piece in zip(rows, column, strict=True) if isinstance(piece, Select)
        ]

    def _generate(self, rows: list[list[int]], num_tokens: int, calls: list[Call]) -> list[list[int]]:
        ids, clock = self._torch.tensor(rows), _Clock()
        length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        mask = self._torch.ones_like(ids)
        done = self._model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, streamer=clock, **length)
        for call in calls:
            call.token_times = clock.times[1:]  # the first is the prompt's
        answers: list[list[int]] = done[:, ids.shape[1] :].tolist()
        return answers

    def _select(self, now: float, row: list[int], select: Select) -> Call:
        """Score all choices in one batch, logits for the choices only."""
        torch, choices = self._torch, [token_ids(choice) for choice in select.choices]
        size = len(choices[0])
        ids = torch.tensor([row + choice for choice in choices])
        logits = self._model(ids[:, :-1], logits_to_keep=size, use_cache=False).logits.float()
        scores = logits.log_softmax(-1).gather(2, ids[:, -size:, None])[:, :, 0].mean(1)
        return Call(now, ids[:, :-1].tolist(), answer=[int(scores.argmax())])


class _Clock:
    """A streamer that keeps the time of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All was put."""


def _flat(program: Program) -> list[Program]:
    """Return a program without forks as it is, one that forks as one program per branch."""
    *before, last = program
    return [(*before, *branch) for branch in last.branches] if isinstance(last, Fork) else [program]
