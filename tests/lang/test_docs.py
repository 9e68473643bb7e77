"""The code of the README and of docs/ runs, and its links lead somewhere."""

from __future__ import annotations

import argparse
import inspect
import re
import runpy
from pathlib import Path

import pytest

import bough as bo

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def run(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    file = tmp_path / "page.py"
    file.write_text("\n".join(blocks))
    try:
        runpy.run_path(str(file))
    finally:
        bo.set_default_backend(None)


def test_the_page_about_migrating_runs_on_a_script(tmp_path: Path) -> None:
    bo.set_default_backend(bo.ScriptedBackend(lambda text, params: "said"))
    run(ROOT / "docs" / "migrating-from-sglang.md", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/language.md", "docs/runtime.md"])
def test_the_code_of_a_page_runs_on_the_bundled_model(
    name: str, tmp_path: Path, pocket: bo.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bo, "Runtime", lambda *args, **options: Borrowed(pocket))
    run(ROOT / name, tmp_path)


def test_every_public_name_is_in_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    assert [name for name in bo.__all__ if not re.search(rf"\b{name}\b", pages)] == []


def test_every_option_of_the_runtime_is_in_its_page() -> None:
    from bough.runtime.options import build_parser

    text = (ROOT / "docs" / "runtime.md").read_text()
    flags = [
        flag
        for action in build_parser()._actions
        if action.help != argparse.SUPPRESS
        for flag in action.option_strings
        if flag.startswith("--")
    ]
    named = [name for name in inspect.signature(bo.Runtime.__init__).parameters if name not in ("self", "server_args")]
    assert [flag for flag in [*flags, *named] if flag not in text and flag not in ("--help", "model_path")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


class Borrowed:
    """The shared runtime, as a page's own: a page that ends it ends nothing."""

    def __init__(self, runtime: bo.Runtime) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> object:
        return getattr(self._runtime, name)

    def __enter__(self) -> bo.Runtime:
        return self._runtime

    def __exit__(self, *exc: object) -> None:
        pass

    def shutdown(self) -> None:
        """Leave it to the others."""
