"""`Sequence`: the running form of one generate, or of one choice being scored."""

from __future__ import annotations

from collections.abc import Hashable

from bough.runtime.batch import Row, SampleRequest
from bough.runtime.cache.prefix_cache import Lease
from bough.runtime.lifecycle import Status, moved
from bough.runtime.protocol import SamplingParams
from bough.runtime.vector import IntArray, IntVector


class Sequence:
    """Tokens, how many of them have their KV computed, and the lease on the pages that hold it.

    A generating sequence (`params` given) draws a token whenever all its tokens are computed. A scoring sequence
    (`score_start` given, params None) wants the log-probabilities of tokens[score_start:]; its last token is never
    computed. The scheduler is the only writer.

    ids of tokens   [0 .... num_computed) [num_computed .... goal) ...
                    KV in the lease's row  to be computed

    goal: how many leading tokens must be computed before the sequence draws or is done. prefill_until: below that many
    it is prefilling, what it computes is its prompt or was lost to a preemption; above, it is the token drawn last.
    num_lost: how many tokens were computed when it was preempted last.
    """

    __slots__ = (
        "_status",
        "admitted_at",
        "arrival",
        "cached_tokens",
        "computed_tokens",
        "forbidden_early",
        "goal",
        "is_paused",
        "lease",
        "namespace",
        "num_computed",
        "num_lost",
        "num_preemptions",
        "params",
        "prefill_until",
        "prompt_len",
        "score_start",
        "seed",
        "tokens",
    )

    def __init__(
        self,
        tokens: IntArray,
        *,
        namespace: Hashable = None,
        params: SamplingParams | None = None,
        seed: int = 0,
        score_start: int | None = None,
        forbidden_early: tuple[int, ...] = (),
    ) -> None:
        assert (params is None) != (score_start is None), "a sequence either generates or scores"
        assert len(tokens) > 0, "a sequence has at least one token"
        self.tokens = IntVector(tokens, capacity=len(tokens) + (min(params.max_tokens, 1024) if params else 0))
        self.prompt_len = len(tokens)
        self.namespace = namespace
        self.params = params
        self.seed = seed
        self.score_start = score_start
        self.forbidden_early = forbidden_early
        self.goal = len(tokens) if score_start is None else len(tokens) - 1
        self.prefill_until = self.goal
        self._status = Status.WAITING
        self.lease: Lease | None = None
        self.num_computed = 0
        self.is_paused = False
        self.arrival = 0
        self.admitted_at: float | None = None
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.num_preemptions = 0
        self.num_lost = 0

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
        return len(self.tokens) - 1 if self.score_start is None else self.score_start - 1

    @property
    def is_prefilling(self) -> bool:
        """Whether more is to be computed than the token drawn last."""
        return self.num_computed < self.prefill_until

    def append(self, token: int) -> None:
        """Append a drawn token."""
        self.tokens.append(token)
        self.goal += 1
        self.prefill_until = self.goal - 1

    @property
    def generated(self) -> IntArray:
        """The tokens drawn so far."""
        return self.tokens.view(self.prompt_len)

    def row(self, num_new: int, num_pages: int) -> Row:
        """Return this sequence's share of a step that computes `num_new` tokens."""
        assert self.lease is not None, "a sequence without a lease cannot run"
        start, stop = self.num_computed, self.num_computed + num_new
        score_ids, score_from = None, 0
        if self.score_start is not None:
            first = max(self.score_start - 1, start)
            score_ids, score_from = self.tokens.view(first + 1, stop + 1).copy(), first - start
        return Row(
            token_ids=self.tokens.view(start, stop).copy(),
            start=start,
            pages=self.lease.row.view(0, num_pages),
            sample=self._sample_request() if self.params is not None and stop == self.goal else None,
            score_ids=score_ids if score_ids is not None and len(score_ids) else None,
            score_from=score_from,
        )

    def _sample_request(self) -> SampleRequest:
        assert self.params is not None
        generated = self.generated
        return SampleRequest(
            params=self.params,
            seed=self.seed,
            position=len(self.tokens),
            generated=generated,
            prompt=self.tokens.view(0, self.prompt_len if self.params.repetition_penalty != 1.0 else 0),
            forbidden=self.forbidden_early if len(generated) < self.params.min_tokens else (),
        )
