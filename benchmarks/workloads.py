"""What the benchmarks ask for: seeded programs, described once and carried out by each system in its own way.

A program is a tuple of pieces. Text is made of words that are one token each (models.py). The shapes:

few-shot     many short questions behind one long prefix that all share: the case a prefix cache is for
fork         one long prefix, 32 branches with a little text of their own, all decoding at once
multi-turn   chats that grow by a user's text and an answer each turn; nothing is shared between chats
select       the likeliest of four answers to questions behind a shared prefix
random       prompts without anything in common: what a prefix cache costs where it cannot help
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

from models import words


@dataclass(frozen=True)
class Text:
    """Append text."""

    text: str


@dataclass(frozen=True)
class Gen:
    """Append exactly `num_tokens` greedy tokens, end-of-text or not."""

    num_tokens: int


@dataclass(frozen=True)
class Select:
    """Append the likeliest of the choices, by log-probability per token."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class Fork:
    """Carry out each branch, a text and its answer, after what came before. The last piece of a program."""

    branches: tuple[tuple[Text, Gen], ...]


Piece: TypeAlias = Text | Gen | Select | Fork
Program: TypeAlias = tuple[Piece, ...]


@dataclass(frozen=True)
class Workload:
    """Programs, how many of them run at once, and what they look like."""

    name: str
    shape: str
    programs: tuple[Program, ...]
    concurrency: int


class Writer:
    """Writes seeded text of an exact number of tokens."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._words = words()

    def text(self, num_tokens: int) -> str:
        """Return `num_tokens` words, each with the space before it."""
        return "".join(self._random.choices(self._words, k=num_tokens))


def few_shot(prefix: int, questions: int, question: int = 24, answer: int = 8) -> Workload:
    """Many short questions behind one prefix."""
    writer = Writer(1)
    shared = writer.text(prefix)
    programs = tuple((Text(shared + writer.text(question)), Gen(answer)) for _ in range(questions))
    shape = f"{questions} × ({prefix} shared + {question}) → {answer}"  # noqa: RUF001
    return Workload("few-shot", shape, programs, concurrency=32)


def fork(prefix: int, width: int = 32, own: int = 32, answer: int = 64) -> Workload:
    """One program that forks `width` ways after a long prefix."""
    writer = Writer(2)
    branches = tuple((Text(writer.text(own)), Gen(answer)) for _ in range(width))
    program: Program = (Text(writer.text(prefix)), Fork(branches))
    return Workload("fork", f"{width} × ({prefix} shared + {own}) → {answer}", (program,), concurrency=1)  # noqa: RUF001


def multi_turn(chats: int, turns: int, user: int = 64, answer: int = 32) -> Workload:
    """Chats of several turns; a turn's prompt is all that was said before."""
    writer = Writer(3)
    programs = tuple(
        tuple(piece for _ in range(turns) for piece in (Text(writer.text(user)), Gen(answer))) for _ in range(chats)
    )
    shape = f"{chats} chats × {turns} turns × ({user} → {answer})"  # noqa: RUF001
    return Workload("multi-turn", shape, programs, concurrency=chats)


def select(prefix: int, questions: int, question: int = 24, choices: int = 4, choice: int = 4) -> Workload:
    """A choice between answers, question by question, behind one prefix."""
    writer = Writer(4)
    shared = writer.text(prefix)
    programs = tuple(
        (Text(shared + writer.text(question)), Select(tuple(writer.text(choice) for _ in range(choices))))
        for _ in range(questions)
    )
    shape = f"{questions} × ({prefix} shared + {question}) → best of {choices} × {choice}"  # noqa: RUF001
    return Workload("select", shape, programs, concurrency=16)


def unshared(prompts: int, prompt: int, answer: int = 32, seed: int = 5) -> Workload:
    """Random prompts: no two begin with the same token in practice."""
    writer = Writer(seed)
    programs = tuple((Text(writer.text(prompt)), Gen(answer)) for _ in range(prompts))
    return Workload("random", f"{prompts} × {prompt} → {answer}", programs, concurrency=prompts)  # noqa: RUF001


def all_workloads(quick: bool) -> list[Workload]:
    """Return the five shapes, at full or at small size."""
    if quick:
        return [few_shot(256, 8), fork(256, 8, answer=16), multi_turn(2, 3), select(256, 4), unshared(4, 128, 16)]
    return [few_shot(1024, 48), fork(1024), multi_turn(8, 6), select(1024, 12), unshared(16, 512)]
