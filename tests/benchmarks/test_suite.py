"""The benchmark suite: its workloads, what fits into a budget, its table and pictures, and one small run of it."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_suite
import plots
import rows
from asks import Ask, Trace
from baselines import Generate
from calls import Call, Run
from clients import NotInstalled, NotPossible, System, carry_out
from models import FIRST_WORD, Size, made, text_of, token_ids
from schedule import Budget, in_turn, order
from shapes import SHAPES
from systems import Bough
from traces import control, fork, from_shape, live, suite, writer

TINY = Size(hidden=128, layers=2, heads=2, kv_heads=1, mlp=128)


class Oracle:
    """Answers at once with words that depend on the prompt."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def run(self, trace: Trace) -> Run:
        return carry_out(trace, self.start)

    def peak_bytes(self) -> int | None:
        return 5_000_000

    def close(self) -> None:
        pass

    def start(self, prompt: list[int], ask: Ask) -> Future[Call]:
        self.prompts.append(prompt)
        done = Future[Call]()
        answer = [FIRST_WORD + (sum(prompt) + i) % 1000 for i in range(ask.num_tokens)]
        done.set_result(Call(0.0, [prompt], [1.0 + i for i in range(ask.num_tokens)], answer))
        return done


# ---------------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("size", ["quick", "standard", "full"])
def test_a_suite_is_the_same_every_time_and_has_every_shape_of_the_paper(size: str) -> None:
    traces = suite(size)
    assert {shape.name for shape in SHAPES} <= {trace.name for trace in traces}
    names = [trace.name for trace in traces]
    assert len(set(names)) == len(names)
    assert [trace.kind for trace in traces] == sorted(
        (t.kind for t in traces), key=["headline", "paper", "sweep"].index
    )
    if size == "quick":
        assert suite(size) == traces


@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_a_prompt_has_the_length_of_the_recorded_one_whatever_the_answers_are(place: int) -> None:
    recorded = SHAPES[place].programs(8, writer=writer(100 + place, 0.125))
    oracle = Oracle()
    for program in recorded:
        oracle.prompts.clear()
        asks = live(program)
        carry_out(Trace("", "", "paper", (asks,), 1), oracle.start)
        lengths = {len(prompt) for prompt in oracle.prompts}
        if any(request.score_start is not None for request in program):
            assert lengths == {program[0].score_start}
            assert len(asks) == 1
            assert len(asks[0].choices) == len(program)
        else:  # a sibling that would be the same greedily, and what follows it, has some words more
            least = {len(request.prompt) for request in program}
            assert len(asks) == len(program)
            assert max(lengths) - max(least) in range(len(program))
            assert min(lengths) == min(least)


def test_answers_stand_in_later_prompts_where_the_recorded_ones_did() -> None:
    program = SHAPES[8].programs(4, writer=writer(1, 0.125))[0]  # chats
    asks = live(program)
    assert [sum(isinstance(part, int) for part in ask.parts) for ask in asks] == [0, 1, 2, 3]
    answers = {i: request.output.tolist() for i, request in enumerate(program) if request.output is not None}
    for ask, request in zip(asks, program, strict=True):
        assert ask.prompt(answers) == request.prompt.tolist()


def test_siblings_of_a_tree_differ_although_all_is_greedy() -> None:
    asks = from_shape(4, 30, 0.125).programs[0]
    assert len(asks) == 30
    assert len({ask.parts for ask in asks}) == 30


def test_counts_of_tokens_are_what_a_run_sends() -> None:
    for trace in (fork(4, 16, 3, 5), control(3, 8, 2), from_shape(8, 8, 0.1)):
        run = Oracle().run(trace)
        assert run.prompt_tokens == trace.num_prompt_tokens()
        assert sum(len(call.answer) for call in run.calls) == trace.num_generated()
    shared = Oracle().run(fork(4, 16, 3, 5))
    assert shared.best_hit_rate() == pytest.approx(3 * 16 / (4 * 19))
    assert Oracle().run(control(3, 8, 2)).best_hit_rate() == 0.0


def test_words_are_text_and_back() -> None:
    ids = writer(3).text(50).tolist()
    assert token_ids(text_of(ids)) == ids
    with pytest.raises(IndexError, match="token 7 is no word"):
        text_of([7])


# ---------------------------------------------------------------------------------------------- order and budget


def test_what_matters_most_runs_first_and_every_workload_before_the_third_time_of_any() -> None:
    traces = [fork(2, 8, 1, 1), control(2, 4, 1), from_shape(0, 4, 0.1)]
    ran = [(trace.name, repetition) for trace, repetition in order(traces)]
    assert ran[:3] == [("no sharing", 0), ("MMLU", 0), ("no sharing", 1)]
    assert ran.index(("fork 2 × 8", 0)) < ran.index(("no sharing", 2))  # noqa: RUF001
    assert {repetition for _, repetition in order(traces, 1)} == {0}
    assert sum(trace.name == "MMLU" for trace, _ in order(traces, 7)) == 7
    assert in_turn(["a", "b"], 0) == ["a", "b"]
    assert in_turn(["a", "b"], 1) == ["b", "a"]


def test_a_budget_leaves_out_what_would_not_end_in_time() -> None:
    clock = [0.0]
    budget = Budget(10.0, lambda: clock[0])
    trace = control(2, 3000, 10)
    assert budget.fits(trace, ["a", "b"], frozenset()) == ["a", "b"]
    budget.seen[trace.name, "a"] = 8.0
    assert budget.fits(trace, ["a", "b"], frozenset()) == ["a"]
    clock[0] = 3.0
    assert budget.fits(trace, ["a", "b"], frozenset()) == ["b"]
    clock[0] = 11.0
    assert budget.fits(trace, ["a", "b"], frozenset()) == []


# ---------------------------------------------------------------------------------------------- a run, table, pictures


class Selectless(Oracle):
    def run(self, trace: Trace) -> Run:
        if trace.name == "no sharing" and trace.num_prompt_tokens() > 128:
            raise NotPossible("it cannot")
        return super().run(trace)


def _about() -> dict[str, object]:
    environment = {"date": "2026-01-01T00:00:00+00:00", "commit": "c", "cpu": "x", "cores": 2}
    environment |= {"torch": "t", "transformers": "v", "load_average_at_start": [0.1], "load_average_at_end": 0.2}
    return {"environment": environment, "model": "30m", "size": "quick", "arguments": ["--quick"]}


def _suite_run(traces: list[Trace], systems: dict[str, System | None]) -> bench_suite.SuiteRun:
    made_up = bench_suite.SuiteRun(traces, list(systems), Budget(1e9, lambda: 0.0), reps=3)

    def begin(name: str) -> System:
        system = systems[name]
        if system is None:
            raise NotInstalled("pip install it")
        return system

    with ExitStack() as stack:
        made_up.start(begin, stack)
        made_up.measure()
    return made_up


def test_rows_say_what_ran_and_why_the_rest_did_not_and_survive_the_file(tmp_path: Path) -> None:
    traces = [fork(2, 64, 4, 3, "headline"), control(4, 64, 2), fork(4, 64, 4, 3), fork(8, 64, 4, 3)]
    systems: dict[str, System | None] = {
        "bough": Oracle(),
        "bough, no tree decode": Oracle(),
        "transformers continuous": Selectless(),
        "vllm": None,
    }
    found = _suite_run(traces, systems).rows()
    assert len(found) == len(traces) * len(systems)
    status = {(row["workload"], row["system"]): row["status"] for row in found}
    assert status["no sharing", "bough"] == "ok"
    assert status["no sharing", "vllm"] == "not installed"
    assert status["no sharing", "transformers continuous"] == "not possible"
    assert status["fork 4 × 64", "transformers continuous"] == "left out"  # noqa: RUF001
    path = tmp_path / "results" / "run.jsonl"
    rows.write(path, found[:3], {**_about(), "environment": {"date": "2025-01-01"}})
    rows.write(path, found, _about())
    again = rows.read(path)
    assert len(path.read_text().splitlines()) == len(found) + 3
    assert [row["system"] for row in again] == [row["system"] for row in found]
    assert all(row["figures"]["tok_s"]["n"] == 3 for row in again if row["status"] == "ok")
    assert bench_suite.main(["--render", str(path)]) == 0
    table = path.with_suffix(".md").read_text()
    assert "| fork 2 × 64 | bough |" in table  # noqa: RUF001
    assert "vllm: not installed: pip install it (every workload)" in table
    assert "transformers continuous: not possible: it cannot (no sharing)" in table


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traces = [control(4, 64, 2), fork(4, 64, 4, 3), fork(8, 64, 4, 3)]
    found = _suite_run(traces, {"bough": Oracle(), "bough, no tree decode": Oracle()}).rows()
    drawn = plots.draw(found, tmp_path, "x", "here")
    assert [path.name for path in drawn] == [
        f"x-{name}.png" for name in ("speed", "latency", "hits", "memory", "sweep")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw([row for row in found if row["status"] != "ok"], tmp_path, "y", "here") == []


def test_unknown_workloads_and_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_suite.main(["--quick", "--only", "nonsense", "--models-dir", str(tmp_path)]) == 2
    assert "no workload ['nonsense']" in capsys.readouterr().err
    assert bench_suite.main(["--render", str(tmp_path / "none.jsonl")]) == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "tiny", TINY)


@pytest.mark.slow
def test_systems_agree_on_a_tiny_model(tiny: Path) -> None:
    traces = [fork(4, 64, 8, 4), from_shape(1, 8, 0.05), from_shape(8, 8, 0.05), from_shape(4, 30, 0.05)]
    runs = {}
    radix, generate = Bough(tiny), Generate(tiny)
    try:
        for trace in traces:
            runs[trace.name] = {"bough": radix.run(trace), "generate": generate.run(trace)}
            for run in runs[trace.name].values():
                assert len(run.calls) == sum(map(len, trace.programs))
                assert all(len(call.token_times) == len(call.answer) for call in run.calls if not trace.selects)
                assert sum(len(call.token_times) for call in run.calls) == trace.num_generated()
            made_of = rows.figures(trace, runs[trace.name]["bough"], radix.peak_bytes(), True)
            assert 0 < made_of["hit_rate"] <= made_of["best_hit_rate"] + 1e-9
            assert json.dumps(made_of)
        again = radix.run(traces[0])
        assert again.cached_tokens == runs[traces[0].name]["bough"].cached_tokens  # cold again
    finally:
        radix.close()
