"""`RadixTree`: which token prefixes have their KV in which pages. Pure bookkeeping, token-granular over pages.

A node is an edge of tokens below its parent and names the pages that hold their KV. Page i of a path holds positions
[i * page_size, (i + 1) * page_size). Where an edge starts inside a page, that first page also holds the KV of the
positions before it (the same page, or a copy made when a sequence began to write there), so along a path the deeper
node's page wins::

    page_size 4    root ── a: [t0 t1 t2 t3 t4 t5]       pages of a: P0 P1      P1 = . . t4 t5 . .
                             └─ b: [t6 t7 t8]           pages of b: P7 P8      P7 = copy of t4 t5, then t6 t7

The tree holds its nodes' pages in the allocator (one holder per node and page) and never writes KV. A node may be
locked; only a leaf without locks can be evicted, so a lock on a node protects the whole path above it in O(1), and who
has one need not hold the full pages of that path: where a page is full, no other copy of it takes its place.
Each namespace is a root of its own: nothing matches across namespaces by construction.
After SGLang's RadixAttention (Zheng et al. 2024, arXiv 2312.07104, section 3).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Iterator

import msgspec
import numpy as np

from bough.runtime.cache.page_allocator import PageAllocator
from bough.runtime.vector import IntArray, IntVector, common_prefix

_EMPTY: IntArray = np.empty(0, dtype=np.int32)


class Node:
    """An edge of the tree. `end` is the length of the prefix that the path to this node spells.

    Both arrays are of the standard library: they grow in place, a slice is a copy, an item a Python integer.
    """

    __slots__ = ("children", "in_heap", "last_use", "locks", "pages", "parent", "start", "tokens")

    def __init__(self, parent: Node | None, start: int, tokens: array[int], pages: array[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.pages = pages
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.last_use = 0
        self.in_heap = False

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def common(self, tokens: IntArray) -> int:
        """Return with how many of `tokens` the edge begins."""
        return common_prefix(np.frombuffer(self.tokens, dtype=np.int32), tokens)

    @property
    def is_evictable(self) -> bool:
        return self.parent is not None and not self.children and self.locks == 0


class Match(msgspec.Struct, frozen=True):
    """The longest cached prefix of some tokens: the path from below the root, the last node used up to `length`."""

    root: Node
    path: tuple[Node, ...]
    length: int


class RadixTree:
    """Prefixes -> pages. The prefix cache is its only caller."""

    def __init__(self, page_size: int, allocator: PageAllocator) -> None:
        self.page_size = page_size
        self.num_nodes = 0
        self.version = 0  # grows when what can match changes
        self._allocator = allocator
        self._roots: dict[Hashable, Node] = {}
        self._heap: list[tuple[int, int, Node]] = []  # (last_use, tie, node); stale entries are mended when popped
        self.clock = 0  # grows with every use
        self._tie = 0

    # ------------------------------------------------------------------------------------------ reading

    def match(self, namespace: Hashable, tokens: IntArray) -> Match:
        """Find the longest cached prefix of `tokens`; changes nothing but the time of last use."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, 0, array("i"), array("i"))
        self.clock += 1
        path: list[Node] = []
        node, position = root, 0
        while position < len(tokens):
            child = node.children.get(tokens.item(position))
            if child is None:
                break
            common = child.common(tokens[position:])
            child.last_use = self.clock
            path.append(child)
            position += common
            node = child
            if common < len(child.tokens):
                break
        return Match(root, tuple(path), position)

    def continuation(self, node: Node, tokens: IntArray, count: int) -> IntArray:
        """Return up to `count` tokens that follow `tokens`, which spell the path to `node` and go on from there.

        Where several go on, what came last; empty if none does. Changes nothing, no time of use either.
        """
        position = node.end
        found: list[array[int]] = []
        while count > 0 and node.children:
            if position < len(tokens):
                child = node.children.get(tokens.item(position))
            else:
                child = next(reversed(node.children.values()))
            if child is None:
                break
            common = child.common(tokens[position:])
            if common < min(len(child.tokens), len(tokens) - position):
                break
            rest = child.tokens[common : common + count]
            found.append(rest)
            count -= len(rest)
            node, position = child, child.end
        return np.concatenate(found) if found else _EMPTY

    def num_cached_pages(self) -> int:
        """Count the pages that some node names. O(pages)."""
        return len({page for node in self.nodes() for page in node.pages})

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    # ------------------------------------------------------------------------------------------ changing

    def seal(self, match: Match) -> Node:
        """Return the node that ends exactly at `match.length`, splitting an edge that goes on."""
        if not match.path:
            return match.root
        last = match.path[-1]
        return last if last.end == match.length else self._split(last, match.length - last.start)

    def fill_row(self, node: Node, row: IntVector) -> None:
        """Append to the empty `row` the pages of the path to `node`, one per page index."""
        path: list[Node] = []
        walk: Node | None = node
        while walk is not None and walk.parent is not None:
            path.append(walk)
            walk = walk.parent
        for step in reversed(path):
            row.truncate(step.start // self.page_size)  # a deeper node's first page wins
            row.extend(step.pages)

    def insert(self, node: Node, tokens: IntArray, row: IntVector) -> Node:
        """Add tokens[node.end:], whose KV lies in the pages of `row`, below `node`; return the node of the whole.

        The row holds its pages from the one in which `node` ends, and gives up its hold on all that are full now: it
        passes to the tree, or, where the tree already has a twin, the tree's pages win: the row is rewritten to them
        and its own are released. The caller has a lock on `node` and moves it to the node returned.
        """
        self.clock += 1
        start, position = node, node.end
        while position < len(tokens):
            child = node.children.get(tokens.item(position))
            if child is None:
                self.version += 1
                return self._append(node, tokens, row, locks_of_caller=1 if node is start else 0)
            common = child.common(tokens[position:])
            if common < len(child.tokens):
                child = self._split(child, common)
            self._adopt(child, row)
            child.last_use = self.clock
            node, position = child, child.end
        return node

    def lock(self, node: Node) -> None:
        """Protect the path to `node` from eviction."""
        node.locks += 1

    def unlock(self, node: Node) -> None:
        """Take back one `lock`; the path to `node` counts as used now."""
        assert node.locks > 0, "a node was unlocked more often than locked"
        node.locks -= 1
        node.last_use = self.clock
        self._offer(node)

    def has_leaves(self, used_until: int | None = None) -> bool:
        """Whether there may be something to evict that was last used until then: no entry's time is too late."""
        return bool(self._heap) and (used_until is None or self._heap[0][0] <= used_until)

    def evict(self, num_pages: int, used_until: int | None = None) -> int:
        """Drop least recently used leaves until `num_pages` pages became free or nothing is left; return how many did.

        used_until: a time of `clock`; what was used later is kept. O(log n) per leaf: a heap entry that is out of date
        is put back when it surfaces, never searched for.
        """
        freed = 0
        while freed < num_pages and self.has_leaves(used_until):
            last_use, _, node = heapq.heappop(self._heap)
            node.in_heap = False
            if not node.is_evictable:
                continue  # offered again when it becomes so
            if node.last_use != last_use:
                self._offer(node)
                continue
            freed += self._remove(node)
        return freed

    def discard(self, match: Match, keep: int) -> int:
        """Drop what only `match` goes through beyond its first `keep` tokens; return how many pages became free.

        What somebody has locked, and what another prefix shares, stays.
        """
        freed = 0
        node: Node | None = match.path[-1] if match.path and match.path[-1].end == match.length else None
        while node is not None and node.is_evictable and node.end > keep:
            if node.start < keep:
                self._split(node, keep - node.start)
            parent = node.parent
            freed += self._remove(node)
            node = parent
        return freed

    # ------------------------------------------------------------------------------------------ steps

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node`'s edge after `length` tokens; return the new upper part. `node` stays the lower: leases hold."""
        size = self.page_size
        cut = node.start + length
        first = node.start // size
        upper = Node(node.parent, node.start, node.tokens[:length], node.pages[: -(-cut // size) - first])
        upper.last_use = node.last_use
        assert node.parent is not None, "a root has no edge to split"
        node.parent.children[upper.tokens[0]] = upper
        if cut % size:  # both parts name the page that holds the cut
            self._allocator.hold(upper.pages[-1:])
        node.pages = node.pages[cut // size - first :]
        node.tokens = node.tokens[length:]
        node.start = cut
        node.parent = upper
        upper.children[node.tokens[0]] = node
        self.num_nodes += 1
        return upper

    def _append(self, node: Node, tokens: IntArray, row: IntVector, locks_of_caller: int) -> Node:
        """Put the rest of `tokens` below `node`: a longer edge if nobody else's lease ends there, else a new leaf."""
        size, position = self.page_size, node.end
        added = array("i", tokens[position:].tobytes())
        pages = array("i", row.view(position // size, -(-len(tokens) // size)).tobytes())
        if len(tokens) % size:  # the row goes on writing its last page; of the others its hold becomes the node's
            self._allocator.hold(pages[-1:])
        if node.parent is None or node.children or node.locks > locks_of_caller:
            leaf = Node(node, position, added, pages)
            if node.parent is not None and not node.children:
                self._share_straddling_page(node, leaf)
            node.children[added[0]] = leaf
            self.num_nodes += 1
            leaf.last_use = self.clock
            return leaf
        if position % size:
            self._allocator.release([node.pages.pop()])
        node.pages.extend(pages)
        node.tokens.extend(added)
        node.last_use = self.clock
        return node

    def _share_straddling_page(self, node: Node, leaf: Node) -> None:
        """Let `node` name its first child's copy of the page where they meet, so that no page is kept twice."""
        if node.end % self.page_size and node.pages[-1] != leaf.pages[0]:
            old = node.pages[-1]
            node.pages[-1] = leaf.pages[0]
            self._allocator.hold(node.pages[-1:])
            self._allocator.release([old])

    def _adopt(self, child: Node, row: IntVector) -> None:
        """Rewrite the row's full pages of `child`'s range to the tree's, and release those that it had."""
        first, last = child.start // self.page_size, child.end // self.page_size
        ours = row.view(first, last)
        self._allocator.release(ours.tolist())
        ours[:] = child.pages[: last - first]

    def _remove(self, node: Node) -> int:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[0]]
        node.parent = None
        parent.last_use = max(parent.last_use, node.last_use)
        self.num_nodes -= 1
        self.version += 1
        freed = self._allocator.release(node.pages)
        self._offer(parent)
        return len(freed)

    def _offer(self, node: Node) -> None:
        if node.is_evictable and not node.in_heap:
            node.in_heap = True
            self._tie += 1
            heapq.heappush(self._heap, (node.last_use, self._tie, node))
