"""A system in a process of its own: the protocol, failures, and that it needs none of bough's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import systems
import vllm_system
from asks import Ask, Trace
from clients import NotInstalled, NotPossible
from hosting import Hosted

SYSTEM = '''
import os, subprocess, sys, time
from concurrent.futures import Future

from asks import Trace
from calls import Call, Run
from clients import NotInstalled, NotPossible, carry_out


class Counting:
    """Answers 0, 1, 2 ...; the trace's name says how to fail."""

    def __init__(self, model, left):
        if model.name == "absent":
            raise NotInstalled("pip install counting")
        self.left = left
        left.joinpath("modules").write_text(" ".join(sorted(sys.modules)))
        left.joinpath("variables").write_text(f"{os.environ.get('TAKEN')} {os.environ.get('GIVEN')}")

    def run(self, trace):
        if trace.name == "impossible":
            raise NotPossible("it has no way")
        if trace.name == "broken":
            raise KeyError("lost")
        if trace.name == "fatal":
            print("out of luck", flush=True)
            os._exit(3)
        if trace.name == "child":
            self.child = subprocess.Popen(["sleep", "600"], stdout=open(self.left / "fifo", "wb"))
        return carry_out(trace, self.start)

    def start(self, prompt, ask):
        done = Future()
        times = [time.perf_counter()] * ask.num_tokens
        done.set_result(Call(times[0], [prompt], times, list(range(ask.num_tokens)), len(prompt) // 2))
        return done

    def peak_bytes(self):
        return 12345

    def close(self):
        self.left.joinpath("closed").touch()
'''


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what makes a Counting, of a module that the other process finds by PYTHONPATH."""
    (tmp_path / "counting_system.py").write_text(SYSTEM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "counting_system", import_module("counting_system"))
    monkeypatch.setenv("TAKEN", "yes")
    return partial(sys.modules["counting_system"].Counting, left=tmp_path)


def _hosted(make: Any, tmp_path: Path, model: str = "m", python: str = sys.executable) -> Hosted:
    return Hosted(make, Path(model), python, {"PYTHONPATH": str(tmp_path), "TAKEN": None, "GIVEN": "7"})


def _trace(name: str = "two asks") -> Trace:
    asks = (Ask(((5, 6),), num_tokens=3), Ask(((5,), 0, (9,)), num_tokens=2, after=(0,)))
    return Trace(name, "", "paper", (asks,), 1)


def test_traces_go_there_and_runs_come_back_until_it_is_closed(make: Any, tmp_path: Path) -> None:
    hosted = _hosted(make, tmp_path)
    for _ in range(2):
        run = hosted.run(_trace())
        assert [call.prompts for call in run.calls] == [[[5, 6]], [[5, 0, 1, 2, 9]]]
        assert [call.answer for call in run.calls] == [[0, 1, 2], [0, 1]]
        assert run.cached_tokens == 1 + 2
        assert hosted.peak_bytes() == 12345
    assert not (tmp_path / "closed").exists()
    hosted.close()
    assert (tmp_path / "closed").exists()
    assert (tmp_path / "variables").read_text() == "None 7"


def test_what_a_host_needs_of_ours_is_the_standard_library_alone(make: Any, tmp_path: Path) -> None:
    _hosted(make, tmp_path).close()
    modules = set((tmp_path / "modules").read_text().split())
    assert {"asks", "calls", "clients"} <= modules
    assert not modules & {"bough", "numpy", "torch", "harness", "transformers"}
    code = "import vllm_system, sys; print(*(m for m in ('bough', 'numpy', 'torch', 'harness') if m in sys.modules))"
    folder = Path(vllm_system.__file__).parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).strip() == ""


def test_failures_come_back_as_what_they_are_and_the_host_goes_on(make: Any, tmp_path: Path) -> None:
    hosted = _hosted(make, tmp_path)
    with pytest.raises(NotPossible, match="it has no way"):
        hosted.run(_trace("impossible"))
    with pytest.raises(RuntimeError, match="KeyError: 'lost'"):
        hosted.run(_trace("broken"))
    assert len(hosted.run(_trace()).calls) == 2
    with pytest.raises(RuntimeError, match="ended with status 3: out of luck"):
        hosted.run(_trace("fatal"))
    with pytest.raises(RuntimeError, match="ended with status 3"):
        hosted.run(_trace())
    hosted.close()


def test_a_host_that_is_closed_takes_what_it_started_with_it(make: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open(os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK), "rb") as fifo:
        hosted = _hosted(make, tmp_path)
        hosted.run(_trace("child"))
        hosted.close()
        os.set_blocking(fifo.fileno(), True)
        assert fifo.read() == b""  # comes when nobody is left who could write


def test_what_is_not_installed_says_so(make: Any, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="pip install counting"):
        _hosted(make, tmp_path, "absent")
    with pytest.raises(NotInstalled, match=r"no/python does not run: No such file"):
        _hosted(make, tmp_path, python="/no/python")
    with pytest.raises(NotInstalled, match="vllm-python"):  # this environment has no vllm
        systems.start("vllm", Path("m"))


def test_vllm_gets_every_core_and_its_own_way_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 3})
    for name in ("LD_PRELOAD", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    found = vllm_system.environment(str(tmp_path / "bin" / "python"))
    assert found["GOMP_SPINCOUNT"] is None
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,3"
    assert str(found["LD_PRELOAD"]).endswith(str(tmp_path / "lib" / "libiomp5.so"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_system.environment(str(tmp_path / "bin" / "python"))
