"""Deliberate bugs, one edit each, that the tests of the runtime core have to notice. Run by scripts/mutate.

Each is a way in which a cache, a scheduler or a state machine of this kind has been wrong before, here or elsewhere
(research: ownership of pages, terminal transitions, poison, budgets, counters). `old` occurs exactly once in the file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Replace `old` by `new` in runtime/`file`."""

    name: str
    file: str
    old: str
    new: str


TREE = "cache/radix_tree.py"
CACHE = "cache/prefix_cache.py"
ALLOCATOR = "cache/page_allocator.py"
SCHEDULER = "scheduler.py"
SPECULATION = "speculation.py"
ENGINE = "engine.py"

MUTANTS = (
    # ------------------------------------------------------------------------------------------ tree
    Mutant("a twin's row is not rewritten", TREE, "        ours[:] = child.pages[: last - first]\n", ""),
    Mutant("a twin's own page is not given back", TREE, "        self._allocator.release(ours.tolist())\n", ""),
    Mutant(
        "a page that its row goes on writing is not held by the tree",
        TREE,
        "            self._allocator.hold(pages[-1:])\n",
        "            pass\n",
    ),
    Mutant("a locked leaf is evicted", TREE, "not self.children and self.locks == 0", "not self.children"),
    Mutant("an inner node is evicted", TREE, "not self.children and self.locks == 0", "self.locks == 0"),
    Mutant(
        "the namespace is forgotten",
        TREE,
        "root = self._roots.get(namespace)\n        if root is None:\n            root = self._roots[namespace] =",
        "root = self._roots.get(None)\n        if root is None:\n            root = self._roots[None] =",
    ),
    Mutant("a leaf grows that another lease ends in", TREE, " or node.locks > locks_of_caller:", ":"),
    Mutant("the wrong straddling page is shared", TREE, "= leaf.pages[0]\n", "= leaf.pages[-1]\n"),
    Mutant("a straddling page is dropped twice", TREE, "            self._allocator.hold(node.pages[-1:])\n", ""),
    Mutant("a straddling page is never dropped", TREE, "            self._allocator.release([old])\n", ""),
    Mutant(
        "a split page has one holder",
        TREE,
        "            self._allocator.hold(upper.pages[-1:])\n",
        "            pass\n",
    ),
    Mutant(
        "a grown leaf keeps its old last page",
        TREE,
        "            self._allocator.release([node.pages.pop()])\n",
        "            pass\n",
    ),
    Mutant(
        "a grown leaf never drops its old last page",
        TREE,
        "self._allocator.release([node.pages.pop()])",
        "node.pages.pop()",
    ),
    Mutant(
        "the shallower page of two wins",
        TREE,
        "            row.extend(step.pages)\n",
        "            row.extend(step.pages) if not len(row) else None\n",
    ),
    Mutant("a parent without children is never on offer", TREE, "        self._offer(parent)\n", ""),
    Mutant(
        "use does not keep from eviction",
        TREE,
        "            child.last_use = self.clock\n            path",
        "            path",
    ),
    # ------------------------------------------------------------------------------------------ leases
    Mutant(
        "publishing keeps the old lock",
        CACHE,
        "            self.tree.unlock(lease.node)\n            lease",
        "            lease",
    ),
    Mutant(
        "what the tree holds is the row's, too",
        CACHE,
        "return lease.published // self.page_size",
        "return lease.matched // self.page_size",
    ),
    Mutant(
        "a page that is half published is the tree's alone",
        CACHE,
        "return lease.published // self.page_size",
        "return self.num_pages_for(lease.published)",
    ),
    Mutant(
        "copy on write is forgotten",
        CACHE,
        "copy = PageCopy(row[shared], fresh[0], match.length % self.page_size)",
        "pass",
    ),
    Mutant(
        "one slot too few is copied",
        CACHE,
        "fresh[0], match.length % self.page_size)",
        "fresh[0], match.length % self.page_size - 1)",
    ),
    Mutant(
        "a failed acquire stays locked",
        CACHE,
        "            self.tree.unlock(node)\n            return None",
        "            return None",
    ),
    Mutant(
        "who waits is sent away while leaves could be evicted",
        CACHE,
        "num_free >= needed or self.tree.has_leaves(used_until)",
        "num_free >= needed",
    ),
    Mutant("headroom is ignored", CACHE, "self.allocator.num_free >= count + headroom", "True"),
    Mutant(
        "a release forgets the lock",
        CACHE,
        "        lease.is_released = True\n        self.tree.unlock(lease.node)\n",
        "        lease.is_released = True\n",
    ),
    Mutant(
        "a release forgets the pages",
        CACHE,
        "        self.allocator.release(lease.row.view(self._num_in_tree(lease)).tolist())\n",
        "",
    ),
    Mutant("a page is freed while others hold it", ALLOCATOR, "extend(freed)", "extend(pages)"),
    Mutant(
        "a page is free before the step retired",
        ALLOCATOR,
        "(self._limbo[-1] if self._limbo else self._free)",
        "self._free",
    ),
    Mutant("a page in limbo is free after the step before", ALLOCATOR, "self._limbo[-1] if", "self._limbo[0] if"),
    Mutant("a page in limbo is lost", ALLOCATOR, "self._free.extend(self._limbo.popleft())", "self._limbo.popleft()"),
    Mutant("a page in limbo is freed twice", ALLOCATOR, "self._limbo.popleft())", "self._limbo[0])"),
    Mutant("a step is never fenced", SCHEDULER, "        self.cache.allocator.begin_step()\n", ""),
    # ------------------------------------------------------------------------------------------ sequences
    Mutant(
        "the whole prompt may come from the cache",
        "sequence.py",
        "return len(self.tokens) - 1 if self.trie is None else max(self.prompt_len - 1, 0)",
        "return len(self.tokens) if self.trie is None else max(self.prompt_len - 1, 0)",
    ),
    Mutant(
        "the token before the first score may come from the cache",
        "sequence.py",
        "return len(self.tokens) - 1 if self.trie is None else max(self.prompt_len - 1, 0)",
        "return len(self.tokens) - 1 if self.trie is None else self.prompt_len",
    ),
    Mutant(
        "a trie's nodes are published as if they were a prompt",
        "sequence.py",
        "return self.num_computed if self.trie is None else min(self.num_computed, self.prompt_len)",
        "return self.num_computed",
    ),
    Mutant(
        "a node takes the slot of an ancestor of the next",
        "sequence.py",
        "            kept = self.slots[trie.ancestors(start)]\n",
        "            kept = self.slots[trie.ancestors(start)[:1]]\n",
    ),
    Mutant(
        "scores are taken for the edges before",
        "sequence.py",
        "return slice(last - num_scores, last)",
        "return slice(last - num_scores - 1, last - 1)",
    ),
    Mutant(
        "a node attends to its own run only",
        "trie.py",
        "        left = above != ROOT\n",
        "        left = np.zeros_like(above, dtype=np.bool_)\n",
    ),
    Mutant(
        "min_tokens is one too many",
        "sequence.py",
        "len(generated) + self.num_due < self.params.min_tokens",
        "len(generated) + self.num_due <= self.params.min_tokens",
    ),
    # ------------------------------------------------------------------------------------------ scheduler
    Mutant(
        "the budget is one too large", SCHEDULER, "budget = self._token_budget\n", "budget = self._token_budget + 1\n"
    ),
    Mutant(
        "a token is published that was not computed",
        SCHEDULER,
        "self._publish(sequence, sequence.lease, settled)",
        "self._publish(sequence, sequence.lease, settled + 1)",
    ),
    Mutant(
        "nothing is published before the end",
        SCHEDULER,
        "            if was_prefilling or settled >=",
        "            if False and settled >=",
    ),
    Mutant(
        "pages are given back unpublished",
        SCHEDULER,
        "self._publish(sequence, sequence.lease, sequence.num_publishable)\n        self.cache.release",
        "self._publish(sequence, sequence.lease, 0)\n        self.cache.release",
    ),
    Mutant(
        "single flight is off",
        SCHEDULER,
        "if common_prefix(other.tokens.view(0, least), wanted) == least:",
        "if False:",
    ),
    Mutant(
        "one sequence too many runs",
        SCHEDULER,
        "if budget <= 0 or len(self.running) >= self._max_running:",
        "if budget <= 0 or len(self.running) > self._max_running:",
    ),
    # ------------------------------------------------------------------------------------------ overlap
    Mutant(
        "the row of a sequence that left counts",
        "sequence.py",
        "if not self._flying or self._flying[0] is not row:",
        "if not self._flying:",
    ),
    Mutant(
        "who ended waits for rows in flight",
        SCHEDULER,
        "        sequence.lease = None\n        sequence.forget_rows(sequence.num_computed)\n",
        "        sequence.lease = None\n",
    ),
    Mutant(
        "who is paused takes what is in flight",
        SCHEDULER,
        "        sequence.is_paused = True\n        sequence.forget_rows(sequence.num_computed)\n",
        "        sequence.is_paused = True\n",
    ),
    Mutant(
        "a step is planned without the values it needs",
        SCHEDULER,
        "any(s.waits_for_values and not s.is_paused for s in self.running)",
        "False",
    ),
    Mutant(
        "a row is planned beyond the last token",
        "sequence.py",
        "if self.num_due and len(self.tokens) + self.num_due >= self.most_len:",
        "if False:",
    ),
    Mutant(
        "pages are taken from others for a step planned ahead",
        SCHEDULER,
        "if ahead_of is not None and not sequence.is_paused and not self._has_slots(sequence):",
        "if False:",
    ),
    Mutant(
        "no slot is kept for a token in flight",
        "sequence.py",
        "len(self.tokens) + self.num_due if",
        "len(self.tokens) if",
    ),
    Mutant(
        "a pool is too small while pages are in limbo",
        SCHEDULER,
        " and not self.running and may_exhaust:",
        " and not self.running:",
    ),
    Mutant(
        "a token in flight does not count for min_tokens",
        "sequence.py",
        "len(generated) + self.num_due < self.params.min_tokens",
        "len(generated) < self.params.min_tokens",
    ),
    Mutant("the cache is rebuilt while steps run", "inflight.py", "        self._pipeline.abandon()", "        pass"),
    Mutant(
        "a step is launched behind one that could not be",
        "pipeline.py",
        " and not isinstance(self._flying[0][1], _Done):",
        ":",
    ),
    Mutant("the newest step is taken back first", "pipeline.py", "self._flying.popleft()", "self._flying.pop()"),
    # ------------------------------------------------------------------------------------------ preemption
    Mutant("the oldest is preempted", SCHEDULER, "candidates[-1])", "candidates[0])"),
    Mutant(
        "a preempted sequence is planned all the same",
        SCHEDULER,
        "            if victim is sequence:\n                return False",
        "            if victim is sequence:\n                return True",
    ),
    Mutant(
        "a paused sequence decodes: credit is ignored",
        SCHEDULER,
        "if sequence.is_paused or sequence.status",
        "if sequence.status",
    ),
    Mutant(
        "a sequence that ended stays among the preempted",
        SCHEDULER,
        "        elif sequence in self._preempted:\n            self._preempted.remove(sequence)",
        "        elif False:\n            pass",
    ),
    Mutant(
        "a preempted sequence takes no old place",
        SCHEDULER,
        "self.running.insert(position, sequence)",
        "self.running.append(sequence)",
    ),
    Mutant(
        "a rejected draft counts as computed",
        "sequence.py",
        "len(row.token_ids) - row.draft + num_accepted",
        "len(row.token_ids)",
    ),
    Mutant(
        "what a draft brought is cached before stops are looked for",
        SCHEDULER,
        "settled = sequence.num_publishable - accepted",
        "settled = sequence.num_publishable",
    ),
    Mutant("what stands behind a stop in a draft is kept", SCHEDULER, " -= sequence.cut(num_generated)", " -= 0"),
    Mutant("what is cut off a draft counts as computed", "sequence.py", "min(self.num_computed, length - 1)", "length"),
    Mutant(
        "a grammar's sequence drafts", "sequence.py", "(self.constraint is None or self.constraint.is_free)", "True"
    ),
    Mutant(
        "draws after a draft are of one position",
        "batch.py",
        "position=first.position + count",
        "position=first.position",
    ),
    Mutant(
        "min_tokens is forgotten within a draft",
        "batch.py",
        "first.forbidden if num_drawn + count < first.params.min_tokens else ()",
        "()",
    ),
    Mutant(
        "a draft evicts what is cached",
        SPECULATION,
        "(len(lease.row) + cache.allocator.num_free) * cache.page_size - len(tokens)",
        "most",
    ),
    Mutant("a draft's pages are kept", SCHEDULER, "        self.cache.trim(lease, len(sequence.tokens))\n", ""),
    Mutant(
        "the host's time for a draft costs nothing",
        "drafts.py",
        "won = accepted - (costs.draft + costs.row * drafted) / self.value",
        "won = accepted - costs.row * drafted / self.value",
    ),
    Mutant("a sequence in debt goes on drafting", "drafts.py", "if self.balance >= 0:", "if True:"),
    Mutant("a doubtful token is drafted", "drafts.py", "token if known in (token, ~token) else ~token", "token"),
    Mutant(
        "a draft may go beyond the end", SPECULATION, "count = min(most, to_end, slots)", "count = min(most, slots)"
    ),
    Mutant(
        "a hit is counted as computed",
        SCHEDULER,
        "self.counters.computed_tokens += computed",
        "self.counters.computed_tokens += prompt",
    ),
    Mutant(
        "a preempted prompt is counted twice",
        SCHEDULER,
        "        if sequence.num_preemptions:\n",
        "        if False:\n",
    ),
    # ------------------------------------------------------------------------------------------ operations
    Mutant(
        "two terminal replies",
        "operation.py",
        "self.session.reply(reply, buffers)",
        "[self.session.reply(reply, buffers) for _ in range(2)]",
    ),
    Mutant(
        "an ended operation is cancelled again",
        ENGINE,
        "                continue  # ended as a consequence of an earlier one\n",
        "                pass\n",
    ),
    Mutant("the partial text is lost", "work.py", '"partial_text": self.text,', '"partial_text": "",'),
    Mutant(
        "a failure does not poison",
        ENGINE,
        "        branch.poison = branch.poison or operation.poison\n        if",
        "        if",
    ),
    Mutant(
        "a failure poisons the children born before",
        ENGINE,
        "        branch.poison = branch.poison or operation.poison\n        if",
        "        for it in branch.descendants():\n            it.poison = it.poison or operation.poison\n        if",
    ),
    Mutant(
        "what was cancelled while it waited poisons nothing",
        ENGINE,
        "branch.poison = branch.poison or operation.poison\n                continue",
        "continue",
    ),
    Mutant("what is cancelled runs on", ENGINE, "            self._in_flight.stop(operation.work)\n", ""),
    Mutant(
        "a cancelled fork leaves its children unborn",
        ENGINE,
        "            self._bear_poisoned(operation, error)\n            self._fail",
        "            self._fail",
    ),
    Mutant(
        "a cancelled operation still counts as queued",
        ENGINE,
        "                self._num_queued -= 1\n            self._bear",
        "                pass\n            self._bear",
    ),
    Mutant(
        "a branch is released before its turn",
        ENGINE,
        "                self._enqueue(ending, branch)\n",
        "                self._forget(session, branch)\n",
    ),
    Mutant("deadlines are ignored", ENGINE, "op.deadline is not None and op.deadline <= now]", "False]"),
    Mutant("a stop's left-over text is lost", ENGINE, "        branch.tail.append(work.leftover)\n", ""),
    Mutant("a repeated operation is carried out again", "session.py", " or operation.id in self._ended_ids", ""),
    Mutant("credit piles up", "inflight.py", "min(work.credit + tokens, self._credit)", "work.credit + tokens"),
    Mutant(
        "credit does not wake",
        "inflight.py",
        "            self._scheduler.resume(work.sequences[0])\n",
        "            pass\n",
    ),
    # ------------------------------------------------------------------------------------------ branches
    Mutant(
        "a rollback keeps one token too many",
        "branch.py",
        "        self.log.truncate(length)\n        self.tail",
        "        self.log.truncate(min(length + 1, len(self.log)))\n        self.tail",
    ),
    Mutant(
        "a rollback does not heal",
        "branch.py",
        "        self.poison = None\n\n    def descendants",
        "\n    def descendants",
    ),
    Mutant("a fork writes into its parent", "branch.py", "self.log = parent.log.fork()", "self.log = parent.log"),
    Mutant(
        "a fork shares its parent's waiting text",
        "branch.py",
        "self.tail = parent.tail.copy()",
        "self.tail = parent.tail",
    ),
    Mutant("a fork of a failed branch is sound", "branch.py", "        self.poison = parent.poison\n", ""),
    Mutant(
        "forks draw the same",
        "composer.py",
        "(self._seed, *branch.path, branch.num_draws)",
        "(self._seed, branch.num_draws)",
    ),
    Mutant(
        "a cut log keeps a segment's rest",
        "token_log.py",
        "kept.append(segment[: length - self._sealed_len])",
        "kept.append(segment)",
    ),
)
