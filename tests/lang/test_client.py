"""The client against a scripted peer: pipelining, routing, credit, and every way a peer can go."""

from __future__ import annotations

import functools
import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from loopback import WELCOME, Loopback, plain_answer
from processes import within

import bough as bo
from bough import RuntimeClient, State
from bough.runtime import protocol
from bough.runtime.protocol import SamplingParams

WAIT_S = 10.0


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


@pytest.fixture
def peer(address: str) -> Iterator[Loopback]:
    with Loopback(address) as loopback:
        yield loopback


@pytest.fixture
def client(peer: Loopback) -> Iterator[RuntimeClient]:
    with RuntimeClient(peer.address) as connected:
        yield connected


def ask(client: RuntimeClient) -> State:
    s = State(client)
    s += "prompt " + bo.gen("x", seed=1)
    return s


# --------------------------------------------------------------------------------------------- working


def test_a_program_runs_over_the_wire(client: RuntimeClient) -> None:
    @bo.function
    def program(s: bo.State) -> None:
        s += bo.system("sys") + bo.user("hi")
        forks = s.fork(3)
        forks += bo.assistant(bo.gen("draft"))
        forks.join()
        s += bo.assistant(bo.select("best", ["a", "b"]))

    state = program.run(backend=client)
    assert state["draft"] == ["one two three"] * 3
    assert state["best"] == "a"
    assert state.text() == "<system>sys</><user>hi</><assistant>a</>"
    meta = state.get_meta_info("draft")[0]
    assert (meta["cached_tokens"], meta["completion_tokens"], meta["token_ids"]) == (2, 3, [1, 2, 3])
    assert state.get_meta_info("best")["distribution"] == [0.5, 0.5]


def test_everything_is_sent_before_anything_is_answered(peer: Loopback, client: RuntimeClient) -> None:
    peer.hold()
    s = State(client)
    s += "a" + bo.gen("x", max_tokens=3)
    forks = s.fork(2)
    forks += "b" + bo.gen("y")
    sent = peer.expect(9)[1:]
    assert [type(request).__name__ for request in sent] == [
        "Open", "Extend", "Generate", "Fork", "Extend", "Generate", "Extend", "Generate",
    ]  # fmt: skip
    root = sent[0].branch
    assert [request.branch for request in sent] == [root] * 4 + [sent[3].children[0]] * 2 + [sent[3].children[1]] * 2
    assert sent[1].parts == [protocol.Text("a")]
    assert sent[2].params == SamplingParams(max_tokens=3, seed=sent[2].params.seed)
    assert len({request.op for request in sent}) == 8
    assert not s._interpreter.strand.items[1].replies[0].done()  # type: ignore[union-attr]
    peer.release()
    assert (s["x"], forks[1]["y"]) == ("one two three",) * 2


def test_branches_are_released_together_after_a_join_and_when_dropped(peer: Loopback, client: RuntimeClient) -> None:
    s = State(client)
    forks = s.fork(3)
    forks += bo.gen("x")
    forks.join()
    children = peer.expect(1, protocol.Fork)[0].children
    assert peer.expect(1, protocol.Release)[0].branches == children
    root = peer.expect(1, protocol.Open)[0].branch
    del s, forks
    gc.collect()
    assert peer.expect(2, protocol.Release)[1].branches == [root]


def test_each_reply_finds_its_own_future_from_many_threads(client: RuntimeClient) -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for i in range(50):
            branch = client.open()
            length = client.rollback(branch, number * 1000 + i).result(WAIT_S).length
            if length != number * 1000 + i:
                wrong.append((number, i, length))
            client.release([branch])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []


def test_one_thread_serves_any_number_of_programs(client: RuntimeClient) -> None:
    before = threading.active_count()
    states = [ask(client) for _ in range(200)]
    forks = [fork for state in states for fork in state.fork(8)]
    assert threading.active_count() == before
    assert {state["x"] for state in [*states, *forks]} == {"one two three"}


def test_streams_arrive_and_are_granted_credit(peer: Loopback, client: RuntimeClient) -> None:
    @bo.function
    def program(s: bo.State) -> None:
        s += "a " + bo.gen("x")

    state = program.run(backend=client, stream=True)
    assert list(state.text_iter()) == ["a ", "one ", "two ", "three"]
    generate = peer.expect(1, protocol.Generate)[0]
    assert generate.stream
    peer.wait_for(lambda: bool(peer.credits))
    assert peer.credits[0] == protocol.Credit(generate.op, 2)  # a quarter of the peer's 8


def test_what_has_arrived_is_read_though_the_runtime_has_gone_since(peer: Loopback, client: RuntimeClient) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def read_slowly(delta: Any) -> None:
        has_begun.set()
        assert may_go_on.wait(WAIT_S)

    peer.hold()
    running = client.generate(client.open(), SamplingParams(), on_delta=read_slowly)
    op = peer.expect(1, protocol.Generate)[0].op
    for _ in range(500):  # ZeroMQ looks for news of the connection once in a hundred messages
        peer.send([protocol.Delta(op, "one ", protocol.encode_tokens([1]))])
    assert has_begun.wait(WAIT_S)
    peer.send([protocol.Generated(op, "one two", 0, "stop", 8, protocol.Usage())], [protocol.encode_tokens([1, 2])])
    peer.leave()
    may_go_on.set()
    assert running.result(WAIT_S).text == "one two"


def test_timeouts_travel_with_the_operation(peer: Loopback, client: RuntimeClient) -> None:
    s = State(client)
    s += bo.gen("x", timeout=2.5) + bo.select("y", ["a"], timeout=3)
    assert peer.expect(1, protocol.Generate)[0].timeout_s == 2.5
    assert peer.expect(1, protocol.Select)[0].timeout_s == 3.0


def test_counters_info_flush_score_and_cancel(peer: Loopback, client: RuntimeClient) -> None:
    assert client.stats() == {"steps": 3, "model": "loopback"}
    client.flush_cache()
    client.drain()
    branch = client.open()
    assert client.score(branch, ["a", "b"], "token_length_normalized").result(WAIT_S).index == 0
    assert client.cancel(branch).result(WAIT_S) == 1
    info = client.server_info()
    assert (info["model"], info["context_len"], info["address"]) == ("loopback", 1024, peer.address)
    assert client.welcome.epoch == WELCOME.epoch
    assert client.bytes_out > 0
    assert client.bytes_in > 0
    assert "model loopback" in repr(client)


def test_heartbeats_go_on_while_nothing_happens(peer: Loopback, client: RuntimeClient) -> None:
    peer.wait_for(lambda: peer.pings >= 3)
    assert client.stats()


# --------------------------------------------------------------------------------------------- failing operations


def failing(kind: Any, cause_kind: type[Any]) -> Any:
    """Return answers where operations of one type fail, and all later ones of the branch depend on it."""
    failed: dict[Any, int] = {}

    def answer(request: Any) -> Any:
        branch = getattr(request, "branch", None)
        if isinstance(request, cause_kind) and branch not in failed:
            failed[branch] = request.op
            return [protocol.Failed(request.op, kind, "the first failure", {"limit": 7})], []
        if branch in failed and not isinstance(request, protocol.Release):
            return [protocol.Failed(request.op, "dependency_failed", "depends", cause=failed[branch])], []
        return plain_answer(request)

    return answer


@pytest.mark.parametrize("at", [protocol.Open, protocol.Extend, protocol.Generate])
def test_what_depends_on_a_failed_operation_raises_the_original(address: str, at: type[Any]) -> None:
    with Loopback(address, failing("context_overflow", at)), RuntimeClient(address) as client:
        s = State(client)
        s += "a" + bo.gen("x") + "b" + bo.gen("y")
        for name in "xy":
            with pytest.raises(bo.ContextOverflow, match="the first failure") as caught:
                s[name]
            assert caught.value.details == {"limit": 7}
        assert isinstance(caught.value.__cause__, bo.ContextOverflow)
        assert isinstance(s.error(), bo.ContextOverflow)
        other = State(client)
        other += bo.gen("fine")  # another branch, and another answer of the peer
        assert isinstance(other.error(), (bo.ContextOverflow, type(None)))


def test_a_failure_whose_cause_is_forgotten_is_still_a_failure(address: str) -> None:
    def answer(request: Any) -> Any:
        if isinstance(request, protocol.Generate):
            return [protocol.Failed(request.op, "dependency_failed", "operation 9 failed", cause=999_999)], []
        return plain_answer(request)

    with Loopback(address, answer), RuntimeClient(address) as client, pytest.raises(bo.BackendError, match="9 failed"):
        ask(client)["x"]


def test_what_cannot_be_sent_is_refused_where_it_is_appended(client: RuntimeClient) -> None:
    s = State(client)
    s += "half a character: \ud800"
    with pytest.raises(bo.InvalidRequest, match="lone surrogate"):
        s += bo.gen("x")
    s = State(client)
    s += "x" * (protocol.MAX_FRAME_BYTES + 1)
    with pytest.raises(bo.InvalidRequest, match="one append may have 67108864 bytes"):
        s += bo.gen("x")
    assert client.stats()


def test_the_rest_of_a_dropped_stream_goes_nowhere(peer: Loopback, client: RuntimeClient) -> None:
    peer.send([protocol.Delta(12345, "late", protocol.encode_tokens([1])), protocol.Ok(12346)], [])
    assert client.stats()


# --------------------------------------------------------------------------------------------- losing the peer


def lost(client: RuntimeClient, waiting: list[State], words: str, kind: type[bo.BoughError] = bo.RuntimeLost) -> None:
    """Every waiter, and every later call, is told; soon."""
    for state in waiting:
        with pytest.raises(kind, match=words):
            within(10, functools.partial(state.__getitem__, "x"))
        assert isinstance(state.error(), bo.RuntimeLost)
    for call in (client.open, client.stats, lambda: ask(client)):
        with pytest.raises(kind, match=words):
            call()
    client.release([1])


def test_a_dead_peer_wakes_every_waiter(peer: Loopback, client: RuntimeClient) -> None:
    peer.hold()
    waiting = [ask(client) for _ in range(20)]
    woken: list[BaseException | None] = []
    threads = [threading.Thread(target=lambda s=s: woken.append(s.error())) for s in waiting]
    for thread in threads:
        thread.start()
    peer.expect(20, protocol.Generate)
    peer.die()
    for thread in threads:
        thread.join(WAIT_S)
    assert [type(error) for error in woken] == [bo.RuntimeLost] * 20
    lost(client, waiting, "closed the connection")


def test_a_join_of_lost_branches_raises_where_they_are_read(peer: Loopback, client: RuntimeClient) -> None:
    s = State(client)
    peer.hold()
    forks = s.fork(2)
    forks += bo.assistant(bo.gen("x"))
    peer.expect(2, protocol.Generate)
    peer.die()
    forks.join()
    with pytest.raises(bo.RuntimeLost):
        s["x"]
    for fork in forks:
        assert isinstance(fork.error(), bo.RuntimeLost)
        with pytest.raises(bo.RuntimeLost):
            fork.text()


def test_a_process_that_ended_is_told_with_its_reason(peer: Loopback) -> None:
    reason: list[str] = []
    with RuntimeClient(peer.address, watch=lambda: reason[0] if reason else None) as client:
        peer.hold()
        waiting = [ask(client)]
        reason.append("the runtime (pid 1) was killed by SIGKILL")
        lost(client, waiting, "was killed by SIGKILL")


def test_a_silent_peer_is_lost_after_its_time(peer: Loopback) -> None:
    with RuntimeClient(peer.address, silence_timeout=0.3) as client:
        peer.mute()
        lost(client, [ask(client)], "has not answered a ping for 0.3 s")


def test_a_peer_of_another_epoch_is_another_peer(address: str) -> None:
    def answer(request: Any) -> Any:
        if isinstance(request, protocol.Ping):
            return [protocol.Pong(request.op, 8, 0, 0, 0, "serving")], []
        return ([], []) if isinstance(request, protocol.Generate) else plain_answer(request)

    with Loopback(address, answer), RuntimeClient(address) as client:
        lost(client, [ask(client)], r"was restarted \(epoch 8\)")


GARBAGE: list[tuple[list[bytes], str]] = [
    ([b"junk"], "at least 2 frames"),
    ([b"junk", b"junk"], "not a bough prefix"),
    ([protocol.prefix(protocol.REPLIES), b"\xc1"], "not replies of this protocol"),
    ([protocol.prefix(protocol.REPLIES), b"\x91\x81\xa1t\xa4eval"], "not replies of this protocol"),
    ([bytes((0x42, 9, 0, 1)), b"\x90"], "protocol version 9 is not supported"),
    ([protocol.prefix(protocol.REQUEST), b"\x90"], "kind 0 is not expected"),
    ([protocol.prefix(protocol.REPLIES), b"\x90", *[b""] * protocol.MAX_FRAMES], "at most 1026 frames"),
]


@pytest.mark.parametrize(("frames", "words"), GARBAGE)
def test_garbage_from_the_peer_ends_the_connection_and_every_wait(
    peer: Loopback, client: RuntimeClient, frames: list[bytes], words: str
) -> None:
    peer.hold()
    waiting = [ask(client), ask(client)]
    peer.send_raw(frames)
    lost(client, waiting, words, bo.ProtocolMismatch)


@pytest.mark.parametrize(
    ("reply", "buffers", "words"),
    [
        (lambda op: protocol.Generated(op, "x", 3, "stop", 1, protocol.Usage()), [], "buffer 3 is not in this message"),
        (lambda op: protocol.Generated(op, "x", 0, "stop", 1, protocol.Usage()), [b"abc"], "multiple of 4 bytes"),
        (lambda op: protocol.Delta(op, "x", b"abc"), [], "multiple of 4 bytes"),
        (lambda op: protocol.Ok(op), [], "a Ok in answer to operation"),
    ],
)
def test_a_reply_that_makes_no_sense_ends_the_connection(
    peer: Loopback, client: RuntimeClient, reply: Any, buffers: list[bytes], words: str
) -> None:
    peer.hold()
    waiting = [ask(client), ask(client)]
    peer.send([reply(peer.expect(1, protocol.Generate)[0].op)], buffers)
    lost(client, waiting, words, bo.ProtocolMismatch)


def test_a_choice_that_was_not_offered_ends_the_connection(address: str) -> None:
    def answer(request: Any) -> Any:
        replies, buffers = plain_answer(request)
        if isinstance(request, protocol.Select):
            replies = [msgspec.structs.replace(replies[0], index=5)]
        return replies, buffers

    with Loopback(address, answer), RuntimeClient(address) as client:
        s = State(client)
        s += bo.select("x", ["a", "b"])
        lost(client, [s], "choice 5 of 2", bo.ProtocolMismatch)


def test_a_frame_over_the_limit_ends_the_connection(peer: Loopback, client: RuntimeClient) -> None:
    peer.hold()
    waiting = [ask(client)]
    peer.send_raw([protocol.prefix(protocol.REPLIES), bytes(protocol.MAX_FRAME_BYTES + 1)])
    lost(client, waiting, "closed the connection")


def test_a_request_that_the_peer_could_not_read_ends_the_connection(peer: Loopback, client: RuntimeClient) -> None:
    peer.hold()
    waiting = [ask(client)]
    peer.send([protocol.Failed(None, "protocol", "what was that")])
    lost(client, waiting, "could not read a request: what was that")


def test_a_peer_that_has_forgotten_the_client_has_forgotten_all_of_it(peer: Loopback, client: RuntimeClient) -> None:
    """As when this process was stopped for longer than its lease: the first request since is told so, and all wait."""
    peer.hold()
    waiting = [ask(client), ask(client)]
    first = peer.expect(1, protocol.Generate)[0].op
    peer.send([protocol.Failed(first, "unknown_client", "say hello first")])
    lost(client, waiting, "forgot this client: say hello first")


# --------------------------------------------------------------------------------------------- connecting, closing


def test_nobody_at_the_address_is_told_in_time(address: str) -> None:
    path = address.removeprefix("ipc://")
    with pytest.raises(bo.RuntimeLost, match=rf"no runtime answered at {address} within 0.1 s: .* {path}") as lost:
        RuntimeClient(address, timeout=0.1)
    assert lost.value.details["path"] == path


def test_a_socket_that_is_not_there_is_not_waited_for_as_long_as_an_answer(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bough.client.SOCKET_S", 0.05)
    with pytest.raises(bo.RuntimeLost, match=r"within 0\.05 s: there is no socket"):
        RuntimeClient(address)


def test_a_runtime_that_begins_to_listen_in_time_is_found(address: str) -> None:
    begun: list[Loopback] = []
    starting = threading.Timer(0.1, lambda: begun.append(Loopback(address).__enter__()))
    starting.start()
    with RuntimeClient(address, timeout=WAIT_S) as late:
        assert late.server_info()["address"] == address
    starting.join()
    begun[0].__exit__(None, None, None)


def test_what_is_waited_for_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("bough.client.TELL_AFTER_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(bo.RuntimeLost, match=f"no runtime answered at {address} within 0.1 s"):
            RuntimeClient(address, timeout=0.1)
    assert f"waiting for a runtime to answer at {address}" in caplog.text


@pytest.mark.parametrize("wrong", ["nonsense", "http://localhost:1", "tcp://"])
def test_an_address_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(bo.InvalidRequest, match="cannot connect to"):
        RuntimeClient(wrong)


def test_a_client_without_keys_is_told_that_it_needs_some() -> None:
    public, secret = zmq.curve_keypair()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_publickey, router.curve_secretkey, router.curve_server = public, secret, True
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(bo.RuntimeLost, match="wants CURVE keys, and this client has none"):
            RuntimeClient(f"tcp://127.0.0.1:{port}")


def test_another_version_at_the_address_is_told(address: str) -> None:
    def refuse(request: Any) -> Any:
        return [protocol.Failed(None, "protocol", "protocol version 1 is not supported, this side speaks 2")], []

    with Loopback(address, refuse), pytest.raises(bo.ProtocolMismatch, match="this side speaks 2"):
        RuntimeClient(address)


def test_closing_ends_what_runs_gives_branches_back_and_is_idempotent(peer: Loopback, client: RuntimeClient) -> None:
    peer.hold()
    s = ask(client)
    peer.expect(1, protocol.Generate)
    client.close()
    client.close()
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        s["x"]
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        ask(client)
    root = peer.expect(1, protocol.Open)[0].branch
    assert [request.branch for request in peer.expect(1, protocol.Cancel)] == [root]
    assert peer.expect(1, protocol.Release)[0].branches == [root]


def test_a_dropped_client_closes_itself(peer: Loopback) -> None:
    before = set(threading.enumerate())
    client = RuntimeClient(peer.address)
    (thread,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "bough-client"]
    del client
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_forked_process_is_told_to_make_its_own_client(client: RuntimeClient, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(bo.InvalidRequest, match="after a fork, make a new one"):
        client.open()
    client.release([1])


def test_two_clients_do_not_meet(peer: Loopback, client: RuntimeClient) -> None:
    with RuntimeClient(peer.address) as other:
        states = [ask(backend) for backend in (client, other) * 20]
        assert {state["x"] for state in states} == {"one two three"}
    assert ask(client)["x"] == "one two three"


def test_curve_keys_come_all_three_or_not_at_all(address: str) -> None:
    with pytest.raises(bo.InvalidRequest, match="all three"):
        RuntimeClient(address, public_key="x")
