"""The layout is the architecture: layers import downwards only, the face is light, the package list is complete."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"lang": "bough", "runtime": "bough.runtime", "kernels": "bough.kernels"}
# Modules that plan: they know token counts, not tensors, sockets or text models.
WITHOUT_TORCH = [
    "protocol", "lifecycle", "config", "vector", "batch", "sequence", "policies", "scheduler", "token_log",
    "cache.page_allocator", "cache.radix_tree", "cache.prefix_cache", "branch", "operation", "session", "work",
    "engine", "loading",
]  # fmt: skip
HEAVY = {"torch", "transformers", "triton", "numpy", "tokenizers", "tiktoken", "jinja2", "rich", "tqdm", "llguidance"}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports point to the wrong place in a mapped folder"
            assert node.module is not None
            if node.module == "bough.runtime":  # `from bough.runtime import protocol` names a module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer_of(module: str) -> str:
    for name in ("kernels", "runtime"):
        if module == LAYERS[name] or module.startswith(LAYERS[name] + "."):
            return name
    return "lang"


def is_protocol(module: str) -> bool:
    return module == "bough.runtime.protocol" or module.startswith("bough.runtime.protocol.")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_itself_and_what_lies_below(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        for module in imports_of(path):
            if module.split(".")[0] != "bough":
                continue
            target = layer_of(module)
            if layer == "lang":
                assert target == "lang" or is_protocol(module), f"{path} imports {module}"
            else:
                allowed = {"runtime": ("runtime", "kernels"), "kernels": ("kernels",)}[layer]
                assert target in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_planning_modules_import_no_torch(name: str) -> None:
    code = f"import sys, bough.runtime.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_face_is_light() -> None:
    code = "import sys, bough; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_the_face_loads_nothing_of_the_runtime_but_the_protocol() -> None:
    code = "import sys, bough; print(*sorted(name for name in sys.modules if name.startswith('bough.runtime')))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded[:2] == ["bough.runtime", "bough.runtime.protocol"]
    assert all(is_protocol(name) for name in loaded[1:])


def test_every_public_name_exists() -> None:
    face = importlib.import_module("bough")
    assert face.__all__
    assert all(hasattr(face, name) for name in face.__all__)


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder, package in LAYERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert found == set(settings["packages"])


def test_no_module_of_ours_is_hidden_by_a_layer() -> None:
    names = {path.stem for path in (ROOT / "lang").glob("*.py")}
    assert not names & {"runtime", "kernels"}


def test_every_module_says_what_it_is() -> None:
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_nothing_of_ours_can_run_foreign_code() -> None:
    """No layer imports the pickle family or calls exec, eval or torch.load. (The offline recipe of pocket may.)"""
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            if path.is_relative_to(ROOT / "runtime" / "pocket"):
                continue
            modules = {module.split(".")[0] for module in imports_of(path)}
            assert not modules & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
            calls = {
                ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            }
            assert not calls & {"exec", "eval", "compile", "torch.load"}, path
