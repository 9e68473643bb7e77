"""What an operation does while it runs: `Generation` draws tokens and watches for a stop, `Selection` scores choices.

Both turn outcomes of the scheduler into text and replies; neither touches sockets, pages or devices.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeAlias

import msgspec
import numpy as np

from bough.runtime.batch import RowResult
from bough.runtime.choices import best, distribution, score_choices
from bough.runtime.operation import Operation
from bough.runtime.protocol import (
    ChoiceMethod,
    Delta,
    FinishReason,
    Generate,
    Generated,
    Selected,
    TokenLogprob,
    Usage,
    encode_tokens,
)
from bough.runtime.sequence import Sequence
from bough.runtime.text.detokenizer import IncrementalDecoder
from bough.runtime.text.stops import StopMatcher
from bough.runtime.text.tokenizer import Tokenizer
from bough.runtime.vector import IntArray


class Generation:
    """One generate in flight: its sequence, the text so far, and when it is enough.

    kept: how many drawn tokens the branch keeps; leftover: text after them that goes back to the branch's tail, when
    a stop string cut a token in two.
    """

    def __init__(
        self, operation: Operation, request: Generate, sequence: Sequence, tokenizer: Tokenizer, context_len: int
    ) -> None:
        self.operation = operation
        self.sequences: tuple[Sequence, ...] = (sequence,)
        self.is_streaming = request.stream
        self.credit = 0
        self.kept = 0
        self.leftover = ""
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.matched_stop: str | int | None = None
        self._params = request.params
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._context_len = context_len
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = (
            StopMatcher(request.params.stop, request.params.stop_regex)
            if request.params.stop or request.params.stop_regex
            else None
        )
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._eos_ids = frozenset() if request.params.ignore_eos else frozenset(tokenizer.eos_ids)
        self._logprobs: list[TokenLogprob] = []
        self._first_token_at: float | None = None
        self._num_drawn = 0
        self._sent_chars = 0
        self._unsent_ids: list[int] = []
        self._sent_logprobs = 0

    def take(self, result: RowResult, now: float) -> bool:
        """Take the outcome of a step in; True if the generation is complete."""
        if result.token is None:
            return False
        token = result.token
        if self._first_token_at is None:
            self._first_token_at = now
        self._num_drawn += 1
        if self._params.logprobs is not None:
            self._logprobs.append(self._logprob(token, result))
        if token in self._eos_ids or token in self._stop_ids:
            self.text += self._decoder.finish()
            self.finish_reason, self.matched_stop = "stop", token
            return True
        self.kept += 1
        self._unsent_ids.append(token)
        return self._stopped_by_text(self._decoder.feed(token)) or self._stopped_by_length()

    def _stopped_by_text(self, delta: str) -> bool:
        self.text += delta
        if self._matcher is None or not delta:
            return False
        hit = self._matcher.feed(delta)
        if hit is None:
            return False
        self.kept, self.leftover = self._decoder.tokens_within(hit.start)
        self.text = self.text[: hit.start]
        self.finish_reason, self.matched_stop = "stop", hit.stop
        return True

    def _stopped_by_length(self) -> bool:
        if self._num_drawn >= self._params.max_tokens:
            self.finish_reason = "length"
        elif len(self._sequence.tokens) >= self._context_len:
            self.finish_reason = "context"
        else:
            return False
        rest = self._decoder.finish()
        self._stopped_by_text(rest)
        return True

    def delta(self) -> tuple[Delta, list[bytes]] | None:
        """Return the text that can be released and was not yet sent, if any."""
        is_over = self.finish_reason is not None
        safe = len(self.text) if is_over or self._matcher is None else min(self._matcher.safe_len, len(self.text))
        if safe <= self._sent_chars:
            return None
        text, self._sent_chars = self.text[self._sent_chars : safe], safe
        ids, self._unsent_ids = self._unsent_ids, []
        self.credit -= len(ids)
        logprobs = None
        if self._params.logprobs is not None:
            logprobs, self._sent_logprobs = self._logprobs[self._sent_logprobs :], len(self._logprobs)
        return Delta(self.operation.id, text, 0, logprobs), [encode_tokens(ids)]

    def reply(self, length: int, now: float) -> tuple[Generated, list[bytes]]:
        """Return the terminal reply; `length` is the branch's new length in tokens."""
        assert self.finish_reason is not None
        reply = Generated(
            op=self.operation.id,
            text=self.text,
            buffer=0,
            finish_reason=self.finish_reason,
            length=length,
            usage=_usage(self.operation, self.sequences, self._num_drawn, self._first_token_at, now),
            matched_stop=self.matched_stop,
            logprobs=self._logprobs if self._params.logprobs is not None else None,
            leftover=self.leftover,
        )
        return reply, [encode_tokens(self.kept_ids())]

    def partial(self, now: float) -> dict[str, int | float | str]:
        """What the reply says of a generation that fails: the text so far, and the fields of `Usage`."""
        usage = _usage(self.operation, self.sequences, self._num_drawn, self._first_token_at, now)
        return {"partial_text": self.text, **msgspec.structs.asdict(usage)}

    def kept_ids(self) -> list[int]:
        """The drawn ids that become part of the branch."""
        ids: list[int] = self._sequence.generated[: self.kept].tolist()
        return ids

    def _logprob(self, token: int, result: RowResult) -> TokenLogprob:
        assert result.logprob is not None, "log-probabilities were asked for"
        top = [(value, other, self._tokenizer.decode([other])) for value, other in result.top]
        return TokenLogprob(result.logprob, token, self._tokenizer.decode([token]), top)


class Selection:
    """One select or score in flight: a sequence per choice, and per choice alone where the method needs it.

    choices[i] holds the ids of choice i, which follow the branch's `context_len` ids.
    """

    def __init__(
        self,
        operation: Operation,
        method: ChoiceMethod,
        context: IntArray,
        choices: list[list[int]],
        skip: int,
        namespace: str,
        tokenizer: Tokenizer,
    ) -> None:
        self.operation = operation
        self.choices = choices
        self._skip = skip
        self._method = method
        self._tokenizer = tokenizer
        self._first_result_at: float | None = None
        start = len(context) + skip
        self._given = [Sequence(_ids(context, ids), namespace=namespace, score_start=start) for ids in choices]
        self._alone: list[Sequence | None] = []
        if method == "unconditional_likelihood_normalized":
            self._alone = [
                Sequence(_ids(ids[skip:]), namespace=namespace, score_start=1) if len(ids) - skip > 1 else None
                for ids in choices
            ]
        self._values: dict[Sequence, list[float]] = {s: [] for s in (*self._given, *self._alone) if s is not None}
        self.sequences = tuple(self._values)
        self._logprobs: list[list[float]] = []
        self._unconditional: list[list[float]] | None = None
        self._scores: list[float] = []

    def take_scores(self, sequence: Sequence, result: RowResult, now: float) -> bool:
        """Take the outcome of a step for one sequence in; True if that sequence is complete.

        After a preemption some scores come a second time, and take the place of the first.
        """
        if result.score_logprobs is not None:
            assert sequence.score_start is not None
            scores = result.score_logprobs.tolist()
            known = self._values[sequence]
            del known[sequence.num_computed + 1 - len(scores) - sequence.score_start :]
            known.extend(scores)
        if sequence.num_computed < sequence.goal:
            return False
        if self._first_result_at is None:
            self._first_result_at = now
        return True

    def decide(self) -> int:
        """Score the choices, all of whose sequences are complete; return the index of the best."""
        self._logprobs = [self._values[sequence] for sequence in self._given]
        if self._alone:
            self._unconditional = [[0.0, *(self._values[s] if s is not None else [])] for s in self._alone]
        self._scores = score_choices(self._method, self._logprobs, self._unconditional)
        return best(self._scores)

    def reply(self, length: int, now: float) -> Selected:
        """Return the terminal reply, after `decide`; `length` is the branch's new length in tokens."""
        return Selected(
            op=self.operation.id,
            index=best(self._scores),
            scores=self._scores,
            distribution=distribution(self._logprobs),
            logprobs=[self._labelled(ids, row) for ids, row in zip(self.choices, self._logprobs, strict=True)],
            length=length,
            usage=_usage(self.operation, self.sequences, 0, self._first_result_at, now),
            unconditional=self._unconditional,
        )

    def partial(self, now: float) -> dict[str, int | float | str]:
        """What the reply says of a selection that fails: the fields of `Usage`."""
        return msgspec.structs.asdict(_usage(self.operation, self.sequences, 0, self._first_result_at, now))

    def _labelled(self, ids: list[int], values: list[float]) -> list[TokenLogprob]:
        return [
            TokenLogprob(value, token, self._tokenizer.decode([token]))
            for value, token in zip(values, ids[self._skip :], strict=True)
        ]


def _ids(*parts: Items[int] | IntArray) -> IntArray:
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


Work: TypeAlias = Generation | Selection


def _usage(
    operation: Operation, sequences: Items[Sequence], num_drawn: int, first_at: float | None, now: float
) -> Usage:
    admitted = [s.admitted_at for s in sequences if s.admitted_at is not None]
    return Usage(
        prompt_tokens=sum(s.cached_tokens + s.computed_tokens for s in sequences),
        cached_tokens=sum(s.cached_tokens for s in sequences),
        computed_tokens=sum(s.computed_tokens for s in sequences),
        completion_tokens=num_drawn,
        queue_ms=_ms(operation, min(admitted) if admitted else now),
        ttft_ms=_ms(operation, now if first_at is None else first_at),
        latency_ms=_ms(operation, now),
    )


def _ms(operation: Operation, at: float) -> float:
    return round((at - operation.arrived_at) * 1e3, 3)
