"""What the suite's systems are asked: workloads of programs, programs of requests.

No import beyond the standard library: peers that live in an environment of their own (hosting.py) read these too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """One request. parts: its prompt, ids or the place of the ask whose answer goes there; after: places of asks.

    num_tokens: how many greedy tokens to generate, end of text or not. choices: instead, which of these is likeliest,
    by log-probability per token.
    """

    parts: tuple[Ids | int, ...]
    num_tokens: int = 0
    choices: tuple[Ids, ...] = ()
    after: tuple[int, ...] = ()

    def prompt(self, answers: Mapping[int, Sequence[int]]) -> list[int]:
        """Return the prompt's ids, given the answers to the asks before."""
        return [token for part in self.parts for token in (answers[part] if isinstance(part, int) else part)]


Program: TypeAlias = tuple[Ask, ...]


@dataclass(frozen=True)
class Trace:
    """A workload. kind: "headline", "paper" or "sweep", in order of importance; concurrency: programs at once.

    width, prefix: of a fork, else 0.
    """

    name: str
    shape: str
    kind: str
    programs: tuple[Program, ...]
    concurrency: int
    width: int = 0
    prefix: int = 0

    @property
    def selects(self) -> bool:
        """Whether it asks for choices."""
        return any(ask.choices for program in self.programs for ask in program)

    def num_prompt_tokens(self) -> int:
        """Return the tokens of all prompts; a select's count once per choice."""
        return sum(_length(program, ask) for program in self.programs for ask in program)

    def num_generated(self) -> int:
        """Return the tokens that all asks generate."""
        return sum(ask.num_tokens for program in self.programs for ask in program)


def _length(program: Program, ask: Ask) -> int:
    prompt = sum(program[part].num_tokens if isinstance(part, int) else len(part) for part in ask.parts)
    return sum(prompt + len(choice) - 1 for choice in ask.choices) if ask.choices else prompt
