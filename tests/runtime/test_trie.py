"""The token trie of some choices: every different token once, and what each one attends to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bough.runtime.trie import PREFILL_RUN, ROOT, TokenTrie, segments

CHOICE = st.lists(st.integers(0, 2), min_size=1, max_size=5)
LONG = st.tuples(CHOICE, st.integers(1, 12)).map(lambda pair: pair[0] * pair[1])
CHOICES = st.lists(st.one_of(CHOICE, LONG), min_size=1, max_size=12)


def path_of(trie: TokenTrie, node: int) -> list[int]:
    """The tokens from below the root to a node."""
    return [int(trie.tokens[n]) for n in (*reversed(trie.ancestors(node)), node)]


@given(CHOICES)
def test_what_choices_share_is_there_once(choices: list[list[int]]) -> None:
    trie = TokenTrie(choices)
    prefixes = {tuple(choice[:end]) for choice in choices for end in range(1, len(choice) + 1)}
    followed = {prefix[:-1] for prefix in prefixes if len(prefix) > 1}
    assert trie.num_nodes == len(prefixes)
    assert sorted(map(tuple, (path_of(trie, node) for node in range(len(trie))))) == sorted(followed)
    assert trie.num_levels == max(map(len, choices)) - 1


@given(CHOICES)
def test_parents_come_first_and_depths_count_them(choices: list[list[int]]) -> None:
    trie = TokenTrie(choices)
    for node, parent in enumerate(trie.parents.tolist()):
        assert ROOT <= parent < node
        assert trie.depths[node] == len(trie.ancestors(node))
        run = list(range(int(trie.run_starts[node]), node + 1))
        assert all(trie.parents[after] == before for before, after in pairwise(run))


@given(CHOICES)
def test_each_choice_gets_the_values_of_its_own_nodes(choices: list[list[int]]) -> None:
    trie = TokenTrie(choices)
    values = np.zeros(trie.num_nodes)
    for edge, (parent, token) in enumerate(zip(trie.edge_parents.tolist(), trie.edge_tokens.tolist(), strict=True)):
        above = () if parent == ROOT else path_of(trie, parent)
        values[edge] = hash((*above, token)) % 1_000_003
    expected = [[hash(tuple(c[: j + 1])) % 1_000_003 for j in range(len(c))] for c in choices]
    assert trie.per_choice(values) == expected
    assert (np.diff(trie.edge_parents) >= 0).all()
    assert trie.edges_below(ROOT, len(trie)) == (0, trie.num_nodes)


@given(CHOICES, st.data())
def test_a_segment_attends_to_the_path_above_it(choices: list[list[int]], data: st.DataObject) -> None:
    trie = TokenTrie(choices)
    if not len(trie):
        return
    start = data.draw(st.integers(0, len(trie) - 1))
    stop = data.draw(st.integers(start + 1, len(trie)))
    slots = np.random.default_rng(0).permutation(100 + len(trie)).astype(np.int32)[: len(trie)]
    is_decode, bounds, indptr, path_slots = segments(trie, slots, start, stop)
    assert (bounds[0], bounds[-1]) == (0, stop - start)
    for index, (first, last) in enumerate(zip(bounds.tolist(), bounds[1:].tolist(), strict=False)):
        node = start + last - 1
        path = [*reversed(trie.ancestors(node)), node]
        assert path_slots[indptr[index] : indptr[index + 1]].tolist() == slots[path].tolist()
        assert path[len(path) - (last - first) :] == list(range(start + first, start + last))
        assert not is_decode[index] or last - first == 1


def test_whether_a_node_is_a_decode_does_not_tell_how_the_work_was_cut() -> None:
    trie = TokenTrie([[1] * (PREFILL_RUN + 3), [2, 3], [2, 4]])
    slots = np.arange(len(trie), dtype=np.int32)
    whole = trie.is_long.tolist()
    assert whole == [True] * (PREFILL_RUN + 2) + [False]
    for cut in range(1, len(trie)):
        kinds: list[bool] = []
        for start, stop in ((0, cut), (cut, len(trie))):
            is_decode, bounds, _, _ = segments(trie, slots, start, stop)
            kinds += np.repeat(~is_decode, np.diff(bounds)).tolist()
        assert kinds == whole
