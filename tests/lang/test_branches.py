"""Branches by argument and by name, the ways to join them, races, scopes and deadlines."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from itertools import count
from typing import Any

import msgspec
import pytest

import bough as bo
from bough import State
from bough.backend import Branch, Generation
from bough.runtime.protocol import SamplingParams, TokenLogprob


def say(*replies: str) -> bo.ScriptedBackend:
    return bo.ScriptedBackend(list(replies))


def failing_on(word: str) -> bo.ScriptedBackend:
    def reply(text: str, params: object) -> str:
        if text.endswith(word):
            raise bo.ResourceExhausted("no room")
        return text[-1].upper()

    return bo.ScriptedBackend(reply)


# ------------------------------------------------------------------------------------------------ fork


def test_a_fork_over_arguments_tells_each_state_its_own() -> None:
    s = State(say(*"ab"))
    forks = s.fork(["x", "y"])
    for f in forks:
        f += f.arg + bo.gen("v")
    assert [(f.arg, f.text()) for f in forks] == [("x", "xa"), ("y", "yb")]
    assert s.arg is None
    assert [f.arg for f in forks[0].fork(2)] == ["x", "x"]
    assert [f.arg for f in s.fork(({"k": 1}, None))] == [{"k": 1}, None]


def test_branches_can_have_names() -> None:
    s = State(say())
    forks = s.fork(names=["plan", "code"])
    forks["plan"] += "p"
    forks["code"] += "c"
    assert (forks["plan"].text(), forks[1].text()) == ("p", "c")
    assert (forks.names, forks["code"].branch_name) == (["plan", "code"], "code")
    assert s.fork({"a": 1, "b": 2})["b"].arg == 2
    assert s.fork([1, 2], names=["a", "b"])[1:]["b"].arg == 2
    with pytest.raises(bo.InvalidRequest, match="no branch is called 'test'; called by name: plan, code"):
        forks["test"]


@pytest.mark.parametrize(
    ("size", "names", "words"),
    [
        ([], None, "fork's size"),
        ("ab", None, "fork's size"),
        (3, ["a"], "names must be one per branch, 3, got 1"),
        (1, ["a", "a"], "'a' is there twice"),
        (1, [""], "must be a text"),
        ({"a": 1}, ["a"], "leave names out"),
    ],
)
def test_a_fork_that_cannot_be_is_refused_before_anything_happens(size: Any, names: Any, words: str) -> None:
    backend = say()
    s = State(backend)
    with pytest.raises(bo.InvalidRequest, match=words):
        s.fork(size, names=names)
    assert backend.stats()["num_branches"] == 0


# ------------------------------------------------------------------------------------------------ join


def test_gather_keeps_errors_in_their_cells() -> None:
    s = State(failing_on("b"))
    forks = s.fork(["a", "b", "c"])
    for f in forks[:2]:
        f += f.arg + bo.gen("x")
    forks.join("gather")
    cells = s["x"]
    assert isinstance(cells, bo.Cells)
    assert (len(cells), cells[0], cells[2]) == (3, "A", None)
    with pytest.raises(bo.ResourceExhausted):
        cells[1]
    assert cells.values == ["A"]
    assert [type(error) for error in cells.errors] == [type(None), bo.ResourceExhausted, type(None)]
    assert repr(cells) == "['A', ResourceExhausted('no room'), None]"
    assert cells[::2] == ["A", None]
    with pytest.raises(bo.ResourceExhausted):
        list(cells)


def test_merge_takes_every_variable_as_it_is() -> None:
    s = State(say("p", "c"))
    forks = s.fork(names=["plan", "code"])
    for f in forks:
        f += bo.gen(f.branch_name)
    forks.join("merge")
    assert (s["plan"], s["code"]) == ("p", "c")
    clash = s.fork(2)
    for f in clash:
        f["v"] = 1
    with pytest.raises(bo.InvalidRequest, match="branches 0 and 1 both assigned 'v'"):
        clash.join("merge")
    assert "v" not in s


def test_concat_is_exact() -> None:
    s = State(say("1", "2"))
    s += "p"
    forks = s.fork(2)
    forks += " a" + bo.gen("x")
    forks.join("concat")
    assert s.text() == "p a1 a2"


def test_what_is_no_branch_cannot_be_adopted() -> None:
    with pytest.raises(bo.InvalidRequest, match="adopt takes a branch of this state, got 3"):
        State(say("a")).adopt(3)  # type: ignore[arg-type]


def test_a_state_goes_on_as_the_branch_that_is_picked() -> None:
    backend = say("long one", "x", "short", "then")
    s = State(backend)
    s += bo.user("q") + bo.assistant_begin()
    forks = s.fork(2)
    for f in forks:
        f += bo.gen("plan")
    forks[1] += " and " + bo.gen("more")
    chosen = forks.pick(lambda forks: min(forks, key=lambda f: len(f["plan"])))
    assert chosen is forks[1]
    assert (s["plan"], s["more"]) == ("x", "short")
    s += "," + bo.gen("end") + bo.assistant_end()
    assert s.messages()[-1]["content"] == "x and short,then"
    assert s.get_meta_info("end")["computed_tokens"] <= 1
    assert forks[0]["plan"] == "long one"
    for f in forks:
        with pytest.raises(bo.BoughError):
            f += "more"
    with pytest.raises(bo.UnknownVariable):
        chosen["end"]
    s.sync()
    assert int(backend.stats()["num_branches"]) <= 2


def test_the_best_and_the_most_frequent_branch() -> None:
    s = State(failing_on("!"))
    forks = s.fork(["a", "b", "!", "b", "c"])
    for f in forks:
        f += f.arg + bo.gen("x")
    assert forks.vote("x") is forks[1]
    assert (s["x"], s.text()) == ("B", "bB")
    forks = s.fork(["a", "d", "!", "c"])
    for f in forks:
        f += f.arg + bo.gen("x")
    forks.join("best", by=lambda f: ord(f["x"]))
    assert s.text() == "bBdD"
    forks = s.fork(2)
    forks += "!" + bo.gen("x")
    with pytest.raises(bo.ResourceExhausted):
        forks.vote("x")


def test_the_default_score_is_the_mean_log_probability() -> None:
    s = State(say("a", "b", "c"))
    forks = s.fork(2)
    forks += bo.gen("x", return_logprob=True)
    assert bo.mean_logprob(forks[0]) == 0.0
    forks.best()
    assert s["x"] == "a"
    plain = State(say("c"))
    assert bo.mean_logprob(plain) == 0.0
    plain += bo.gen("y")
    with pytest.raises(bo.InvalidRequest, match="gen y has no log-probabilities"):
        bo.mean_logprob(plain)


class Likely(bo.ScriptedBackend):
    """Says "a" with a log-probability of -1, then "b" with -2, and so on, where log-probabilities are asked for."""

    def __init__(self) -> None:
        self._letters = count()
        super().__init__(lambda text, params: chr(ord("a") + next(self._letters)))

    def generate(self, branch: Branch, params: SamplingParams, **options: Any) -> Future[Generation]:
        done = super().generate(branch, params, **options).result()
        if done.logprobs is not None:
            logprob = -1.0 - ord(done.text) + ord("a")
            done = msgspec.structs.replace(done, logprobs=[TokenLogprob(logprob, 1, done.text, [])])
        future: Future[Generation] = Future()
        future.set_result(done)
        return future


def test_the_best_branch_is_judged_by_what_it_generated_itself() -> None:
    asked = bo.gen("x", return_logprob=True)
    s = State(Likely())
    s += bo.gen("before")
    forks = s.fork(2)
    forks += asked
    assert [bo.mean_logprob(f) for f in forks] == [-2.0, -3.0]
    forks[0].__iadd__(" more " + asked)
    assert bo.mean_logprob(forks[0]) == -3.0  # b and d, as good as c
    below = forks[0].fork(2)
    below += asked
    assert [bo.mean_logprob(b) for b in below] == [(-2.0 - 4.0 - own) / 3 for own in (5.0, 6.0)]
    below.best()
    assert forks[0]["x"] == "e"

    s = State(say("a", "b", "c"))
    s += bo.gen("before", return_logprob=True)  # the same for all: it is no reason for any of them
    forks = s.fork(2)
    forks += bo.gen("x")
    with pytest.raises(bo.InvalidRequest, match="gen x has no log-probabilities"):
        forks.best()


def test_a_choice_by_default_needs_nothing_of_what_came_before_the_fork() -> None:
    s = State(say("a"))
    s += bo.gen("plan")
    forks = s.fork(2)
    forks += ["one", "two"]
    forks.best()
    assert s.text() == "aone"
    (leaf,) = s.beam(1, "!", depth=2, branching=1)
    assert leaf.text() == "aone!!"


def test_a_state_that_went_on_cannot_become_its_branch() -> None:
    s = State(say("a"))
    forks = s.fork(2)
    s += "mine"
    with pytest.raises(bo.InvalidRequest, match="it went on itself"):
        forks.pick(lambda forks: forks[0])
    with pytest.raises(bo.InvalidRequest, match="not a state of the group"):
        s.fork(2).pick(lambda forks: s)


def test_a_state_goes_on_as_a_fork_of_a_fork() -> None:
    s = State(say("a", "b", "c"))
    s += "p"
    (leaf,) = s.fork(2)[1].fork()
    leaf += bo.gen("x")
    s.adopt(leaf)
    s += bo.gen("y")
    assert (s.text(), s["x"]) == ("pab", "a")


# ------------------------------------------------------------------------------------------------ race


def racing(number: int) -> tuple[bo.ScriptedBackend, State, Any]:
    backend = bo.ScriptedBackend(lambda text, params: text[-1].upper())
    s = State(backend)
    s += "p"
    return backend, s, s.fork(list("abcdef"[:number]))


def test_the_first_to_finish_wins_and_the_others_are_cancelled() -> None:
    backend, _, forks = racing(3)
    with backend.paused():
        forks[1] += "x" + bo.gen("v")
        backend.step(None)
        for f in (forks[0], forks[2]):
            f += f.arg + bo.gen("v")
        (winner,) = forks.race()
        assert winner is forks[1]
        for f in (forks[0], forks[2]):
            with pytest.raises(bo.Cancelled):
                f["v"]
        winner += bo.gen("more")
        backend.step(None)
        assert winner["more"] == "X"
    assert backend.stats()["num_branches"] == 2  # the parent's and the winner's


def test_a_race_waits_without_a_thread_for_whoever_comes_first() -> None:
    backend, _, forks = racing(4)
    with backend.paused():
        for f in forks:
            f += f.arg + bo.gen("v")
        won: list[Any] = []
        threads = threading.active_count()
        runner = threading.Thread(target=lambda: won.extend(forks.race(k=2)))
        runner.start()
        assert threading.active_count() <= threads + 1
        while not won:
            backend.step(1)
        runner.join(10)
    assert [f.arg for f in won] == ["a", "b"]


def test_a_race_until_something_holds() -> None:
    _, s, forks = racing(4)
    for f in forks:
        f += f.arg + bo.gen("v")
    (winner,) = forks.race(until=lambda f: f["v"] == "C")
    assert winner.arg == "c"
    assert forks[0]["v"] == "A"
    none = s.fork(2).race(until=lambda f: False)
    assert len(none) == 0


def test_a_race_that_all_lose_raises_why() -> None:
    s = State(failing_on("!"))
    forks = s.fork(["!", "a", "!"])
    for f in forks:
        f += f.arg + bo.gen("v")
    assert [f.arg for f in forks.race(k=3)] == ["a"]
    forks = s.fork(2)
    forks += "!" + bo.gen("v")
    with pytest.raises(bo.ResourceExhausted):
        forks.race()
    with pytest.raises(bo.InvalidRequest, match="k must be between 1 and the number of branches, 2, got 3"):
        s.fork(2).race(3)


def test_a_predicate_that_raises_leaves_nothing_running() -> None:
    backend, _, forks = racing(2)
    with backend.paused():
        forks[0] += bo.gen("v")
        backend.step(None)
        forks[1] += bo.gen("v")
        with pytest.raises(ZeroDivisionError):
            forks.race(until=lambda f: 1 // 0 > 0)
        with pytest.raises(bo.Cancelled):
            forks[1]["v"]


def test_a_race_has_a_timeout() -> None:
    backend, _, forks = racing(2)
    with backend.paused():
        forks += bo.gen("v")
        with pytest.raises(bo.Timeout, match=r"no branch won within 0.01 s"):
            forks.race(timeout=0.01)
        with pytest.raises(bo.Cancelled):
            forks[0]["v"]


def test_a_race_can_be_awaited() -> None:
    async def main() -> list[str]:
        backend, _, forks = racing(3)
        with backend.paused():
            for f in forks:
                f += f.arg + bo.gen("v")
            race = asyncio.ensure_future(forks.arace(k=2))
            while not race.done():
                await asyncio.sleep(0)
                backend.step(1)
            return [f.arg for f in await race]

    assert asyncio.run(main()) == ["a", "b"]


def test_states_of_any_origin_can_race() -> None:
    backend = say("x", "y")
    one, two = State(backend), State(backend)
    one += bo.gen("v")
    two += bo.gen("v")
    assert bo.race([one, two]) == [one]


# ------------------------------------------------------------------------------------------------ scopes and deadlines


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_the_scope_of_branches_cancels_what_was_not_joined(fails: bool) -> None:
    backend = say(*"ab")
    kept: list[Any] = []

    def scope() -> None:
        with s.branches(2) as forks:
            kept.extend(forks)
            forks += bo.gen("x")
            forks[0].cancel()
            if fails:
                raise KeyError("mine")

    with backend.paused():
        s = State(backend)
        if fails:
            with pytest.raises(KeyError):
                scope()
        else:
            scope()
        for f in kept:
            with pytest.raises(bo.Cancelled):
                f["x"]
            with pytest.raises(bo.Cancelled):
                f += "more"


def test_a_joined_scope_has_nothing_to_cancel() -> None:
    s = State(say(*"ab"))
    with s.branches(2) as forks:
        forks += bo.gen("x")
        forks.join()
    assert s["x"] == ["a", "b"]


def test_the_timeout_of_a_run_is_for_the_whole_run() -> None:
    @bo.function
    def program(s: State) -> None:
        s += "a"
        (f,) = s.fork()
        f += bo.gen("x", timeout=100)

    with pytest.raises(bo.Timeout, match=r"the run's timeout of 1e-09 s has passed"):
        program.run(backend=say("a"), timeout=1e-9)
    seen: list[float | None] = []

    class Watched(bo.ScriptedBackend):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["timeout_s"])
            return super().generate(*args, **kwargs)

    program.run(backend=Watched(["a"]), timeout=50)
    assert seen[0] is not None
    assert 0 < seen[0] <= 50
