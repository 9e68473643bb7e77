"""The compiled CPU kernels (native/*.c): built when the package is installed, if there is a compiler; loaded once.

They run on torch's own OpenMP threads: the library leaves OpenMP's symbols to be found among those that torch loads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from typing import Any, Final

import torch  # noqa: F401  (the library needs the OpenMP that comes with it)

log = logging.getLogger(__name__)

LANES: Final = 16
"""Sizes of rows and heads must be multiples of this."""
VERSION: Final = 8
"""Of the structs that the functions take; a library built before they changed must not be called."""
_FUNCTIONS: Final = (
    "bough_attention",
    "bough_add_rms_norm",
    "bough_decoder_step",
    "bough_gated_silu",
    "bough_likeliest",
    "bough_linear",
    "bough_split_rotate_store",
)


@functools.cache
def native_library() -> Any:
    """Return the compiled library, or None if it was not built or cannot be loaded."""
    spec = importlib.util.find_spec("bough.kernels._native")
    if spec is None or spec.origin is None:
        log.info("the compiled kernels were not built, PyTorch does their work")
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        for name in _FUNCTIONS:
            getattr(library, name).restype = None
        built = library.bough_version()
    except (OSError, AttributeError) as error:
        log.warning("the compiled kernels cannot be used, PyTorch does their work (install bough again?): %s", error)
        return None
    if built != VERSION:
        log.warning("the compiled kernels are of another version (%d, not %d): install bough again", built, VERSION)
        return None
    return library
