"""The link that outlives its runtime, over scripted peers that are lost and replaced."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loopback import Loopback, plain_answer

import bough as bo
from bough import RuntimeClient, State
from bough.backend import Delta
from bough.link import Link
from bough.recovery import MAX_RESTARTS, RecoveringLink
from bough.runtime import protocol
from bough.runtime.protocol import Text

WAIT_S = 10.0
Answer = Callable[[Any], Any]


class PeerLife:
    """A life whose runtime is a peer in this process."""

    def __init__(self, address: str, answer: Answer, *, is_holding: bool = False) -> None:
        self.peer = Loopback(address, answer)
        if is_holding:
            self.peer.hold()
        self.link = Link(address)
        self.pid = 0
        self.may_start = threading.Event()
        self.may_start.set()

    def start(self) -> protocol.Welcome:
        assert self.may_start.wait(WAIT_S)
        return self.link.start(WAIT_S)

    def end(self) -> None:
        self.link.stop()
        with contextlib.suppress(OSError):  # the test is letting it die just now
            self.peer.die()


class Lives:
    """Begins peers one after the other; `answers` and `prepare` say what becomes of the next one."""

    def __init__(self, folder: Path) -> None:
        self.lives: list[PeerLife] = []
        self.answers: list[Answer] = []
        self.prepare: Callable[[PeerLife], None] = lambda life: None
        self._folder = folder
        self._changed = threading.Condition()

    def begin(self) -> PeerLife:
        number = len(self.lives)
        answer = self.answers[number] if number < len(self.answers) else plain_answer
        life = PeerLife(f"ipc://{self._folder}/{number}", answer)
        self.prepare(life)
        with self._changed:
            self.lives.append(life)
            self._changed.notify_all()
        return life

    def peer(self, number: int) -> Loopback:
        """Wait for the life of that number to begin."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.lives) > number, WAIT_S)
        return self.lives[number].peer

    def client(self) -> RuntimeClient:
        life = self.begin()
        life.start()
        return RuntimeClient.over(RecoveringLink(self.begin, life, 7))


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    made = Lives(tmp_path)
    yield made
    for life in made.lives:
        life.may_start.set()
        life.end()


@pytest.fixture
def client(lives: Lives) -> Iterator[RuntimeClient]:
    with lives.client() as connected:
        yield connected


def names(peer: Loopback) -> list[str]:
    return [type(request).__name__ for request in peer.requests]


def ask(client: RuntimeClient) -> State:
    s = State(client)
    s += "prompt " + bo.gen("x")
    return s


def streaming(*texts: str) -> Answer:
    """A peer that streams these texts and never ends; what comes then has to wait for that."""
    streams: list[Any] = []

    def answer(request: Any) -> Any:
        if not isinstance(request, protocol.Generate):
            return ([], []) if streams and isinstance(request, protocol.Extend) else plain_answer(request)
        streams.append(request)
        return [protocol.Delta(request.op, text, protocol.encode_tokens([1])) for text in texts], []

    return answer


# --------------------------------------------------------------------------------------------- going on


def test_a_program_goes_on_where_it_was(lives: Lives, client: RuntimeClient) -> None:
    s = State(client)
    s += bo.user("hi") + bo.gen("x")
    forks = s.fork(2)
    forks += bo.gen("y")
    assert forks[1]["y"] == "one two three"
    epoch = client.welcome.epoch
    lives.answers = [plain_answer, lambda request: _with_epoch(request, epoch + 1)]
    lives.peer(0).die()
    forks[0].__iadd__("more " + bo.gen("z"))
    assert forks[0]["z"] == "one two three"
    peer = lives.peer(1)
    peer.expect(9)
    assert names(peer)[:5] == ["Hello", "Open", "Extend", "Extend", "Fork"]
    after_fork: dict[Any, list[str]] = {}  # branches among each other go on in any order
    for request in peer.requests[5:9]:
        after_fork.setdefault(request.branch, []).append(type(request).__name__)  # type: ignore[union-attr]
    assert sorted(after_fork.values(), key=len) == [["Extend"], ["Extend", "Extend", "Generate"]]
    assert peer.requests[3].parts == [protocol.Tokens(0)]  # type: ignore[union-attr]
    assert s.text() == "<user>hi</>one two three"
    assert client.welcome.epoch == client.server_info()["epoch"] == epoch + 1
    assert client.address.endswith("/1")


def _with_epoch(request: Any, epoch: int) -> Any:
    replies, buffers = plain_answer(request)
    if isinstance(request, (protocol.Hello, protocol.Ping)):
        replies = [msgspec.structs.replace(reply, epoch=epoch) for reply in replies]
    return replies, buffers


def test_what_is_in_flight_is_sent_again_and_nobody_notices(lives: Lives, client: RuntimeClient) -> None:
    first = lives.peer(0)
    first.hold()
    states = [ask(client) for _ in range(3)]
    sent = first.expect(3, protocol.Generate)
    assert all(request.params.seed is not None for request in sent)
    first.die()
    assert [s["x"] for s in states] == ["one two three"] * 3
    again = lives.peer(1).expect(3, protocol.Generate)
    assert [(r.branch, r.params) for r in again] == [(r.branch, r.params) for r in sent]
    assert client.stats()["steps"] == 3


def test_nothing_is_restarted_before_something_is_sent(lives: Lives, client: RuntimeClient) -> None:
    s = ask(client)
    assert s["x"] == "one two three"
    lives.peer(0).die()
    lives.lives[0].link._thread.join(WAIT_S)  # type: ignore[union-attr]
    assert len(lives.lives) == 1
    s += bo.gen("y")
    assert s["y"] == "one two three"
    assert len(lives.lives) == 2


def test_what_is_sent_during_a_restart_waits_for_its_end(lives: Lives, client: RuntimeClient) -> None:
    lives.prepare = lambda life: life.may_start.clear()
    lives.peer(0).die()
    first = ask(client)
    lives.peer(1)
    second = ask(client)
    (fork,) = second.fork()
    fork += bo.select("y", ["a", "b"])
    assert client.server_info()["model"] == "loopback"
    with pytest.raises(bo.InvalidRequest, match="lone surrogate"):
        client.extend(client.open(), [Text("\ud800")])
    lives.lives[1].may_start.set()
    assert (first["x"], second["x"], fork["y"]) == ("one two three", "one two three", "a")


def test_a_stream_goes_on_after_what_was_delivered(lives: Lives) -> None:
    lives.answers = [streaming("one ", "tw")]
    with lives.client() as client:
        arrived = threading.Event()
        chunks: list[str] = []

        def on_delta(delta: Delta) -> None:
            chunks.append(delta.text)
            if delta.text == "tw":
                arrived.set()

        branch = client.open()
        client.extend(branch, [Text("a")])
        done = client.generate(branch, protocol.SamplingParams(), on_delta=on_delta)
        assert arrived.wait(WAIT_S)
        lives.peer(0).die()
        assert done.result(WAIT_S).text == "one two three"
        assert chunks == ["one ", "tw", "o ", "three"]


@pytest.mark.parametrize("delivered", [("uno ",), ("one two three four",), ("one ", "two two")])
def test_a_stream_that_comes_out_different_fails_and_with_it_what_depends_on_it(
    lives: Lives, delivered: tuple[str, ...]
) -> None:
    lives.answers = [streaming(*delivered)]
    arrived = threading.Event()

    def seen(delta: Delta) -> None:
        if delta.text == delivered[-1]:
            arrived.set()

    with lives.client() as client:
        branch, other = client.open(), client.open()
        client.extend(branch, [Text("a")])
        done = client.generate(branch, protocol.SamplingParams(), on_delta=seen)
        (child,) = client.fork(branch, 1)
        dependant = client.extend(child, [Text("b")])
        assert arrived.wait(WAIT_S)
        lives.peer(0).die()
        error = done.exception(WAIT_S)
        assert isinstance(error, bo.RuntimeLost)
        assert "came out different" in str(error)
        failure = dependant.exception(WAIT_S)
        assert isinstance(failure, bo.RuntimeLost)
        assert failure.__cause__ is error
        assert isinstance(client.extend(branch, [Text("c")]).exception(WAIT_S), bo.RuntimeLost)
        assert isinstance(client.extend(child, [Text("c")]).exception(WAIT_S), bo.RuntimeLost)
        assert client.extend(other, [Text("c")]).result(WAIT_S).length == 3
        assert lives.peer(1).expect(1, protocol.Cancel)[0].branch == branch


def test_what_was_released_is_not_made_again(lives: Lives, client: RuntimeClient) -> None:
    s = ask(client)
    forks = s.fork(2)
    forks += "in a fork" + bo.gen("y")
    assert forks[0]["y"]
    forks.join()
    assert s["y"]
    gone = ask(client)
    assert gone["x"]
    del gone, forks
    gc.collect()
    lives.peer(0).die()
    s += bo.gen("z")
    assert s["z"]
    assert names(lives.peer(1)) == ["Hello", "Open", "Extend", "Extend", "Generate"]


def test_a_branch_released_by_the_garbage_collector_inside_the_lock_is_released(client: RuntimeClient) -> None:
    link = client._link
    assert isinstance(link, RecoveringLink)
    s = ask(client)
    assert s["x"]
    with link._lock:
        del s
        gc.collect()
        assert len(link._ledger) == 1
    client.flush_cache()
    assert len(link._ledger) == 0


def test_a_failure_from_before_is_told_to_what_depends_on_it(lives: Lives) -> None:
    def full(request: Any) -> Any:
        if isinstance(request, protocol.Generate):
            return [protocol.Failed(request.op, "context_overflow", "too long", {"limit": 7})], []
        return plain_answer(request)

    lives.answers = [full]
    with lives.client() as client:
        s, other = ask(client), State(client)
        with pytest.raises(bo.ContextOverflow):
            s["x"]
        lives.peer(0).die()
        other += bo.gen("fine")
        assert other["fine"]
        s += "more" + bo.gen("y")
        with pytest.raises(bo.ContextOverflow, match="too long") as caught:
            s["y"]
        assert caught.value.details == {"limit": 7}
        assert isinstance(caught.value.__cause__, bo.ContextOverflow)
        (fork,) = s.fork()
        fork += bo.gen("z")
        with pytest.raises(bo.ContextOverflow):
            fork["z"]
        branch = s._interpreter.lease.branch
        assert branch is not None
        assert client.rollback(branch, 1).result(WAIT_S).length == 1
        assert client.extend(branch, [Text("healed")]).result(WAIT_S).length == 3


def test_a_deadline_does_not_begin_anew(lives: Lives, client: RuntimeClient) -> None:
    lives.peer(0).hold()
    s = State(client)
    s += "a" + bo.gen("x", timeout=1000) + bo.gen("y", timeout=0.001)
    lives.peer(0).expect(2, protocol.Generate)
    lives.peer(0).die()
    assert s["y"]
    late, later = lives.peer(1).expect(2, protocol.Generate)
    assert 990 < late.timeout_s < 1000
    assert later.timeout_s == 0.001


def test_questions_and_cancels_in_flight_are_asked_again(lives: Lives, client: RuntimeClient) -> None:
    lives.peer(0).hold()
    s = ask(client)
    cancelled = client.cancel(s._interpreter.lease.branch or 0)
    stats: list[Any] = []
    asking = threading.Thread(target=lambda: stats.append(client.stats()))
    asking.start()
    lives.peer(0).expect(1, protocol.Stat)
    lives.peer(0).die()
    assert cancelled.result(WAIT_S) == 1
    asking.join(WAIT_S)
    assert stats == [{"steps": 3, "model": "loopback"}]
    assert names(lives.peer(1))[-2:] == ["Cancel", "Stat"]


def test_many_threads_lose_their_runtime_and_all_get_their_own(lives: Lives, client: RuntimeClient) -> None:
    wrong: list[Any] = []
    rounds = threading.Barrier(5)

    def work(number: int) -> None:
        for turn in range(2):
            for i in range(50):
                branch = client.open()
                length = client.rollback(branch, number * 1000 + i).result(WAIT_S).length
                if length != number * 1000 + i:
                    wrong.append((number, i, length))
                client.release([branch])
                if i == 10:
                    rounds.wait(WAIT_S)
            assert turn < 2

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2):
        rounds.wait(WAIT_S)
        lives.peer(number).die()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    link = client._link
    assert isinstance(link, RecoveringLink)
    client.flush_cache()
    assert len(link._ledger) == 0


# --------------------------------------------------------------------------------------------- the end


def test_a_runtime_that_is_lost_again_and_again_is_given_up(lives: Lives, client: RuntimeClient) -> None:
    lives.prepare = lambda life: life.peer.hold() if not lives.lives else None

    def deadly(request: Any) -> Any:
        if isinstance(request, protocol.Generate):
            return [protocol.Failed(None, "protocol", "no")], []
        return plain_answer(request)

    lives.answers = [deadly] * 10
    s = State(client)
    lives.peer(0).die()
    s += "a" + bo.gen("x")
    with pytest.raises(bo.RuntimeLost, match="was restarted 3 times within 60 s; then") as caught:
        s["x"]
    assert isinstance(caught.value.__cause__, bo.RuntimeLost)
    assert len(lives.lives) == 1 + MAX_RESTARTS
    with pytest.raises(bo.RuntimeLost, match="was restarted 3 times"):
        client.stats()
    assert client._link.lost is not None


def test_a_restart_that_fails_is_told_to_all_with_its_cause(lives: Lives, client: RuntimeClient) -> None:
    def no_memory(life: PeerLife) -> None:
        life.end()
        raise bo.ResourceExhausted("no memory")

    lives.prepare = no_memory
    lives.peer(0).hold()
    states = [ask(client), ask(client)]
    lives.peer(0).die()
    for s in states:
        with pytest.raises(bo.RuntimeLost, match="could not be restarted: no memory") as caught:
            s["x"]
        assert isinstance(caught.value.__cause__, bo.ResourceExhausted)


def test_another_model_is_not_taken_for_the_same(lives: Lives) -> None:
    def other(request: Any) -> Any:
        replies, buffers = plain_answer(request)
        if isinstance(request, protocol.Hello):
            replies = [msgspec.structs.replace(replies[0], dtype="bfloat16")]
        return replies, buffers

    lives.answers = [plain_answer, other]
    with lives.client() as client:
        lives.peer(0).hold()
        s = ask(client)
        lives.peer(0).die()
        with pytest.raises(bo.RuntimeLost, match="dtype was 'float32' and would be 'bfloat16'"):
            s["x"]


def test_what_is_no_death_is_not_survived(lives: Lives, client: RuntimeClient) -> None:
    lives.peer(0).hold()
    s = ask(client)
    lives.peer(0).send_raw([b"garbage", b""])
    with pytest.raises(bo.ProtocolMismatch):
        s["x"]
    assert len(lives.lives) == 1


def test_closing_restarts_nothing_and_tells_who_waits(lives: Lives, client: RuntimeClient) -> None:
    lives.peer(0).hold()
    s = ask(client)
    client.close()
    client.close()
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        s["x"]
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        client.open()
    assert len(lives.lives) == 1


def test_closing_during_a_restart_ends_it(lives: Lives, client: RuntimeClient) -> None:
    lives.prepare = lambda life: life.may_start.clear()
    s = ask(client)
    assert s["x"]
    lives.peer(0).die()
    s += bo.gen("y")
    lives.peer(1)
    client.close()
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        s["y"]
    lives.lives[1].may_start.set()
    assert names(lives.peer(1)) == []


def test_a_runtime_that_was_drained_may_end(lives: Lives, client: RuntimeClient) -> None:
    client.drain()
    lives.peer(0).hold()
    s = ask(client)
    lives.peer(0).die()
    with pytest.raises(bo.RuntimeLost, match="closed the connection"):
        s["x"]
    assert len(lives.lives) == 1
