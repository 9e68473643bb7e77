"""`PrefixCache`: leases on pages for running sequences, over the radix tree and the allocator.

    acquire   match the tokens, lock the path, copy on write the page where writing begins
    reserve   make the row long enough for more tokens, evicting what nobody uses
    publish   put computed tokens into the tree; twins are deduplicated, the row rewritten to the tree's pages
    release   give everything back, once

A lease's row names one page per page index. The full pages of what is published are the tree's: the lease's lock keeps
them. The row holds the others, from the page where `lease.published` lies. So none is freed while a row names it.
A row writes only slots at or beyond `lease.published`, in pages it allocated itself::

    positions   [0 ........ matched) [matched ....... published) [published ........ len(row) * page_size)
                 the tree's          ours, in the tree by now     ours alone, writable
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from bough.runtime.batch import PageCopy
from bough.runtime.cache.page_allocator import PageAllocator
from bough.runtime.cache.radix_tree import Match, Node, RadixTree
from bough.runtime.vector import IntArray, IntVector


class Lease:
    """A running sequence's claim: a locked node, and a row of pages. Made by `acquire`, ended by `release`."""

    __slots__ = ("copy", "is_released", "matched", "namespace", "node", "row")

    def __init__(self, namespace: Hashable, node: Node, row: IntVector, matched: int, copy: PageCopy | None) -> None:
        self.namespace = namespace
        self.node = node
        self.row = row
        self.matched = matched
        self.copy = copy
        self.is_released = False

    @property
    def published(self) -> int:
        """How many leading tokens the tree holds for this lease."""
        return self.node.end


class PrefixCache:
    """The scheduler's only way to pages. `enabled=False` keeps no prefixes: every lease starts empty."""

    def __init__(self, num_pages: int, page_size: int, *, enabled: bool = True) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self.num_evictions = 0
        self.num_discarded = 0  # pages
        self.allocator = PageAllocator(num_pages)
        self.tree = RadixTree(page_size, self.allocator)

    def emptied(self) -> PrefixCache:
        """Return a cache over the same pages that knows nothing of this one's tree and leases."""
        empty = PrefixCache(self.num_pages, self.page_size, enabled=self.enabled)
        empty.num_evictions = self.num_evictions
        empty.num_discarded = self.num_discarded
        return empty

    @property
    def num_pages(self) -> int:
        return self.allocator.num_pages

    def num_pages_for(self, num_tokens: int) -> int:
        """Return how many pages `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def matched_len(self, namespace: Hashable, tokens: IntArray) -> int:
        """Return how many leading tokens are cached."""
        return self.tree.match(namespace, tokens).length if self.enabled else 0

    def has_room(self, num_tokens: int, matched: int, headroom: int, used_until: int | None) -> bool:
        """Whether `acquire` may succeed for so many tokens of which `matched` are cached; if not, it need not be asked.

        In a full pool somebody waits in every step: this costs a third of matching, locking and giving back.
        """
        needed = self.num_pages_for(num_tokens) - matched // self.page_size + headroom
        return self.allocator.num_free >= needed or self.tree.has_leaves(used_until)

    def acquire(
        self, namespace: Hashable, tokens: IntArray, limit: int, headroom: int, used_until: int | None = None
    ) -> Lease | None:
        """Lease the cached prefix of tokens[:limit] and pages for all of `tokens`; None if they cannot be had.

        headroom: pages that must still be free afterwards, so that what runs can go on for a while.
        used_until: a time of the tree's clock; prefixes used later are not evicted for this lease.
        """
        match = self.tree.match(namespace, tokens[: limit if self.enabled else 0])
        lease = self._lease(namespace, match, len(tokens), headroom, used_until)
        if lease is None and match.length % self.page_size:
            # The page that would be copied is one more than the tokens need: in a full pool, recompute its part.
            match = self.tree.match(namespace, tokens[: match.length - match.length % self.page_size])
            lease = self._lease(namespace, match, len(tokens), headroom, used_until)
        return lease

    def _lease(
        self, namespace: Hashable, match: Match, num_tokens: int, headroom: int, used_until: int | None
    ) -> Lease | None:
        shared = match.length // self.page_size
        num_pages = self.num_pages_for(num_tokens)
        node = self.tree.seal(match)
        self.tree.lock(node)
        fresh = self._allocate(num_pages - shared, headroom, used_until)
        if fresh is None:
            self.tree.unlock(node)
            return None
        row = IntVector(capacity=num_pages + 4)
        self.tree.fill_row(node, row)
        copy = None
        if match.length % self.page_size:  # the page where writing begins is the tree's: write into a copy
            copy = PageCopy(row[shared], fresh[0], match.length % self.page_size)
        row.truncate(shared)
        row.extend(fresh)
        return Lease(namespace, node, row, match.length, copy)

    def reserve(self, lease: Lease, num_tokens: int) -> bool:
        """Make the row long enough for `num_tokens` tokens; False, and nothing changed, if there are no pages."""
        needed = self.num_pages_for(num_tokens) - len(lease.row)
        if needed <= 0:
            return True
        fresh = self._allocate(needed, headroom=0)
        if fresh is None:
            return False
        for page in fresh:  # one, most often
            lease.row.append(page)
        return True

    def continuation(self, lease: Lease, tokens: IntArray, count: int) -> IntArray:
        """Return up to `count` tokens that the tree has after `tokens`, which begin with the lease's published ones."""
        return self.tree.continuation(lease.node, tokens, count)

    def trim(self, lease: Lease, num_tokens: int) -> None:
        """Give back the pages of the row that `num_tokens` tokens do not need; nothing in them is published."""
        needed = self.num_pages_for(num_tokens)
        if needed < len(lease.row):
            self.allocator.release(lease.row.view(needed).tolist())
            lease.row.truncate(needed)

    def publish(self, lease: Lease, tokens: IntArray) -> None:
        """Put `tokens`, whose KV the row holds, into the tree and move the lease's lock to their end."""
        if not self.enabled or len(tokens) <= lease.node.end:
            return
        node = self.tree.insert(lease.node, tokens, lease.row)
        if node is not lease.node:
            self.tree.lock(node)
            self.tree.unlock(lease.node)
            lease.node = node

    def release(self, lease: Lease) -> None:
        """Give the lease's pages and lock back. The only place where a sequence's pages end; once per lease."""
        assert not lease.is_released, "a lease was released twice"
        lease.is_released = True
        self.tree.unlock(lease.node)
        self.allocator.release(lease.row.view(self._num_in_tree(lease)).tolist())
        lease.row.truncate(0)

    def discard(self, namespace: Hashable, tokens: IntArray, keep: int) -> int:
        """Drop the cached prefix of `tokens` beyond its first `keep`, where nobody else uses it; return pages freed."""
        freed = self.tree.discard(self.tree.match(namespace, tokens), keep)
        self.num_discarded += freed
        return freed

    def flush(self) -> int:
        """Drop every prefix that no lease needs; return how many pages became free."""
        return self.tree.evict(self.num_pages)

    def _allocate(self, count: int, headroom: int, used_until: int | None = None) -> list[int] | None:
        missing = count + headroom - self.allocator.num_free
        if missing > 0:
            self.num_evictions += self.tree.evict(missing, used_until)
        return self.allocator.allocate(count) if self.allocator.num_free >= count + headroom else None

    def _num_in_tree(self, lease: Lease) -> int:
        """Return how many pages of the row are full and published: the tree holds them, the row the others."""
        return lease.published // self.page_size

    def check_invariants(self, leases: Iterable[Lease]) -> None:
        """Raise AssertionError unless holders, locks and the free list are what tree and leases say. O(everything)."""
        holders = np.zeros(self.num_pages, dtype=np.int32)
        locks: dict[int, int] = {}
        for lease in leases:
            assert not lease.is_released, "a live sequence has a released lease"
            row = lease.row.view()
            assert len(np.unique(row)) == len(row), "a row names a page twice"
            num_in_tree = self._num_in_tree(lease)
            holders[row[num_in_tree:]] += 1
            path = IntVector()
            self.tree.fill_row(lease.node, path)
            assert np.array_equal(row[:num_in_tree], path.view(0, num_in_tree)), (
                "a row names other full pages than its path"
            )
            locks[id(lease.node)] = locks.get(id(lease.node), 0) + 1
        num_nodes = 0
        for node in self.tree.nodes():
            num_nodes += 1
            assert len(node.tokens) > 0, "an edge without tokens"
            assert node.parent is not None
            assert node.start == node.parent.end, "an edge does not start where its parent ends"
            assert node.parent.children[node.tokens[0]] is node, "a child is filed under another token"
            pages = self.num_pages_for(node.end) - node.start // self.page_size
            assert len(node.pages) == pages, "an edge's pages do not cover its tokens"
            assert node.locks == locks.pop(id(node), 0), "lock count and leases disagree"
            assert node.in_heap or not node.is_evictable, "an evictable leaf is not on offer"
            holders[np.asarray(node.pages)] += 1
        assert num_nodes == self.tree.num_nodes, "node count drifted"
        assert np.array_equal(holders, self.allocator.holders()), "holder counts and holders disagree"
        self.allocator.check()
