"""The `bough` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback

import bough as bo
from bough import cli
from bough.runtime.options import build_parser

PROGRAM = """
import sys
import bough as bo
import beside
assert __name__ == "__main__"
p = bo.function(lambda s: s.__iadd__(bo.gen("x")))
print(sys.argv[1:], beside.NAME, p.run()["x"])
"""


def test_run_gives_a_file_a_backend_its_arguments_and_its_folder(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    before = sys.argv, list(sys.path)
    with Loopback(f"ipc://{tmp_path}/s") as peer:
        status = cli.main(["run", "--address", peer.address, str(tmp_path / "program.py"), "--flag", "1"])
    assert status == 0
    assert capsys.readouterr().out == "['--flag', '1'] beside one two three\n"
    assert (sys.argv, sys.path) == before
    with pytest.raises(bo.InvalidRequest, match="no backend"):
        bo.get_server_info()


def test_run_says_what_is_missing(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["run", str(tmp_path / "nothing.py")]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "program.py").write_text("raise AssertionError")
    assert cli.main(["run", "--address", "nonsense", str(tmp_path / "program.py")]) == 1
    assert "InvalidRequest: cannot connect to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", "--adress", "x", "program.py"])


def test_an_error_of_the_program_is_the_programs(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("raise LookupError('mine')")
    with Loopback(f"ipc://{tmp_path}/s") as peer, pytest.raises(LookupError, match="mine"):
        cli.main(["run", "--address", peer.address, str(tmp_path / "program.py")])


def test_bench_becomes_the_checkouts_suite_and_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append(argv))
    monkeypatch.setattr(bo, "__file__", str(tmp_path / "site-packages" / "bough" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert "in the source repository" in capsys.readouterr().err
    monkeypatch.chdir(Path(__file__).parents[2])
    cli.main(["bench", "--quick", "--budget", "9"])
    assert [argv[2:] for argv in calls] == [["--quick", "--budget", "9"]]
    assert Path(calls[0][1]).name == "bench_suite.py"
    assert Path(calls[0][1]).is_file()


def test_serve_becomes_the_runtime_and_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append(argv))
    cli.main(["serve", "pocket", "--listen", "ipc:///tmp/x", "--page-size", "8", "--no-radix-cache"])
    assert calls[0][0] == sys.executable
    assert calls[0][-6:] == ["pocket", "--listen", "ipc:///tmp/x", "--page-size", "8", "--no-radix-cache"]


def test_the_help_of_serve_is_the_runtimes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append(argv))
    cli.main(["serve", "--help"])
    assert calls[0][-3:] == ["-m", "bough.runtime", "--help"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(calls[0][-1:])
    said = capsys.readouterr().out
    assert said.startswith("usage: bough serve ")
    assert "--max-total-tokens N" in said


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"bough {bo.__version__}\n"
