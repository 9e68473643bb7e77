"""Starting a runtime process, on a stand-in for `python -m bough.runtime` that tells its parent what the test says."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from processes import within

import bough as bo
from bough import process
from bough.launch import runtime_options

STAND_IN = """
import argparse, json, os, signal, sys, threading
sys.path.insert(0, {support!r})
parser = argparse.ArgumentParser()
parser.add_argument("model")
for name in ("listen", "status-fd", "parent-pid"):
    parser.add_argument("--" + name, required=True)
options, rest = parser.parse_known_args()

def report(**fields):
    os.write(int(options.status_fd), json.dumps(fields).encode() + b"\\n")

def serve():
    from loopback import Loopback
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop = threading.Event()
    def watch():
        while os.read(0, 100):
            pass
        stop.set()
    threading.Thread(target=watch, daemon=True).start()
    with Loopback(options.listen):
        report(phase="ready", address=options.listen)
        stop.wait()

{body}
"""
SUPPORT = str(Path(__file__).parents[1] / "support")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the launcher start a script with this body instead of the runtime."""

    def use(body: str) -> Path:
        script = tmp_path / "runtime.py"
        script.write_text(STAND_IN.format(support=SUPPORT, body=textwrap.dedent(body)))
        monkeypatch.setattr(process, "module_command", lambda: [sys.executable, str(script)])
        return script

    return use


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def until(is_so: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_runtime_serves_as_a_backend_and_leaves_nothing_behind(stand_in: Any) -> None:
    stand_in("serve()")
    with bo.Runtime() as runtime:
        folder = Path(runtime.address.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert is_alive(runtime.pid)
        s = bo.State(runtime)
        s += bo.user("hi") + bo.gen("x") + bo.select("y", ["a", "b"])
        (fork,) = s.fork()
        fork += bo.gen("z")
        assert (s["x"], s["y"], fork["z"]) == ("one two three", "a", "one two three")
        assert runtime.stats()["steps"] == 3
        runtime.flush_cache()
        assert runtime.server_info()["model"] == "loopback"
        assert f"pid {runtime.pid}" in repr(runtime)
        branch = runtime.open()
        assert runtime.score(branch, ["a"], "token_length_normalized").result(10).index == 0
        assert runtime.rollback(branch, 1).result(10).length == 1
        assert runtime.cancel(branch).result(10) == 1
    assert not is_alive(runtime.pid)
    assert not folder.exists()
    runtime.shutdown()
    with pytest.raises(bo.RuntimeLost):
        s += bo.gen("x")


def test_options_reach_the_process_and_a_path_is_made_absolute(stand_in: Any, tmp_path: Path) -> None:
    stand_in(f"open(os.path.join({str(tmp_path)!r}, 'argv'), 'w').write('\\n'.join(sys.argv[1:]))\nserve()")
    (tmp_path / "model").mkdir()
    relative = os.path.relpath(tmp_path / "model")
    with bo.Runtime(model_path=relative, dtype="float32", device="cpu", page_size=8, max_total_tokens=4096,
                    token_budget=64, max_running=4, schedule_policy="fcfs", radix_cache=False, seed=0,
                    exact=True, speculate=True, log_level="info") as runtime:  # fmt: skip
        argv = (tmp_path / "argv").read_text().split("\n")
        assert runtime.address in argv
    assert argv[0] == str(tmp_path / "model")
    given = dict(itertools.pairwise(argv))
    assert given["--parent-pid"] == str(os.getpid())
    expected = {"--dtype": "float32", "--device": "cpu", "--page-size": "8", "--max-total-tokens": "4096",
                "--token-budget": "64", "--max-running": "4", "--schedule-policy": "fcfs", "--seed": "0",
                "--log-level": "info"}  # fmt: skip
    assert {name: given[name] for name in expected} == expected
    assert "--no-radix-cache" in argv
    assert "--exact" in argv
    assert "--speculate" in argv


def test_only_what_was_asked_for_is_passed_on() -> None:
    defaults: dict[str, Any] = dict.fromkeys(
        ("dtype", "device", "max_total_tokens", "token_budget", "max_running", "seed")
    )
    given: dict[str, Any] = {"schedule_policy": "lpm", "radix_cache": True, "log_level": "warning"}
    for speculate, words in ((None, []), (True, ["--speculate"]), (False, ["--no-speculate"])):
        options = runtime_options(**defaults, **given, exact=False, speculate=speculate, page_size=16)
        assert options == [*words, "--schedule-policy", "lpm", "--log-level", "warning", "--page-size", "16"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"page_size": 0}, "page_size must be a whole number of at least 1, got 0"),
        ({"page_size": None}, "page_size must be"),
        ({"max_total_tokens": 1.5}, "max_total_tokens must be"),
        ({"mem_fraction": 1.5}, "mem_fraction must be above 0 and at most 1, got 1.5"),
        ({"max_running": True}, "max_running must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"dtype": "int3"}, "dtype must be one of float32"),
        ({"schedule_policy": "random"}, "schedule_policy must be one of lpm, fcfs"),
        ({"log_level": "loud"}, "log_level must be one of"),
        ({"radix_cache": 1}, "radix_cache must be True or False"),
        ({"exact": 1}, "exact must be True or False"),
        ({"speculate": 1}, "speculate must be True or False"),
        ({"restart": "always"}, "restart must be True or False"),
        ({"start_timeout": 0}, "start_timeout must be"),
        ({"model": ""}, "model must be"),
        ({"model": 3}, "model must be"),
        ({"model": "a", "model_path": "b"}, "model_path is another name of model"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(stand_in: Any, given: dict[str, Any], words: str) -> None:
    stand_in("raise SystemExit('started')")
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.Runtime(**given)
    with pytest.raises(TypeError, match="mem_fraction_static"):
        bo.Runtime(mem_fraction_static=0.8)


def test_a_model_that_cannot_be_loaded_is_told_in_the_runtimes_words(stand_in: Any) -> None:
    stand_in(
        'report(phase="loading", text="half", is_line=True);'
        'report(phase="failed", kind="unsupported_model", message="GPT-9")'
    )
    with pytest.raises(bo.UnsupportedModel, match="GPT-9"):
        bo.Runtime()


def test_a_process_that_dies_at_start_is_told_with_code_and_log(stand_in: Any, capfd: Any) -> None:
    stand_in('os.write(int(options.status_fd), b"no json\\n"); sys.exit("the log: no luck")')
    with pytest.raises(bo.RuntimeLost, match=r"(?s)exited with code 1 before it was ready.*the log: no luck") as caught:
        bo.Runtime()
    assert caught.value.details == {"exit_code": 1}
    assert "the log: no luck" in capfd.readouterr().err


LOADS_SLOWLY = """
    report(phase="loading", text="a quarter", is_line=False)
    report(phase="loading", text="half", is_line=True)
    report(phase="loading", text="all", is_line=False)
    report(phase="failed", kind="unsupported_model", message="GPT-9")
"""


def test_a_terminal_shows_how_a_start_goes_and_is_clean_when_it_is_over(
    stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(LOADS_SLOWLY)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(bo.UnsupportedModel):
        bo.Runtime()
    shown = terminal.getvalue().partition("\rbough: a quarter")[2]  # before it: that nothing is heard, if it is slow
    assert shown == "\rbough: half     \rbough: all \r          \r"


def test_what_is_no_terminal_gets_the_lines_that_are_due(stand_in: Any, capsys: Any) -> None:
    stand_in(LOADS_SLOWLY)
    with pytest.raises(bo.UnsupportedModel):
        bo.Runtime()
    assert capsys.readouterr().err == "bough: half\n"


def test_a_start_that_says_nothing_is_told_of_on_a_terminal(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in('threading.Event().wait(0.3); report(phase="failed", kind="unsupported_model", message="GPT-9")')
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(process, "QUIET_S", 0.01)
    with pytest.raises(bo.UnsupportedModel, match="GPT-9"):
        bo.Runtime()
    assert terminal.getvalue().startswith("\rbough: starting the runtime\r")


def test_a_process_that_is_too_slow_is_stopped(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("threading.Event().wait()")
    started: list[int] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self.pid)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(bo.Timeout, match="not ready in time"):
        bo.Runtime(start_timeout=0.5)
    assert [is_alive(pid) for pid in started] == [False]


def test_a_runtime_killed_at_work_wakes_the_waiters_and_the_next_one_starts_clean(stand_in: Any) -> None:
    stand_in("serve()")
    with bo.Runtime() as runtime:
        os.kill(runtime.pid, signal.SIGSTOP)  # so that the gen stays in flight
        s = bo.State(runtime)
        s += bo.gen("x")
        os.kill(runtime.pid, signal.SIGKILL)
        with pytest.raises(bo.RuntimeLost, match="was killed by SIGKILL"):
            within(20, lambda: s["x"])
        with pytest.raises(bo.RuntimeLost, match="was killed by SIGKILL"):
            runtime.stats()
    with bo.Runtime() as runtime:
        s = bo.State(runtime)
        s += bo.gen("x")
        assert s["x"] == "one two three"


def test_a_process_that_will_not_stop_is_killed(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "TERMINATE_S", 0.2)
    stand_in("""
        from loopback import Loopback
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with Loopback(options.listen):
            report(phase="ready", address=options.listen)
            threading.Event().wait()
    """)
    with bo.Runtime() as runtime:
        pass
    assert not is_alive(runtime.pid)


PROGRAM = """
import os, signal, sys
import bough as bo
from bough import process
process.module_command = lambda: [sys.executable, {script!r}]
runtime = bo.Runtime()
print(runtime.pid, runtime.address, flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)", "raise KeyError", "os._exit(1)"]
)
def test_no_orphan_outlives_its_parent_however_that_ends(stand_in: Any, end: str) -> None:
    script = stand_in("serve()")
    code = PROGRAM.format(script=str(script), end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout.split()[0])
    until(lambda: not is_alive(pid))
    assert "ResourceWarning" not in done.stderr
