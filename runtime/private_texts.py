"""What only a branch and its descendants have computed since its fork: the part of the cache that it may take along."""

from __future__ import annotations

from collections.abc import Sequence

from bough.runtime.branch import Branch
from bough.runtime.operation import Operation
from bough.runtime.vector import IntArray, common_prefix


def private_texts(start: Branch, doomed: Sequence[Operation]) -> list[tuple[IntArray, int]]:
    """Return the texts of a branch and its descendants, and how many leading tokens of each others use too.

    Those are what the branch was forked off with, and what a sibling happens to have in common with it. doomed: the
    operations on them, whose running sequences have texts of their own.
    """
    if not start.is_born:
        return []
    born_len = start.born_len
    siblings = start.parent.children.values() if start.parent is not None else ()
    others = [other.log.since(born_len) for other in siblings if other is not start and other.is_born]
    running = [sequence.tokens.view() for op in doomed if op.work is not None for sequence in op.work.sequences]
    logs = [branch.log.array() for branch in reversed(start.descendants()) if branch.is_born]
    return [
        (text.copy(), born_len + max((common_prefix(other, text[born_len:]) for other in others), default=0))
        for text in (*running, *logs)
    ]
