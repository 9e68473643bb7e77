"""A runtime process against peers that send anything: it answers or drops, goes on, and serves the others."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq
from peers import Peer
from processes import Served, memory_mb, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.runtime import protocol
from bough.runtime.protocol import SamplingParams, Text

PREFIX = protocol.prefix(protocol.REQUEST)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(tiny_checkpoint(), "--max-total-tokens", "4096") as served:
        with served.client():  # it listens from here on
            pass
        yield served


@pytest.fixture(autouse=True)
def still_serving(served: Served) -> Iterator[None]:
    """Whatever a test did, another client is served afterwards."""
    yield
    assert served.process.poll() is None, served.log.read_text()
    with served.client() as client:
        state = bo.State(client)
        state += "The tree"
        state += bo.gen("new", max_tokens=4, temperature=0, ignore_eos=True)
        assert len(within(20, lambda: state.get_meta_info("new"))["token_ids"]) == 4


@pytest.fixture
def peer(served: Served) -> Iterator[Peer]:
    with Peer(served.address) as peer:
        yield peer


def encoded(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], "at least 2 frames"),
        ([PREFIX], "at least 2 frames"),
        ([b"GET / HTTP/1.1", b"Host: x"], "not a bough prefix"),
        ([b"B\x07\x00\x00", encoded(t="ping", op=2)], "version 7 is not supported, this side speaks 2"),
        ([b"B\x02\x00\x01", encoded(t="ping", op=2)], "kind 1 is not expected"),
        ([PREFIX, b""], "not a request"),
        ([PREFIX, b"\xc1"], "not a request"),
        ([PREFIX, b"\x91" * 100_000], "not a request"),
        ([PREFIX, b"\xdd\xff\xff\xff\xff"], "not a request"),
        ([PREFIX, encoded(t="ping", op=2)[:-1]], "not a request"),
        ([PREFIX, encoded(t="shutdown", op=2)], "not a request"),
        ([PREFIX, encoded(op=2)], "not a request"),
        ([PREFIX, encoded(t="ping", op=2, evil=True)], "not a request"),
        ([PREFIX, encoded(t="ping", op=-1)], "op must be between 0"),
        ([PREFIX, encoded(t="ping", op="two")], "not a request"),
        ([PREFIX, encoded(t="open", op=2, branch=1 << 64 - 1)], "branch must be between 0"),
        ([PREFIX, *[b"x"] * 2000], "at most 1026 frames"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[-1][:12]),
)
def test_frames_that_are_no_request_are_answered_with_a_failure(peer: Peer, frames: list[bytes], words: str) -> None:
    peer.hello()
    peer.send(*frames)
    reply = peer.reply()
    assert isinstance(reply, protocol.Failed)
    assert reply.kind == "protocol"
    assert words in reply.message


def test_whoever_did_not_say_hello_is_told_so(peer: Peer) -> None:
    peer.request(protocol.Open(3, 1))
    reply = peer.reply()
    assert isinstance(reply, protocol.Failed)
    assert (reply.op, reply.kind) == (3, "unknown_client")
    assert "say hello first" in reply.message


def test_an_operation_id_is_never_used_twice(peer: Peer) -> None:
    peer.hello()
    peer.request(protocol.Open(2, 1))
    assert isinstance(peer.reply(), protocol.Ok)
    peer.request(protocol.Extend(3, 1, [Text("The tree")]))
    assert isinstance(peer.reply(), protocol.Extended)
    peer.request(protocol.Generate(4, 1, SamplingParams(max_tokens=100, ignore_eos=True)))
    for op in (4, 3, 2):
        peer.request(protocol.Extend(op, 1, [Text("twice")]))
    replies = [peer.reply() for _ in range(4)]
    refused = [reply for reply in replies if isinstance(reply, protocol.Failed)]
    (done,) = [reply for reply in replies if isinstance(reply, protocol.Generated)]
    assert sorted(reply.op or 0 for reply in refused) == [2, 3, 4]
    assert done.usage.completion_tokens == 100


def test_a_fork_behind_the_release_of_its_parent_fails_with_all_that_waits_for_it(peer: Peer) -> None:
    peer.hello()
    peer.request(protocol.Open(2, 1))
    peer.request(protocol.Extend(3, 1, [Text("The tree")]))
    peer.request(protocol.Generate(4, 1, SamplingParams(max_tokens=50, ignore_eos=True)))
    peer.request(protocol.Release(5, [1]))
    peer.request(protocol.Fork(6, 1, [2]))
    peer.request(protocol.Extend(7, 2, [Text("never")]))
    replies = {reply.op: reply for reply in (peer.reply(5) for _ in range(6))}
    assert isinstance(replies[4], protocol.Generated)
    assert isinstance(replies[6], protocol.Failed)
    assert isinstance(replies[7], protocol.Failed)


@pytest.mark.parametrize(
    ("request_", "buffers"),
    [
        (protocol.Extend(3, 1, [protocol.Tokens(0)]), []),
        (protocol.Extend(3, 1, [protocol.Tokens(-1)]), [b"\0" * 4]),
        (protocol.Extend(3, 1, [protocol.Tokens(0)]), [b"\0" * 5]),
        (protocol.Extend(3, 1, [protocol.Tokens(0)]), [protocol.encode_tokens([1 << 30])]),
        (protocol.Extend(3, 1, [protocol.Tokens(0)]), [protocol.encode_tokens([-1])]),
        (protocol.Extend(3, 99, [Text("x")]), []),
        (protocol.Fork(3, 1, [1]), []),
        (protocol.Fork(3, 1, [7, 7]), []),
        (protocol.Fork(3, 1, []), []),
        (protocol.Fork(3, 1, list(range(10, 5000))), []),
        (protocol.Rollback(3, 1, -1), []),
        (protocol.Rollback(3, 1, 1 << 40), []),
        (protocol.Generate(3, 1, SamplingParams()), []),
        (protocol.Select(3, 1, []), []),
        (protocol.Cancel(3), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_requests_that_cannot_be_are_refused_by_their_id(
    peer: Peer, request_: protocol.Request, buffers: Sequence[bytes]
) -> None:
    peer.hello()
    peer.request(protocol.Open(2, 1))
    assert isinstance(peer.reply(), protocol.Ok)
    peer.request(request_, *buffers)
    reply = peer.reply()
    assert isinstance(reply, protocol.Failed)
    assert reply.op == 3
    assert reply.kind in ("invalid_request", "protocol")


def test_a_frame_beyond_the_limit_costs_its_sender_the_connection_and_nobody_memory(served: Served, peer: Peer) -> None:
    peer.hello()
    before = memory_mb(served.pid)
    monitor = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        peer.send(PREFIX, bytes(protocol.MAX_FRAME_BYTES + 1))
        assert monitor.poll(20_000), "the runtime did not hang up"
    finally:
        peer.socket.disable_monitor()
        monitor.close(0)
    assert memory_mb(served.pid) - before < 100


def test_a_frame_just_within_the_limit_is_read_and_refused(served: Served, peer: Peer) -> None:
    peer.hello()
    before = memory_mb(served.pid)
    peer.send(PREFIX, bytes(protocol.MAX_FRAME_BYTES))
    reply = peer.reply(20)
    assert isinstance(reply, protocol.Failed)
    wait_until(lambda: memory_mb(served.pid) - before < 150, 10, "the frame is freed")


FRAMES = int(os.environ.get("BOUGH_FUZZ_FRAMES", "10000"))


def mutated(rng: random.Random) -> list[bytes]:
    """Return frames near enough to real ones to get past the first checks."""
    branch = rng.randrange(6)
    requests: list[protocol.Request] = [
        protocol.Open(rng.randrange(1 << 20), branch),
        protocol.Extend(rng.randrange(1 << 20), branch, [Text("a tree"), protocol.Tokens(0)], rng.random() < 0.5),
        protocol.Extend(rng.randrange(1 << 20), branch, [protocol.RoleBegin("user"), Text("x"), protocol.RoleEnd()]),
        protocol.Fork(rng.randrange(1 << 20), branch, [rng.randrange(8) for _ in range(rng.randrange(4))]),
        protocol.Generate(rng.randrange(1 << 20), branch, SamplingParams(max_tokens=2), rng.random() < 0.5),
        protocol.Select(rng.randrange(1 << 20), branch, ["yes", "no"]),
        protocol.Rollback(rng.randrange(1 << 20), branch, rng.randrange(4)),
        protocol.Cancel(rng.randrange(1 << 20), branch=branch),
        protocol.Release(rng.randrange(1 << 20), [branch]),
        protocol.Credit(rng.randrange(1 << 20), rng.randrange(-5, 5)),
        protocol.Ping(rng.randrange(1 << 20)),
    ]
    frames = [bytearray(frame) for frame in protocol.encode_request(rng.choice(requests), [bytes(8)])]
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        frame = rng.choice(frames)
        match rng.randrange(4):
            case 0 if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 1:
                del frame[rng.randrange(len(frame) + 1) :]
            case 2:
                frame.insert(rng.randrange(len(frame) + 1), rng.randrange(256))
            case _:
                frames.insert(rng.randrange(len(frames) + 1), bytearray(rng.randbytes(rng.randrange(16))))
    return [bytes(frame) for frame in frames]


def test_mutated_messages_by_the_thousand_do_no_harm(served: Served, peer: Peer) -> None:
    """BOUGH_FUZZ_FRAMES=1000000 makes it the long run."""
    rng = random.Random(20)
    peer.hello()
    before = memory_mb(served.pid)
    until = time.monotonic() + 60 + FRAMES / 100  # a hang, not a slow machine
    answers = 0
    for index in range(FRAMES):
        peer.send(*mutated(rng))
        if index % 100 == 0:
            answers += peer.drain()
            assert time.monotonic() < until, f"stuck after {index} messages"
    with served.client() as client:
        wait_until(lambda: client.stats()["num_queued"] == client.stats()["num_running"] == 0, 10, "all is carried out")
        stats = client.stats()
        assert int(stats["num_bad_frames"]) > 1000
    assert answers + peer.drain() > 3000
    assert memory_mb(served.pid) - before < 60


def test_a_flood_of_hellos_without_end_is_bounded(served: Served) -> None:
    peers = [Peer(served.address) for _ in range(40)]
    try:
        assert len({peer.hello().epoch for peer in peers}) == 1
    finally:
        for peer in peers:
            peer.__exit__()
