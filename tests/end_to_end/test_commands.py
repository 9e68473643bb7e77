"""The `bough` command and the examples, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import START_S, environment, within

import bough as bo

ROOT = Path(__file__).parents[2]
BOUGH = str(Path(sys.executable).parent / "bough")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SAYS = {
    "chat_streaming.py": "tokens cached",
    "demo.py": "The best one, by select: ",
    "few_shot_select.py": "tokens cached",
    "fork_join.py": "In short:",
    "hello.py": "tokens of the prompt;",
    "template.py": "one gen: 'Name: ",
    "tool_loop.py": "answer ",
    "tree_of_thought.py": "best:",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(PYTHONWARNINGS="error", HF_HUB_OFFLINE="1"),
    )


@pytest.fixture(scope="module")
def outcomes() -> dict[str, subprocess.CompletedProcess[str]]:
    """Every example, run as it is, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        each = pool.map(lambda name: run(sys.executable, str(ROOT / "examples" / name)), EXAMPLES)
        return dict(zip(EXAMPLES, each, strict=True))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is_with_the_bundled_model(
    outcomes: dict[str, subprocess.CompletedProcess[str]], name: str
) -> None:
    done = outcomes[name]
    assert done.returncode == 0, done.stderr
    assert SAYS.get(name, " ") in done.stdout
    assert "Traceback" not in done.stderr
    assert "�" not in done.stdout


def test_the_command_tells_its_version() -> None:
    done = run(BOUGH, "--version")
    assert (done.returncode, done.stdout) == (0, f"bough {bo.__version__}\n")


PROGRAM = """
import sys
import bough as bo

@bo.function
def answer(s, question):
    s += bo.user(question) + bo.assistant(bo.gen("answer", max_tokens=8, temperature=0))

print(__name__, sys.argv[1:], repr(answer.run(sys.argv[1])["answer"]))
"""


def test_run_gives_a_file_a_default_backend_and_its_arguments(pocket: bo.Runtime, tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = run(BOUGH, "run", "--address", pocket.address, str(file), "Hello!", "--flag")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("__main__ ['Hello!', '--flag'] '")
    alone = run(BOUGH, "run", str(file), "Hello!", "--flag")
    assert (alone.returncode, alone.stdout) == (0, done.stdout), alone.stderr


def test_run_tells_what_is_missing(tmp_path: Path) -> None:
    done = run(BOUGH, "run", str(tmp_path / "absent.py"))
    assert done.returncode == 2
    assert "there is no file" in done.stderr


def test_serve_serves_clients_until_it_is_told_to_stop(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    address = f"ipc://{tmp_path}/s"
    process = subprocess.Popen([BOUGH, "serve", "pocket", "--listen", address], stdin=subprocess.DEVNULL)
    try:
        with bo.RuntimeClient(address, timeout=START_S) as client:
            assert client.server_info()["pid"] == process.pid
            state = bo.State(client)
            state += bo.user("Hello!") + bo.assistant(bo.gen("answer", max_tokens=4))
            assert within(20, state.error) is None
            process.terminate()
            assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_serve_bounds_what_a_grammar_may_cost_as_it_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    command = [BOUGH, "serve", "pocket", "--listen", f"ipc://{tmp_path}/s"]
    refused = run(*command, "--grammar-seconds", "0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "compile_s must be above 0" in refused.stderr
    process = subprocess.Popen([*command, "--grammar-states", "20"], stdin=subprocess.DEVNULL)
    try:
        with bo.RuntimeClient(f"ipc://{tmp_path}/s", timeout=START_S) as client:
            state = bo.State(client)
            state += "Digits: " + bo.gen("few", regex="[0-9]{2}")
            assert within(20, lambda: state["few"]).isdigit()
            state += bo.gen("many", regex="[a-z]{100}")
            with pytest.raises(bo.InvalidRequest, match="too complex"):
                within(20, lambda: state["many"])
    finally:
        process.kill()
        process.wait()
