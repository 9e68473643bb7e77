"""`Constraint`: which tokens a generation may draw next. It belongs to its sequence and goes where that goes.

    constraint.fill(words)                before a draw: the mask
    tokens = constraint.advance(drawn)    after it: the token, and those that have to follow

A preempted sequence keeps its constraint, for it depends on the tokens, not on their KV.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint32]
"""(ceil(vocab_size / 32),) uint32: bit i % 32 of word i // 32 says whether token i is allowed."""


class Constraint(Protocol):
    """What the sampler and the sequence need to know. is_ended: nothing may follow. is_free: anything may.

    num_forced: how many of the tokens so far were not drawn.
    """

    is_ended: bool
    is_free: bool
    num_forced: int

    def fill(self, words: Words, forbidden: tuple[int, ...] = ()) -> None:
        """Write the mask of the next draw; `forbidden` ids are left out where that leaves anything."""
        ...

    def begin(self) -> list[int]:
        """Return the tokens that have to come first; once, before anything else."""
        ...

    def advance(self, token: int) -> list[int]:
        """Take a drawn token in; return what to append: the token, then what it forces."""
        ...


def leave_out(words: Words, ids: tuple[int, ...]) -> None:
    """Clear the bits of `ids`, unless nothing would be left."""
    if not ids:
        return
    cleared = words.copy()
    for token in ids:
        cleared[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
    if cleared.any():
        words[:] = cleared
