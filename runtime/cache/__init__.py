"""Which KV is kept where: the allocator, the radix tree, and the cache that keeps both and the leases consistent.

    PageAllocator   free pages and the number of holders of every other page; the one place that frees
    RadixTree       token prefixes -> pages, locks, eviction; holds the pages its nodes name
    PrefixCache     leases for running sequences: match, reserve, publish, release
    KVPool          the tensors (knows pages, not tokens)

The invariant: a page is free exactly when no tree node and no lease names it; a published slot is never written again.
"""
