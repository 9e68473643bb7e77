"""The report on a GPU: what it writes when a section fails or finds no time, and its sections under the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import baselines
import gpu_kernels
import gpu_questions
import gpu_report
import gpu_serving
import gpu_steps
import gpu_tree
import traces
from gpu_goals import GOALS, summary, verdicts
from gpu_report import Clock, Report, Row, Section, run_sections
from gpu_steps import extend_batch
from shapes import SHAPES

from bough.runtime.batch import Batch, RowResult

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def failing(clock: Clock) -> Iterator[Row]:
    yield {"us": 1.5}
    raise RuntimeError("out of memory")


def breaking(clock: Clock) -> Iterator[Row]:
    yield {"us": 2.5}
    os.kill(os.getpid(), signal.SIGKILL)
    yield {"us": 3.5}


def hanging(clock: Clock) -> Iterator[Row]:
    yield {"us": 4.5}
    while True:
        time.sleep(0.01)


def long(clock: Clock) -> Iterator[Row]:
    yield {"is_out": clock.is_out}


def written(path: Path) -> dict[str, tuple[str, list[Row]]]:
    sections = json.loads(path.read_text())["sections"]
    return {name: (section["status"].split(" after")[0], section["rows"]) for name, section in sections.items()}


def test_a_section_that_fails_breaks_or_hangs_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "_GRACE_S", 0.0)
    paths = [tmp_path / "new" / "report.json", tmp_path / "copy.json"]
    report = Report({"device": "none"}, paths)
    sections = [
        Section("failing", 60, failing),
        Section("breaking", 60, breaking, "side by side"),
        Section("hanging", 0.2, hanging, "side by side"),
        Section("long", 5, long),
    ]
    run_sections(sections, report, time.monotonic() + 600)
    run_sections([Section("late", 60, long)], report, time.monotonic())
    assert (
        written(paths[0])
        == written(paths[1])
        == {
            "failing": ("failed: RuntimeError: out of memory", [{"us": 1.5}]),
            "breaking": (f"failed: its process ended with {-signal.SIGKILL}", [{"us": 2.5}]),
            "hanging": ("killed", [{"us": 4.5}]),
            "long": ("done", [{"is_out": False}]),
            "late": ("not run: no time left", []),
        }
    )


def test_seconds_that_sections_left_go_to_those_that_take_more_and_to_no_others() -> None:
    alone, more = Section("alone", 20, long), Section("more", 40, long, takes_more=True)
    side = [Section("one", 30, long, "side"), Section("two", 10, long, "side")]
    groups = gpu_report.grouped([alone, *side, more, alone])
    assert [[section.name for section in group] for group in groups] == [["alone"], ["one", "two"], ["more"], ["alone"]]
    for left, seconds in ((60.0, 40.0), (55.0, 40.0), (100.0, 80.0)):
        assert [section.seconds for section in gpu_report.with_spare(groups[2], groups[3:], left)] == [seconds]
    assert gpu_report.with_spare(groups[1], groups[2:], 400.0) == side


def test_what_a_section_started_ends_with_it(tmp_path: Path) -> None:
    """Else a compiler's worker, say, would hold the report's output open when the report is over."""
    ours, theirs = os.pipe()

    def leaving(clock: Clock) -> Iterator[Row]:
        subprocess.Popen(["sleep", "600"], pass_fds=(theirs,))
        yield {"us": 1.5}

    report = Report({}, [tmp_path / "report.json"])
    run_sections([Section("leaving", 60, leaving)], report, time.monotonic() + 600)
    os.close(theirs)
    assert os.read(ours, 1) == b"", "it ends when nobody holds the other end"
    os.close(ours)
    assert written(tmp_path / "report.json") == {"leaving": ("done", [{"us": 1.5}])}


def odd(clock: Clock) -> Iterator[Row]:
    yield {"us": np.float32(1.5)}


def test_what_is_no_json_and_a_path_that_cannot_be_written_cost_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = Report({}, [tmp_path / "file" / "report.json", tmp_path / "report.json"])
    run_sections([Section("odd", 60, odd), Section("long", 60, long)], report, time.monotonic() + 600)
    assert written(report.paths[1]) == {"odd": ("done", [{"us": "1.5"}]), "long": ("done", [{"is_out": False}])}


class Interrupted(Report):
    """A report that a signal stops when all that runs has told something."""

    def write(self) -> None:
        super().write()
        if all(section["rows"] and section["status"] == "running" for section in self.sections.values()):
            raise KeyboardInterrupt


def endless(clock: Clock) -> Iterator[Row]:
    yield {"pid": os.getpid()}
    yield from hanging(clock)


def test_a_stop_from_outside_ends_what_runs_and_leaves_what_was_found(tmp_path: Path) -> None:
    """Each section is a session of its own, so no signal to the report would end it."""
    report = Interrupted({}, [tmp_path / "report.json"])
    together = [Section(name, 600, endless, "side by side") for name in ("one", "two")]
    with pytest.raises(KeyboardInterrupt):
        run_sections(together, report, time.monotonic() + 600)
    for status, rows in written(tmp_path / "report.json").values():
        assert status == "stopped from outside"
        with pytest.raises(ProcessLookupError):
            os.kill(rows[0]["pid"], 0)


class Event:
    """A CUDA event that notes when it is recorded."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, end: object) -> float:
        return 0.25


@pytest.mark.parametrize("cold", [True, False])
def test_attention_is_timed_with_a_cache_that_holds_something_else(monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    """The cache is filled between the head start of the host and the first event, by reading: see `cooling`."""
    monkeypatch.setattr(Event, "log", log := [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(gpu_kernels, "cooling", lambda device: lambda: log.append("other"))
    works: dict[str, Callable[[], object]] = {name: partial(log.append, name) for name in ("tree", "each")}
    found = gpu_kernels.medians_us(works, torch.device("cuda"), 2, cold=cold)
    assert found == {"tree": 250.0, "each": 250.0}
    other = ["other"] if cold else []
    timed = [["sleep", *other, "event", name, "event", "wait"] for name in ("tree", "each", "tree", "each")]
    assert log == ["tree", "tree", "each", "each", *chain(*timed)]


def test_a_question_without_an_answer_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def unanswered(case: object) -> Row:
        raise RuntimeError("the text has changed")

    monkeypatch.setattr(gpu_questions, "_stages_and_indices", unanswered)
    monkeypatch.setattr(gpu_questions, "_programs", lambda case: {"question": "programs", "us": 1.0})
    monkeypatch.setattr(gpu_questions, "Case", lambda *shape: shape)
    assert list(gpu_questions.questions(torch.device("cpu"), Clock(time.monotonic() + 600))) == [
        {"question": "stages", "no": "RuntimeError: the text has changed"},
        {"question": "programs", "us": 1.0},
    ]


class Failing:
    """A runner whose graphs cannot be captured."""

    def execute(self, batch: Batch) -> list[RowResult]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_runner_that_fails_costs_no_other_its_figures() -> None:
    assert gpu_steps._failure(Instant(), Batch(())) is None
    assert gpu_steps._failure(Failing(), Batch(())) == "RuntimeError: operation not permitted when stream is capturing"
    assert gpu_steps._served_ms([], Batch(())) == []


class Manager:
    """A manager of continuous batching that answers the first request only, to warm up, or none at all.

    takes: how many requests it takes until it dies.
    """

    def __init__(self, takes: int, *, answers: bool = True) -> None:
        self.stopped: dict[str, bool] = {}
        self.background_thread_status = SimpleNamespace(fatal_error=None if answers else MemoryError("no room"))
        self._takes = takes
        self._answers = int(answers)

    def start(self) -> None:
        pass

    def add_request(self, prompt: list[int], **options: object) -> str | None:
        self._takes -= 1
        return "taken" if self._takes >= 0 else None

    def get_result(self, timeout: float) -> Any:
        self._answers -= 1
        return SimpleNamespace(is_finished=lambda: True, error=None) if self._answers == 0 else None

    def is_running(self) -> bool:
        return not self.stopped

    def stop(self, block: bool, hard_stop: bool = False) -> None:
        self.stopped = {"block": block, "hard_stop": hard_stop}


@pytest.mark.parametrize(
    ("manager", "seconds", "said"),
    [
        (Manager(100), 0.0, "requests were left when its time was over"),
        (Manager(1), None, "takes no request"),
        (Manager(1, answers=False), None, "answers nothing: no room"),
    ],
    ids=["out of time", "dead", "never alive"],
)
def test_a_peer_that_answers_no_more_is_told_and_stops_at_once(
    manager: Manager, seconds: float | None, said: str
) -> None:
    """Stopped as usual it would first answer all that it was asked, in the next workload's time."""
    network = SimpleNamespace(init_continuous_batching=lambda generation, config: manager)
    peer = baselines.ContinuousBatching((torch, network), pool_tokens=1024)
    with pytest.raises(RuntimeError, match=said):
        peer.run(traces.fork(1, 0, 4, 2), seconds)
    assert manager.stopped == {"block": True, "hard_stop": True}


def goal_sections(factor: float) -> dict[str, Row]:
    """Return a report in which every figure of an aim is `factor` times as good as it must be."""
    base = {"new": 1, "graphs": True, "share": True}

    def alone(model: str, batch: int, **more: object) -> Row:
        return {"model": model, "batch": batch, "context": 1024, "shared": 0, **base, **more}

    def branches(batch: int, prefix: int, gain: float) -> list[Row]:
        row = {"model": "8b", "batch": batch, "context": prefix + 128, "shared": prefix, **base, "ms": 5.0}
        return [row, {**row, "share": False, "ms": 5.0 * gain * factor}]

    steps: list[Row] = [
        {"model": "8b", "tree_costs": "measured"},
        alone("8b", 1, ms=4.0, share_of_copy=0.75 * factor, idle=0.05 / factor),
        alone("8b", 1, ms=4.0 * 1.3 * factor, graphs=False),
        alone("8b", 64, ms=1.02 / factor), alone("8b", 64, ms=1.0, share=False),
        *branches(16, 8192, 1.5), *branches(64, 8192, 3.0), *branches(64, 32_768, 6.0),
        {"model": "8b", "cached": 8192, "new": 64, "ms": 4.0, "floors": 1.6 / factor},
        alone("1b", 1, ms=1.0), alone("1b", 1, ms=3.0 * factor, graphs=False),
    ]  # fmt: skip
    rows: dict[str, list[Row]] = {
        "tree": [{"width": width, "prefix": 8192, "each/tree": least * factor} for width, least in ((16, 4), (64, 12))]
        + [{"width": 64, "prefix": 32_768, "each/tree": 12 * factor}],
        "steps 8b": [row for row in steps if row["model"] == "8b"],
        "steps 1b": [row for row in steps if row["model"] == "1b"],
        "peers": [{"peer": "sdpa", "width": 64, "prefix": 0, "sdpa/tree": 1.0}],
        "peers flashinfer": [
            {"peer": "flashinfer", "width": 64, "prefix": 0, "flashinfer/tree": 0.9 * factor},
            {"peer": "cascade", "width": 64, "prefix": 8192, "cascade/tree": factor},
        ],
        "prefill": [{"tokens": 4096, "fa3/ours": 0.7 * factor, "cudnn/ours": 0.7 * factor, "flash/ours": 9.0}],
    }
    return {name: {"status": "done", "rows": found} for name, found in rows.items()}


def test_every_goal_is_met_missed_or_not_measured_by_its_rows() -> None:
    for factor, word in ((1.01, "pass"), (0.99, "FAIL")):
        assert [verdict.split()[0] for _, _, verdict in verdicts(goal_sections(factor))] == [word] * len(GOALS)
    assert {verdict.split(" (")[0] for _, _, verdict in verdicts({})} == {"not measured"}
    assert all(value is None for _, value, _ in verdicts({}))


def test_the_goals_are_those_of_the_issue() -> None:
    limits = [verdict.split("(")[-1].rstrip(")") for _, _, verdict in verdicts({})]
    assert limits == [
        ">= 0.75", ">= 4", ">= 12", ">= 12", ">= 1.5", ">= 3", ">= 6", "<= 1.02", ">= 0.9", ">= 1", ">= 0.7", ">= 0.7",
        "<= 0.05", ">= 1.3", ">= 3", "<= 1.6",
    ]  # fmt: skip


def test_a_stand_in_is_named_where_a_peer_is_missing() -> None:
    sections = goal_sections(1.01)
    del sections["prefill"]["rows"][0]["fa3/ours"]
    found = {what: (value, verdict) for what, value, verdict in verdicts(sections)}
    assert found["FA3 prefill / ours, 4k"] == (9.0, "pass (>= 0.7, of PyTorch's flash attention, no FA3 here)")


def test_the_table_names_what_is_wrong_and_how_workloads_were_served() -> None:
    wrong = {"kernel": "draw", "dtype": "float32", "error": 2.0, "limit": 0.0, "right": False}
    peer = "transformers continuous batching"
    sections = {
        "correctness rows": {"status": "done", "rows": [wrong]},
        "serving": {"status": "done", "rows": [{"workload": "MMLU", "system": "bough", "seconds": 2.0}]},
        "serving peer": {"status": "done", "rows": [{"workload": "MMLU", "system": peer, "seconds": 5.0}]},
    }
    lines = summary(sections)
    assert "WRONG draw float32: 2 > 0" in lines
    assert "2.5x transformers" in lines


def test_sections_have_time_within_eight_minutes_and_serving_has_all_workloads() -> None:
    sections = gpu_report._sections(torch.device("cuda"), peers=True)
    together = {section.together: section.seconds for section in sections if section.together}
    total = sum(section.seconds for section in sections if not section.together) + sum(together.values())
    assert total <= gpu_report._parser().parse_args([]).seconds
    assert total + gpu_report._GRACE_S <= 480
    names = [trace.name for trace in gpu_serving.workloads(tiny=False)]
    assert names[0].startswith("fork")
    assert names[1] == "no sharing"
    assert sorted(names[2:]) == sorted(shape.name for shape in SHAPES)


class Instant:
    """A runner that draws the same token always."""

    num_pages, page_size, vocab_size = gpu_serving._POOL_TOKENS // 16, 16, 128_256

    def execute(self, batch: Batch) -> list[RowResult]:
        return [RowResult(token=5 if row.sample is not None else None) for row in batch.rows]


def test_every_workload_is_served_to_its_end_within_the_pool() -> None:
    """At full size, by a runner that takes no time: answers become prompts, a program's end lets the next one begin."""
    num_steps = 0
    for trace in gpu_serving.workloads(tiny=False):
        served = gpu_serving.Served(Instant(), trace, overlap=False)
        served.run(time.monotonic() + 60)
        figures = served.figures()
        assert figures["generated"] == trace.num_generated()
        assert figures["cached"] + figures["computed"] == figures["prompt"]
        num_steps += figures["steps"]
    assert num_steps < 4000


def test_a_workload_that_takes_too_long_is_told_and_leaves_nothing_in_flight() -> None:
    trace = gpu_serving.workloads(tiny=False)[0]
    with pytest.raises(TimeoutError, match="32 requests were left when its time was over"):
        gpu_serving.Served(Instant(), trace, overlap=False).run(time.monotonic())


def test_flashinfer_is_not_called_where_it_could_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: set[str] = set()
    tools: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in found else None)
    monkeypatch.setattr(gpu_tree, "_tool", lambda name: name if name in tools else None)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    assert gpu_tree.flashinfer_state() == "not installed"
    found.add("flashinfer")
    assert gpu_tree.flashinfer_state() == "no compiled kernels, and no nvcc or ninja to make them"
    tools |= {"nvcc", "ninja"}
    assert gpu_tree.flashinfer_state() == "to be compiled now, by nvcc"
    library = tmp_path / ".cache/flashinfer/0.5.3/90a/cached_ops/batch_decode/batch_decode.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert gpu_tree.flashinfer_state() == "compiled before: batch_decode"
    found.add("flashinfer_jit_cache")
    assert gpu_tree.flashinfer_state().startswith("compiled ahead")


def test_a_step_of_new_tokens_stands_after_what_is_cached() -> None:
    (row,) = extend_batch(8192, 64).rows
    assert (row.start, len(row.token_ids), len(row.pages)) == (8192, 64, 516)


# What a CUDA image of PyTorch has; bough itself and everything else comes from the checkout or from wheels.
BARE = """
import sys
from importlib.machinery import PathFinder

class Missing:
    names = {names!r}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.names or path is not None:
            return None
        carried = [folder for folder in sys.path if "bough-report-" in folder]
        spec = PathFinder.find_spec(name, carried)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return spec

sys.meta_path[:] = [finder for finder in sys.meta_path if "bough" not in getattr(finder, "__module__", "")]
sys.meta_path.insert(0, Missing())
"""
LACKING = (
    "bough", "matplotlib", "transformers", "tokenizers", "tiktoken", "pydantic", "jsonschema", "msgspec", "msgpack",
    "zmq", "llguidance", "greenlet", "openai", "rich", "tqdm", "safetensors", "huggingface_hub", "flashinfer", "psutil",
)  # fmt: skip


def carried_wheel(folder: Path, package: str) -> None:
    """Make a wheel of an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        for path in source.rglob("*"):
            if path.suffix in (".py", ".so"):
                wheel.write(path, path.relative_to(source.parent))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_without_the_runtimes_packages_kernels_are_reported_and_what_is_missing_is_told(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE.format(names=set(LACKING)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    path = tmp_path / "report.json"
    command = [sys.executable, "gpu_report.py", "--dry-run", "--wheels", str(tmp_path / "none"), "--out", str(path)]
    command += ["--only", "ceilings", "serving"]
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    document = json.loads(path.read_text())
    assert document["environment"]["missing"] == ["msgspec", "llguidance", "safetensors"]
    found = {name: section["status"].split(":")[0] for name, section in document["sections"].items()}
    assert found == {"device": "done", "ceilings": "done", "serving": "failed", "serving peer": "done"}
    for told in (result.stdout.splitlines()[-1], result.stderr.splitlines()[0]):
        assert told.startswith("not installed: msgspec llguidance safetensors. Whole steps and serving will fail")
    assert result.returncode == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_a_dry_run_needs_nothing_but_torch_triton_numpy_and_wheels(tmp_path: Path) -> None:
    """Every kernel is right and a fork is served from the cache, in a process that finds no other package.

    Triton decides at its import whether kernels are interpreted.
    """
    (tmp_path / "sitecustomize.py").write_text(BARE.format(names=set(LACKING)))
    for package in ("msgspec", "safetensors", "llguidance"):
        carried_wheel(tmp_path / "wheels", package)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    path = tmp_path / "report.json"
    command = [sys.executable, "gpu_report.py", "--dry-run", "--wheels", str(tmp_path / "wheels"), "--out", str(path)]
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    sections = json.loads(path.read_text())["sections"]
    parts = ["device", "correctness rows", "correctness attention", "correctness keys", "correctness steps"]
    parts += ["flashinfer", "ceilings", "tree", "steps tiny", "peers", "peers flashinfer", "prefill", "serving"]
    parts += ["serving peer", "questions", "kernels"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(parts, "done")
    checks = [row["right"] for section in sections.values() for row in section["rows"] if "right" in row]
    assert len(checks) >= 10
    assert all(checks)
    assert {row["kernel"] for row in sections["kernels"]["rows"]} == {"norm", "gate", "rotation", "logits", "draw"}
    assert sections["tree"]["rows"][0]["tree_costs"] == "estimated: no GPU"
    assert sections["steps tiny"]["rows"][0]["tree_costs"] == "estimated: no GPU"
    assert {row["graphs"] for row in sections["steps tiny"]["rows"] if "graphs" in row} == {True, False}
    assert {row["share"] for row in sections["steps tiny"]["rows"] if "share" in row} == {True, False}
    asked = {row["question"] for row in sections["questions"]["rows"]}
    assert asked == {"stages, and pages looked up in the loop", "programs"}
    assert sections["flashinfer"]["rows"] == [{"flashinfer": "not installed"}]
    missing = [sections[name]["rows"][0]["no"] for name in ("peers flashinfer", "serving peer")]
    assert all(reason.startswith("ModuleNotFoundError: No module named") for reason in missing)
    served = [(row["workload"].split()[0], row["system"], row["generated"]) for row in sections["serving"]["rows"]]
    overlap, alone = "bough", "bough --no-overlap"
    assert served[:4] == [("fork", overlap, 4), ("fork", alone, 4), ("no", overlap, 4), ("no", alone, 4)]
    assert [workload for workload, *_ in served[4:]] == ["HellaSwag", "multi-turn"]
    assert sections["serving"]["rows"][0]["cached"] == 32, "two branches, one prefix of 32"
    assert "not measured" in result.stdout, "the goals are told last"
