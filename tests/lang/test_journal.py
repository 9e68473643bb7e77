"""Journals and replays: a run is repeated, checked to the token, or played back without a model."""

from __future__ import annotations

import json
import os
import random
import stat
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import pytest

import bough as bo
from bough.runtime.protocol import SamplingParams


def seeded(text: str, params: SamplingParams) -> str:
    """A model whose text follows from the seed alone."""
    rng = random.Random(params.seed)
    return " ".join(rng.choice(["oak", "elm", "fir", "ash", "yew"]) for _ in range(12))


def model() -> bo.ScriptedBackend:
    return bo.ScriptedBackend(seeded, choose=lambda text, choices: sorted(choices)[len(text) % len(choices)])


@bo.function
def inside(s: bo.State, word: str) -> str:
    s += f"about {word} " + bo.gen("x", max_tokens=3)
    return str(s["x"])


@bo.function
def tree(s: bo.State, question: str, *, width: int = 2, options: tuple[str, ...] = ("a", "b")) -> str:
    s += bo.user(question) + bo.assistant(bo.gen("plan", max_tokens=8, return_logprob=True))
    forks = s.fork(width)
    for index, fork in enumerate(forks):
        fork += f"branch {index}: " + bo.gen("draft", max_tokens=5)
        fork += bo.gen("many", n=2, max_tokens=2)
    forks.join()
    s += bo.user("Best?") + bo.select("best", choices=list(options))
    s["inner"] = inside.run(word=s["best"]).ret_value
    s["day"] = s.recorded("day", lambda: f"day {random.random()}")
    s += s["day"] + bo.gen("last", stop="yew yew")
    return str(s["last"])


def everything(state: bo.State) -> Any:
    names = ("plan", "draft", "many", "best", "inner", "last")
    return state.text(), state.messages(), [state[name] for name in names], state.ret_value, state.get_meta_info("plan")


def journal_of(path: Path, **options: Any) -> bo.State:
    state = tree.run("Which?", width=3, backend=model(), journal=path, seed=7, **options)
    state.sync()
    return state


def test_a_journal_plays_a_run_back_without_a_model(tmp_path: Path) -> None:
    state = journal_of(tmp_path / "j")
    again = tree.run("Which?", width=3, backend=bo.ReplayBackend(tmp_path / "j"))
    assert everything(again) == everything(state)
    assert (again["day"], again.seed) == (state["day"], state.seed)
    assert again.usage == state.usage


def test_a_journal_plays_back_under_events_and_streams(tmp_path: Path) -> None:
    state = journal_of(tmp_path / "j")
    again = tree.run("Which?", width=3, backend=bo.ReplayBackend(tmp_path / "j"), stream=True)
    assert "".join(again.text_iter()) == state.text()
    kinds = {event.kind for event in again.events()}
    assert kinds == {"begin", "text", "start", "delta", "end", "fork", "choice", "recorded", "finish"}


def test_a_replay_repeats_the_run_on_the_model(tmp_path: Path) -> None:
    state = journal_of(tmp_path / "j", temperature=0.7, stop="fir")
    again = bo.replay(tmp_path / "j", tree, backend=model())
    assert everything(again) == everything(state)
    assert again["day"] == state["day"], "what came from outside is the journal's"
    assert everything(bo.replay(tmp_path / "j", backend=model())) == everything(state), "the journal names its program"


@bo.function
def ends_with_text(s: bo.State, question: str) -> None:
    s += bo.user(question) + bo.assistant(bo.gen("answer", max_tokens=4))


def test_the_text_after_the_last_gen_is_in_a_journal_that_nobody_waited_for(tmp_path: Path) -> None:
    state = ends_with_text.run("Why?", backend=model(), journal=tmp_path / "j")
    assert state["answer"] == bo.replay(tmp_path / "j", ends_with_text, backend=model())["answer"]
    again = ends_with_text.run("Why?", backend=bo.ReplayBackend(tmp_path / "j"))
    assert again.text() == state.text()


def test_a_journal_that_was_read_before_its_last_text_was_written_is_replayed(tmp_path: Path) -> None:
    ends_with_text.run("Why?", backend=model(), journal=tmp_path / "j").sync()
    with open(tmp_path / "j", "rb") as file:
        records = list(msgpack.Unpacker(file))
    assert [record["kind"] for record in records if record["t"] == "op"] == ["extend", "gen", "extend"]
    last = max(i for i, record in enumerate(records) if record["t"] == "op")
    (tmp_path / "cut").write_bytes(b"".join(msgpack.packb(record) for record in records[:last]))
    assert bo.replay(tmp_path / "cut", ends_with_text, backend=model()).error() is None


@pytest.mark.parametrize("target", ["plan", "draft", "many", "last", "x"])
def test_a_replay_names_the_first_token_that_differs(tmp_path: Path, target: str) -> None:
    journal_of(tmp_path / "j")
    backend = model()
    original = backend.generate
    done: list[bo.Generation] = []

    def other(branch: int, params: SamplingParams, *, name: str | None = None, **more: Any) -> Any:
        future = original(branch, params, name=name, **more)
        if name != target or done:
            return future
        done.append(future.result())
        changed = type(future)()
        ids = list(done[0].token_ids)
        ids[1] += 1
        changed.set_result(type(done[0])(done[0].text, ids, "stop", None, done[0].length, done[0].usage))
        return changed

    backend.generate = other  # type: ignore[method-assign]
    with pytest.raises(bo.ReplayMismatch, match=r"token 1: token was \d+ in the journal and is \d+") as caught:
        bo.replay(tmp_path / "j", tree, backend=backend)
    details = caught.value.details
    assert (details["expected"], details["got"]) == (done[0].token_ids[1], done[0].token_ids[1] + 1)
    recorded = [op for run in bo.Journal(tmp_path / "j").all_runs for op in run.ops if op.name == target]
    assert (details["path"], details["index"]) in [(op.path, op.index) for op in recorded]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "Why?"}, r"root, operation 0: text was 'Which\?' in the journal and is 'Why\?'"),
        ({"width": 2}, "branch 2, operation 0: operation was 'gen' in the journal and is None"),
        (
            {"width": 4},
            "branch 3, operation 0: the text 'branch 3: ' is asked for, the journal holds no such operation yet",
        ),
        ({"options": ("a", "c")}, r"choices was \['a', 'b'\] in the journal and is \['a', 'c'\]"),
    ],
)
def test_a_program_that_asks_for_something_else_is_told_where(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    journal_of(tmp_path / "j")
    arguments = {"question": "Which?", "width": 3, **changes}
    with pytest.raises(bo.ReplayMismatch, match=words):
        bo.replay(tmp_path / "j", tree, backend=model(), args=(), kwargs=arguments)


def test_a_playback_refuses_other_parameters_where_they_are_read(tmp_path: Path) -> None:
    journal_of(tmp_path / "j")
    again = bo.ReplayBackend(tmp_path / "j")
    with pytest.raises(bo.ReplayMismatch, match=r"params\.temperature was 1.0 in the journal and is 0.0"):
        tree.run("Which?", width=3, backend=again, temperature=0)
    with pytest.raises(bo.ReplayMismatch, match="no further run with seed 4"):
        tree.run("Which?", backend=bo.ReplayBackend(tmp_path / "j"), seed=4)


def test_failures_are_recorded_and_fail_again(tmp_path: Path) -> None:
    def failing(text: str, params: SamplingParams) -> str:
        if "2" in text:
            raise bo.ContextOverflow("too long", length=9)
        return "1 2"

    @bo.function
    def two(s: bo.State) -> str:
        s += bo.gen("x") + bo.gen("y") + bo.gen("z")
        with pytest.raises(bo.ContextOverflow, match="too long"):
            s["y"]
        return "survived"

    two.run(backend=bo.ScriptedBackend(failing), journal=tmp_path / "j").sync()
    again = two.run(backend=bo.ReplayBackend(tmp_path / "j"))
    assert again.ret_value == "survived"
    with pytest.raises(bo.ContextOverflow) as caught:
        again["y"]
    assert caught.value.details == {"length": 9}
    assert bo.replay(tmp_path / "j", two, backend=bo.ScriptedBackend(failing)).ret_value == "survived"
    with pytest.raises(bo.ReplayMismatch, match="operation 1: error was 'ContextOverflow' in the journal and is None"):
        bo.replay(tmp_path / "j", two, backend=bo.ScriptedBackend(lambda text, params: "1 2"))


@pytest.mark.parametrize("has_text", [True, False])
def test_a_journal_that_is_read_before_its_run_is_done_says_so(tmp_path: Path, has_text: bool) -> None:
    backend = model()
    unfinished: list[Future[Any]] = []

    def never(*asked: Any, **more: Any) -> Future[Any]:
        unfinished.append(Future())
        return unfinished[-1]

    backend.generate = never  # type: ignore[method-assign]
    if not has_text:
        backend.extend = never  # type: ignore[method-assign]

    @bo.function
    def early(s: bo.State) -> None:
        s += bo.user("Which?") + bo.assistant(bo.gen("x"))

    state = early.run(backend=backend, journal=tmp_path / "j")
    asked = "gen x" if has_text else "a message of 'user'"
    words = f"branch root, operation 0: {asked} is asked for, the journal holds no such operation yet"
    with pytest.raises(bo.ReplayMismatch, match=words) as caught:
        bo.replay(tmp_path / "j", early, backend=model())
    assert caught.value.details["field"] == "operation"
    state.cancel()


def test_every_run_of_a_batch_is_in_one_journal(tmp_path: Path) -> None:
    items = [{"question": f"Q{i}?"} for i in range(6)]
    states = tree.run_batch(items, backend=model(), journal=tmp_path / "j")
    journal = bo.Journal(tmp_path / "j")
    assert len(journal.runs) == 6
    assert len(journal.all_runs) == 12
    by_question = {run.kwargs["question"]: index for index, run in enumerate(journal.runs)}
    for item, state in zip(items, states, strict=True):
        again = bo.replay(journal, tree, backend=model(), run=by_question[item["question"]])
        assert again.text() == state.text()
    with pytest.raises(bo.InvalidRequest, match="has 6 runs, there is no number 6"):
        bo.replay(journal, tree, backend=model(), run=6)


def test_a_journal_is_private_whole_and_never_overwritten(tmp_path: Path) -> None:
    state = journal_of(tmp_path / "j")
    assert stat.S_IMODE(os.stat(tmp_path / "j").st_mode) == 0o600
    size = (tmp_path / "j").stat().st_size
    with pytest.raises(bo.InvalidRequest, match="exists already, and is not overwritten"):
        journal_of(tmp_path / "j")
    with pytest.raises(bo.InvalidRequest, match="cannot be written"):
        journal_of(tmp_path / "missing" / "j")
    with pytest.raises(bo.InvalidRequest, match="journal must be the path of a file, got 3"):
        tree.run("Which?", backend=model(), journal=3)
    assert (tmp_path / "j").stat().st_size == size
    run = bo.Journal(tmp_path / "j").runs[0]
    assert (run.seed, run.args, run.kwargs, run.name) == (state.seed, ["Which?"], {"width": 3}, "tree")
    assert run.backend["model"] == "script"
    assert [op.result for op in run.ops if op.kind == "recorded"] == [state["day"]]


def test_a_journal_cut_off_anywhere_is_good_up_to_there(tmp_path: Path) -> None:
    journal_of(tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    whole = len(bo.Journal(tmp_path / "j").runs[0].ops)
    counts = []
    for size in range(400, len(data), 97):
        (tmp_path / "cut").write_bytes(data[:size])
        runs = bo.Journal(tmp_path / "cut").runs
        counts.append(len(runs[0].ops) if runs else 0)
    assert counts == sorted(counts)
    assert 0 < max(counts) <= whole


@pytest.mark.parametrize(
    "data", [b"\xc1", json.dumps({"t": "journal"}).encode(), msgpack.packb([1, 2]), b"\x81\xa1t\x05"]
)
def test_what_is_no_journal_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(bo.InvalidRequest, match="is not a journal"):
        bo.Journal(tmp_path / "x")
    with pytest.raises(bo.InvalidRequest, match="cannot be read"):
        bo.ReplayBackend(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(bo.InvalidRequest, match="has 0 runs"):
        bo.ReplayBackend(tmp_path / "empty")


def test_arguments_that_cannot_be_recorded_are_asked_for(tmp_path: Path) -> None:
    @bo.function
    def odd(s: bo.State, make: Any, big: int) -> None:
        s += f"{make()} {big}" + bo.gen("x")

    odd.run(lambda: "made", 1 << 70, backend=model(), journal=tmp_path / "j").sync()
    with pytest.raises(bo.InvalidRequest, match=r"could not record the arguments 0: pass args= and kwargs="):
        bo.replay(tmp_path / "j", odd, backend=model())
    again = bo.replay(tmp_path / "j", odd, backend=model(), args=(lambda: "made", 1 << 70))
    assert again.text().startswith(f"made {1 << 70}")
    with pytest.raises(bo.InvalidRequest, match="there is no program"):
        bo.replay(tmp_path / "j", backend=model())


def test_a_recorded_value_that_raises_raises_again(tmp_path: Path) -> None:
    @bo.function
    def asks(s: bo.State) -> str:
        try:
            return str(s.recorded("site", lambda: 1 / 0))
        except Exception as error:
            return type(error).__name__

    assert asks.run(backend=model(), journal=tmp_path / "j").ret_value == "ZeroDivisionError"
    again = asks.run(backend=bo.ReplayBackend(tmp_path / "j"))
    assert again.ret_value == "BackendError", "the class of a foreign exception is not a journal's to make"
    assert asks.run(backend=model()).ret_value == "ZeroDivisionError"


@bo.function
def says(s: bo.State, what: str, turns: list[int]) -> None:
    turns.append(0)
    s += what + bo.gen("x")


def test_items_of_a_batch_are_played_back_whatever_order_they_begin_in(tmp_path: Path) -> None:
    items = [{"what": "?", "turns": []} for _ in range(6)]
    seeded: dict[str, Any] = {"seed": 3}
    for name, given in (("seeded", seeded), ("drawn", {})):
        first = says.run_batch(items, backend=model(), max_in_flight=1, journal=tmp_path / name, **given)
        texts = [state["x"] for state in first]
        assert len(set(texts)) == 6, "equal items draw different texts"
        journal = bo.Journal(tmp_path / name)
        journal._runs = dict(reversed(journal._runs.items()))  # as if they had begun the other way round
        for again in (given, {}):
            backend = bo.ReplayBackend(journal)
            assert [state["x"] for state in says.run_batch(items, backend=backend, **again)] == texts
    assert [state["x"] for state in says.run_batch(items, backend=model(), seed=3)] == [
        state["x"] for state in says.run_batch(items, backend=bo.ReplayBackend(tmp_path / "seeded"), seed=3)
    ]


def test_tools_are_not_called_again(tmp_path: Path) -> None:
    called: list[str] = []

    def look(key: str) -> dict[str, str]:
        called.append(key)
        if key == "nothing":
            raise KeyError(key)
        return {"found": key}

    def thing(key: str) -> object:
        called.append(key)
        return object

    @bo.function
    def agent(s: bo.State, question: str) -> Any:
        s.tools([look, thing])
        s += bo.user(question)
        return s.run_tools(name="answer")

    turns = ["Action: look[a]\nAction: look[nothing]\nAction: thing[b]", "Answer: done"]
    first = agent.run("?", backend=bo.ScriptedBackend({"answer": turns}), journal=tmp_path / "j")
    text = first.text()
    assert sorted(called) == ["a", "b", "nothing"]
    again = agent.run("?", backend=bo.ReplayBackend(tmp_path / "j"))
    assert bo.replay(tmp_path / "j", agent, backend=bo.ScriptedBackend({"answer": turns})).text() == text
    assert sorted(called) == ["a", "b", "nothing"], "not again"
    assert again.text() == text
    results = again.ret_value.results
    assert [result.text for result in results] == [result.text for result in first.ret_value.results]
    assert [result.value for result in results] == [{"found": "a"}, None, None]
    assert isinstance(results[1].error, bo.ToolError)
