"""`Selection`: one select or score while it runs. Scores the choices over their token trie, then decides.

The score of a choice is the log-likelihood of its bytes after the branch's text. Text that still waits in the branch's
tail is tokenised together with each choice, so that the seam is where the tokenizer puts it: a token that begins in the
waiting text and ends in the choice counts whole, tokens within the waiting text that all choices share belong to the
context, and those that only some choices change count for all. No end of text is counted: a choice that begins another
one is as likely as its own tokens. Equal scores: the first of the choices wins.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from bough.runtime.batch import RowResult
from bough.runtime.operation import Operation
from bough.runtime.protocol import Score, Select, Selected, TokenLogprob
from bough.runtime.protocol.scoring import best, distribution, draw, score_choices
from bough.runtime.rng import uniforms
from bough.runtime.sequence import Sequence
from bough.runtime.text.tokenizer import Tokenizer
from bough.runtime.trie import TokenTrie
from bough.runtime.usage import usage_of
from bough.runtime.vector import IntArray

NOTHING: Final[IntArray] = np.zeros(0, dtype=np.int32)


class _Scoring:
    """The choices' trie after one context: its sequence, and the log-probability of every node as it comes in.

    Without a context nothing precedes the first tokens; their value stays 0.0, and if there is nothing else to score
    there is no sequence.
    """

    def __init__(self, context: IntArray, trie: TokenTrie, namespace: str) -> None:
        self.values: npt.NDArray[np.float64] = np.zeros(trie.num_nodes)
        self.sequence: Sequence | None = None
        if len(context) + len(trie):
            self.sequence = Sequence(context, namespace=namespace, trie=trie)

    def take(self, scores: npt.NDArray[np.float64]) -> None:
        """Take the scores of a step in. After a preemption some come again, and take the place of the first."""
        assert self.sequence is not None
        self.values[self.sequence.edges_taken(len(scores))] = scores


class Selection:
    """One select or score in flight: a sequence for all choices, and one for all without the context if need be.

    context: (context_len,) the ids before the choices. choices[i]: the ids that become part of the branch if choice i
    is taken, of which the first `skip` are the last of the context. base: the context of the unconditional
    log-probabilities, None where the method needs none. seed: of the draw, where the request has a temperature.
    """

    def __init__(
        self,
        operation: Operation,
        request: Select | Score,
        context: IntArray,
        choices: list[list[int]],
        skip: int,
        tokenizer: Tokenizer,
        *,
        base: IntArray | None,
        seed: int,
    ) -> None:
        self.operation = operation
        self.choices = choices
        self._request = request
        self._skip = skip
        self._tokenizer = tokenizer
        self._draws = seed, len(context)
        self._first_result_at: float | None = None
        self._trie = TokenTrie([ids[skip:] for ids in choices])
        namespace = operation.session.namespace
        self._given = _Scoring(context, self._trie, namespace)
        self._alone = None if base is None else _Scoring(base, self._trie, namespace)
        scorings = (self._given,) if self._alone is None else (self._given, self._alone)
        self._scoring_of = {scoring.sequence: scoring for scoring in scorings if scoring.sequence is not None}
        self.sequences = tuple(self._scoring_of)
        self._logprobs: list[list[float]] = []
        self._unconditional: list[list[float]] | None = None
        self._scores: list[float] = []
        self._distribution: list[float] = []
        self._index = 0

    def take_scores(self, sequence: Sequence, result: RowResult, now: float) -> bool:
        """Take the outcome of a step for one sequence in; True if that sequence is complete."""
        if result.score_logprobs is not None:
            self._scoring_of[sequence].take(result.score_logprobs)
        if sequence.num_computed < sequence.goal:
            return False
        if self._first_result_at is None:
            self._first_result_at = now
        return True

    def decide(self) -> int:
        """Score the choices, all of whose sequences are complete; return the index of the one that is taken."""
        request = self._request
        temperature = request.temperature if isinstance(request, Select) else 0.0
        self._logprobs = self._trie.per_choice(self._given.values)
        if self._alone is not None:
            self._unconditional = self._trie.per_choice(self._alone.values)
        num_bytes = [len(choice.encode()) for choice in request.choices]
        self._scores = score_choices(request.method, self._logprobs, self._unconditional, num_bytes)
        self._distribution = distribution(self._logprobs, temperature or 1.0)
        if temperature:
            seed, position = self._draws
            self._index = draw(self._distribution, float(uniforms([seed], [position])[0]))
        else:
            self._index = best(self._scores)
        return self._index

    def reply(self, length: int, now: float) -> Selected:
        """Return the terminal reply, after `decide`; `length` is the branch's new length in tokens."""
        texts = {token: self._tokenizer.decode([token]) for token in self._trie.edge_tokens.tolist()}
        return Selected(
            op=self.operation.id,
            index=self._index,
            scores=self._scores,
            distribution=self._distribution,
            logprobs=[
                [TokenLogprob(value, token, texts[token]) for value, token in zip(row, ids[self._skip :], strict=True)]
                for ids, row in zip(self.choices, self._logprobs, strict=True)
            ],
            length=length,
            usage=usage_of(self.operation, self.sequences, 0, self._first_result_at, now),
            unconditional=self._unconditional,
        )

    def partial(self, now: float) -> dict[str, int | float | str]:
        """What the reply says of a selection that fails: the fields of `Usage`."""
        return msgspec.structs.asdict(usage_of(self.operation, self.sequences, 0, self._first_result_at, now))


def ids_of(*parts: Items[int] | IntArray) -> IntArray:
    """Return token ids after one another as one array."""
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
