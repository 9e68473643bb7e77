"""Triton launches on a machine without a GPU: noted, as Triton would compile them, instead of carried out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
_RESULTS = frozenset({"out", "tokens", "block_max", "block_sum", "block_argmax", "part_out", "part_lse", "qkv"})


class Launch(NamedTuple):
    """What a compilation depends on. arguments: of each, its type ("*bf16", "i32", "constexpr") and "D" where it is a
    multiple of 16, or a constant's value; constants and options likewise."""

    kernel: str
    arguments: tuple[tuple[str, str, object], ...]
    options: str


class Launches:
    """Every launch since `record`, and how many there were."""

    def __init__(self) -> None:
        self.kinds: set[Launch] = set()
        self.count = 0

    def named(self, kernel: str) -> set[Launch]:
        return {launch for launch in self.kinds if launch.kernel == kernel}


def record(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Note launches from now on, for an H100; what kernels write becomes zeros."""
    launches, backend = Launches(), make_backend(TARGET)
    binders: dict[object, Any] = {}

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialisation, chosen = binders[self](*arguments, **options)
        named = zip(bound, specialisation, strict=True)
        kinds = tuple((name, kind, value) for name, (kind, value) in named)
        launches.kinds.add(Launch(self.fn.__name__, kinds, str(sorted(chosen.items()))))
        launches.count += 1
        for name, value in bound.items():
            if name in _RESULTS and isinstance(value, torch.Tensor):
                value.zero_()

    monkeypatch.setattr(JITFunction, "run", run)
    return launches
