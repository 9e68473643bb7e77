"""The code in docs/ runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import bough as bo

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("migrating-from-sglang.md",)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    file = tmp_path / "page.py"
    file.write_text("\n".join(blocks))
    bo.set_default_backend(bo.ScriptedBackend(lambda text, params: "said"))
    try:
        runpy.run_path(str(file))
    finally:
        bo.set_default_backend(None)
