"""Where the Triton kernels' numeric tests run: on a GPU if there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_under_interpreter.py`, one folder up, starts a
process of its own for this folder. In a plain run without a GPU the tests here are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
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
def _numbers_as_on_a_gpu() -> None:
    """Mend faults of Triton's interpreter, 3.6 and 3.7, which would hide the kernels' own.

    It cuts float32 off to bfloat16 and loses a carry on the way to float8, where GPUs round to the nearest; it takes
    the bits of an integer for those of a bfloat16, and multiplies the raw bits of bfloat16 matrices. That of 3.6 makes
    a number of an array of one by a way that numpy 2.4 has closed.
    """
    if not IS_INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
    }

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        bits = torch.from_numpy(np.ascontiguousarray(data).view(f"u{data.itemsize}"))
        converted = bits.view(torch_dtypes[source]).to(torch_dtypes[target])
        unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[converted.itemsize]
        return converted.view(unsigned).numpy().reshape(data.shape)

    original = interpreter.InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar not in (tl.bfloat16, tl.float8e4nv):
            return x
        values = convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_si_to_fp(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return self.cast_impl(source, target)
        values = convert(source.data.astype(np.float32), tl.float32, tl.bfloat16, None)
        return interpreter.TensorHandle(values, tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, wide(a), wide(b), *others)

    original_call = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fn.__module__.startswith("bough."):
            return original_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)  # not patching again what the launch has patched: 0.2 ms a call

    original_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpretedFunction.__call__ = call
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_si_to_fp = create_si_to_fp
    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session", autouse=True)
def _bounds_as_on_a_gpu() -> Iterator[None]:
    """Let every load and store that no mask keeps away lie in a tensor of the launch: elsewhere a GPU may fault.

    The interpreter reads and writes the process's memory, whatever lies there.
    """
    if not IS_INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        check_bounds(patch, interpreter)
        yield


def check_bounds(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Have the interpreter raise IndexError for an access beyond the tensors given to the launch, views as they are."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    bounds: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        places = sorted((tensor.data_ptr(), tensor.data_ptr() + _span_bytes(tensor)) for tensor in tensors)
        begins, ends = np.array(places, dtype=np.uint64).T
        bounds.append((begins, np.maximum.accumulate(ends)))
        try:
            launch(self, *args, **kwargs)
        finally:
            bounds.pop()

    def check(pointers: Any, mask: Any) -> None:
        begins, ends = bounds[-1]
        reached = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        place = np.searchsorted(begins, reached, side="right").astype(np.int64) - 1
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if not ((place >= 0) & (reached + size <= ends[place])).all():
            raise IndexError("a kernel reaches beyond the tensors it was given")

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    patch.setattr(executor, "__call__", launched)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)


def _span_bytes(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.itemsize
