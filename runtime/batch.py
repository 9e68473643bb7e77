"""`Batch`: what one step computes, as plain arrays; `RowResult`: what came out. No torch, no sequences.

The scheduler makes a `Batch` and forgets the device; the runner executes it and forgets the sequences. Rows are in
the same order everywhere. A row is one sequence's share of the step::

    tokens of the sequence   [0 ............ start)            [start .. start + num_new)      [...
                             KV lies in the pages already      KV is computed in this step

Structs rather than dataclasses: 64 rows are made per step, and a frozen dataclass costs 0.9 us more each. Nothing in
them refers back to them, so the garbage collector need not know of them.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from bough.runtime.grammar.constraint import Constraint
from bough.runtime.protocol import SamplingParams

IntArray = npt.NDArray[np.int32]


class PageCopy(msgspec.Struct, frozen=True):
    """Copy the first `num_slots` slots of page `source` to page `target`, in every layer, before the step computes."""

    source: int
    target: int
    num_slots: int


class SampleRequest(msgspec.Struct, frozen=True, gc=False):
    """How to draw the next token of a row: parameters, and what they refer to.

    seed keys the counter-based generator together with the position of the drawn token (`position`), so that a draw
    does not depend on the batch. generated: the ids this operation has drawn so far, but for one that the host does not
    know yet (`Row.drawn_by`); prompt: the ids before them (given only when repetition_penalty asks for it). forbidden:
    ids that must not be drawn now (min_tokens).
    constraint: which ids may be drawn at all; forbidden ids then may, where nothing else may. is_forced: the last
    token was not drawn but forced by a grammar, so that it is computed as a prompt is.
    """

    params: SamplingParams
    seed: int
    position: int
    generated: IntArray
    prompt: IntArray
    forbidden: tuple[int, ...]
    constraint: Constraint | None = None
    is_forced: bool = False


class TrieShare(msgspec.Struct, frozen=True):
    """The part of a row whose tokens are nodes of a trie below its first `context_len` tokens (see `TokenTrie`).

    It is the row's last num_nodes tokens. depths: (num_nodes,) int32; a node stands at position context_len + depth.
    slots: (num_nodes,) int32, where its KV goes (page * page_size + offset, pages counted in the row).
    bounds: (num_segments + 1,) int32 from 0 to num_nodes: in a segment each node is the parent of the next.
    is_decode: (num_segments,) bool, which are attended as a decode; these have one node.
    path_indptr: (num_segments + 1,) into path_slots: the slots of the positions from context_len to the segment's end.
    """

    context_len: int
    depths: IntArray
    slots: IntArray
    bounds: IntArray
    is_decode: npt.NDArray[np.bool_]
    path_indptr: IntArray
    path_slots: IntArray


class Row(msgspec.Struct, frozen=True, gc=False):
    """One sequence's share of a step.

    token_ids: (num_new,) int32, the tokens whose KV is computed; they stand at positions start, start + 1, ...
    pages: (ceil((start + num_new) / page_size),) int32, page i holds positions [i * page_size, (i + 1) * page_size).
    sample: draw the token after the last new one, or None in the middle of a prefill.
    score_ids: (k,) int32 or None; the log-probability of score_ids[j] is read from the logits that follow
    token_ids[score_at[j]]. score_at: (k,) int32, ascending.
    trie: None, or what stands elsewhere than start says; pages then holds all pages of the row.
    draft: how many of the last token_ids nobody drew yet. A row that samples draws after the token before them, and
    then after each of them as long as they are what was drawn.
    drawn_by: None, or the row of the step launched before whose draw is this row's one token, when it is not known yet
    on the host; token_ids then holds a 0 in its place.
    """

    token_ids: IntArray
    start: int
    pages: IntArray
    sample: SampleRequest | None = None
    score_ids: IntArray | None = None
    score_at: IntArray | None = None
    trie: TrieShare | None = None
    draft: int = 0
    drawn_by: int | None = None

    def draws(self) -> list[SampleRequest]:
        """Return how to draw after each token that is followed by a draw: 1 + draft requests, or none."""
        first = self.sample
        if first is None:
            return []
        if not self.draft:
            return [first]
        text = np.concatenate([first.generated, self.token_ids[len(self.token_ids) - self.draft :]])
        num_drawn = len(first.generated)
        return [
            first,
            *(
                msgspec.structs.replace(
                    first,
                    position=first.position + count,
                    generated=text[: num_drawn + count],
                    forbidden=first.forbidden if num_drawn + count < first.params.min_tokens else (),
                )
                for count in range(1, self.draft + 1)
            ),
        ]


class Batch(msgspec.Struct, frozen=True):
    """One step. `copies` are carried out first, then all rows at once."""

    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()


class RowResult(msgspec.Struct, frozen=True, gc=False):
    """What one row produced.

    token: the drawn id, None if the row asked for none. logprob: its natural-log probability under the model's
    unmodified distribution; top: likelier-first (logprob, id) alternatives; entropy: of that distribution, in nats; all
    only if params.logprobs was given.
    score_logprobs: (k,) float64 for score_ids. further: what was drawn after each token of the draft that came true.
    """

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[float, int], ...] = ()
    score_logprobs: npt.NDArray[np.float64] | None = None
    entropy: float | None = None
    further: tuple[RowResult, ...] = ()
