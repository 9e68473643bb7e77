"""Where the branches of a run are: paths that are the same whenever the program does the same."""

from __future__ import annotations

from collections.abc import Sequence

from bough.backend import Branch
from bough.seeds import Path


class Place:
    """Where a branch is in its run, and what was counted on it."""

    __slots__ = ("num_children", "num_ops", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_children = self.num_ops = 0


class Places:
    """The places of a run's branches. The first root is (), each further one has a number below 0."""

    def __init__(self) -> None:
        self._places: dict[Branch, Place] = {}
        self._num_roots = 0

    def open(self, branch: Branch) -> None:
        """Give an empty branch its place."""
        self.put(branch, () if not self._num_roots else (-self._num_roots,))
        self._num_roots += 1

    def fork(self, place: Place, children: Sequence[Branch]) -> list[Path]:
        """Give the branches forked off a place theirs; return their paths."""
        paths = [(*place.path, place.num_children + number) for number in range(len(children))]
        place.num_children += len(children)
        for child, path in zip(children, paths, strict=True):
            self.put(child, path)
        return paths

    def put(self, branch: Branch, path: Path) -> Place:
        """Give a branch this place."""
        place = self._places[branch] = Place(path)
        return place

    def get(self, branch: Branch | None) -> Place | None:
        """Return a branch's place; None for one that has none, or none any more."""
        return None if branch is None else self._places.get(branch)

    def forget(self, branches: Sequence[Branch]) -> None:
        """Forget where branches were."""
        for branch in branches:
            self._places.pop(branch, None)
