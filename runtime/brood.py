"""`Brood` and `Branches`: a session's branches, of which those of a fork exist only once something is sent for them.

A fork into n children costs one object and one dictionary entry per child; measured for 64 children, a `Branch` object
for each took 148 µs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bough.runtime.branch import Branch


class Brood:
    """The children of one fork that nothing was sent for yet.

    heritage: what they all hold, once their parent got to the fork; they are unborn until then.
    early: those that were parted from the brood while unborn.
    """

    __slots__ = ("_early", "_first", "_heritage", "_ids", "_num_left", "_path", "_places", "parent")

    def __init__(self, parent: Branch, ids: Sequence[int]) -> None:
        self.parent: Branch | None = parent
        self._path = parent.path
        self._first = parent.num_forked
        self._ids = ids
        self._num_left = len(ids)
        self._places: dict[int, int] | None = None
        self._heritage: Branch | None = None
        self._early: list[Branch] = []
        parent.num_forked += len(ids)
        parent.broods[self] = None

    @property
    def is_born(self) -> bool:
        """Whether the children have a text."""
        return self._heritage is not None

    def bear(self, heritage: Branch) -> list[Branch]:
        """Give all children what `heritage`, which nobody else uses, holds; return those that may have work waiting."""
        assert self._heritage is None, "a brood is born once"
        self._heritage = heritage
        early, self._early = [child for child in self._early if child.is_unborn], []
        for child in early:
            child.inherit(heritage)
        return early

    def part(self, branch_id: int) -> Branch:
        """Make a child a branch of its own."""
        if self._places is None:
            self._places = {child: place for place, child in enumerate(self._ids)}
        branch = Branch(branch_id, (*self._path, self._first + self._places[branch_id]))
        branch.parent = self.parent
        if self.parent is not None:
            self.parent.children[branch_id] = branch
        if self._heritage is None:
            self._early.append(branch)
        else:
            branch.inherit(self._heritage)
        self.lose()
        return branch

    def lose(self) -> None:
        """Count one child less; the last one takes the brood out of its parent."""
        self._num_left -= 1
        if self._num_left == 0 and self.parent is not None:
            del self.parent.broods[self]
            self.parent = None


class Branches(Mapping[int, Branch]):
    """A session's branches by id. To look a branch up makes it one, if it was part of a brood."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[int, Branch | Brood] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __contains__(self, branch_id: object) -> bool:
        return branch_id in self._entries

    def __getitem__(self, branch_id: int) -> Branch:
        """Return a branch. Raises KeyError."""
        entry = self._entries[branch_id]
        if isinstance(entry, Brood):
            entry = self._entries[branch_id] = entry.part(branch_id)
        return entry

    def add(self, branch: Branch) -> None:
        """Take a new branch in."""
        self._entries[branch.id] = branch

    def add_brood(self, parent: Branch, ids: Sequence[int]) -> Brood:
        """Take the children of a fork in, whose ids are new and distinct."""
        brood = Brood(parent, ids)
        self._entries.update(dict.fromkeys(ids, brood))
        return brood

    def has_any(self, ids: Sequence[int]) -> bool:
        """Whether one of the ids is taken."""
        return not self._entries.keys().isdisjoint(ids)

    def touched(self) -> list[Branch]:
        """Every branch that something was ever sent for, oldest first."""
        return [entry for entry in self._entries.values() if isinstance(entry, Branch)]

    def drop_untouched(self, branch_id: int) -> bool:
        """Take a branch out if it is born and nothing was ever sent for it; True if so."""
        entry = self._entries.get(branch_id)
        if not isinstance(entry, Brood) or not entry.is_born:
            return False
        del self._entries[branch_id]
        entry.lose()
        return True

    def remove(self, branch: Branch) -> None:
        """Take a branch out."""
        del self._entries[branch.id]

    def clear(self) -> None:
        """Take out whatever is left."""
        self._entries.clear()
