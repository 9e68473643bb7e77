"""A step is planned from the last one's units, and always as if it were the first."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.kernels import unit_planner
from bough.kernels.layout import PagedLayout
from bough.kernels.unit_planner import UnitPlanner
from bough.kernels.units import CHUNK, Units, plan_units


@dataclasses.dataclass
class Sequence:
    """Pages (ids), tokens, and how many of them are new in the next step."""

    pages: list[int]
    length: int
    num_new: int = 1


class Tree:
    """Sequences that grow, fork, join and leave, over pages nobody else has."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.sequences: list[Sequence] = []
        self._next_page = 0

    def join(self, length: int, num_new: int = 1) -> None:
        """Add a sequence of new pages."""
        self.sequences.append(Sequence([], 0))
        self.grow(-1, length)
        self.sequences[-1].num_new = min(num_new, length)

    def fork(self, index: int, length: int) -> None:
        """Add a sequence that has the whole pages of another's first `length` tokens."""
        parent = self.sequences[index]
        length = min(length, parent.length)
        self.sequences.append(Sequence(parent.pages[: length // self.page_size], 0))
        self.grow(-1, length + 1)

    def grow(self, index: int, num_new: int) -> None:
        """Add tokens to a sequence, and the pages they need."""
        sequence = self.sequences[index]
        sequence.length, sequence.num_new = sequence.length + num_new, num_new
        for _ in range(-(-sequence.length // self.page_size) - len(sequence.pages)):
            sequence.pages.append(self._next_page)
            self._next_page += 1

    def step(self) -> None:
        """Let every sequence decode one token."""
        for index in range(len(self.sequences)):
            self.grow(index, 1)

    def layout(self) -> PagedLayout:
        """Return the layout of the step that computes the new tokens."""
        num_new = [sequence.num_new for sequence in self.sequences]
        return PagedLayout(
            qo_indptr=np.cumsum([0, *num_new]).astype(np.int32),
            kv_indptr=np.cumsum([0, *(len(sequence.pages) for sequence in self.sequences)]).astype(np.int32),
            kv_indices=np.concatenate([sequence.pages for sequence in self.sequences]).astype(np.int32),
            kv_lens=np.array([sequence.length for sequence in self.sequences], dtype=np.int32),
            is_decode=np.array(num_new) == 1,
            page_size=self.page_size,
        )


class Counted:
    """A planner whose every answer is compared with the definition's."""

    def __init__(self) -> None:
        self._planner = UnitPlanner()
        self.num_made = 0

    def plan(self, layout: PagedLayout, *, share: bool = True) -> Units:
        """Plan a step; count it if the units were made anew."""
        with mock.patch.object(unit_planner, "plan_units", wraps=plan_units) as made:
            units = self._planner.plan(layout, share=share)
        self.num_made += made.call_count
        fresh = plan_units(layout, share=share)
        for field in dataclasses.fields(Units):
            found, expected = getattr(units, field.name), getattr(fresh, field.name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, err_msg=field.name)
        return units


def forked(page_size: int, width: int, prefix: int, own: int) -> Tree:
    tree = Tree(page_size)
    tree.join(prefix + own)
    for _ in range(width - 1):
        tree.fork(0, prefix)
    for sequence, index in zip(tree.sequences[1:], range(1, width), strict=True):
        tree.grow(index, prefix + own - sequence.length)
        sequence.num_new = 1
    tree.sequences[0].num_new = 1
    return tree


def test_a_decode_is_planned_once_for_each_chunk_and_pages_move_in_between() -> None:
    tree, planner = forked(16, 4, 256, 1), Counted()
    for _ in range(CHUNK - 1):
        planner.plan(tree.layout())
        tree.step()
    assert planner.num_made == 1
    planner.plan(tree.layout())  # the second chunk is whole now
    assert planner.num_made == 2
    tree.step()
    planner.plan(tree.layout())  # and a third one begun
    assert planner.num_made == 3


def test_a_page_in_another_place_of_a_whole_chunk_is_another_tree_and_in_the_last_chunk_it_is_not() -> None:
    tree, planner = forked(16, 2, 256, 20), Counted()
    assert planner.plan(tree.layout()).num_shared == 1
    tree.sequences[1].pages[-1] = 1_000
    assert planner.plan(tree.layout()).num_shared == 1
    assert planner.num_made == 1
    tree.sequences[1].pages[0] = 1_001
    assert planner.plan(tree.layout()).num_shared == 0
    assert planner.num_made == 2


def test_an_earlier_steps_units_stay_what_they_were() -> None:
    tree, planner = forked(16, 3, 256, 16), Counted()
    earlier = planner.plan(tree.layout())
    copy = earlier.fields.copy()
    tree.step()  # every sequence gets a page
    later = planner.plan(tree.layout())
    assert planner.num_made == 1
    assert (later.fields[:, 0] != copy[:, 0]).any()
    np.testing.assert_array_equal(earlier.fields, copy)


def test_a_prefills_queries_are_cut_anew_where_it_has_come_further_in_its_chunk() -> None:
    planner = Counted()
    for length in (130, 200):  # both end in the second chunk
        tree = Tree(16)
        tree.join(length, num_new=100)
        planner.plan(tree.layout())
    assert planner.num_made == 2


def test_the_same_pages_of_another_size_are_another_tree() -> None:
    tree, planner = forked(64, 2, 256, 20), Counted()
    planner.plan(tree.layout())
    for page_size in (128, 48, 64):
        planner.plan(dataclasses.replace(tree.layout(), page_size=page_size))
    assert planner.num_made == 4


changes = st.lists(
    st.one_of(
        st.just(("step",)),
        st.just(("again",)),
        st.tuples(st.just("join"), st.sampled_from([1, 100, 127, 128, 300, 513]), st.sampled_from([1, 1, 2, 70, 200])),
        st.tuples(st.just("fork"), st.integers(0, 9), st.integers(1, 600)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("swap"), st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("prefill"), st.integers(0, 9), st.sampled_from([2, 64, 100, 128])),
        st.tuples(st.just("repage"), st.integers(0, 9), st.integers(0, 40)),
        st.tuples(st.just("draft"), st.integers(0, 9), st.integers(1, 5)),
        st.tuples(st.just("share"), st.booleans()),
    ),
    max_size=12,
)


@given(st.sampled_from([1, 16, 48, 64, 128, 256]), changes)
@settings(deadline=None, max_examples=150)
def test_every_step_is_planned_as_the_definition_says(page_size: int, changes: list[tuple[str, int, int]]) -> None:
    tree, planner, share = forked(page_size, 3, 256, 10), Counted(), True
    planner.plan(tree.layout())
    for kind, *numbers in changes:
        index = numbers[0] % len(tree.sequences) if numbers else 0
        if kind == "step":
            tree.step()
        elif kind == "join":
            tree.join(*numbers)
        elif kind == "fork":
            tree.fork(index, numbers[1])
        elif kind == "leave" and len(tree.sequences) > 1:
            del tree.sequences[index]
        elif kind == "swap":
            other = numbers[1] % len(tree.sequences)
            tree.sequences[index], tree.sequences[other] = tree.sequences[other], tree.sequences[index]
        elif kind == "prefill":
            tree.grow(index, numbers[1])
        elif kind == "draft":  # several queries where there was one, and no more tokens
            tree.sequences[index].num_new = min(numbers[1], tree.sequences[index].length)
        elif kind == "repage":
            pages = tree.sequences[index].pages
            pages[numbers[1] % len(pages)] = 100_000 + numbers[1]
        elif kind == "share":
            share = bool(numbers[0])
        planner.plan(tree.layout(), share=share)
