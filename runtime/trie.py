"""`TokenTrie`: the choices of a select as one tree of tokens, so that what they share is computed once.

    choices           "red", "red ink", "blue"       tokens  [5] [5 9] [3]

    nodes, preorder                 root (the last token of the context)
                                     |- 3           ends a choice
                                     `- 5           ends a choice, and is computed: another token follows it
                                         `- 9       ends a choice

Every node is scored: its token's log-probability is read from the logits of its parent. A node is computed only if
another follows it, for nobody asks what comes after the others. The computed nodes keep the preorder; a stretch of
them in which each is the parent of the next is a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bough.runtime.vector import IntArray

# A run as long as this is attended in blocks of queries, as a prefill is; the tokens of shorter ones one by one, all in
# one batched product, as decodes are. A block of 16 queries costs about 5 decodes (kernels/cpu_attention.py).
PREFILL_RUN = 8

ROOT = -1


class TokenTrie:
    """The tokens of some choices, shared where they begin alike. Immutable.

    tokens, parents, depths: (num_computed,) int32, the computed nodes: their ids, the index of their parent (ROOT: the
    context), and how many nodes are above them. run_starts: (num_computed,) int32, the first node of each one's run.
    is_long: (num_computed,) bool, whether its run has PREFILL_RUN nodes or more.
    edge_tokens, edge_parents: (num_nodes,) int32, the scored nodes, ordered by their parent.
    num_levels: how many computed nodes the longest path has.
    """

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        assert all(len(choice) for choice in choices), "a choice has at least one token"
        tokens, parents, paths = _merge(choices)
        has_child = np.zeros(len(tokens), dtype=np.bool_)
        has_child[parents[parents != ROOT]] = True
        # One entry more than there are nodes: parent ROOT, which is -1, looks up the last one.
        computed = np.full(len(tokens) + 1, ROOT, dtype=np.int32)
        computed[:-1][has_child] = np.arange(int(has_child.sum()), dtype=np.int32)
        self.tokens: IntArray = tokens[has_child]
        self.parents: IntArray = computed[parents[has_child]]
        order = np.argsort(computed[parents], kind="stable")
        self.edge_tokens: IntArray = tokens[order]
        self.edge_parents: IntArray = computed[parents][order]
        edge_of_node = np.empty(len(tokens), dtype=np.int64)
        edge_of_node[order] = np.arange(len(tokens))
        self._lengths = np.array([len(choice) for choice in choices], dtype=np.int64)
        self._edges = edge_of_node[np.concatenate(paths)]
        self._find_runs()

    def __len__(self) -> int:
        """How many nodes are computed."""
        return len(self.tokens)

    @property
    def num_nodes(self) -> int:
        """How many different tokens the choices have: those that are scored."""
        return len(self.edge_tokens)

    def _find_runs(self) -> None:
        index = np.arange(len(self), dtype=np.int32)
        is_first = self.parents != index - 1
        is_first[:1] = True
        starts = index[is_first]
        run = np.cumsum(is_first) - 1
        self.run_starts: IntArray = starts[run]
        self.is_long: npt.NDArray[np.bool_] = np.bincount(run, minlength=len(starts))[run] >= PREFILL_RUN
        self.depths: IntArray = np.zeros(len(self), dtype=np.int32)
        above = 0
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(self)], strict=False):
            parent = int(self.parents[start])
            above = 0 if parent == ROOT else int(self.depths[parent]) + 1
            self.depths[start:end] = np.arange(above, above + end - start)
        self.num_levels = int(self.depths.max(initial=-1)) + 1

    def edges_below(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of edges whose parent is one of the nodes [start, stop); ROOT is a node here."""
        first, last = np.searchsorted(self.edge_parents, (start, stop))
        return int(first), int(last)

    def ancestors(self, node: int) -> list[int]:
        """Return the computed nodes above a node, the nearest first."""
        found: list[int] = []
        while (node := int(self.parents[node])) != ROOT:
            found.append(node)
        return found

    def per_choice(self, values: npt.NDArray[np.float64]) -> list[list[float]]:
        """Return for each choice the values of its nodes; values: (num_nodes,) float64, one per edge."""
        flat: list[float] = values[self._edges].tolist()
        ends = np.cumsum(self._lengths).tolist()
        return [flat[end - length : end] for end, length in zip(ends, self._lengths.tolist(), strict=True)]


def _merge(choices: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray, list[list[int]]]:
    """Return the tokens and parents of all nodes in preorder, and each choice's nodes.

    In sorted order a choice shares its beginning with the one before it, if with any.
    """
    tokens: list[int] = []
    parents: list[int] = []
    paths: list[list[int]] = [[] for _ in choices]
    previous: Sequence[int] = ()
    path: list[int] = []
    for index in sorted(range(len(choices)), key=lambda index: list(choices[index])):
        choice = choices[index]
        shared = _num_shared(previous, choice)
        new = range(len(tokens), len(tokens) + len(choice) - shared)
        if new:
            parents += [path[shared - 1] if shared else ROOT, *new[:-1]]
            tokens += choice[shared:]
        path = [*path[:shared], *new]
        paths[index] = path
        previous = choice
    return np.array(tokens, dtype=np.int32), np.array(parents, dtype=np.int32), paths


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def segments(
    trie: TokenTrie, slots: IntArray, start: int, stop: int
) -> tuple[npt.NDArray[np.bool_], IntArray, IntArray, IntArray]:
    """Cut the nodes [start, stop) into segments, each node of one the parent of the next, and say what each attends to.

    slots: (len(trie),) int32, where each node's KV lies. Returns is_decode (num_segments,), the segments' own
    boundaries (num_segments + 1,) from 0 to stop - start, path_indptr (num_segments + 1,) and path_slots: the slots of
    the nodes from below the root to the segment's last, the last included.
    """
    nodes = np.arange(start, stop, dtype=np.int64)
    is_long = trie.is_long[start:stop]
    is_first = (trie.run_starts[start:stop] == nodes) | ~is_long
    is_first[:1] = True
    heads = nodes[is_first]
    ends = np.append(heads[1:], stop)
    path_lens = trie.depths[ends - 1].astype(np.int64) + 1
    path_indptr = np.concatenate([[0], np.cumsum(path_lens)])
    path_slots = np.empty(int(path_indptr[-1]), dtype=np.int32)
    begin, last = heads, ends - 1  # of each segment, the stretch of nodes to be written
    base = path_indptr[:-1]
    while len(begin):
        lengths = last - begin + 1
        offset = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(base + trie.depths[begin], lengths) + offset
        path_slots[at] = slots[np.repeat(begin, lengths) + offset]
        above = trie.parents[begin].astype(np.int64)
        left = above != ROOT
        last, base = above[left], base[left]
        begin = trie.run_starts[last].astype(np.int64)
    bounds = np.append(heads - start, stop - start).astype(np.int32)
    return ~is_long[heads - start], bounds, path_indptr.astype(np.int32), path_slots
