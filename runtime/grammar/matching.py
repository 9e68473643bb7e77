"""`GrammarConstraint`: a grammar's matcher along the tokens of one generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import llguidance
import numpy as np

from bough.runtime.grammar.closing import closing_path
from bough.runtime.grammar.constraint import Words, leave_out
from bough.runtime.grammar.source import literals_of
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.protocol import Grammar, RequestError

# So many tokens before the way would no longer fit it is looked at with every token: a key begun makes the way of JSON,
# one bracket long behind a value, longer by its value and more, and forced tokens come along with a drawn one.
_MARGIN: Final = 64


class GrammarConstraint:
    """A grammar's matcher along the tokens of one generation.

    start: a matcher before the first token, which is not changed. budget: most tokens that may be appended; what
    grammar.on_limit says of it is kept here. is_closed: it was ended for the budget's sake. find_way: returns the way
    from `start` to an end, if somebody keeps it. begin and advance raise RequestError where the grammar cannot go on.
    """

    def __init__(
        self,
        grammar: Grammar,
        start: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        budget: int,
        *,
        ignore_eos: bool,
        find_way: Callable[[], list[int] | None] | None = None,
    ) -> None:
        self.grammar = grammar
        self.is_ended = False
        self.is_free = False
        self.is_closed = False
        self.num_forced = 0
        self._start = start
        self._matcher = start.deep_copy()
        self._vocabulary = vocabulary
        self._left = budget
        self._never = vocabulary.eos_ids if ignore_eos else ()
        self._queued: deque[int] = deque()  # forced, but to be drawn one by one
        self._look_at = budget  # how much is left when the way to the end is looked for next
        self._find_way = find_way
        self._way: list[int] = []  # to the end, from where it was looked for last

    @property
    def matcher(self) -> llguidance.LLMatcher:
        """The matcher after the tokens so far; None of its state may be changed."""
        return self._matcher

    def fill(self, words: Words, forbidden: tuple[int, ...] = ()) -> None:
        if self._queued:
            words[:] = 0
            words[self._queued[0] // 32] = np.uint32(1 << (self._queued[0] % 32))
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self.finish_mask(words, forbidden)

    @property
    def needs_matcher(self) -> bool:
        """Whether the mask is the matcher's, so that it can be filled beside others."""
        return not self._queued

    def finish_mask(self, words: Words, forbidden: tuple[int, ...]) -> None:
        """Leave out what must not be drawn, in a mask that the matcher wrote."""
        leave_out(words, (*forbidden, *self._never))

    def begin(self) -> list[int]:
        if self.grammar.on_limit == "close":
            path = self._closing(self._matcher) if self._find_way is None else self._find_way()
            if path is None:
                raise self._failure("no way to close its text was found: use on_limit='truncate'")
            if len(path) > self._left:
                raise RequestError(
                    "invalid_request",
                    f"max_tokens must be at least {len(path)} for this grammar to be closed in time, got {self._left}",
                    field="max_tokens",
                    limit=len(path),
                )
            self._way = path
        return self._follow([])

    def advance(self, token: int) -> list[int]:
        if self._queued:
            assert token == self._queued[0], "only the forced token was allowed"
            self._queued.popleft()
            self._left -= 1
            self.is_ended = not self._queued and self._matcher.is_stopped()
            return [token]
        if token in self._vocabulary.eos_ids and self._matcher.is_accepting():
            self.is_ended = True
            return [token]
        closing = self._closing_instead_of(token)
        if closing is not None:
            self.is_ended = self.is_closed = True
            self.num_forced += len(closing)
            return closing
        if not self._matcher.consume_token(token):
            raise self._failure(f"token {token} does not fit")
        return self._follow([token])

    def _follow(self, drawn: list[int]) -> list[int]:
        """Return the drawn token and what it forces."""
        self._left -= len(drawn)
        forced = self._matcher.compute_ff_tokens() if not self._matcher.is_stopped() else []
        if forced and not self._matcher.consume_tokens(forced):
            raise self._failure("forced tokens do not fit")
        if self._matcher.is_error():
            raise self._failure("no token can follow")
        self.num_forced += len(forced)
        if not self.grammar.jump_forward:
            self._queued.extend(forced)
            self.is_ended = not forced and self._matcher.is_stopped()
            return drawn
        self._left -= len(forced)
        self.is_ended = self._matcher.is_stopped()
        return [*drawn, *forced]

    # ------------------------------------------------------------------------------------------ the budget

    def _closing_instead_of(self, token: int) -> list[int] | None:
        """Return the way to the end if taking `token` would leave too little for one, else None.

        Looked for at half the distance each time, and at every token near the end. Where tokens far from it make the
        way longer than all that is left, there may be none; the text is then truncated.
        """
        if self.grammar.on_limit != "close" or self._left > self._look_at:
            return None
        ahead = self._matcher.deep_copy()
        if not ahead.consume_token(token):
            return None
        path = self._way_within(ahead, self._left - 1)
        if path is None:
            return self._way_within(self._matcher, self._left)
        self._way = path
        self._look_at = self._left - max((self._left - len(path) - _MARGIN) // 2, 1)
        return None

    def _way_within(self, matcher: llguidance.LLMatcher, most: int) -> list[int] | None:
        """Return a way to the end of at most so many tokens; the known one is not searched again for a shorter."""
        path = self._closing(matcher, self._way)
        return path if path is not None and len(path) <= most else None

    def _closing(self, matcher: llguidance.LLMatcher, known: Sequence[int] = ()) -> list[int] | None:
        return closing_path(matcher, self._vocabulary, literals_of(self.grammar), known)

    # ------------------------------------------------------------------------------------------ the end

    def judged(self, kept: list[int], rest: str) -> tuple[bool, list[tuple[str, bytes]]]:
        """Return whether tokens and the text after them match as a whole, and what was captured."""
        matcher = self._start.deep_copy()
        ids = [*kept, *(self._vocabulary.tokenizer.encode(rest, at_start=False) if rest else [])]
        if matcher.try_consume_tokens(ids) < len(ids):
            return False, []
        return matcher.is_accepting(), matcher.get_captures()

    def _failure(self, what: str) -> RequestError:
        reason = self._matcher.get_error().strip().splitlines()
        return RequestError(
            "invalid_request",
            f"the {self.grammar.kind} cannot go on: {reason[0][:300] if reason else what}",
            field="grammar",
            reason="too_complex",
        )
