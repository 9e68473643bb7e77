"""Engine, scheduler and cache as one, driven at random beside an oracle that knows no pages and no steps.

BOUGH_FUZZ_OPERATIONS=1000000 makes the run as long as that, and another one every time; failures are shrunk and kept
in .hypothesis. Otherwise every run is the same, and runs of other seeds follow while something was met too seldom.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import product
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from oracle import PALETTE, TENANTS, World

from bough.runtime.protocol import (
    CHOICE_METHODS,
    Cancel,
    Credit,
    Extend,
    Flush,
    Fork,
    Open,
    Part,
    Release,
    RoleBegin,
    RoleEnd,
    Rollback,
    Score,
    Select,
    Stat,
    Text,
    Tokens,
    encode_tokens,
)
from bough.runtime.work import Generation

OPERATIONS = int(os.environ.get("BOUGH_FUZZ_OPERATIONS", "0"))
RULES_PER_RUN = 60
SEEN: Counter[str] = Counter()

SLOT = st.sampled_from([0, 0, 0, 1, 2])
PICK = st.integers(0, 63)
STEPS = st.integers(0, 4)
WORDS = ("a", "b", " a", " the", "ab", "a b", " the a b", "b the ab a the b a")
PARTS = st.one_of(
    st.sampled_from(WORDS).map(Text),
    st.sampled_from(WORDS).map(Text),
    st.just(Tokens(0)),
)
CHOICES = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True),
    st.integers(2, 3).map(lambda depth: ["".join(words) for words in product((" a", " b", " the"), repeat=depth)]),
)
STOPS = st.sampled_from([(), (), (), ("ab",), ("b a", "a"), (" th",), ("aab", "aa")])
# Choices, counts, forced stretches in the middle and at the end; what comes first is never forced as a whole.
REGEXES = st.sampled_from(
    ["( a| the|b){2,9}", "[ab]{3,6} the( ab)+", "(a b the a b|b a the b a){1,2}", "[a-z ]{0,25}b"]
)
STOP_IDS = st.sampled_from([(), (), (), (PALETTE[0],), (PALETTE[1], PALETTE[3])])


class EngineMachine(RuleBasedStateMachine):
    """Branch and operation numbers are picked from those known, so most requests make sense, and some do not."""

    @initialize(
        page_size=st.sampled_from([1, 2, 16]),
        tokens=st.integers(20, 110),
        budget=st.sampled_from([1, 3, 8, 64]),
        max_running=st.sampled_from([1, 2, 4, 8]),
        policy=st.sampled_from(["lpm", "fcfs"]),
        max_branches=st.sampled_from([6, 24, 24]),
        max_waiting=st.sampled_from([3, 64, 64, 64]),
        radix_cache=st.sampled_from([True, True, True, False]),
        speculate=st.booleans(),
        overlap=st.booleans(),
    )
    def start(
        self,
        page_size: int,
        tokens: int,
        budget: int,
        max_running: int,
        policy: str,
        max_branches: int,
        max_waiting: int,
        radix_cache: bool,
        speculate: bool,
        overlap: bool,
    ) -> None:
        self.world = World(
            num_pages=max(2, tokens // page_size),
            page_size=page_size,
            context_len=80,
            seen=SEEN,
            token_budget=budget,
            max_running=max_running,
            schedule_policy=policy,
            max_branches=max_branches,
            max_waiting=max_waiting,
            radix_cache=radix_cache,
            speculate=speculate,
            credit=4,
            overlap=overlap,
        )
        self.next_branch = 1
        for slot in range(len(TENANTS)):
            self.open(slot, "a b")

    def some_branch(self, slot: int, pick: int) -> int:
        """Mostly a branch that is sound, now and then any, or none."""
        leaves = self.world.oracle.leaves[slot]
        sound = [i for i, leaf in leaves.items() if leaf.poison is None]
        known = sound if sound and pick % 8 else list(leaves)
        return known[pick % len(known)] if known and pick < 63 else 9_999

    def some_operation(self, slot: int, pick: int) -> int:
        known = list(self.world.sessions[slot].operations)
        return known[pick % len(known)] if known and pick < 63 else pick

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()
            self.world.check()

    @rule(slot=SLOT, text=st.sampled_from(WORDS))
    def open(self, slot: int, text: str) -> None:
        self.world.branch(slot, self.next_branch, Text(text))
        self.next_branch += 1

    @rule(
        slot=SLOT,
        pick=PICK,
        parts=st.lists(PARTS, min_size=1, max_size=3),
        ids=st.lists(st.sampled_from(PALETTE), max_size=6),
        commit=st.booleans(),
    )
    def extend(self, slot: int, pick: int, parts: list[Part], ids: list[int], commit: bool) -> None:
        branch = self.some_branch(slot, pick)
        self.world.send(slot, Extend, branch=branch, parts=parts, commit=commit, buffers=[encode_tokens(ids)])

    @rule(slot=SLOT, pick=PICK, role=st.sampled_from(["user", "assistant"]))
    def change_role(self, slot: int, pick: int, role: str) -> None:
        branch = self.some_branch(slot, pick)
        leaf = self.world.oracle.leaves[slot].get(branch)
        is_open = leaf is not None and leaf.roles[1] and pick % 16 > 0
        self.world.send(slot, Extend, branch=branch, parts=[RoleEnd() if is_open else RoleBegin(role)])

    @rule(slot=SLOT, pick=PICK, count=st.integers(1, 3), steps=STEPS)
    def fork(self, slot: int, pick: int, count: int, steps: int) -> None:
        children = list(range(self.next_branch, self.next_branch + count))
        self.next_branch += count
        self.world.send(slot, Fork, branch=self.some_branch(slot, pick), children=children)
        self.go(steps)

    @rule(
        slot=SLOT,
        pick=PICK,
        max_tokens=st.integers(1, 30).map(lambda n: n % 30),
        min_tokens=st.sampled_from([0, 0, 0, 3]),
        stop=STOPS,
        stop_ids=STOP_IDS,
        ignore_eos=st.booleans(),
        stream=st.booleans(),
        timeout_s=st.sampled_from([None, None, 1.0, 3.0]),
        steps=STEPS,
    )
    def generate(
        self,
        slot: int,
        pick: int,
        max_tokens: int,
        min_tokens: int,
        stop: tuple[str, ...],
        stop_ids: tuple[int, ...],
        ignore_eos: bool,
        stream: bool,
        timeout_s: float | None,
        steps: int,
    ) -> None:
        self.world.generate(
            slot,
            self.some_branch(slot, pick),
            stream=stream,
            timeout_s=timeout_s,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            stop=stop,
            stop_token_ids=stop_ids,
            ignore_eos=ignore_eos,
        )
        self.go(steps)

    @rule(
        slot=SLOT,
        pick=PICK,
        count=st.integers(2, 3),
        text=st.sampled_from(WORDS),
        max_tokens=st.integers(1, 20),
        stream=st.booleans(),
        steps=STEPS,
        cancel=st.sampled_from([False, False, True]),
    )
    def fan_out(
        self, slot: int, pick: int, count: int, text: str, max_tokens: int, stream: bool, steps: int, cancel: bool
    ) -> None:
        """The usual program: children that share what came before, and generate."""
        children = list(range(self.next_branch, self.next_branch + count))
        self.next_branch += count
        self.world.send(slot, Fork, branch=self.some_branch(slot, pick), children=children)
        for index, child in enumerate(children):
            self.world.send(slot, Extend, branch=child, parts=[Text(text * (1 + index))])
            self.world.generate(slot, child, max_tokens=max_tokens, stream=stream)
        if cancel:
            self.world.send(slot, Cancel, branch=children[0])
        self.go(steps)

    @rule(
        slot=SLOT,
        pick=PICK,
        kind=st.sampled_from([Select, Score]),
        choices=CHOICES,
        method=st.sampled_from(CHOICE_METHODS),
        timeout_s=st.sampled_from([None, None, None, 1.0]),
        steps=STEPS,
        temperature=st.sampled_from([0.0, 0.7]),
    )
    def choose(
        self,
        slot: int,
        pick: int,
        kind: type[Select | Score],
        choices: list[str],
        method: str,
        timeout_s: float | None,
        steps: int,
        temperature: float,
    ) -> None:
        branch = self.some_branch(slot, pick)
        options: dict[str, Any] = {"temperature": temperature} if kind is Select else {}
        self.world.send(slot, kind, branch=branch, choices=choices, method=method, timeout_s=timeout_s, **options)
        self.go(steps)

    @rule(
        slot=SLOT,
        pick=PICK,
        regex=REGEXES,
        max_tokens=st.sampled_from([3, 8, 30]),
        min_tokens=st.sampled_from([0, 3]),
        stop=STOPS,
        ignore_eos=st.booleans(),
        stream=st.booleans(),
        fork=st.booleans(),
        steps=STEPS,
    )
    def constrain(
        self,
        slot: int,
        pick: int,
        regex: str,
        max_tokens: int,
        min_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        stream: bool,
        fork: bool,
        steps: int,
    ) -> None:
        """A grammar, on a branch or on its children; each keeps its own place in it."""
        branch, branches = self.some_branch(slot, pick), []
        if fork:
            branches = [self.next_branch, self.next_branch + 1]
            self.next_branch += 2
            self.world.send(slot, Fork, branch=branch, children=branches)
        for index, child in enumerate(branches or [branch]):
            if index:
                self.world.send(slot, Extend, branch=child, parts=[Text(" the")])
            self.world.generate(
                slot,
                child,
                regex=regex,
                stream=stream,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                stop=stop,
                ignore_eos=ignore_eos,
            )
        self.go(steps)

    @rule(slot=SLOT, pick=PICK, steps=st.integers(5, 12), cancel=st.booleans(), fork=st.booleans())
    def stall(self, slot: int, pick: int, steps: int, cancel: bool, fork: bool) -> None:
        """A reader that stops reading, and perhaps goes; perhaps with a fork that waits for it."""
        branch = self.some_branch(slot, pick)
        op = self.world.generate(slot, branch, stream=True, max_tokens=20, ignore_eos=True)
        if fork:
            self.world.send(slot, Fork, branch=branch, children=[self.next_branch])
            self.world.generate(slot, self.next_branch)
        self.go(steps)
        if cancel:
            self.world.send(slot, Cancel, branch=self.next_branch if fork else branch)
            self.world.send(slot, Cancel, target=op)
        self.next_branch += fork

    @rule(slot=SLOT, pick=PICK, max_tokens=st.integers(3, 20))
    def write_twice(self, slot: int, pick: int, max_tokens: int) -> None:
        """Two children that write the same side by side, so that each page is there already when the other has it."""
        children = [self.next_branch, self.next_branch + 1]
        self.next_branch += 2
        self.world.send(slot, Fork, branch=self.some_branch(slot, pick), children=children)
        for child in children:
            self.world.generate(slot, child, max_tokens=max_tokens)
        self.go(max_tokens)

    @rule(slot=SLOT, pick=PICK, steps=st.integers(1, 9), end=st.sampled_from(["cancel", "preempt", "preempt, cancel"]))
    def interrupt(self, slot: int, pick: int, steps: int, end: str) -> None:
        """Work that ends, or has to begin again, while its long prompt is computed, if that comes in so many steps."""
        branch = self.next_branch
        self.next_branch += 1
        self.world.branch(slot, branch, *(Text(WORDS[(pick >> bit) % len(WORDS)] * 2) for bit in range(4)))
        op = self.world.generate(slot, branch)
        while steps and self.world.state_of(slot, op) != "prefill":
            steps -= 1
            self.go(1)
        if "preempt" in end:
            self.world.preempt(-1)  # what came last
        if "cancel" in end:
            self.world.send(slot, Cancel, target=op)
        self.go(1)

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        self.go(steps)

    @rule(steps=st.integers(4, 40))
    def many_steps(self, steps: int) -> None:
        for _ in range(steps):
            if not self.world.step():
                break

    @rule(slot=SLOT, pick=PICK, length=st.integers(0, 12), steps=STEPS)
    def rollback(self, slot: int, pick: int, length: int, steps: int) -> None:
        branch = self.some_branch(slot, pick)
        leaf = self.world.oracle.leaves[slot].get(branch)
        if leaf is not None and pick % 16:
            length = max(len(leaf.ids) - length, 0)
        self.world.send(slot, Rollback, branch=branch, length=length)
        self.go(steps)

    @rule(slot=SLOT, pick=PICK)
    def heal(self, slot: int, pick: int) -> None:
        """What a program does after a failure: back to where it was, and on."""
        poisoned = [leaf for leaf in self.world.oracle.leaves[slot].values() if leaf.poison is not None]
        if poisoned:
            leaf = poisoned[pick % len(poisoned)]
            self.world.send(slot, Rollback, branch=leaf.id, length=max(1, min(len(leaf.ids), 20)))
            self.world.generate(slot, leaf.id)

    @rule(slot=SLOT, picks=st.lists(PICK, max_size=4))
    def release(self, slot: int, picks: list[int]) -> None:
        self.world.send(slot, Release, branches=[self.some_branch(slot, pick) for pick in picks])

    @rule(slot=SLOT, pick=PICK)
    def cancel(self, slot: int, pick: int) -> None:
        self.world.send(slot, Cancel, target=self.some_operation(slot, pick))

    @rule(slot=SLOT, pick=PICK)
    def cancel_below(self, slot: int, pick: int) -> None:
        self.world.send(slot, Cancel, branch=self.some_branch(slot, pick), discard=pick % 2 == 0)

    @rule(slot=SLOT, pick=PICK, tokens=st.integers(1, 6), steps=STEPS)
    def credit(self, slot: int, pick: int, tokens: int, steps: int) -> None:
        streams = [o.id for o in self.world.sessions[slot].operations.values() if isinstance(o.work, Generation)]
        target = streams[pick % len(streams)] if streams else pick
        self.world.send(slot, Credit, target=target, tokens=tokens)
        self.go(steps)

    @rule(slot=SLOT, pick=PICK, what=st.sampled_from(["flush", "flush", "repeat", "nonsense", "death"]))
    def oddity(self, slot: int, pick: int, what: str) -> None:
        used = list(self.world.oracle.ops[slot])
        if what == "flush":
            self.world.send(slot, Flush)
        elif what == "repeat" and used:
            self.world.send(slot, Open, op=used[-1 - pick % len(used)], branch=10_000)
        elif what == "nonsense":
            self.world.send(slot, Cancel)
            self.world.send(slot, Stat)
            self.world.send(slot, Fork, branch=self.some_branch(slot, pick), children=[9_000, 9_000])
            self.world.send(slot, Fork, branch=9_999, children=[9_000])
        elif what == "death" and pick < 48:
            self.world.close(slot)
            self.open(slot, "a b")

    @rule(seconds=st.sampled_from([0.1, 1.0, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.now += seconds

    @rule(pages=st.integers(1, 64), restore=st.booleans(), steps=STEPS)
    def resize_the_pool(self, pages: int, restore: bool, steps: int) -> None:
        if restore or self.world.stolen:
            self.world.give_back()
        else:
            self.world.steal(pages)
        self.go(steps)

    @rule(pick=PICK, steps=STEPS, cancel=st.booleans())
    def preempt(self, pick: int, steps: int, cancel: bool) -> None:
        preempted = self.world.preempt(pick)
        if preempted is not None and cancel:
            self.world.send(preempted[0], Cancel, target=preempted[1])
        self.go(steps)

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if hasattr(self, "world"):
            SEEN["rules"] += 1
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world") and self.world.is_sound:
            SEEN["runs"] += 1
            self.world.finish()


# What a run must have met, and how often at least, in ten thousand rules: a fuzz that meets nothing proves nothing.
MUST_SEE = {
    "step": 3000,
    "launched ahead": 1000,
    "hit": 100,
    "eviction": 300,
    "preemption": 20,
    "copy on write": 50,
    "twin": 3,
    "shrink": 20,
    "draft that came true": 10,
    "draft that did not": 10,
    "death": 10,
    "delta": 300,
    "finished by length": 150,
    "finished by stop": 20,
    "finished by choice": 100,
    "trie in less room than it has nodes": 10,
    "forced by a grammar": 50,
    "failed: cancelled": 30,
    "failed: dependency_failed": 50,
    "failed: overloaded": 20,
    "failed: protocol": 20,
    "failed: resource_exhausted": 20,
    "failed: timeout": 3,
    "cancel: queued": 3,
    "cancel: unborn": 2,
    "cancel: waiting": 10,
    "cancel: prefill": 5,
    "cancel: decode": 5,
    "cancel: preempted": 2,
    "cancel: paused decode": 2,
    "cancel: paused preempted": 2,
    "forced preemption: prefill": 5,
    "forced preemption: decode": 5,
    "forced preemption: paused decode": 5,
}


# What the first run draws shifts with every edit, and with what is imported: further rounds make up for its luck.
FURTHER_ROUNDS = 6
RUNS_PER_ROUND = 60


def drive(machine: type[EngineMachine], max_examples: int, **options: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=RULES_PER_RUN,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def too_seldom() -> dict[str, int]:
    """What was met less often than it must be, in as many rules as were run."""
    scale = min(SEEN["rules"] / 10_000, 1)
    return {name: SEEN[name] for name, least in MUST_SEE.items() if SEEN[name] < least * scale}


def test_the_engine_does_what_the_oracle_says_whatever_happens_in_whatever_order() -> None:
    SEEN.clear()
    drive(EngineMachine, max(1, OPERATIONS // RULES_PER_RUN) if OPERATIONS else 150, derandomize=not OPERATIONS)
    for number in range(FURTHER_ROUNDS):
        if not too_seldom():
            break
        # A class of its own for each seed, as the seed is an attribute of the class.
        again = seed(number)(type(f"{EngineMachine.__name__}{number}", (EngineMachine,), {}))
        drive(again, RUNS_PER_ROUND, derandomize=False, database=None)
    assert not too_seldom(), f"too seldom: {too_seldom()} of {SEEN}"
