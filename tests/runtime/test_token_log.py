"""Token logs: forks share, nobody sees another's changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.token_log import TokenLog
from bough.runtime.vector import IntVector

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 40), st.lists(st.integers(0, 9), max_size=5)),
        st.tuples(st.just("fork"), st.integers(0, 40), st.none()),
        st.tuples(st.just("truncate"), st.integers(0, 40), st.floats(0, 1)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS)
def test_every_log_holds_what_was_put_into_it_and_nothing_of_its_forks(actions: list[tuple[str, int, object]]) -> None:
    logs = [TokenLog()]
    expected: list[list[int]] = [[]]
    for action, which, value in actions:
        index = which % len(logs)
        if action == "extend":
            assert isinstance(value, list)
            logs[index].extend(value)
            expected[index] = expected[index] + value
        elif action == "fork":
            logs.append(logs[index].fork())
            expected.append(expected[index])
        else:
            assert isinstance(value, float)
            length = int(value * len(expected[index]))
            logs[index].truncate(length)
            expected[index] = expected[index][:length]
        for log, ids in zip(logs, expected, strict=True):
            assert log.array().tolist() == ids
            assert len(log) == len(ids)


def test_an_array_can_have_more_ids_after_it_and_is_a_copy() -> None:
    log = TokenLog()
    log.extend([1, 2])
    array = log.array([3], [4, 5])
    array[0] = 9
    assert array.tolist() == [9, 2, 3, 4, 5]
    assert log.array().tolist() == [1, 2]


def test_a_log_cannot_be_truncated_to_more_than_it_holds() -> None:
    with pytest.raises(AssertionError, match="cannot truncate 0 tokens to 1"):
        TokenLog().truncate(1)


def test_a_vector_grows_and_reads_like_a_list() -> None:
    vector = IntVector([1, 2])
    for value in range(100):
        vector.append(value)
    vector.extend([7, 8])
    assert len(vector) == 104
    assert vector.view().tolist() == [1, 2, *range(100), 7, 8]
    assert vector.view(1, 4).tolist() == [2, 0, 1]
    vector[0] = 5
    vector.truncate(2)
    assert vector.view().tolist() == [5, 2]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            vector[index]
