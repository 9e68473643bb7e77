"""`Branch`: the state of one program branch as the runtime holds it: token ids, text that waits, roles, queued work."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from bough.runtime.lifecycle import Life, moved
from bough.runtime.protocol import ErrorKind
from bough.runtime.text.tail import TextTail
from bough.runtime.token_log import TokenLog

if TYPE_CHECKING:
    from bough.runtime.brood import Brood
    from bough.runtime.operation import Operation


@dataclass(frozen=True, slots=True)
class Roles:
    """The messages begun so far, whether the last one is still open, and the definitions of the tools told of.

    is_joined: what comes before the next message was written with the end of the last.
    """

    names: tuple[str, ...] = ()
    is_open: bool = False
    tools: str = ""
    is_joined: bool = False


Healed: TypeAlias = "tuple[int, list[int], Healed | None]"
Seam: TypeAlias = "tuple[int, int, Seam | None]"


@dataclass(frozen=True, slots=True)
class Poison:
    """Why nothing that depends on a branch can be carried out: the operation that failed, and how."""

    op: int
    kind: ErrorKind
    message: str


class Branch:
    """One branch of a session. Operations run one at a time in the order received; `current` is the one in progress.

    marks: (token length, roles) wherever the roles changed, so that a rollback restores them.
    path: position in the tree of branches, (root id, child index, child index ...): the key of derived seeds.
    healed: (length, ids that came next, the one before) where tokens gave way to others that begin with their text, so
    that a rollback to before brings them back.
    seams: (length, bytes of the tail there, the one before) wherever something ended that no program wrote as text: a
    role, given tokens, what was drawn or selected. Only what comes after it may be drawn again.
    A branch is unborn, without log and tail, while the fork that makes it still waits for its parent.
    born_len: how many tokens it was forked off with.
    children: those that something was sent for; broods: the others.
    """

    log: TokenLog
    tail: TextTail

    __slots__ = (
        "_life",
        "born_len",
        "broods",
        "children",
        "current",
        "healed",
        "id",
        "log",
        "marks",
        "num_draws",
        "num_forked",
        "parent",
        "path",
        "pending",
        "poison",
        "roles",
        "seams",
        "tail",
    )

    def __init__(self, branch_id: int, path: tuple[int, ...]) -> None:
        self.id = branch_id
        self.path = path
        self.roles = Roles()
        self.marks: tuple[tuple[int, Roles], ...] = ()
        self.healed: Healed | None = None
        self.seams: Seam | None = None
        self.num_draws = 0
        self.num_forked = 0
        self.born_len = 0
        self._life = Life.UNBORN
        self.poison: Poison | None = None
        self.current: Operation | None = None
        self.pending: deque[Operation] = deque()
        self.parent: Branch | None = None
        self.children: dict[int, Branch] = {}
        self.broods: dict[Brood, None] = {}

    @property
    def is_born(self) -> bool:
        """Whether the branch has a text, and operations on it can be carried out."""
        return self._life is Life.LIVE

    @property
    def is_unborn(self) -> bool:
        """Whether the fork that makes the branch still waits for its parent."""
        return self._life is Life.UNBORN

    def release(self) -> None:
        """End the branch; it leaves the tree of branches."""
        self._life = moved(self._life, Life.RELEASED)
        self.detach()

    def begin(self, tail: TextTail) -> None:
        """Be born without a parent, with the given empty tail."""
        self.log = TokenLog()
        self.tail = tail
        self._life = moved(self._life, Life.LIVE)

    def inherit(self, parent: Branch) -> None:
        """Take over everything `parent` holds now. O(1) in the length of its text."""
        self.log = parent.log.fork()
        self.born_len = len(self.log)
        self.tail = parent.tail.copy()
        self.roles = parent.roles
        self.marks = parent.marks
        self.healed = parent.healed
        self.seams = parent.seams
        self.poison = parent.poison
        self._life = moved(self._life, Life.LIVE)

    def set_roles(self, roles: Roles) -> None:
        self.roles = roles
        self.marks = (*self.marks, (len(self.log), roles))

    def set_seam(self) -> None:
        """Note that what was appended last was not a program's text."""
        self.seams = (len(self.log), len(self.tail.pending.encode()), self.seams)

    def take_back(self, count: int) -> None:
        """Take the last `count` tokens off, which give way to others with their text."""
        length = len(self.log) - count
        self.healed = (length, self.log.array()[length:].tolist(), self.healed)
        self.log.truncate(length)

    @property
    def longest(self) -> int:
        """The most tokens that a rollback can ask for: those of now, or of before some gave way to others."""
        longest, healed = len(self.log), self.healed
        while healed is not None:
            kept, taken, healed = healed
            longest = max(longest, kept + len(taken))
        return longest

    def rollback(self, length: int, tail: TextTail) -> None:
        """Keep the first `length` tokens as they were then, and the roles; `tail` is the empty tail that follows.

        Heals a branch that failed after that point.
        """
        while self.healed is not None and length <= self.healed[0] + len(self.healed[1]):
            kept, taken, self.healed = self.healed
            self.log.truncate(kept)
            self.log.extend(taken)
        self.log.truncate(length)
        self.tail = tail
        while self.seams is not None and self.seams[0] > length:
            self.seams = self.seams[2]
        self.marks = tuple(mark for mark in self.marks if mark[0] <= length)
        self.roles = self.marks[-1][1] if self.marks else Roles()
        self.poison = None

    def descendants(self) -> list[Branch]:
        """This branch and everything forked from it that something was sent for, parents first."""
        found = [self]
        for branch in found:
            found.extend(branch.children.values())
        return found

    def detach(self) -> None:
        """Leave the tree of branches; children move up to the parent."""
        for child in self.children.values():
            child.parent = self.parent
        for brood in self.broods:
            brood.parent = self.parent
        if self.parent is not None:
            del self.parent.children[self.id]
            self.parent.children.update(self.children)
            self.parent.broods.update(self.broods)
        self.parent, self.children, self.broods = None, {}, {}
