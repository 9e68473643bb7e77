"""The likeliest token of each row of logits, in one pass over them."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from bough.kernels.native_library import LANES, native_library

_DTYPES = (torch.float32, torch.bfloat16)


def likeliest(logits: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return (num_rows,) the lowest of the likeliest ids of each row of logits, -1 where one of these is not finite.

    logits: (num_rows, vocab_size) on the CPU. Compiled where that can be: 32 rows of 8,192 take PyTorch a pass to widen
    them from bfloat16, two to look whether all are finite, and NumPy one for the maximum.
    """
    library = native_library()
    if library is None or logits.dtype not in _DTYPES or logits.shape[1] < LANES:
        is_finite = (logits.amax(-1) - logits.amin(-1)).isfinite().numpy()  # both pass NaN on
        return np.where(is_finite, logits.float().numpy().argmax(-1), -1)  # the first of equals, by NumPy's promise
    assert logits.is_contiguous(), "arrays are read in place"
    tokens = np.empty(len(logits), dtype=np.int64)
    addresses = ctypes.c_void_p(logits.data_ptr()), ctypes.c_void_p(tokens.ctypes.data)
    library.bough_likeliest(*addresses, *logits.shape, logits.dtype == torch.bfloat16)
    return tokens
