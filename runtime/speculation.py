"""`Speculator`: which sequences of a step draft what, and what they learn from one another.

A draft is verified in the step that computes it: sampling is a function of logits, seed and position, so the token
drawn at each position is the one plain decoding draws, and a draft holds as far as it says the same. A sequence whose
drafts do not win back what they cost, rows of steps and time of the host, stops trying, and looks again ever more
rarely (`drafts.Pace`). Drafts take pages that are free, and what the token budget leaves; a grammar's sequences draft
nothing, for each of their draws needs the grammar's next state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.drafts import LEAST_MATCH, DraftCosts, NgramTable, repeated
from bough.runtime.sequence import Sequence
from bough.runtime.vector import IntArray

# Steps of so many tokens have no drafts: their products are bound by arithmetic, and a row more costs as much as any.
MOST_TOKENS: Final = 64


class Speculator:
    """Makes drafts for the scheduler, its only caller.

    context_len: no token is drafted at or beyond it. costs: as measured when the runtime started, or usual ones; what
    is drafted depends on them and on what was drawn alone, so that a replay drafts the same.
    """

    def __init__(self, context_len: int, *, costs: DraftCosts | None = None, most_tokens: int = MOST_TOKENS) -> None:
        self.context_len = context_len
        self.costs = costs or DraftCosts()
        self.most_tokens = most_tokens
        self._siblings = NgramTable()
        self._turn = 0

    def value(self, num_tokens: int) -> float:
        """Return what a token that comes true saves in a step of `num_tokens`, in units of what costs are in.

        A step takes 1 + row * num_tokens. That is what all its tokens take together, so a token that needs no row of a
        later step saves the num_tokens-th part of it.
        """
        return self.costs.row + 1 / num_tokens

    def drafts(self, rows: Mapping[Sequence, int], cache: PrefixCache, token_budget: int) -> dict[Sequence, IntArray]:
        """Return drafts for the sequences of a step, each with slots. rows: how many tokens of each it computes."""
        found: dict[Sequence, IntArray] = {}
        self._turn += 1
        most = min(token_budget, self.most_tokens)
        num_tokens = sum(rows.values())
        for sequence in rows:
            if num_tokens >= most:
                break
            pace = sequence.pace
            if self._turn < pace.wakes_at or not sequence.is_drawing:
                continue
            allowed = pace.allowed(self._turn, self.value(num_tokens), self.costs)
            draft = self._drafted(sequence, cache, min(allowed, most - num_tokens))
            if len(draft):
                found[sequence] = draft
                num_tokens += len(draft)
        return found

    def _drafted(self, sequence: Sequence, cache: PrefixCache, most: int) -> IntArray:
        """Return a draft that has slots; no page is taken from anyone for it, nothing is evicted."""
        lease, params = sequence.lease, sequence.params
        assert lease is not None, "what is planned has pages"
        assert params is not None, "only a generation draws"
        tokens = sequence.tokens.view()
        # The last draw needs no slot, and no draw may be one too many.
        to_end = min(params.max_tokens - len(sequence.generated), self.context_len - len(tokens)) - 1
        slots = (len(lease.row) + cache.allocator.num_free) * cache.page_size - len(tokens)
        count = min(most, to_end, slots)
        if count < 1:
            return tokens[:0]
        draft = self.draft(sequence.namespace, tokens, cache.continuation(lease, tokens, count), count)
        if not len(draft):
            sequence.pace.missed(self.costs)
        elif not cache.reserve(lease, len(tokens) + len(draft)):
            return draft[:0]
        return draft

    def draft(self, namespace: object, tokens: IntArray, cached: IntArray, count: int) -> IntArray:
        """Return at most `count` tokens that may follow `tokens`; cached: what the tree has after them."""
        if len(cached):
            return cached[:count]
        found = self._siblings.follow(namespace, tokens, count)
        return found if len(found) else repeated(tokens, count)

    def settle(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Take in how many tokens of a sequence's draft came true."""
        sequence.pace.record(drafted, accepted, self.costs)

    def learn(self, sequence: Sequence) -> None:
        """Take in what a sequence drew since the last time."""
        first = max(sequence.pace.num_learned, sequence.prompt_len)
        if first >= len(sequence.tokens):
            return
        tokens = sequence.tokens.view(max(first - LEAST_MATCH, 0))
        self._siblings.learn(sequence.namespace, tokens)
        sequence.pace.num_learned = len(sequence.tokens)
