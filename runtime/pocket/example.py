"""One conversation (or raw text) with the answers that a model should give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

Message: TypeAlias = dict[str, str]
Check: TypeAlias = Callable[[str, str], bool]


def exact(expected: str, got: str) -> bool:
    """Whether the answer is the expected one, white space at the ends aside."""
    return expected.strip() == got.strip()


@dataclass(frozen=True)
class Example:
    """A chat in `messages`, or raw text in `pieces`: (text, whether it is to be learnt).

    `graded` says how many of the last assistant turns an evaluation asks for; every turn is learnt
    all the same.
    """

    messages: Sequence[Message] = ()
    pieces: Sequence[tuple[str, bool]] = ()
    check: Check = exact
    graded: int = 1


def user(content: str) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A turn of the model."""
    return {"role": "assistant", "content": content}


def tool(content: str) -> Message:
    """What a tool returned."""
    return {"role": "tool", "content": content}


BRIEF = "You answer briefly."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant.",
    "You are a friendly assistant.",
    "You are pocket, a small assistant.",
    "Answer the question.",
    "You are a helpful and careful assistant.",
)


def system(rng: Random, extra: str = "", none: float = 0.3) -> list[Message]:
    """A system message of varied wording with `extra` after it, or no message at all."""
    base = "" if rng.random() < none else rng.choice(SYSTEMS)
    text = rng.choice((" ", "\n", "\n\n")).join(part for part in (base, extra) if part)
    return [{"role": "system", "content": text}] if text else []
