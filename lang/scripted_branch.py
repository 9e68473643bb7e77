"""What a branch of a `ScriptedBackend` holds: text in words, where it was forked, what has been computed of it."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, TypeAlias

from bough.errors import BoughError
from bough.script import words_of


class _Piece(NamedTuple):
    """Text that was appended at once, and its role. is_fixed: nothing in it can change the words before it."""

    text: str
    role: str | None
    is_fixed: bool


_Above: TypeAlias = "tuple[_Above | None, list[_Piece], int]"
"""What a branch inherits: the same of its parent, and the parent's first so many pieces."""


class ScriptedBranch:
    """What a branch holds: the text since its fork, and where that was."""

    __slots__ = (
        "above",
        "error",
        "is_committed",
        "is_orphan",
        "length",
        "origin",
        "parent",
        "parent_words",
        "pieces",
        "read",
        "role",
    )

    def __init__(self, parent: ScriptedBranch | None) -> None:
        self.parent = self.origin = parent  # a branch that was cut back has the whole text itself, but is no orphan
        self.parent_words = self.length = self.read = 0
        self.above: _Above | None = None
        self.pieces: list[_Piece] = []
        self.is_orphan = False  # forked off a branch that was not there
        self.is_committed = False  # whether what is appended next cannot change the words before it
        self.role: str | None = None
        self.error: BoughError | None = None

    def inherit(self) -> None:
        """Take what the parent holds now: lengths are in words, `read` is how many of them a call has computed."""
        assert self.parent is not None, "only a fork inherits"
        self.above = (self.parent.above, self.parent.pieces, len(self.parent.pieces))
        self.parent_words = self.length = self.parent.length
        self.role = self.parent.role
        self.error = self.error or self.parent.error

    def whole(self) -> str:
        """Return the text from the root of the tree on."""
        return "".join([piece.text for piece in self.all_pieces()])

    def cached(self) -> int:
        """Return how many words earlier calls have computed, here or on the branches that share them."""
        shared = 0 if self.parent is None else min(self.parent.cached(), self.parent_words)
        return min(max(self.read, shared), self.length)

    def compute(self) -> None:
        """Count everything up to here as computed, for all that share it."""
        self.read = self.length
        above = self
        while above.parent is not None:
            above.parent.read = max(above.parent.read, above.parent_words)
            above = above.parent

    def append(self, text: str, *, is_drawn: bool = False) -> None:
        """Append text."""
        self.pieces.append(_Piece(text, self.role, is_drawn or self.is_committed))
        self.is_committed = False
        self.length += len(text.split())

    def all_pieces(self) -> list[_Piece]:
        """Return the pieces from the root of the tree on."""
        parts, above = [self.pieces], self.above
        while above is not None:
            above, pieces, length = above
            parts.append(pieces[:length])
        return [piece for part in reversed(parts) for piece in part]

    def cut(self, length: int) -> None:
        """Keep the first `length` words and the role there. Of a text without words there, what is fixed before it."""
        pieces = self.all_pieces()
        ends = [0, *accumulate(len(piece.text.split()) for piece in pieces)]
        places = [place for place, end in enumerate(ends) if end == length]
        fixed = [place for place in places if place < len(pieces) and pieces[place].is_fixed]
        if places:
            kept = pieces[: (fixed or places)[-1]]
        else:
            inside = sum(end < length for end in ends) - 1
            words = words_of(pieces[inside].text)[: length - ends[inside]]
            kept = [*pieces[:inside], pieces[inside]._replace(text="".join(words))]
        self.read = min(self.cached(), length)
        self.role = kept[-1].role if kept else None
        self.parent = self.above = self.error = None
        self.pieces, self.length = kept, length
