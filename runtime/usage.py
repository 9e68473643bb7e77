"""What an operation cost: the tokens of its sequences and the times of its life, as `Usage` reports them."""

from __future__ import annotations

from collections.abc import Sequence as Items

from bough.runtime.operation import Operation
from bough.runtime.protocol import Usage
from bough.runtime.sequence import Sequence


def usage_of(
    operation: Operation, sequences: Items[Sequence], num_drawn: int, first_at: float | None, now: float
) -> Usage:
    """Return the usage of an operation until `now`; first_at: when its first result came, if one did."""
    admitted = [s.admitted_at for s in sequences if s.admitted_at is not None]
    return Usage(
        prompt_tokens=sum(s.cached_tokens + s.computed_tokens for s in sequences),
        cached_tokens=sum(s.cached_tokens for s in sequences),
        computed_tokens=sum(s.computed_tokens for s in sequences),
        completion_tokens=num_drawn,
        forced_tokens=sum(s.constraint.num_forced for s in sequences if s.constraint is not None),
        drafted_tokens=sum(s.pace.drafted for s in sequences),
        accepted_tokens=sum(s.pace.accepted for s in sequences),
        queue_ms=_ms(operation, min(admitted) if admitted else now),
        ttft_ms=_ms(operation, now if first_at is None else first_at),
        latency_ms=_ms(operation, now),
    )


def _ms(operation: Operation, at: float) -> float:
    return round((at - operation.arrived_at) * 1e3, 3)
