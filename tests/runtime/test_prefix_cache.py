"""Tree, allocator and leases together: worked examples, then a state machine with token ids as KV."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bough.runtime.cache.page_allocator import PageAllocator
from bough.runtime.cache.prefix_cache import Lease, PrefixCache
from bough.runtime.vector import IntArray


def ids(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def lease_of(cache: PrefixCache, tokens: IntArray) -> Lease:
    lease = cache.acquire("ns", tokens, limit=len(tokens) - 1, headroom=0)
    assert lease is not None
    return lease


def filled(cache: PrefixCache, tokens: IntArray) -> list[int]:
    """Compute and publish `tokens`, release the lease; return the pages used."""
    lease = lease_of(cache, tokens)
    cache.publish(lease, tokens)
    pages: list[int] = lease.row.view().tolist()
    cache.release(lease)
    return pages


def test_a_published_prefix_is_matched_token_by_token() -> None:
    cache = PrefixCache(8, page_size=4)
    filled(cache, ids(1, 2, 3, 4, 5, 6))
    assert cache.matched_len("ns", ids(1, 2, 3, 4, 5, 6, 7)) == 6
    assert cache.matched_len("ns", ids(1, 2, 3, 9)) == 3
    assert cache.matched_len("other", ids(1, 2, 3)) == 0


def test_a_match_inside_a_page_copies_that_page_and_shares_those_before() -> None:
    cache = PrefixCache(8, page_size=4)
    pages = filled(cache, ids(1, 2, 3, 4, 5, 6))
    lease = lease_of(cache, ids(1, 2, 3, 4, 5, 9, 9))
    assert lease.matched == 5
    assert lease.row[0] == pages[0]
    assert lease.copy is not None
    assert (lease.copy.source, lease.copy.target, lease.copy.num_slots) == (pages[1], lease.row[1], 1)


def test_where_a_leaf_begins_inside_a_leased_page_both_edges_name_the_leafs_copy_of_it() -> None:
    cache = PrefixCache(12, page_size=4)
    short, long = ids(1, 2, 3, 4, 5, 6), ids(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    first = lease_of(cache, short)
    cache.publish(first, short)
    second = lease_of(cache, long)  # the first is still leased: its edge cannot simply grow
    cache.publish(second, long)
    third = lease_of(cache, ids(1, 2, 3, 4, 5, 6, 99))
    assert third.matched == 6
    assert third.copy is not None
    assert (third.copy.source, third.copy.num_slots) == (second.row[1], 2)
    cache.check_invariants([first, second, third])


def test_a_twin_adopts_the_pages_of_the_tree_and_its_own_become_free() -> None:
    cache = PrefixCache(8, page_size=2)
    tokens = ids(1, 2, 3, 4)
    first, twin = lease_of(cache, tokens), lease_of(cache, tokens)
    cache.publish(first, tokens)
    cache.publish(twin, tokens)
    assert twin.row.view().tolist() == first.row.view().tolist()
    assert cache.allocator.num_free == 6
    cache.check_invariants([first, twin])


def test_eviction_takes_the_least_recently_used_leaf_and_never_a_leased_path() -> None:
    cache = PrefixCache(5, page_size=2)
    filled(cache, ids(1, 1))
    filled(cache, ids(2, 2))
    filled(cache, ids(3, 3))
    lease = lease_of(cache, ids(1, 1, 5))  # touches and locks the oldest
    assert cache.acquire("ns", ids(4, 4, 4, 4), limit=3, headroom=0) is not None
    assert cache.matched_len("ns", ids(1, 1)) == 2
    assert cache.matched_len("ns", ids(2, 2)) == 0
    assert cache.matched_len("ns", ids(3, 3)) == 2
    cache.release(lease)


def test_what_cannot_be_had_changes_nothing() -> None:
    cache = PrefixCache(4, page_size=2)
    lease = lease_of(cache, ids(1, 2, 3, 4))
    assert cache.acquire("ns", ids(9, 9, 9, 9, 9), limit=4, headroom=0) is None
    assert cache.acquire("ns", ids(9, 9, 9), limit=2, headroom=1) is None
    assert cache.allocator.num_free == 2
    cache.check_invariants([lease])


def test_there_is_room_while_something_old_enough_can_be_evicted() -> None:
    cache = PrefixCache(4, page_size=2)
    filled(cache, ids(1, 1, 1, 1))
    then = cache.tree.clock
    lease = lease_of(cache, ids(2, 2))
    assert cache.has_room(4, matched=0, headroom=0, used_until=then)
    assert cache.has_room(2, matched=0, headroom=0, used_until=then - 2)  # the free page
    assert not cache.has_room(4, matched=0, headroom=0, used_until=then - 2)
    assert cache.has_room(4, matched=2, headroom=0, used_until=then - 2)
    cache.release(lease)


def test_a_full_pool_gives_up_the_copied_page_rather_than_fail() -> None:
    cache = PrefixCache(2, page_size=2)
    filled(cache, ids(1, 2, 3))
    lease = lease_of(cache, ids(1, 2, 3, 4))
    assert lease.matched == 2
    assert lease.copy is None


def test_a_lease_is_released_once() -> None:
    cache = PrefixCache(4, page_size=2)
    lease = lease_of(cache, ids(1, 2))
    cache.release(lease)
    with pytest.raises(AssertionError, match="released twice"):
        cache.release(lease)


def test_pages_are_free_exactly_when_nobody_holds_them() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    assert pages is not None
    assert allocator.allocate(2) is None
    allocator.hold(pages[:1])
    assert allocator.release(pages) == pages[1:]
    assert allocator.num_free == 3
    with pytest.raises(AssertionError, match="more often than it was held"):
        allocator.release(pages[1:2])
    with pytest.raises(AssertionError, match="second holder"):
        allocator.hold(pages[1:2])


class CacheMachine(RuleBasedStateMachine):
    """Leases come, compute, publish, grow and go. Every page stores, per slot, the whole prefix its KV stands for."""

    @initialize(page_size=st.sampled_from([1, 2, 3, 16]), num_pages=st.integers(4, 24))
    def start(self, page_size: int, num_pages: int) -> None:
        self.cache = PrefixCache(num_pages, page_size)
        self.kv: dict[tuple[int, int], tuple[int, ...]] = {}
        self.live: list[tuple[Lease, list[int]]] = []
        self.computed: dict[int, int] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        headroom=st.integers(0, 2),
        age=st.none() | st.integers(0, 8),
    )
    def acquire(self, tokens: list[int], headroom: int, age: int | None) -> None:
        used_until = None if age is None else self.cache.tree.clock - age
        matched = self.cache.matched_len("ns", ids(*tokens[:-1]))
        had_room = self.cache.has_room(len(tokens), matched, headroom, used_until)
        lease = self.cache.acquire("ns", ids(*tokens), len(tokens) - 1, headroom, used_until)
        if lease is None:
            return
        assert had_room, "somebody who was sent away would have got pages"
        assert self.cache.allocator.num_free >= headroom
        if lease.copy is not None:
            for slot in range(lease.copy.num_slots):
                self.kv[lease.copy.target, slot] = self.kv[lease.copy.source, slot]
        self.live.append((lease, tokens))
        self.computed[id(lease)] = lease.matched

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 4))
    def compute(self, data: st.DataObject, count: int) -> None:
        lease, tokens = data.draw(st.sampled_from(self.live))
        start = self.computed[id(lease)]
        stop = min(start + count, len(tokens))
        for position in range(start, stop):
            page, slot = divmod(position, self.cache.page_size)
            self.kv[lease.row[page], slot] = tuple(tokens[: position + 1])
        self.computed[id(lease)] = stop

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lease, tokens = data.draw(st.sampled_from(self.live))
        self.cache.publish(lease, ids(*tokens[: self.computed[id(lease)]]))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        lease, tokens = data.draw(st.sampled_from(self.live))
        if self.cache.reserve(lease, len(tokens) + 1):
            tokens.append(token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        self.cache.release(self.live.pop(index)[0])

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        if not self.live:
            assert self.cache.allocator.num_free == self.cache.num_pages

    @invariant()
    def holders_locks_and_free_pages_agree(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_invariants([lease for lease, _ in self.live])

    @invariant()
    def every_row_reads_its_own_tokens(self) -> None:
        for lease, tokens in getattr(self, "live", ()):
            for position in range(self.computed[id(lease)]):
                page, slot = divmod(position, self.cache.page_size)
                assert self.kv[lease.row[page], slot] == tuple(tokens[: position + 1])


CacheMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
