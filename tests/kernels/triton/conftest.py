"""Where the Triton kernels' numeric tests run: on a GPU if there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_under_interpreter.py`, one folder up, starts a
process of its own for this folder. In a plain run without a GPU the tests here are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, all on their devices: the hook is given those of the whole run."""
    for item in items:
        if item.path.parent.name == "triton" and not IS_INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU: test_under_interpreter runs these in a process"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_products() -> None:
    """Triton 3.7's interpreter multiplies the raw bits of bfloat16 matrices: hand it their values instead."""
    if not IS_INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    original = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, wide(a), wide(b), *others)

    InterpreterBuilder.create_dot = create_dot
