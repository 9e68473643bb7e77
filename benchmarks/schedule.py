"""Which workload runs next on which systems, so that a budget of seconds is spent on what matters most.

Everything runs once, headlines first; then headlines twice more, the paper's shapes again, and so on. What would not
end within what is left is left out, and said to be. A system that took many times as long as bough is not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from asks import Trace

_ROUNDS: Final = (
    *("headline", "paper", "sweep", "headline", "headline"),
    *("paper", "headline", "sweep", "paper", "headline"),
)
"""Kinds in the order they run; once through is up to five repetitions of a headline."""
_PROMPT_S: Final = 1 / 3000
_TOKEN_S: Final = 1 / 150
"""Seconds per prompt token and per generated one of a first guess, for a 30M model on two cores; pessimistic."""
FAR_BEHIND: Final = 8.0
"""A system that took this many times as long as bough is not repeated: its ratio needs no spread."""
CACHED_SHARE: Final = 0.35
"""Of a prompt's time, in a first guess for a system that caches."""


@dataclass
class Budget:
    """Seconds to spend. scale: how much slower than the 30M model; seen: seconds that (workload, system) took."""

    seconds: float
    now: Callable[[], float]
    scale: float = 1.0
    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._begun_at = self.now()

    def left(self) -> float:
        """Return the seconds left."""
        return self.seconds - (self.now() - self._begun_at)

    def expected(self, trace: Trace, system: str, caches: bool) -> float:
        """Return how long a run will take: what it took, or a guess."""
        share = CACHED_SHARE if caches else 1.0
        guess = trace.num_prompt_tokens() * _PROMPT_S * share + trace.num_generated() * _TOKEN_S
        return self.seen.get((trace.name, system), guess * self.scale)

    def fits(self, trace: Trace, systems: Sequence[str], caching: frozenset[str]) -> list[str]:
        """Return the systems, in their order of importance, that can run the trace within what is left."""
        left, chosen = self.left(), []
        for system in systems:
            expected = self.expected(trace, system, system in caching)
            if expected <= left:
                left -= expected
                chosen.append(system)
        return chosen


def worth_repeating(seen: Mapping[tuple[str, str], float], trace: Trace, system: str, reference: str) -> bool:
    """Return whether the system was near enough to the reference to be measured again."""
    took, ours = seen.get((trace.name, system)), seen.get((trace.name, reference))
    return took is None or ours is None or took <= FAR_BEHIND * ours


def order(traces: Sequence[Trace], most: int | None = None) -> Iterator[tuple[Trace, int]]:
    """Yield each workload with its repetition's number, from 0, in the order to run; each at most `most` times.

    most None: as often as the rounds have its kind.
    """
    limit = math.inf if most is None else most
    done: dict[str, int] = {}
    kinds = _ROUNDS if most is None else (*_ROUNDS, *("headline", "paper", "sweep") * most)
    for kind in kinds:
        for trace in traces:
            if trace.kind == kind and done.get(trace.name, 0) < limit:
                yield trace, done.get(trace.name, 0)
                done[trace.name] = done.get(trace.name, 0) + 1


def in_turn(systems: Sequence[str], repetition: int) -> list[str]:
    """Return the systems in the order of that repetition: every other one runs backwards."""
    return list(systems) if repetition % 2 == 0 else list(reversed(systems))


def missing(why: Mapping[str, str], name: str) -> str:
    """Return why a system has no figures."""
    return why.get(name, "skipped: budget")
