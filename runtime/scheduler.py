"""Continuous batching: admit, plan a `Batch`, commit its results, finish, preempt. No torch, no sockets, no text.

One token budget per step is shared by the decodes of all running sequences and by chunks of any number of prefills.
A sequence is admitted when pages for all its tokens can be had; later growth may run out of pages, and then the
newest sequence is preempted: its KV is published before its pages are released, so that resuming is mostly a hit.
The oldest running sequence is never preempted for another, so there is always progress.

A step may be planned ahead, while the results of the one before are not known: of a sequence that draws there, it is
known that it will have one token more, hence positions, pages and counts; only the token's value stays on the device.
What would need more than that (a grammar, penalties, pages that somebody has to give up) is not planned ahead.
A sequence that ends, is preempted or paused meanwhile has a row in the step planned ahead, which it forgets: the row
counts for nothing, and pages given back are in limbo until that step is over (see `PageAllocator`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain

import msgspec

from bough.runtime.batch import Batch, PageCopy, RowResult
from bough.runtime.cache.prefix_cache import Lease, PrefixCache
from bough.runtime.lifecycle import Status
from bough.runtime.policies import POLICIES
from bough.runtime.protocol import RequestError
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.vector import IntArray, common_prefix

# What was used in this many steps is not evicted to admit another sequence while anything runs: a program's next
# request arrives a step or so after its last result, and what waits is matched, and so used, when the queue is ranked.
KEPT_STEPS = 16
# A sequence of which less than half is cached begins something new, which will want to grow: it starts only if this
# share of the pool is left for what runs already.
COLD_HEADROOM = 0.25


class Step(msgspec.Struct, frozen=True):
    """A planned step: the batch for the runner, and which sequence each row belongs to."""

    batch: Batch
    sequences: tuple[Sequence, ...]


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What a step did for one sequence.

    tokens: what was appended to it, the token drawn (`result.token`) and those that a grammar forced after it, or those
    drawn after a draft that came true (`result.further`). error: why nothing could be appended.
    """

    sequence: Sequence
    result: RowResult
    tokens: tuple[int, ...] = ()
    error: RequestError | None = None


@dataclass(slots=True)
class Counters:
    """Totals since start, mostly tokens. prompt = cached + computed; recomputed: again, after a preemption."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    rebuilds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Owns the sequences and, through the cache, the pages. One caller, one thread.

    usual_len: tokens that a generation is expected to have, the first value of a moving mean.
    speculator: makes drafts, or None for plain decoding.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        token_budget: int,
        max_running: int,
        policy: str = "lpm",
        usual_len: float = 256.0,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.counters = Counters()
        self.running: list[Sequence] = []  # oldest first
        self._waiting: dict[Sequence, None] = {}  # in order of arrival
        self._preempted: deque[Sequence] = deque()  # oldest first; always before the others
        self._exhausted: list[Sequence] = []
        self._matched: dict[Sequence, tuple[int, int]] = {}  # tree version, matched length
        self._order = POLICIES[policy]
        self._token_budget = token_budget
        self._max_running = max_running
        self._clock = clock
        self._arrivals = 0
        self._clocks: deque[int] = deque(maxlen=KEPT_STEPS)  # the tree's clock at the last plans
        self._usual_len = usual_len
        self._speculator = speculator

    # ------------------------------------------------------------------------------------------ queue

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def has_work(self) -> bool:
        """Whether a step could do something now."""
        return bool(self._exhausted) or any(
            not sequence.is_paused for sequence in chain(self.running, self._preempted, self._waiting)
        )

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError("resource_exhausted") if the whole pool could not hold it."""
        needed = self.cache.num_pages_for(sequence.least_slots)
        if needed > self.cache.num_pages:
            raise RequestError(
                "resource_exhausted",
                f"{sequence.least_slots} tokens need {needed} pages, the KV pool has {self.cache.num_pages}: "
                "raise max_total_tokens",
                needed_pages=needed,
                total_pages=self.cache.num_pages,
            )
        sequence.limit_room(self._token_budget, self.cache.num_pages * self.cache.page_size)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._waiting[sequence] = None

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, whatever its state; its KV stays in the cache. The one terminal transition."""
        assert sequence.status is not Status.FINISHED, "a sequence was finished twice"
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence in self._waiting:
            del self._waiting[sequence]
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        self._matched.pop(sequence, None)
        sequence.status = Status.FINISHED
        if sequence.params is not None:
            self._usual_len += (len(sequence.generated) - self._usual_len) / 16

    def cut(self, sequence: Sequence, num_generated: int) -> None:
        """Forget what a step appended after the tokens at which a generation ended; it is neither kept nor cached."""
        self.counters.generated_tokens -= sequence.cut(num_generated)

    def pause(self, sequence: Sequence) -> None:
        """Stop scheduling a sequence; it keeps its pages, but is the first to be preempted."""
        sequence.is_paused = True
        sequence.forget_rows(sequence.num_computed)

    def resume(self, sequence: Sequence) -> None:
        """Take back `pause`."""
        sequence.is_paused = False

    def take_exhausted(self) -> list[Sequence]:
        """Return the sequences that can never go on for lack of pages; the caller finishes them."""
        exhausted, self._exhausted = self._exhausted, []
        return exhausted

    # ------------------------------------------------------------------------------------------ plan

    def plan(self, ahead_of: Step | None = None) -> Step | None:
        """Choose what the next step computes and make sure that it has pages. None if there is nothing to do.

        ahead_of: the step in flight, if its results are not committed yet. None is returned also if they are needed.
        """
        if ahead_of is not None and any(s.waits_for_values and not s.is_paused for s in self.running):
            return None
        rows: dict[Sequence, int] = {}
        copies: list[PageCopy] = []
        budget = self._token_budget
        num_preempted = self.counters.preemptions
        self._clocks.append(self.cache.tree.clock)
        for sequence, num_new in [(s, count) for s in self.running if (count := s.num_decoding)]:
            if ahead_of is not None and not sequence.is_paused and not self._has_slots(sequence):
                return None  # once nothing is in flight, preempting gives pages at once
            if budget and self._can_decode(sequence, rows):
                rows[sequence] = min(num_new, budget)
                budget -= rows[sequence]
        for sequence in self.running:
            if sequence not in rows and budget and not sequence.is_paused and not sequence.decodes_next:
                rows[sequence] = sequence.most_new(budget)
                budget -= rows[sequence]
        if num_preempted == self.counters.preemptions:
            self._admit(budget, rows, copies, may_exhaust=ahead_of is None)
        return self._step_of(rows, copies, ahead_of) if rows else None

    def _step_of(self, rows: dict[Sequence, int], copies: Items[PageCopy], ahead_of: Step | None) -> Step:
        """Make a step of so many new tokens of each sequence; it counts as in flight from now on."""
        drafts = self._speculator.drafts(rows, self.cache, self._token_budget) if self._speculator else {}
        self.cache.allocator.begin_step()
        before = {} if ahead_of is None else {s: row for row, s in enumerate(ahead_of.sequences)}
        size = self.cache.page_size
        planned = [
            s.plan_row(num_new, size, before[s] if s.num_due else None, drafts.get(s)) for s, num_new in rows.items()
        ]
        return Step(Batch(tuple(planned), tuple(copies)), tuple(rows))

    def _has_slots(self, sequence: Sequence) -> bool:
        """Reserve the slots of the tokens appended last, and of one that is drawn now."""
        assert sequence.lease is not None
        num_slots = sequence.num_slots
        return num_slots <= len(sequence.lease.row) * self.cache.page_size or self.cache.reserve(
            sequence.lease, num_slots
        )

    def _can_decode(self, sequence: Sequence, planned: dict[Sequence, int]) -> bool:
        """See to its slots, preempting newer sequences if need be."""
        if sequence.is_paused or sequence.status is not Status.RUNNING:
            return False
        while not self._has_slots(sequence):
            victim = self._victim(planned)
            self.preempt(victim)  # alone, it comes back without a prefix that pins pages, or is told that it cannot
            if victim is sequence:
                return False
        return True

    def _victim(self, planned: dict[Sequence, int]) -> Sequence:
        """The sequence to preempt: one that is paused, else the newest, never one that is planned already."""
        candidates = [s for s in self.running if s not in planned]
        return next((s for s in reversed(candidates) if s.is_paused), candidates[-1])

    def preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back among the waiting; its KV is published before its pages are released."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self._lose_pages(sequence)
        self.counters.preemptions += 1
        self._preempted.appendleft(sequence)

    def _lose_pages(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        sequence.num_lost = sequence.num_computed
        sequence.forget_rows(0)
        sequence.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        self._publish(sequence, sequence.lease, sequence.num_publishable)
        self.cache.release(sequence.lease)
        sequence.lease = None
        sequence.forget_rows(sequence.num_computed)

    def _publish(self, sequence: Sequence, lease: Lease, num_tokens: int) -> None:
        self.cache.publish(lease, sequence.tokens.view(0, num_tokens))
        self._note_published(sequence, lease)
        if self._speculator is not None and sequence.params is not None:
            self._speculator.learn(sequence)

    def _note_published(self, sequence: Sequence, lease: Lease) -> None:
        """The next to be published is the page that is not full yet."""
        size = self.cache.page_size
        sequence.publish_at = (lease.published // size + 1) * size

    # ------------------------------------------------------------------------------------------ admit

    def _admit(
        self, budget: int, rows: dict[Sequence, int], copies: list[PageCopy], *, may_exhaust: bool = True
    ) -> None:
        """Start waiting sequences while budget, places and pages last; stop at the first that does not fit.

        may_exhaust: whether all pages are in use or free, none in limbo, so that one may be found not to fit ever.
        """
        if budget <= 0 or not self.num_waiting:
            return
        if len(self.running) >= self._max_running and not self._preempt_paused():
            return
        queue = [*self._preempted, *self._order(self._waiting, self._matched_len, self._arrivals)]
        for sequence in queue:
            if budget <= 0 or len(self.running) >= self._max_running:
                return
            if sequence.is_paused or self._is_computed_elsewhere(sequence):
                continue
            lease = self._acquire(sequence)
            if lease is None and not self.running and may_exhaust:
                # A cached prefix can pin more pages than its tokens need, where edges meet inside a page: do without.
                tokens = sequence.tokens.view(0, sequence.num_slots)
                lease = self.cache.acquire(sequence.namespace, tokens, limit=0, headroom=0)
                if lease is None:
                    self._exhausted.append(sequence)
                    sequence.is_paused = True
            if lease is None:
                self._preempt_paused()  # its pages serve the next step
                return
            self._start(sequence)
            sequence.lease = lease
            self._note_published(sequence, lease)
            sequence.forget_rows(lease.matched)
            self._count_prompt(sequence)
            if lease.copy is not None:
                copies.append(lease.copy)
            rows[sequence] = sequence.most_new(budget)
            budget -= rows[sequence]

    def _acquire(self, sequence: Sequence) -> Lease | None:
        """Lease pages for a waiting sequence, beside those that run; None if there are not enough."""
        headroom = self._headroom(sequence)
        used_until = self._clocks[0] if self.running else None
        num_slots = sequence.num_slots
        if self.running and not self.cache.has_room(num_slots, self._matched_len(sequence), headroom, used_until):
            return None
        tokens = sequence.tokens.view(0, num_slots)
        return self.cache.acquire(sequence.namespace, tokens, sequence.match_limit, headroom, used_until)

    def _headroom(self, sequence: Sequence) -> int:
        """Return how many pages to leave free: for what those that run, and this one, are likely to generate."""
        if not self.running:
            return 0
        growth = sum(self._growth(other) for other in self.running) + self._growth(sequence)
        headroom = max(len(self.running), int(growth / self.cache.page_size))
        if self._matched_len(sequence) < len(sequence.tokens) // 2:
            headroom += int(COLD_HEADROOM * self.cache.num_pages)
        return headroom

    def _growth(self, sequence: Sequence) -> float:
        if sequence.params is None:
            return 0.0
        return max(min(self._usual_len, sequence.params.max_tokens) - len(sequence.generated), 1.0)

    def _preempt_paused(self) -> bool:
        """Take place and pages from a sequence whose reader stalls; False if there is none."""
        paused = next((s for s in reversed(self.running) if s.is_paused), None)
        if paused is not None:
            self.preempt(paused)
        return paused is not None

    def _start(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            del self._waiting[sequence]
        else:
            self._preempted.remove(sequence)
        self._matched.pop(sequence, None)
        sequence.status = Status.RUNNING
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
        # Oldest first, so that a sequence that was preempted takes its old place again.
        position = len(self.running)
        while position and self.running[position - 1].arrival > sequence.arrival:
            position -= 1
        self.running.insert(position, sequence)

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.num_preemptions:
            self.counters.recomputed_tokens += max(sequence.num_lost - sequence.num_computed, 0)
            return
        # What a grammar forces after a prompt is none; the choices of a selection count as one.
        prompt = sequence.goal if sequence.params is None else sequence.prompt_len
        cached = min(sequence.num_computed, prompt)
        computed = prompt - cached
        sequence.cached_tokens, sequence.computed_tokens = cached, computed
        self.counters.prompt_tokens += prompt
        self.counters.cached_tokens += cached
        self.counters.computed_tokens += computed
        self.counters.generated_tokens += sequence.goal - prompt

    def _matched_len(self, sequence: Sequence) -> int:
        version, length = self._matched.get(sequence, (-1, 0))
        if version != self.cache.tree.version:
            tokens = sequence.tokens.view(0, sequence.match_limit)
            length = self.cache.matched_len(sequence.namespace, tokens)
            self._matched[sequence] = (self.cache.tree.version, length)
        return length

    def _is_computed_elsewhere(self, sequence: Sequence) -> bool:
        """Whether a running prefill is about to publish a page or more of what this sequence needs (single flight)."""
        if not self.cache.enabled:
            return False
        wanted: IntArray | None = None
        for other in self.running:
            if not other.is_prefilling or other.is_paused or other.namespace != sequence.namespace:
                continue
            if wanted is None:  # looked up once, and only where something runs that might compute it
                least = self._matched_len(sequence) + self.cache.page_size
                if least > sequence.match_limit:
                    return False
                wanted = sequence.tokens.view(0, least)
                last = wanted[-1]
            # Most prompts differ where the cached part ends: one token tells, not thousands.
            if min(other.prompt_len, other.goal) < least or other.tokens[least - 1] != last:
                continue
            if common_prefix(other.tokens.view(0, least), wanted) == least:
                return True
        return False

    # ------------------------------------------------------------------------------------------ commit

    def commit(self, step: Step, results: Items[RowResult]) -> list[Outcome]:
        """Take in what the oldest step in flight computed: advance, append drawn tokens, publish.

        Returns one outcome per row, but for those that their sequences have forgotten since it was planned.
        """
        self.retire()
        self.counters.steps += 1
        outcomes: list[Outcome] = []
        for sequence, row, result in zip(step.sequences, step.batch.rows, results, strict=True):
            was_prefilling = sequence.is_prefilling
            accepted = len(result.further)
            if not sequence.land(row, accepted):
                continue
            assert sequence.lease is not None, "a sequence that is in flight has lost its pages"
            outcomes.append(self._appended(sequence, result))
            if row.draft:
                self._settle_draft(sequence, sequence.lease, row.draft, accepted)
            # What a draft brought may lie behind a stop, which is looked for only now: it is published a step later.
            settled = sequence.num_publishable - accepted
            if was_prefilling or settled >= sequence.publish_at:
                self._publish(sequence, sequence.lease, settled)
        return outcomes

    def _settle_draft(self, sequence: Sequence, lease: Lease, drafted: int, accepted: int) -> None:
        """Give back the pages that only what was rejected needed."""
        assert self._speculator is not None, "somebody made the draft"
        self._speculator.settle(sequence, drafted, accepted)
        self.counters.drafted_tokens += drafted
        self.counters.accepted_tokens += accepted
        self.cache.trim(lease, len(sequence.tokens))

    def _appended(self, sequence: Sequence, result: RowResult) -> Outcome:
        if result.token is None:
            return Outcome(sequence, result)
        try:
            tokens = sequence.append(result.token)
        except RequestError as error:
            return Outcome(sequence, result, error=error)
        for drawn in result.further:
            assert drawn.token is not None, "what is drawn is a token"
            tokens += sequence.append(drawn.token)
        self.counters.generated_tokens += len(tokens)
        return Outcome(sequence, result, tokens)

    def rebuild(self) -> None:
        """Start over with an empty cache; what ran is computed again. Tokens are the truth, so nothing is lost.

        Nothing may be in flight: the new cache knows of no step.
        """
        self.counters.rebuilds += 1
        self.cache = self.cache.emptied()
        self._matched.clear()
        for sequence in reversed(self.running):
            sequence.lease = None
            self._lose_pages(sequence)
            self._preempted.appendleft(sequence)
        self.running = []

    def retire(self) -> None:
        """The oldest step in flight is over, whatever came out: pages released while it was the newest are free."""
        self.cache.allocator.retire_step()

    def check_invariants(self) -> None:
        """Raise AssertionError if queues, leases, tree and pages disagree."""
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.lease is not None
            assert len(sequence.lease.row) * self.cache.page_size >= min(sequence.num_planned, sequence.num_slots)
            is_settled = sequence.num_planned == sequence.num_computed and not sequence.num_due
            assert is_settled or self.cache.allocator.num_steps, "tokens are due from a step that does not run"
        for sequence in (*self._waiting, *self._preempted):
            assert sequence.status is Status.WAITING
            assert sequence.lease is None
        self.cache.check_invariants(s.lease for s in self.running if s.lease is not None)
