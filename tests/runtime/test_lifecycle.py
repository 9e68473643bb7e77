"""The lives of operations, sequences, branches and pages: only what the tables say can happen."""

from __future__ import annotations

import enum
from itertools import product

import numpy as np
import pytest

from bough.runtime.branch import Branch
from bough.runtime.cache.page_allocator import PageAllocator
from bough.runtime.lifecycle import LEGAL, Life, PageState, Progress, Status, moved
from bough.runtime.operation import Operation
from bough.runtime.protocol import Ok, SamplingParams, Stat
from bough.runtime.sequence import Sequence
from bough.runtime.session import Session

KINDS: list[type[enum.Enum]] = [Progress, Status, Life, PageState]
ENDS = {Progress.ENDED, Status.FINISHED, Life.RELEASED}


def test_every_state_has_a_row_and_transitions_stay_within_a_kind() -> None:
    assert set(LEGAL) == {state for kind in KINDS for state in kind}
    assert all(type(new) is type(old) for old, targets in LEGAL.items() for new in targets)


def test_ends_are_final_and_everything_else_can_end() -> None:
    assert {state for state, targets in LEGAL.items() if not targets} == ENDS
    for old, targets in LEGAL.items():
        ends = {end for end in ENDS if type(end) is type(old)}
        assert old in ends or ends <= targets or isinstance(old, PageState)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_table_does_not_name_is_refused(kind: type[enum.Enum]) -> None:
    for old, new in product(kind, kind):
        if new in LEGAL[old]:
            assert moved(old, new) is new
        else:
            with pytest.raises(AssertionError, match=f"cannot go from {old.value} to {new.value}"):
                moved(old, new)


def test_an_operation_ends_once() -> None:
    session = Session(b"me", "local", "test", 0.0)
    operation = Operation(1, session, Stat(op=1), (), 0.0)
    operation.end(Ok(op=1))
    with pytest.raises(AssertionError, match="ended twice"):
        operation.end(Ok(op=1))
    with pytest.raises(AssertionError, match="cannot go from ended to running"):
        operation.progress = Progress.RUNNING


def test_a_sequence_that_finished_cannot_run() -> None:
    sequence = Sequence(np.array([1], dtype=np.int32), params=SamplingParams())
    sequence.status = Status.FINISHED
    with pytest.raises(AssertionError, match="cannot go from finished to running"):
        sequence.status = Status.RUNNING


def test_a_branch_is_born_once_and_released_once() -> None:
    branch = Branch(1, (1,))
    branch.release()
    with pytest.raises(AssertionError, match="cannot go from released"):
        branch.release()


def test_a_page_released_while_a_step_is_in_flight_is_free_only_when_that_step_has_retired() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    assert pages is not None
    allocator.begin_step()
    allocator.release(pages)
    assert [allocator.state(page) for page in pages] == [PageState.LIMBO] * 2
    assert allocator.num_free == 0
    assert allocator.allocate(1) is None
    allocator.check()
    allocator.retire_step()
    assert [allocator.state(page) for page in pages] == [PageState.FREE] * 2
    assert allocator.allocate(2) is not None


def test_of_two_steps_in_flight_the_newer_one_frees_what_was_released_last() -> None:
    allocator = PageAllocator(3)
    first, second, third = allocator.allocate(3) or []
    allocator.begin_step()
    allocator.release([first])
    allocator.begin_step()
    allocator.release([second])
    allocator.check()
    free = []
    for _ in range(3):
        allocator.retire_step()
        allocator.check()
        free.append([allocator.state(page) is PageState.FREE for page in (first, second, third)])
    assert free == [[True, False, False], [True, True, False], [True, True, False]]
