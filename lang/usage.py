"""What a run cost: totals over its operations, for the whole run or for one branch and what was forked off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bough.backend import Generation
from bough.calls import GenCall, SelectCall
from bough.errors import BoughError
from bough.runtime.protocol import Selected, Usage
from bough.strands import Onward, Strand

if TYPE_CHECKING:
    from concurrent.futures import Future

_FIELDS: Final = frozenset(Usage.__struct_fields__)


class RunUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent so far; operations in flight are counted once they end.

    Tokens: prompt_tokens = cached_tokens + computed_tokens, over all gens and selects; generated_tokens were sampled,
    or forced by a grammar (forced_tokens of them), also by those that then failed. drafted_tokens were guessed and
    computed before they were drawn, accepted_tokens of them came true and are generated tokens too. cancelled_tokens
    were computed or generated for operations that were cancelled, timed out or failed. rewound_tokens were cut away by
    rewinds, edits and forgotten thoughts. Times in milliseconds, summed over the operations: queue_ms waiting to be
    scheduled, prefill_ms from then to the first token, decode_ms from there to the end. An operation's own figures are
    in `State.get_meta_info`.
    """

    num_done: int = 0
    num_failed: int = 0
    num_pending: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cancelled_tokens: int = 0
    rewound_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    def __add__(self, other: RunUsage) -> RunUsage:
        fields = self.__struct_fields__
        return RunUsage(**{name: getattr(self, name) + getattr(other, name) for name in fields})


def usage_of(strand: Strand) -> RunUsage:
    """Return what the strand and all that were forked off it cost so far. Waits for nothing.

    Calls that a rewind, an edit or a forgotten thought took out of the text count too.
    """
    total = RunUsage()
    for future in replies_below(strand):
        total += _of_future(future)
    for at in _strands(strand):
        for _, children in list(at.forks):
            if isinstance(children, Onward) and children.cut is not None:
                total += RunUsage(rewound_tokens=children.cut.num_tokens())
        total += RunUsage(rewound_tokens=sum(cut.num_tokens() for cut in at.cuts))
    return total


def replies_below(strand: Strand) -> Iterator[Future[Any]]:
    """Yield the replies to all gens and selects of a strand and of those forked off it, each of them once."""
    seen: set[int] = set()
    for at in _strands(strand):
        for item in (*at.items, *at.dropped):
            if isinstance(item, (GenCall, SelectCall)):
                for future in item.futures():
                    if id(future) not in seen:  # an edit keeps calls that come after it
                        seen.add(id(future))
                        yield future


def _strands(strand: Strand) -> Iterator[Strand]:
    waiting = [strand]
    while waiting:
        at = waiting.pop()
        yield at
        waiting += [child for _, children in list(at.forks) for child in children]


def _of_future(future: Future[Any]) -> RunUsage:
    if not future.done():
        return RunUsage(num_pending=1)
    failure = future.exception()
    if failure is None:
        result: Generation | Selected = future.result()
        return _counted(result.usage, num_done=1)
    usage = spent_by(failure)
    return _counted(usage, num_failed=1, cancelled_tokens=usage.computed_tokens + usage.completion_tokens)


def _counted(usage: Usage, **counts: int) -> RunUsage:
    return RunUsage(
        **counts,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        computed_tokens=usage.computed_tokens,
        generated_tokens=usage.completion_tokens,
        forced_tokens=usage.forced_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
        queue_ms=usage.queue_ms,
        prefill_ms=max(0.0, usage.ttft_ms - usage.queue_ms),
        decode_ms=max(0.0, usage.latency_ms - usage.ttft_ms),
    )


def spent_by(failure: BaseException) -> Usage:
    """Return what an operation had cost when it failed; nothing if it failed because another one did."""
    if not isinstance(failure, BoughError):
        return Usage()
    cause = failure.__cause__
    if isinstance(cause, BoughError) and cause.message == failure.message:  # `for_dependant` made it
        return Usage()
    known = {name: value for name, value in failure.details.items() if name in _FIELDS}
    try:
        return msgspec.convert(known, Usage)
    except msgspec.ValidationError:  # another backend's details of the same names
        return Usage()
