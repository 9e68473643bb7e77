"""The face: what is exported, and that importing it is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bough as bo

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "jinja2",
    "tiktoken",
    "rich",
    "tqdm",
    "zmq",
    "asyncio",
    "tokenizers",
    "triton",
)


def test_every_exported_name_exists_and_says_what_it_is() -> None:
    for name in bo.__all__:
        thing = getattr(bo, name)
        assert getattr(thing, "__doc__", None), name
    assert sorted(bo.__all__) == bo.__all__
    assert bo.errors.BoughError is bo.BoughError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bo.nothing  # noqa: B018


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_importing_bough_imports_nothing_heavy() -> None:
    assert in_a_fresh_process(f"import sys, bough; print([m for m in {HEAVY} if m in sys.modules])").strip() == "[]"


def test_a_program_that_is_not_local_needs_no_torch() -> None:
    code = (
        "import sys, bough as bo; bo.RuntimeClient; bo.Runtime\n"
        "bo.set_default_backend(bo.ScriptedBackend(['a']))\n"
        "p = bo.function(lambda s: s.__iadd__(bo.user('q') + bo.gen('x')))\n"
        "assert p.run()['x'] == 'a'\n"
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'numpy')])"
    )
    assert in_a_fresh_process(code).strip() == "[]"


def test_a_typed_user_program_has_every_public_name_in_it() -> None:
    tree = ast.parse((Path(__file__).parents[1] / "support" / "typed_user_program.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bo"
    }
    assert sorted(set(bo.__all__) - used) == []
