"""Who dies, and what the others notice: within seconds, with a typed error, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peers import Peer
from processes import Served, end, is_running, python, socket_folder, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.runtime import protocol
from bough.runtime.protocol import SamplingParams, Text

ENDLESS: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}
NOTICE_S = 10.0


@bo.function
def endless(s: bo.State, prompt: str = "Once upon a time") -> None:
    s += prompt
    s += bo.gen("story")


@bo.function
def joined(s: bo.State) -> None:
    s += "Once upon a time"
    forks = s.fork(3)
    forks += bo.gen("story")
    forks.join()
    s["lengths"] = [len(text) for text in s["story"]]


@pytest.fixture
def runtime() -> Iterator[bo.Runtime]:
    with bo.Runtime() as runtime:
        yield runtime


def test_when_the_runtime_is_killed_every_waiter_is_told_and_the_next_one_starts_clean(runtime: bo.Runtime) -> None:
    streaming = endless.run(backend=runtime, stream=True, **ENDLESS)
    plain = endless.run(backend=runtime, **ENDLESS)
    waits: dict[str, Callable[[], Any]] = {
        "a variable": lambda: plain["story"],
        "a text": lambda: plain.text(),
        "meta information": lambda: plain.get_meta_info("story"),
        "a stream": lambda: list(streaming.text_iter("story")),
        "a join": lambda: joined.run(backend=runtime, **ENDLESS),
        "a batch": lambda: _raise_first(endless.run_batch([("a",), ("b",)], backend=runtime, **ENDLESS)),
    }
    told: dict[str, tuple[BaseException | None, float]] = {}

    def wait_for(name: str) -> None:
        try:
            waits[name]()
        except BaseException as error:
            told[name] = (error, time.monotonic())
        else:
            told[name] = (None, time.monotonic())

    threads = [threading.Thread(target=wait_for, args=(name,), daemon=True) for name in waits]
    for thread in threads:
        thread.start()
    wait_until(lambda: int(runtime.stats()["num_running"]) >= 7, 20, "everything runs")
    pid, folder = runtime.pid, socket_folder(runtime.address)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(NOTICE_S)
    assert set(told) == set(waits), "somebody still waits"
    for name, (error, at) in told.items():
        assert isinstance(error, bo.RuntimeLost), f"{name}: {error!r}"
        assert at - killed_at < NOTICE_S, name
    assert "SIGKILL" in str(told["a variable"][0])
    with pytest.raises(bo.RuntimeLost):
        runtime.stats()
    runtime.shutdown()
    assert not folder.exists()
    assert not is_running(pid)
    with bo.Runtime(tiny_checkpoint()) as fresh:
        assert within(20, endless.run(backend=fresh, max_tokens=4).error) is None


def _raise_first(states: list[bo.State]) -> None:
    for state in states:
        error = state.error()
        if error is not None:
            raise error


PARENT = """
import os, sys
import bough as bo
runtime = bo.Runtime(sys.argv[1])
print(runtime.pid, runtime.address, flush=True)
sys.stdin.read()
"""


def test_no_runtime_outlives_a_parent_that_is_killed() -> None:
    parent = python("-c", PARENT, str(tiny_checkpoint()), stdin=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        line = within(60, parent.stdout.readline)
        pid, address = line.split()
        assert is_running(int(pid))
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_running(int(pid)), 10, "the orphan ends")
        wait_until(lambda: not socket_folder(address).exists(), 2, "its folder is removed")
    finally:
        end(parent)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new() -> None:
    credit = 16  # so that the generation goes on no further than it is read
    with Served(tiny_checkpoint(), "--credit", str(credit)) as served, served.client() as client:
        with Peer(served.address) as reader:
            reader.hello()
            reader.request(protocol.Open(2, 1))
            reader.request(protocol.Extend(3, 1, [Text("tree")]))
            params = SamplingParams(max_tokens=credit + 40, ignore_eos=True)
            reader.request(protocol.Generate(4, 1, params, stream=True))
            while not isinstance(reader.reply(20), protocol.Delta):
                pass
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(client), 20, "new work is refused")
            reader.request(protocol.Credit(4, credit))
            while not isinstance(done := reader.reply(20), protocol.Generated):
                assert isinstance(done, protocol.Delta)
                reader.request(protocol.Credit(4, credit))
        assert (done.finish_reason, done.usage.completion_tokens) == ("length", credit + 40)
        assert served.process.wait(10) == 0


def is_refused(client: bo.RuntimeClient) -> bool:
    late = client.open()
    client.extend(late, [Text("tree")])
    failure = client.generate(late, SamplingParams(max_tokens=1)).exception(20)
    assert failure is None or isinstance(failure, bo.Overloaded), failure
    return failure is not None


def test_a_client_that_is_killed_gives_its_branches_and_pages_back() -> None:
    script = """
import sys
import bough as bo
from bough.runtime import protocol
from bough.runtime.protocol import SamplingParams, Text
client = bo.RuntimeClient(sys.argv[1])
for _ in range(4):
    branch = client.open()
    client.extend(branch, [Text("Once upon a time")])
    for child in client.fork(branch, 3):
        running = client.generate(child, SamplingParams(max_tokens=4000, ignore_eos=True), on_delta=lambda text: None)
print("running", flush=True)
sys.stdin.read()
"""
    with Served("pocket", "--lease", "2.5") as served, served.client() as watcher:
        child = python("-c", script, served.address, stdin=subprocess.PIPE)
        try:
            assert child.stdout is not None
            assert within(30, child.stdout.readline).strip() == "running"
            wait_until(lambda: watcher.stats()["num_running"] == 12, 20, "its generations run")
            assert watcher.stats()["num_branches"] == 16
            child.kill()
            child.wait()
            wait_until(lambda: watcher.stats()["num_branches"] == 0, 10, "its branches are freed")
        finally:
            end(child)
        stats = watcher.stats()
        assert (stats["num_running"], stats["num_waiting"], stats["num_clients"]) == (0, 0, 1)
        watcher.flush_cache()
        stats = watcher.stats()
        assert stats["free_pages"] == stats["total_pages"]
        assert within(20, endless.run(backend=watcher, max_tokens=4).error) is None


def test_a_runtime_that_hangs_is_noticed_and_can_be_used_again_once_it_moves(runtime: bo.Runtime) -> None:
    with bo.RuntimeClient(runtime.address, silence_timeout=1.5) as client:
        state = endless.run(backend=client, **ENDLESS)
        wait_until(lambda: int(client.stats()["num_running"]) == 1, 10, "it runs")
        os.kill(runtime.pid, signal.SIGSTOP)
        try:
            with pytest.raises(bo.RuntimeLost, match=r"has not answered a ping for 1\.5 s"):
                within(6, lambda: state["story"])
        finally:
            os.kill(runtime.pid, signal.SIGCONT)
    assert within(20, endless.run(backend=runtime, max_tokens=4).error) is None


def test_an_interrupt_from_the_keyboard_drains_too() -> None:
    with Served(tiny_checkpoint()) as served, served.client() as client:
        assert client.stats()["steps"] == 0
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(10) == 0
