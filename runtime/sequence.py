"""`Sequence`: the running form of one generate, or of the choices of a select being scored."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from bough.runtime.batch import Row, SampleRequest, TrieShare
from bough.runtime.cache.prefix_cache import Lease
from bough.runtime.drafts import Pace
from bough.runtime.grammar.constraint import Constraint
from bough.runtime.lifecycle import Status, moved
from bough.runtime.protocol import SamplingParams
from bough.runtime.trie import ROOT, TokenTrie, segments
from bough.runtime.vector import IntArray, IntVector

_UNKNOWN: IntArray = np.zeros(1, dtype=np.int32)
_NOTHING: IntArray = np.zeros(0, dtype=np.int32)
_MOST_INDEX = 1 << 21  # slots that the nodes of one step may read, together: about 60 MB of index


class Sequence:
    """Tokens, how many of them have their KV computed, and the lease on the pages that hold it.

    A generating sequence (`params` given) draws a token whenever all its tokens are computed. A scoring sequence
    (`trie` given, params None) wants the log-probabilities of the trie's nodes after its tokens; the nodes to compute
    follow the prompt among its tokens, and stand where the trie says. The scheduler is the only writer.

    ids of tokens   [0 .... num_computed) [num_computed .... goal) ...
                    KV in the lease's row  to be computed

    Where a trie is larger than its share of the pool, nodes whose subtree is done make room for later ones: of the
    earlier ones only the path to the next node is needed. Only the prompt of a scoring sequence is published.

    goal: how many leading tokens must be computed before the sequence draws or is done. prefill_until: below that many
    it is prefilling, what it computes is its prompt or was lost to a preemption; above, it is the token drawn last.
    num_lost: how many tokens were computed when it was preempted last. room: slots for a trie's nodes. publish_at: how
    many tokens have to be computed before more of them are published.
    num_planned: how many tokens are computed once the steps in flight have ended; num_due: how many tokens these steps
    draw, which nobody knows yet. Without steps in flight num_computed and 0. most_len: it draws no token at or beyond
    this position.
    constraint: what may be drawn; what it forces at the beginning follows the prompt at once. num_jumped: how many
    tokens at the end were forced, not drawn. pace: how drafts of what it draws next have done.
    """

    __slots__ = (
        "_flying",
        "_status",
        "admitted_at",
        "arrival",
        "cached_tokens",
        "computed_tokens",
        "constraint",
        "forbidden_early",
        "goal",
        "is_paused",
        "lease",
        "most_len",
        "namespace",
        "num_computed",
        "num_due",
        "num_jumped",
        "num_lost",
        "num_planned",
        "num_preemptions",
        "pace",
        "params",
        "prefill_until",
        "prompt_len",
        "publish_at",
        "room",
        "seed",
        "slots",
        "tokens",
        "trie",
    )

    def __init__(
        self,
        tokens: IntArray,
        *,
        namespace: Hashable = None,
        params: SamplingParams | None = None,
        seed: int = 0,
        trie: TokenTrie | None = None,
        forbidden_early: tuple[int, ...] = (),
        constraint: Constraint | None = None,
        most_len: int | None = None,
    ) -> None:
        assert (params is None) != (trie is None), "a sequence either generates or scores"
        self.prompt_len = len(tokens)
        self.most_len = len(tokens) + (params.max_tokens if params else 0) if most_len is None else most_len
        self.trie = trie
        if trie is not None:
            self.room = len(trie)
            self.slots: IntArray = np.arange(len(tokens), len(tokens) + len(trie), dtype=np.int32)
            tokens = np.concatenate([tokens, trie.tokens])
        assert len(tokens) > 0, "a sequence has at least one token"
        self.tokens = IntVector(tokens, capacity=len(tokens) + (min(params.max_tokens, 1024) if params else 0))
        self.constraint = constraint
        if constraint is not None:
            self.tokens.extend(constraint.begin())
        self.num_jumped = 0 if trie is not None else len(self.tokens) - self.prompt_len
        self.namespace = namespace
        self.params = params
        self.seed = seed
        self.forbidden_early = forbidden_early
        self.goal = len(self.tokens)
        self.prefill_until = self.goal
        self._status = Status.WAITING
        self.lease: Lease | None = None
        self.num_computed = 0
        self.num_planned = 0
        self.num_due = 0
        self._flying: list[Row] = []  # its rows in steps in flight that count, oldest first
        self.is_paused = False
        self.arrival = 0
        self.admitted_at: float | None = None
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.num_preemptions = 0
        self.num_lost = 0
        self.publish_at = 0
        self.pace = Pace()

    @property
    def status(self) -> Status:
        """Where the sequence is; only legal transitions can be assigned."""
        return self._status

    @status.setter
    def status(self, new: Status) -> None:
        self._status = moved(self._status, new)

    @property
    def match_limit(self) -> int:
        """The most leading tokens that may come from the cache: what is sampled or scored needs its logits computed."""
        return len(self.tokens) - 1 if self.trie is None else max(self.prompt_len - 1, 0)

    @property
    def is_prefilling(self) -> bool:
        """Whether more is to be computed than the token drawn last."""
        return self.num_computed < self.prefill_until

    @property
    def decodes_next(self) -> bool:
        """Whether the next step computes what was drawn last and was forced after it, not a prompt."""
        return self.num_planned >= self.prefill_until or self.is_jumping

    @property
    def num_decoding(self) -> int:
        """How many tokens the next step computes where it `decodes_next`, else 0."""
        if self.num_planned < self.prefill_until and not self.is_jumping:
            return 0
        return self.num_left if self.num_due else self.goal - self.num_planned

    @property
    def waits_for_values(self) -> bool:
        """Whether what it does next depends on which token a step in flight draws, not only on there being one.

        A grammar goes on from the token; penalties count it; a draft holds as far as it says what is drawn.
        """
        if not self.num_due or self.params is None:
            return False
        if self._flying[-1].draft:
            return True
        p = self.params
        is_held = self.constraint is not None and not self.constraint.is_free
        return is_held or p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0

    @property
    def num_left(self) -> int:
        """How many tokens can be computed before the next draw; 0 if the steps in flight may be all it needs."""
        if self.num_due and len(self.tokens) + self.num_due >= self.most_len:
            return 0
        return self.goal + self.num_due - self.num_planned

    @property
    def num_slots(self) -> int:
        """How many slots hold the KV of all tokens."""
        return len(self.tokens) + self.num_due if self.trie is None else self.prompt_len + self.room

    @property
    def least_slots(self) -> int:
        """How many slots it cannot do without."""
        return len(self.tokens) if self.trie is None else self.prompt_len + self.trie.num_levels

    @property
    def num_publishable(self) -> int:
        """How many of the computed tokens are a prefix that others may have: not the nodes of a trie."""
        return self.num_computed if self.trie is None else min(self.num_computed, self.prompt_len)

    def limit_room(self, spare: int, most: int) -> None:
        """Let a trie's nodes take the slots of its longest path and `spare` more; with the prompt at most `most`."""
        if self.trie is not None:
            self.room = min(len(self.trie), self.trie.num_levels + spare, most - self.prompt_len)

    def most_new(self, budget: int) -> int:
        """Return how many tokens the next step may compute, of `budget`."""
        done = self.num_planned
        count = min(self.num_left, budget)
        if self.trie is None or done + count <= self.prompt_len:
            return count
        # A node reads the whole prompt by slot: its index takes memory in proportion.
        count = min(count, max(self.prompt_len - done, 0) + max(_MOST_INDEX // self.num_slots, 16))
        if self.room < len(self.trie):
            first = max(done - self.prompt_len, 0)
            kept = int(self.trie.depths[first])
            count = min(count, max(self.prompt_len - done, 0) + self.room - kept)
        return count

    def append(self, token: int) -> tuple[int, ...]:
        """Append a drawn token and what has to follow it; return them all.

        Raises RequestError, with nothing appended, if a grammar cannot go on.
        """
        if self.constraint is None:
            self.tokens.append(token)
            self.goal += 1
            self.prefill_until = self.goal - 1
            self.num_jumped = 0
            return (token,)
        tokens = self.constraint.advance(token)
        self.tokens.extend(tokens)
        self.goal += len(tokens)
        self.prefill_until = self.goal - 1
        self.num_jumped = len(tokens) - 1
        return tuple(tokens)

    def cut(self, num_generated: int) -> int:
        """Forget what was appended after the first `num_generated` tokens generated; return how many those were."""
        length = min(self.prompt_len + num_generated, len(self.tokens))
        dropped = len(self.tokens) - length
        if dropped:
            self.tokens.truncate(length)
            self.goal = length
            self.forget_rows(min(self.num_computed, length - 1))
        return dropped

    @property
    def is_jumping(self) -> bool:
        """Whether what is to be computed is the token drawn last and those that a grammar forced after it."""
        return self.num_jumped > 0 and self.num_planned == self.goal - 1 - self.num_jumped

    @property
    def generated(self) -> IntArray:
        """The tokens drawn so far."""
        return self.tokens.view(self.prompt_len)

    @property
    def is_drawing(self) -> bool:
        """Whether the next step computes the token drawn last and draws the next, with nothing that decides both."""
        return (
            self.params is not None
            and (self.constraint is None or self.constraint.is_free)
            and not self.num_due
            and self.num_planned >= self.prefill_until
            and self.num_planned == self.goal - 1 >= self.prompt_len
        )

    def plan_row(self, num_new: int, page_size: int, drawn_by: int | None = None, draft: IntArray | None = None) -> Row:
        """Return this sequence's share of a step that computes `num_new` tokens, which is in flight from now on.

        drawn_by: which row of the step before draws the token to be computed, if that is still in flight. draft:
        tokens to compute after them that nobody drew yet.
        """
        row = self._row(num_new, page_size, drawn_by, draft)
        self._flying.append(row)
        self.num_planned += num_new
        self.num_due += row.sample is not None
        return row

    def land(self, row: Row, num_accepted: int = 0) -> bool:
        """The step of this row has ended: its tokens are computed. False if the sequence has forgotten the row.

        num_accepted: how many tokens of a draft came true.
        """
        if not self._flying or self._flying[0] is not row:
            return False
        del self._flying[0]
        self.num_computed += len(row.token_ids) - row.draft + num_accepted
        self.num_planned += num_accepted
        self.num_due -= row.sample is not None
        return True

    def forget_rows(self, num_computed: int) -> None:
        """Go on from `num_computed` computed tokens; what steps in flight do for it counts no more."""
        self._flying.clear()
        self.num_computed = self.num_planned = num_computed
        self.num_due = 0

    def _row(self, num_new: int, page_size: int, drawn_by: int | None, draft: IntArray | None) -> Row:
        assert self.lease is not None, "a sequence without a lease cannot run"
        start, stop = self.num_planned, self.num_planned + num_new
        if self.trie is not None:
            return self._score_row(self.trie, self.lease, start, stop, page_size)
        assert (self.num_due == 0) == (drawn_by is None), "a token that is not known yet is drawn by a row in flight"
        # No copy: while the row is read, what stands there stays.
        token_ids = self.tokens.view(start, stop) if drawn_by is None else _UNKNOWN
        num_draft = 0 if draft is None else len(draft)
        return Row(
            token_ids=token_ids if draft is None else np.concatenate([token_ids, draft]),
            start=start,
            pages=self.lease.row.view(0, -(-(stop + num_draft) // page_size)),
            sample=self._sample_request() if stop == self.goal + self.num_due else None,
            draft=num_draft,
            drawn_by=drawn_by,
        )

    def _score_row(self, trie: TokenTrie, lease: Lease, start: int, stop: int, page_size: int) -> Row:
        first, last = trie.edges_below(start - self.prompt_len, stop - self.prompt_len)
        has_nodes = stop > self.prompt_len
        return Row(
            token_ids=self.tokens.view(start, stop).copy(),
            start=start,
            pages=lease.row.view(0, None if has_nodes else -(-stop // page_size)),
            score_ids=trie.edge_tokens[first:last] if last > first else None,
            score_at=trie.edge_parents[first:last] + np.int32(self.prompt_len - start) if last > first else None,
            trie=self._trie_share(trie, max(start - self.prompt_len, 0), stop - self.prompt_len) if has_nodes else None,
        )

    def _trie_share(self, trie: TokenTrie, start: int, stop: int) -> TrieShare:
        """Give the nodes [start, stop) their slots."""
        if self.room < len(trie):
            kept = self.slots[trie.ancestors(start)]
            free = np.setdiff1d(np.arange(self.prompt_len, self.num_slots, dtype=np.int32), kept)
            self.slots[start:stop] = free[: stop - start]
        is_decode, bounds, path_indptr, path_slots = segments(trie, self.slots, start, stop)
        return TrieShare(
            context_len=self.prompt_len,
            depths=trie.depths[start:stop],
            slots=self.slots[start:stop].copy(),
            bounds=bounds,
            is_decode=is_decode,
            path_indptr=path_indptr,
            path_slots=path_slots,
        )

    def edges_taken(self, num_scores: int) -> slice:
        """Return which edges of the trie the last scores of a step belong to, after it was committed."""
        assert self.trie is not None, "only a scoring sequence has scores"
        last = self.trie.edges_below(ROOT, self.num_computed - self.prompt_len)[1]
        return slice(last - num_scores, last)

    def _sample_request(self) -> SampleRequest:
        assert self.params is not None
        generated = self.tokens.view(self.prompt_len)
        return SampleRequest(
            params=self.params,
            seed=self.seed,
            position=len(self.tokens) + self.num_due,
            generated=generated,
            prompt=self.tokens.view(0, self.prompt_len) if self.params.repetition_penalty != 1.0 else _NOTHING,
            forbidden=self.forbidden_early if len(generated) + self.num_due < self.params.min_tokens else (),
            constraint=None if self.constraint is None or self.constraint.is_free else self.constraint,
            is_forced=self.num_jumped > 0 and not self.num_due,
        )
