"""What a client saw of a workload: each request's times and tokens, and the figures made of them.

No import beyond the standard library: peers that live in an environment of their own (hosting.py) make these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Call:
    """One gen or select, on the client's clock. prompts: the ids of what was asked (a select asks once per choice).

    num_given: of how many tokens the runtime's prompt was; a select's shares what its choices do, and names it once.
    """

    asked_at: float
    prompts: list[list[int]]
    token_times: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    num_given: int = 0


def num_different(rows: Sequence[list[int]]) -> int:
    """Return how many tokens are left of some rows where those that begin alike share their beginning."""
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


@dataclass
class Run:
    """A workload carried out once."""

    wall_s: float
    program_s: list[float]
    calls: list[Call]

    def __post_init__(self) -> None:
        self.prompt_tokens = sum(call.num_given or sum(map(len, call.prompts)) for call in self.calls)
        self.cached_tokens = sum(call.cached_tokens for call in self.calls)

    def figures(self) -> dict[str, float]:
        """Return the run's figures by name."""
        generated = sum(len(call.token_times) for call in self.calls)
        figures = {
            "wall_s": self.wall_s,
            "total_tok_s": (self.prompt_tokens + generated) / self.wall_s,
            "program_p50_s": percentile(self.program_s, 0.5),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "computed_tokens": self.prompt_tokens - self.cached_tokens,
            "hit_rate": self.cached_tokens / self.prompt_tokens,
        }
        if generated:
            times = [call.token_times for call in self.calls]
            first = [(seen[0] - call.asked_at) * 1e3 for call, seen in zip(self.calls, times, strict=True) if seen]
            gaps = [(b - a) * 1e3 for seen in times for a, b in pairwise(seen)]
            figures["generated_tok_s"] = generated / self.wall_s
            figures |= {"ttft_p50_ms": percentile(first, 0.5), "ttft_p99_ms": percentile(first, 0.99)}
            if gaps:  # answers of one token have none
                figures |= {"gap_p50_ms": percentile(gaps, 0.5), "gap_p99_ms": percentile(gaps, 0.99)}
        return figures

    def best_hit_rate(self) -> float:
        """Return the hit rate of a cache that never forgets: 1 - unique prompt tokens of the radix tree / all.

        What was generated is in the tree already when a later prompt repeats it.
        """
        root: dict[int, Any] = {}
        unique = 0
        for call in self.calls:
            for prompt in call.prompts:
                node = root
                for token in prompt:
                    if token not in node:
                        unique += 1
                        node[token] = {}
                    node = node[token]
                for token in call.answer[:-1]:
                    node = node.setdefault(token, {})
        return 1 - unique / self.prompt_tokens


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1e6) * len(ordered) // 1_000_000) - 1))]
