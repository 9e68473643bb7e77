"""Random numbers that are a pure function of (seed, position): Philox4x32-10, counter based.

There is no generator state to save, share or replay: the draw at a position is the same in any batch, after any
pause, on any machine. Philox after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests
hold the known answers of their Random123 library.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox(counters: npt.NDArray[np.uint32], keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return (n, 4) uint32 random words for (n, 4) uint32 counters under (n, 2) uint32 keys."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = (keys[:, i].astype(np.uint64) for i in range(2))
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]  # 32 x 32 -> 64 bits: never overflows
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _LOW, (left >> _HALF) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seeds: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (n,) float64 in [0, 1), one per pair of 64-bit seed and position.

    52 random bits each: with 53, the product of a total just above 1 and the largest uniform rounds up to the total,
    and an inverse-CDF draw would run off the end.
    """
    seed, position = np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64)
    counters = np.zeros((len(position), 4), dtype=np.uint32)
    counters[:, 0], counters[:, 1] = position & _LOW, position >> _HALF
    words = philox(counters, np.stack([seed & _LOW, seed >> _HALF], axis=1).astype(np.uint32)).astype(np.uint64)
    bits = ((words[:, 0] >> np.uint64(6)) << np.uint64(26)) | (words[:, 1] >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-52
