"""Programs that do not notice the death of their runtime: killed at any moment, they end with the same texts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import end, is_running, python, socket_folder, wait_until, within
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.link import Link
from bough.runtime.protocol import SamplingParams, Text

END_S = 90.0  # a restart takes as long as a start
SAMPLED: dict[str, Any] = {"temperature": 0.9, "max_tokens": 48, "ignore_eos": True}
Kill = Callable[[str], None]


@bo.function
def program(s: bo.State, kill: Kill) -> None:
    """Roles, stops that cut tokens in two, a fork, samples, a select; `kill` is called at the places it is told."""
    s += bo.system("You are a careful assistant.")
    s += bo.user("What is 17 + 25?")
    s += bo.assistant("The answer " + bo.gen("first", stop=["e", "a", "o", "1"]))
    kill("with the first gen in flight")
    s["first"]
    kill("between two gens")
    forks = s.fork(3)
    for number, fork in enumerate(forks):
        fork += bo.user(f"And {number}?") + bo.assistant(bo.gen("draft", max_tokens=96) + bo.gen("more"))
    kill("with three forks in flight")
    forks.join()
    kill("after the join")
    s += bo.assistant("Best: " + bo.select("best", choices=["one", "two", "three"]))
    kill("with a select in flight")
    s += bo.user("So?") + bo.assistant(bo.gen("samples", n=2, stop=" "))
    (aside,) = s.fork()
    aside += "aside " + bo.gen("aside")
    s["best"]
    kill("late")
    s += bo.gen("last")
    s["aside"] = aside["aside"]


MOMENTS = [
    "with the first gen in flight",
    "between two gens",
    "with three forks in flight",
    "after the join",
    "with a select in flight",
    "late",
]


def outcome(state: bo.State) -> dict[str, Any]:
    """All that a program computed."""
    error = state.error()
    assert error is None, error
    names = ("first", "draft", "more", "best", "samples", "aside", "last")
    values = {name: state[name] for name in names}
    ids = {name: state.get_meta_info(name)["token_ids"] for name in ("first", "last")}
    drafts = [meta["token_ids"] for meta in state.get_meta_info("draft")]
    return {**values, "text": state.text(), "messages": state.messages(), "ids": ids, "draft ids": drafts}


def kill_now(runtime: bo.Runtime) -> None:
    os.kill(runtime.pid, signal.SIGKILL)


def restarting(**options: Any) -> bo.Runtime:
    return bo.Runtime(seed=11, exact=True, restart=True, **options)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What the program computes on a runtime that is never killed, and could not be restarted."""
    with bo.Runtime(seed=11, exact=True) as runtime:
        return within(END_S, lambda: outcome(program.run(lambda moment: None, backend=runtime, **SAMPLED)))


@pytest.fixture
def runtime() -> Iterator[bo.Runtime]:
    with restarting() as runtime:
        yield runtime


def test_restart_alone_changes_no_text(runtime: bo.Runtime, undisturbed: dict[str, Any]) -> None:
    assert within(END_S, lambda: outcome(program.run(lambda moment: None, backend=runtime, **SAMPLED))) == undisturbed
    assert runtime.stats()["num_restarts"] == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_program_whose_runtime_is_killed_ends_with_the_same_text(
    runtime: bo.Runtime, undisturbed: dict[str, Any], moment: str
) -> None:
    before, pid, folder = runtime.server_info(), runtime.pid, socket_folder(runtime.address)

    def kill(at: str) -> None:
        if at == moment:
            kill_now(runtime)

    assert within(END_S, lambda: outcome(program.run(kill, backend=runtime, **SAMPLED))) == undisturbed
    after = runtime.server_info()
    assert runtime.stats()["num_restarts"] == 1
    assert after["epoch"] != before["epoch"]
    assert after["pid"] == runtime.pid != pid
    assert not is_running(pid)
    assert not folder.exists()


def test_killed_while_forks_decode(runtime: bo.Runtime, undisturbed: dict[str, Any]) -> None:
    def kill(at: str) -> None:
        if at == "with three forks in flight":
            wait_until(lambda: int(runtime.stats()["num_running"]) == 3, END_S, "all three decode")
            kill_now(runtime)

    assert within(END_S, lambda: outcome(program.run(kill, backend=runtime, **SAMPLED))) == undisturbed
    assert runtime.stats()["num_restarts"] == 1


def test_killed_again_and_again(runtime: bo.Runtime, undisturbed: dict[str, Any]) -> None:
    def kill(at: str) -> None:
        if at in ("between two gens", "with three forks in flight", "late"):
            runtime.stats()  # it lives again
            kill_now(runtime)

    assert within(2 * END_S, lambda: outcome(program.run(kill, backend=runtime, **SAMPLED))) == undisturbed
    assert runtime.stats()["num_restarts"] == 3


@bo.function
def story(s: bo.State, length: int = 200) -> None:
    s += bo.user("Tell me of trees.")
    s += bo.assistant(bo.gen("story", max_tokens=length, temperature=0.9, ignore_eos=True))
    s += bo.user("And then?") + bo.assistant(bo.gen("more", max_tokens=20, temperature=0.9, ignore_eos=True))


def test_a_stream_goes_on_without_repeating_or_losing_text(runtime: bo.Runtime) -> None:
    whole = within(END_S, lambda: story.run(backend=runtime).text())
    # The same place in the tree of branches has the same seeds: a runtime of its own for the one that is killed.
    with restarting() as killed:
        state = story.run(backend=killed, stream=True)
        chunks: list[str] = []
        kills = [len(whole) // 6, len(whole) // 2]

        def read() -> None:
            for chunk in state.text_iter():
                chunks.append(chunk)
                if kills and sum(map(len, chunks)) > kills[0]:
                    kills.pop(0)
                    killed.stats()
                    kill_now(killed)

        within(END_S, read)
        assert "".join(chunks) == whole == state.text()
        assert killed.stats()["num_restarts"] == 2


def test_a_batch_goes_on(runtime: bo.Runtime) -> None:
    arrived = threading.Semaphore(0)

    @bo.function
    def item(s: bo.State, number: int) -> None:
        s += f"{number} + {number} = " + bo.gen("x", seed=number, stop="\n")
        arrived.release()
        s += "\n" + bo.gen("y", seed=number)

    items = [{"number": number} for number in range(12)]
    expected = [s.text() for s in within(END_S, lambda: item.run_batch(items, backend=runtime, **SAMPLED))]
    for _ in items:
        assert arrived.acquire(timeout=END_S)

    def kill() -> None:
        for _ in range(6):
            arrived.acquire(timeout=END_S)
        kill_now(runtime)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    states = within(END_S, lambda: item.run_batch(items, backend=runtime, **SAMPLED))
    killer.join(END_S)
    assert [s.text() for s in states] == expected
    assert runtime.stats()["num_restarts"] == 1


def test_branches_come_back_with_their_roles_and_their_pending_text(runtime: bo.Runtime) -> None:
    """A word is tokenised as a whole and an open role stays open, though the runtime died in the middle of them."""

    def tokens(kill: Callable[[], None]) -> list[int]:
        branch = runtime.open()
        s = bo.State(runtime)
        s += bo.user("Hel")
        s._interpreter.flush()
        runtime.extend(branch, [Text("Once upon a ti")]).result(END_S)
        kill()
        lengths = [runtime.extend(branch, [Text("me there was")], commit=True).result(END_S).length]
        s += "lo" + bo.assistant(bo.gen("x", max_tokens=8, temperature=0))
        meta = s.get_meta_info("x")
        runtime.release([branch])
        return [*lengths, meta["prompt_tokens"], *meta["token_ids"]]

    expected = within(END_S, lambda: tokens(lambda: None))
    assert within(END_S, lambda: tokens(lambda: kill_now(runtime))) == expected


def test_what_was_released_is_not_made_again(runtime: bo.Runtime) -> None:
    for _ in range(20):
        assert within(END_S, story.run(length=2, backend=runtime).error) is None
    state = bo.State(runtime)
    state += "a" + bo.gen("x", max_tokens=2)
    assert state["x"] is not None
    kill_now(runtime)
    assert within(END_S, runtime.stats)["num_branches"] == 1


# ------------------------------------------------------------------------------------------------ the end


def test_a_runtime_killed_too_often_is_given_up() -> None:
    with bo.Runtime(tiny_checkpoint(), restart=True) as runtime:
        for _ in range(3):
            kill_now(runtime)
            within(END_S, runtime.stats)
        os.kill(runtime.pid, signal.SIGSTOP)  # so that the gen cannot end
        state = bo.State(runtime)
        state += "a" + bo.gen("x", max_tokens=200, ignore_eos=True)
        kill_now(runtime)
        with pytest.raises(bo.RuntimeLost, match=r"restarted 3 times within 60 s; then .*SIGKILL"):
            within(10, lambda: (state["x"], runtime.stats()))
        with pytest.raises(bo.RuntimeLost, match="restarted 3 times"):
            runtime.open()
        pid = runtime.pid
    assert not is_running(pid)


def test_a_model_that_has_gone_since_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny_checkpoint())
    with bo.Runtime(model, restart=True) as runtime:
        model.unlink()
        kill_now(runtime)
        with pytest.raises(bo.RuntimeLost, match="could not be restarted") as caught:
            within(END_S, runtime.stats)
        assert isinstance(caught.value.__cause__, bo.BoughError)


def test_a_shutdown_during_a_restart_leaves_nothing_behind() -> None:
    runtime = bo.Runtime(tiny_checkpoint(), restart=True)
    old = runtime.pid
    kill_now(runtime)
    state = bo.State(runtime)
    state += "a" + bo.gen("x", max_tokens=4)
    wait_until(lambda: runtime.pid != old, END_S, "the next process has begun")
    pid, folder = runtime.pid, socket_folder(runtime.address)
    within(20, runtime.shutdown)
    assert not is_running(pid)
    assert not folder.exists()
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        within(5, lambda: state["x"])
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        runtime.stats()


def test_a_shutdown_restarts_nothing() -> None:
    runtime = bo.Runtime(restart=True)
    state = bo.State(runtime)
    state += "a" + bo.gen("x", max_tokens=4000, ignore_eos=True)
    pid = runtime.pid
    runtime.shutdown()
    assert not is_running(pid)
    with pytest.raises(bo.RuntimeLost, match="was closed"):
        state["x"]
    assert runtime.pid == pid


PARENT = """
import os, sys
import bough as bo
runtime = bo.Runtime(sys.argv[1], restart=True)
os.kill(runtime.pid, 9)
runtime.stats()
print(runtime.pid, runtime.address, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, None])
def test_no_restarted_runtime_outlives_its_parent(ending: signal.Signals | None) -> None:
    parent = python("-c", PARENT, str(tiny_checkpoint()), stdin=-1)
    try:
        assert parent.stdout is not None
        assert parent.stdin is not None
        pid, address = within(END_S, parent.stdout.readline).split()
        if ending is None:
            parent.stdin.close()
            parent.wait(END_S)
            parent.stdin = None
        else:
            parent.send_signal(ending)
        wait_until(lambda: not is_running(int(pid)), 20, "the runtime ends")
        wait_until(lambda: not socket_folder(address).exists(), 20, "its folder is removed")
    finally:
        end(parent)


def test_off_by_default() -> None:
    with bo.Runtime(tiny_checkpoint()) as runtime:
        assert isinstance(runtime.client._link, Link)
        assert "num_restarts" not in runtime.stats()
        branch = runtime.open()
        runtime.extend(branch, [Text("a")])
        os.kill(runtime.pid, signal.SIGSTOP)  # so that the gen cannot end
        running = runtime.generate(branch, SamplingParams(max_tokens=250, ignore_eos=True))
        kill_now(runtime)
        assert isinstance(running.exception(10), bo.RuntimeLost)
        with pytest.raises(bo.RuntimeLost, match="SIGKILL"):
            runtime.stats()
