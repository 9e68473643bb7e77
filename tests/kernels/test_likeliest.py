"""The likeliest token of each row, compiled or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bough.kernels import likeliest as module
from bough.kernels.likeliest import likeliest


@pytest.fixture(params=["compiled", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "native_library", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [7, 16, 33, 1000, 8192])
def test_it_is_the_first_of_the_largest(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(40, vocab_size, generator=generator).to(dtype)
    logits[3] = -5.0  # all equal
    logits[4, :] = torch.where(torch.arange(vocab_size) % 2 == 0, -0.0, 0.0)  # equal, too
    logits[5, vocab_size - 1] = 9.0
    logits[6, -2:] = 9.0
    logits[7] = (logits[7] * 2).round()  # many ties
    assert likeliest(logits).tolist() == logits.float().numpy().argmax(-1).tolist()
    assert likeliest(logits[:0]).tolist() == []


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_is_told(dtype: torch.dtype) -> None:
    values = (float("nan"), float("inf"), float("-inf"))
    for place in (0, 15, 16, 40, 49):
        for value in values:
            logits = torch.zeros(3, 50, dtype=dtype)
            logits[1, place] = value
            assert np.array_equal(likeliest(logits), [0, -1, 0]), (place, value)
