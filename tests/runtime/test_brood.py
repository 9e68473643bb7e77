"""A fork's children are one object until something is sent for one of them."""

from __future__ import annotations

import pytest
from oracle import TOKENIZER

from bough.runtime.branch import Branch
from bough.runtime.brood import Branches
from bough.runtime.text.tail import TextTail


def live_branch(branch_id: int) -> Branch:
    branch = Branch(branch_id, (branch_id,))
    branch.begin(TextTail(TOKENIZER))
    branch.log.extend([5, 6, 7])
    return branch


def heritage_of(parent: Branch) -> Branch:
    heritage = Branch(parent.id, parent.path)
    heritage.inherit(parent)
    return heritage


def family(*children: int) -> tuple[Branches, Branch]:
    branches, parent = Branches(), live_branch(1)
    branches.add(parent)
    branches.add_brood(parent, children).bear(heritage_of(parent))
    return branches, parent


def test_a_child_becomes_a_branch_when_it_is_looked_up_and_stays_the_same_one() -> None:
    branches, parent = family(2, 3, 4)
    assert branches.touched() == [parent]
    child = branches[3]
    assert branches[3] is child
    assert child.log.array().tolist() == [5, 6, 7]
    assert branches.touched() == [parent, child]


def test_paths_count_all_the_children_of_a_branch_in_the_order_of_its_forks() -> None:
    branches, parent = family(9, 4)
    branches.add_brood(parent, [7]).bear(heritage_of(parent))
    assert branches[7].path == (1, 2)
    assert (branches[9].path, branches[4].path) == ((1, 0), (1, 1))


def test_a_child_holds_what_its_parent_held_at_the_fork_however_late_it_is_looked_up() -> None:
    branches, parent = family(2, 3)
    branches[2].log.extend([8])
    parent.log.extend([9, 9])
    assert branches[3].log.array().tolist() == [5, 6, 7]


def test_a_child_sent_for_before_the_fork_was_carried_out_is_born_with_the_others() -> None:
    branches, parent = Branches(), live_branch(1)
    branches.add(parent)
    brood = branches.add_brood(parent, [2, 3])
    early = branches[2]
    assert early.is_unborn
    assert brood.bear(heritage_of(parent)) == [early]
    assert early.is_born
    assert branches[3].is_born


def test_an_untouched_child_is_dropped_without_becoming_a_branch_and_only_once_it_is_born() -> None:
    branches, parent = Branches(), live_branch(1)
    branches.add(parent)
    brood = branches.add_brood(parent, [2, 3])
    assert not branches.drop_untouched(2), "a release of an unborn branch waits for its turn"
    brood.bear(heritage_of(parent))
    assert branches.drop_untouched(2)
    assert 2 not in branches
    assert not branches.drop_untouched(1)
    assert branches.drop_untouched(3)
    assert not parent.broods, "nothing refers to a brood that is gone"


@pytest.mark.parametrize("is_touched", [True, False])
def test_the_children_of_a_released_branch_move_up(is_touched: bool) -> None:
    branches, parent = family(2)
    middle = branches[2]
    branches.add_brood(middle, [3]).bear(heritage_of(middle))
    if is_touched:
        assert branches[3].parent is middle
    branches.remove(middle)
    middle.release()
    assert branches[3].parent is parent
    assert parent.descendants() == [parent, branches[3]]
    assert branches[3].path == (1, 0, 0)
