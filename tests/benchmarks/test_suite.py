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
import goals
import plots
import report
import rows
from asks import Ask, Trace
from baselines import Generate
from calls import Call, Run
from clients import NotInstalled, NotPossible, System, carry_out
from harness import Summary, put_between
from measuring import SuiteRun
from models import FIRST_WORD, Size, made, text_of, token_ids
from schedule import Budget, in_turn, order, worth_repeating
from shapes import SHAPES
from systems import Bough
from traces import control, first_token, fork, from_shape, live, suite, writer

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


def test_everything_runs_once_before_what_matters_most_runs_again() -> None:
    traces = [fork(2, 8, 1, 1), control(2, 4, 1), from_shape(0, 4, 0.1)]
    ran = [(trace.name, repetition) for trace, repetition in order(traces)]
    once = [("no sharing", 0), ("MMLU", 0), ("fork 2 × 8", 0)]  # noqa: RUF001
    assert ran[:5] == [*once, ("no sharing", 1), ("no sharing", 2)]
    assert {repetition for _, repetition in order(traces, 1)} == {0}
    assert sum(trace.name == "MMLU" for trace, _ in order(traces, 7)) == 7
    assert in_turn(["a", "b"], 0) == ["a", "b"]
    assert in_turn(["a", "b"], 1) == ["b", "a"]


def test_who_is_far_behind_is_not_measured_again() -> None:
    trace = control(2, 4, 1)
    seen = {(trace.name, "bough"): 1.0, (trace.name, "near"): 7.9, (trace.name, "far"): 8.1}
    assert [worth_repeating(seen, trace, name, "bough") for name in ("near", "far", "unseen")] == [True, False, True]


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
    budget.begin()
    assert budget.left() == 10.0


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


def _suite_run(traces: list[Trace], systems: dict[str, System | None]) -> SuiteRun:
    made_up = SuiteRun(traces, list(systems), Budget(1e9, lambda: 0.0), reps=3)

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
    rows.write(path, found[:2], {**_about(), "model": "110m"})
    rows.write(path, found, _about())
    again = rows.read(path)["30m"]
    assert len(path.read_text().splitlines()) == len(found) + 5
    assert list(rows.read(path)) == ["30m", "110m"]
    assert [row["system"] for row in again] == [row["system"] for row in found]
    assert all(row["figures"]["tok_s"]["n"] == 3 for row in again if row["status"] == "ok")
    assert bench_suite.main(["--render", str(path)]) == 0
    assert path.with_name("run-110m.md").exists()
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


def test_first_tokens_are_told_cold_and_cached() -> None:
    trace = first_token(32, 4, programs=2, cached=3)
    for program in trace.programs:
        prompts = [ask.prompt({}) for ask in program]
        assert {len(prompt) for prompt in prompts} == {36}
        assert len({tuple(prompt[:32]) for prompt in prompts}) == 1
        assert len({prompt[32] for prompt in prompts}) == 4
    took = [9.0, 3.0, 1.0, 2.0, 11.0, 2.0, 2.0, 2.0]
    calls = [Call(0.0, [[1]], [ms / 1e3], [1]) for ms in took]
    found = rows.figures(trace, Run(1.0, [0.5, 0.5], calls), None, False)
    assert (found["cold_ms"], found["cached_ms"], found["cold_by_cached"]) == pytest.approx((10.0, 2.0, 5.0))


def test_tokens_are_compared_as_long_as_the_text_before_them_is_the_same() -> None:
    def run(*answers: list[int]) -> Run:
        return Run(1.0, [1.0], [Call(0.0, [[place]], [], answer) for place, answer in enumerate(answers)])

    ours = run([1, 2, 3, 4], [5, 6])
    shares = rows.same_tokens({"bough": ours, "x": run([1, 2, 9, 4], [5, 6]), "y": run([7, 2, 3, 4])})
    assert shares == {"bough": (6, 6), "x": (4, 5), "y": (0, 1)}


# ---------------------------------------------------------------------------------------------- goals and front page


def _row(workload: str, system: str, slower: float | None = None, **figures: float) -> dict[str, object]:
    values = {"wall_s": 1.0, "tok_s": 100.0, **figures}
    found = {name: Summary(value, value, value, 3).fields() for name, value in values.items()}
    row: dict[str, object] = {"workload": workload, "system": system, "status": "ok", "shape": "s", "kind": "headline"}
    row |= {**_about(), "figures": found, "same_tokens": (9, 10)}
    return row if slower is None else {**row, "times_slower": Summary(slower, slower * 0.9, slower * 1.1, 3).fields()}


def _measured() -> list[dict[str, object]]:
    """Rows of a run that meets some goals and misses others."""
    hits = {"hit_rate": 0.9, "best_hit_rate": 0.9, "ttft_p50_ms": 5.0}
    found = [
        _row("fork 32 × 1024", "bough", **hits) | {"width": 32, "prefix": 1024},  # noqa: RUF001
        _row("fork 32 × 1024", "vllm", 1.8) | {"width": 32, "prefix": 1024},  # noqa: RUF001
        _row("fork 64 × 4096", "bough", **hits) | {"width": 64, "prefix": 4096},  # noqa: RUF001
        _row("fork 64 × 4096", "vllm", 3.6) | {"width": 64, "prefix": 4096},  # noqa: RUF001
        _row("batch 8", "bough", hit_rate=0.0, best_hit_rate=0.0),
        _row("batch 8", "vllm", 1.17),
        _row("no sharing", "bough", hit_rate=0.0, best_hit_rate=0.0),
        _row("no sharing", "bough, no radix", 1 / 1.002),
        _row("prefill 1 × 1024", "bough", hit_rate=0.0, best_hit_rate=0.0),  # noqa: RUF001
        _row("first token", "bough", cold_by_cached=9.0, cold_ms=90.0, cached_ms=10.0, **hits),
    ]
    for shape in SHAPES:
        found += [_row(shape.name, "bough", **hits), _row(shape.name, "transformers generate", 4.0)]
        found.append(_row(shape.name, "bough, no radix", 3.3))
        found.append(_row(shape.name, "vllm", 0.96 if shape.name == "MMLU" else 2.0))
    return found


def _documents() -> dict[str, dict[str, object]]:
    about = {"environment": {"date": "2026-01-02T00:00:00", "commit": "abc"}, "quick": False}
    figures = {size: {"torch_by_tree": Summary(10.0, 9.0, 11.0, 9).fields()} for size in ("16 x 1024", "16 x 4096")}
    misses = {f"random 1,024-token prompt, cache {word}": {"median": us} for word, us in (("on", 90.0), ("off", 50.0))}
    return {
        "bench_attention": {**about, "benchmark": "bench_attention", "results": {"attention": figures}},
        "bench_cache": {**about, "benchmark": "bench_cache", "results": misses},
    }


def test_goals_say_met_or_missed_and_by_how_much() -> None:
    verdicts = {verdict.goal: verdict for verdict in goals.goals(_measured(), _documents())}
    cells = {goal: verdict.cells()[1:] for goal, verdict in verdicts.items()}
    assert cells["32 branches on 1,024 shared, vllm"] == ("≥ 1.5 ×", "1.80 (1.62–1.98) ×", "met, by 20%")  # noqa: RUF001
    assert cells["batch of 8, vllm"] == ("≥ 1.3 ×", "1.17 (1.05–1.29) ×", "**missed** by 10%")  # noqa: RUF001
    assert cells["batch of 1, vllm"] == ("≥ 1 ×", "–", "not measured")  # noqa: RUF001
    grown = verdicts["and it grows with prefix and width: largest fork's ratio by the smallest's"]
    assert grown.measured is not None
    assert grown.measured.median == pytest.approx(2.0)
    ahead = verdicts["ahead of every peer on each of the paper's shapes"]
    assert not ahead.met
    assert ahead.note == "(MMLU: vllm, the least of 11; 10 of 11 met)"
    assert verdicts["· MMLU"].part
    assert verdicts["radix cache on, against off, hit-heavy shapes"].met
    whole = verdicts["radix cache where nothing is shared, of the whole time"]
    assert whole.measured is not None
    assert whole.measured.median == pytest.approx(0.2)
    assert whole.met
    part = verdicts["· its bookkeeping for a prompt of 1,024, of that prompt's time"].measured
    assert part is not None
    assert part.median == pytest.approx(0.004)  # 40 µs of a second
    assert verdicts["tree attention, 16 branches on 1,024, against gather and SDPA"].met
    assert not verdicts["tree attention, 16 branches on 4,096, against gather and SDPA"].met
    assert verdicts["first token of 64 new on 1,024 cached, cold by cached"].met


def test_goals_of_a_run_without_peers_and_other_benchmarks_are_not_measured() -> None:
    rows_of = [_row("batch 8", "bough", hit_rate=0.0, best_hit_rate=0.0)]
    rows_of.append({"workload": "batch 8", "system": "vllm", "status": "not installed", "reason": "not installed: x"})
    verdicts = goals.goals(rows_of, {})
    assert not any(verdict.met for verdict in verdicts)
    table = goals.markdown(verdicts, parts=False)
    assert "| batch of 8, vllm | ≥ 1.3 × | – | not measured: not installed |" in table  # noqa: RUF001
    assert "bench_attention.py --save" in table


def test_the_front_page_has_goals_a_line_per_workload_and_larger_shapes(tmp_path: Path) -> None:
    for name, document in _documents().items():
        (tmp_path / f"2026-01-02-{name}.jsonl").write_text(json.dumps(document) + "\n")
    larger = [
        _row("fork 32 × 1024", "bough", hit_rate=0.9, best_hit_rate=0.9),  # noqa: RUF001
        _row("fork 32 × 1024", "vllm", 2.5),  # noqa: RUF001
    ]
    page = report.summary_of({"30m": _measured(), "110m": larger}, tmp_path)
    assert "| MMLU | 100 | 0.96 | 4.00 | – | 3.30 | – | 5.00 / – | 0.90 (0.90) |" in page  # noqa: RUF001
    assert "| fork 32 × 1024 | 1.80 | 2.50 |" in page  # noqa: RUF001
    assert "· MMLU" not in page
    assert "(bench_attention, 2026-01-02, abc)" in page


def test_the_readmes_have_the_places_that_saved_runs_are_put_into(tmp_path: Path) -> None:
    root = Path(report.__file__).parents[1]
    for readme, names in ((root / "README.md", ["bench"]), (root / "benchmarks" / "README.md", ["bench_suite 30m"])):
        copy = tmp_path / "README.md"
        copy.write_text(readme.read_text())
        for name in names:
            put_between(copy, name, "new")
            assert f"<!-- {name} -->\nnew\n<!-- /{name} -->" in copy.read_text()
    with pytest.raises(ValueError, match="no marks <!-- nonsense -->"):
        put_between(copy, "nonsense", "new")


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
