"""A runtime process under more than it can take: readers that stall, clients that stop, floods of requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from peers import Peer
from processes import Served, end, memory_mb, python, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.runtime import protocol
from bough.runtime.protocol import SamplingParams, Text

CREDIT = 64
MAX_WAITING = 50
UNSENT_BYTES = 1 << 20
LEASE_S = 3.0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = f"--credit {CREDIT} --max-waiting {MAX_WAITING} --unsent-bytes {UNSENT_BYTES} --lease {LEASE_S}"
    options = f"{limits} --max-total-tokens 8192 --log-level info"
    with Served(tiny_checkpoint(), *options.split()) as served:
        with served.client():  # it listens from here on
            pass
        yield served


@pytest.fixture
def watcher(served: Served) -> Iterator[bo.RuntimeClient]:
    with served.client() as watcher:
        yield watcher


@bo.function
def story(s: bo.State, start: str) -> None:
    s += start
    s += bo.gen("story", max_tokens=40, ignore_eos=True)


def generate(op: int, branch: int, max_tokens: int, *, stream: bool = False) -> protocol.Generate:
    return protocol.Generate(op, branch, SamplingParams(max_tokens=max_tokens, ignore_eos=True), stream=stream)


def start_endless_streams(peer: Peer, count: int) -> None:
    for branch in range(1, count + 1):
        peer.request(protocol.Open(10 * branch, branch))
        peer.request(protocol.Extend(10 * branch + 1, branch, [Text("tree")]))
        peer.request(generate(10 * branch + 2, branch, 1000, stream=True))


def num(watcher: bo.RuntimeClient, name: str) -> int:
    return int(watcher.stats()[name])


def test_streams_that_nobody_reads_stop_at_their_credit_and_the_others_go_on(
    served: Served, watcher: bo.RuntimeClient
) -> None:
    before = num(watcher, "generated_tokens")
    with Peer(served.address) as stalled:
        stalled.hello()
        start_endless_streams(stalled, 4)
        wait_until(
            lambda: num(watcher, "generated_tokens") - before >= 4 * CREDIT, 20, "the streams use their credit up"
        )
        for state in within(30, lambda: story.run_batch([(f"tree {i}",) for i in range(8)], backend=watcher)):
            assert state.error() is None
            assert len(state.get_meta_info("story")["token_ids"]) == 40
        streamed = num(watcher, "generated_tokens") - before - 8 * 40
        # A token is paid for with the delta that holds it: one that ends inside a character waits for up to three more.
        assert 4 * CREDIT <= streamed <= 4 * (CREDIT + 3), "a stalled stream went on"
        deltas = [reply for reply in stalled.arrived() if isinstance(reply, protocol.Delta)]
        assert {delta.op for delta in deltas} == {12, 22, 32, 42}, "what was generated before the stall can be read"
        for branch in range(1, 5):
            stalled.request(protocol.Credit(10 * branch + 2, CREDIT))
        wait_until(
            lambda: num(watcher, "generated_tokens") - before >= 8 * CREDIT + 8 * 40,
            20,
            "they go on once they are read",
        )


def test_a_flood_is_refused_with_a_hint_and_what_was_taken_is_carried_out(
    served: Served, watcher: bo.RuntimeClient
) -> None:
    flood = 10 * MAX_WAITING
    with Peer(served.address) as peer:
        peer.hello()
        peer.request(protocol.Open(2, 1))
        peer.request(protocol.Extend(3, 1, [Text("tree")]))
        os.kill(served.pid, signal.SIGSTOP)  # so that the flood arrives as one, however slowly it is sent
        for op in range(10, 10 + flood):
            peer.request(generate(op, 1, 1))
        os.kill(served.pid, signal.SIGCONT)
        answers: dict[int, protocol.Reply] = {}
        while len(answers) < flood:
            reply = peer.reply(30)
            if reply.op >= 10:
                assert reply.op not in answers, "answered twice"
                answers[reply.op] = reply
    refused = [reply for reply in answers.values() if isinstance(reply, protocol.Failed)]
    assert {reply.kind for reply in refused} == {"overloaded"}
    assert all(float(reply.details["retry_after_s"] or 0) > 0 for reply in refused)
    assert all(reply.details["limit"] == MAX_WAITING for reply in refused)
    done = [reply for reply in answers.values() if isinstance(reply, protocol.Generated)]
    assert len(done) >= MAX_WAITING
    assert len(done) + len(refused) == flood
    assert within(20, story.run("tree", backend=watcher).error) is None


def test_a_client_that_asks_and_never_reads_is_dropped_before_its_replies_fill_the_memory(
    served: Served, watcher: bo.RuntimeClient
) -> None:
    wait_until(lambda: num(watcher, "num_clients") == 1, 20, "the leases of earlier peers run out")
    with Peer(served.address, queue_len=1) as deaf:
        deaf.hello()
        assert num(watcher, "num_clients") == 2
        before = memory_mb(served.pid)
        op = 10

        def ask_more() -> bool:
            nonlocal op
            for _ in range(500):
                deaf.request(protocol.Stat(op))
                op += 1
            return num(watcher, "num_clients") == 1

        wait_until(ask_more, 60, "it is dropped")
        assert memory_mb(served.pid) - before < 64
        assert "it reads nothing" in served.log.read_text()
    assert within(20, story.run("tree", backend=watcher).error) is None


STREAMING_CLIENT = """
import itertools, sys
import bough as bo

@bo.function
def endless(s):
    s += "tree"
    for number in itertools.count():  # a single gen might be over before the process is stopped
        (f,) = s.fork(1)
        f += bo.gen("story", max_tokens=400, ignore_eos=True)
        for chunk in f.text_iter("story"):
            pass
        if number == 0:
            print("running", flush=True)

with bo.RuntimeClient(sys.argv[1]) as client:
    state = endless.run(backend=client, stream=True)
    print(type(state.error()).__name__, flush=True)
"""


def test_a_client_that_is_stopped_loses_its_lease_and_is_told_when_it_wakes(
    served: Served, watcher: bo.RuntimeClient
) -> None:
    child = python("-c", STREAMING_CLIENT, served.address)
    try:
        assert child.stdout is not None
        assert within(30, child.stdout.readline).strip() == "running"
        wait_until(lambda: num(watcher, "num_clients") == 2, 20, "the leases of earlier peers run out")
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: num(watcher, "num_clients") == 1, 20, "its lease runs out")
        assert (num(watcher, "num_branches"), num(watcher, "num_running")) == (0, 0)
        assert within(20, story.run("tree", backend=watcher).error) is None
        os.kill(child.pid, signal.SIGCONT)
        assert within(30, child.stdout.readline).strip() == "RuntimeLost"
        assert within(20, child.wait) == 0
    finally:
        end(child)
