"""What an operation does while it runs: `Generation` draws tokens and watches for a stop (`Selection`: selection.py).

Both turn outcomes of the scheduler into text and replies; neither touches sockets, pages or devices.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeAlias

import msgspec

from bough.runtime.batch import RowResult
from bough.runtime.grammar.matching import GrammarConstraint
from bough.runtime.operation import Operation
from bough.runtime.protocol import (
    Delta,
    FinishReason,
    Generate,
    Generated,
    TokenLogprob,
    encode_tokens,
)
from bough.runtime.selection import Selection
from bough.runtime.sequence import Sequence
from bough.runtime.text.detokenizer import IncrementalDecoder
from bough.runtime.text.stops import StopMatcher
from bough.runtime.text.tokenizer import Tokenizer
from bough.runtime.usage import usage_of


class Generation:
    """One generate in flight: its sequence, the text so far, and when it is enough.

    Tokens become text when somebody reads it, a stop string or a stream, or at the end: then all at once.

    kept: how many drawn tokens the branch keeps; leftover: text after them that goes back to the branch's tail, when
    a stop string cut a token in two. taken: ids at the branch's end that are drawn again (token healing).
    """

    def __init__(
        self,
        operation: Operation,
        request: Generate,
        sequence: Sequence,
        tokenizer: Tokenizer,
        context_len: int,
        taken: Items[int] = (),
    ) -> None:
        self.operation = operation
        self.sequences: tuple[Sequence, ...] = (sequence,)
        self.is_streaming = request.stream
        self.credit = 0
        self.kept = 0
        self.leftover = ""
        self.finish_reason: FinishReason | None = None
        self.matched_stop: str | int | None = None
        self._params = request.params
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._context_len = context_len
        self._taken = list(taken)
        self._grammar = sequence.constraint if isinstance(sequence.constraint, GrammarConstraint) else None
        self._matcher = (
            StopMatcher(request.params.stop, request.params.stop_regex)
            if request.params.stop or request.params.stop_regex
            else None
        )
        num_bytes, may_cut = self._num_bytes(taken), self._matcher is not None
        self._decoder = IncrementalDecoder(tokenizer, skip_bytes=num_bytes, may_cut=may_cut)
        self._text = ""
        self._undecoded: list[int] = []
        # With a grammar, the end is allowed only where the text is whole.
        ignores_eos = request.params.ignore_eos and self._grammar is None
        self._end_ids = frozenset((*request.params.stop_token_ids, *(() if ignores_eos else tokenizer.eos_ids)))
        self._logprobs: list[TokenLogprob] = []
        self._first_token_at: float | None = None
        self._num_drawn = 0
        self._num_same = 0  # tokens drawn before them, the very ones that were taken off
        self._sent_chars = 0
        self._unsent_ids: list[int] = []
        self._sent_logprobs = 0
        # More may not be drawn, counted without those drawn before them.
        self._most_drawn = min(self._params.max_tokens, context_len - sequence.prompt_len - len(self._taken))
        self._is_plain = not self._taken and self._grammar is None and self._params.logprobs is None

    def begin(self) -> bool:
        """Take in what a grammar forces at the very beginning; True if the generation is complete with it."""
        return self._take_all(self._sequence.generated.tolist(), None)

    def take(self, result: RowResult, tokens: Items[int], now: float) -> bool:
        """Take the outcome of a step in: the token drawn and what it forced. True if the generation is complete."""
        if not tokens:
            return False
        if self._first_token_at is None:
            self._first_token_at = now
        if self._is_plain:
            return self._take_one(tokens[0]) if len(tokens) == 1 else any(map(self._take_one, tokens))
        return self._take_all(tokens, result)

    def _take_all(self, tokens: Items[int], result: RowResult | None) -> bool:
        draws = () if result is None else (result, *result.further)
        for index, token in enumerate(tokens):
            if self._num_same == self.kept < len(self._taken) and token == self._taken[self.kept]:
                self._num_same += 1
                self.kept += 1
                self._undecoded.append(token)
                continue
            if self._params.logprobs is not None:
                is_drawn = index < len(draws) and draws[index].token == token
                self._logprobs.append(self._logprob(token, draws[index] if is_drawn else None))
            if self._take_one(token):
                return True
        if self._grammar is None or not self._grammar.is_ended:
            return False
        self._finish_text()
        self.finish_reason = "length" if self._grammar.is_closed else "stop"
        return True

    def _take_one(self, token: int) -> bool:
        self._num_drawn += 1
        if token in self._end_ids:
            self._finish_text()
            self.finish_reason, self.matched_stop = "stop", token
            return True
        if token >= self._tokenizer.vocab_size:
            self._tokenizer.token_bytes(token)  # raises: it is told at once, whoever reads the text
        self.kept += 1
        self._undecoded.append(token)
        if self.is_streaming:
            self._unsent_ids.append(token)
        if self._matcher is not None and self._stopped_by_text(self._decoded()):
            return True
        return self._num_drawn >= self._most_drawn and self._stopped_by_length()

    @property
    def text(self) -> str:
        """The text so far, whole characters only."""
        if self._undecoded:
            self._decoded()
        return self._text

    def _decoded(self) -> str:
        """Decode what waits, add it to the text and return it."""
        delta = self._decoder.feed_all(self._undecoded)
        self._undecoded.clear()
        self._text += delta
        return delta

    def _finish_text(self) -> str:
        """Decode all there is; return what the last bytes add, which can no longer become a character."""
        self._decoded()
        rest = self._decoder.finish()
        self._text += rest
        return rest

    def _stopped_by_text(self, delta: str) -> bool:
        """Look for a stop in what was added to the text last; where there is one, the text ends there."""
        if self._matcher is None or not delta:
            return False
        hit = self._matcher.feed(delta)
        if hit is None:
            return False
        self.kept, self.leftover = self._decoder.tokens_within(hit.start)
        self._text = self._text[: hit.start]
        self.finish_reason, self.matched_stop = "stop", hit.stop
        return True

    def _stopped_by_length(self) -> bool:
        if self._num_drawn >= self._params.max_tokens:
            self.finish_reason = "length"
        elif self._sequence.prompt_len + self._num_same + self._num_drawn >= self._context_len:
            self.finish_reason = "context"
        else:
            return False
        self._stopped_by_text(self._finish_text())
        return True

    def delta(self) -> Delta | None:
        """Return the text that can be released and was not yet sent, if any."""
        text = self.text
        safe = len(text)
        if self._matcher is not None and self.finish_reason is None:
            safe = min(self._matcher.safe_len, safe)
        if safe <= self._sent_chars:
            return None
        new, self._sent_chars = text[self._sent_chars : safe], safe
        ids, self._unsent_ids = self._unsent_ids, []
        self.credit -= len(ids)
        logprobs = None
        if self._params.logprobs is not None:
            logprobs, self._sent_logprobs = self._logprobs[self._sent_logprobs :], len(self._logprobs)
        return Delta(self.operation.id, new, encode_tokens(ids), logprobs)

    def reply(self, length: int, now: float) -> tuple[Generated, list[bytes]]:
        """Return the terminal reply; `length` is the branch's new length in tokens."""
        assert self.finish_reason is not None
        is_whole, captures = self._judged()
        reply = Generated(
            op=self.operation.id,
            text=self.text,
            buffer=0,
            finish_reason=self.finish_reason,
            length=length,
            usage=usage_of(self.operation, self.sequences, self._num_drawn, self._first_token_at, now),
            matched_stop=self.matched_stop,
            logprobs=self._logprobs if self._params.logprobs is not None else None,
            leftover=self.leftover,
            replaced=self.num_replaced,
            is_whole=is_whole,
            captures=captures,
        )
        return reply, [encode_tokens(self.kept_ids())]

    def _judged(self) -> tuple[bool, dict[str, str | list[str]]]:
        """Whether what is kept matches the grammar as a whole, and what its captures matched."""
        if self._grammar is None:
            return True, {}
        there = self._taken[: len(self._taken) - self.num_replaced]
        is_whole, found = self._grammar.judged([*there, *self.kept_ids()], self.leftover)
        texts: dict[str, list[str]] = {}
        for name, raw in found:
            texts.setdefault(name, []).append(raw.decode("utf-8", "replace"))
        return is_whole, {name: values[0] if len(values) == 1 else values for name, values in texts.items()}

    @property
    def num_taken(self) -> int:
        """How many of the sequence's generated tokens it took, the one that ended it included."""
        return self._num_same + self._num_drawn

    @property
    def num_replaced(self) -> int:
        """How many tokens at the branch's end give way to the first of `kept_ids`."""
        return len(self._taken) - self._num_same if self.kept_ids() else 0

    def partial(self, now: float) -> dict[str, int | float | str]:
        """What the reply says of a generation that fails: the text so far, and the fields of `Usage`."""
        usage = usage_of(self.operation, self.sequences, self._num_drawn, self._first_token_at, now)
        return {"partial_text": self.text, **msgspec.structs.asdict(usage)}

    def kept_ids(self) -> list[int]:
        """The drawn ids that become part of the branch; without those drawn again that it has already."""
        ids: list[int] = self._sequence.generated[self._num_same : max(self.kept, self._num_same)].tolist()
        if self._taken and self._num_bytes(ids) < self._num_bytes(self._taken[self._num_same :]):
            return []  # cut before all that was taken off came again: the branch stays as it was
        return ids

    def _num_bytes(self, ids: Items[int]) -> int:
        return sum(len(self._tokenizer.token_bytes(token)) for token in ids)

    def _logprob(self, token: int, result: RowResult | None) -> TokenLogprob:
        if result is None:  # forced: nothing else was possible
            return TokenLogprob(0.0, token, self._tokenizer.decode([token]))
        assert result.logprob is not None, "log-probabilities were asked for"
        top = [(value, other, self._tokenizer.decode([other])) for value, other in result.top]
        return TokenLogprob(result.logprob, token, self._tokenizer.decode([token]), top, result.entropy)


Work: TypeAlias = Generation | Selection
