"""The counter-based generator: known answers, range, independence."""

from __future__ import annotations

import numpy as np
import pytest

from bough.runtime.rng import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    words = philox(_words(counter), _words(key))
    np.testing.assert_array_equal(words, _words(answer))


def test_a_uniform_is_a_function_of_seed_and_position_alone() -> None:
    seeds, positions = np.arange(50) % 7, np.arange(50) // 7
    together = uniforms(seeds, positions)
    alone = [uniforms([seed], [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 50


def test_large_seeds_and_positions_count_in_full() -> None:
    assert len({*uniforms([1, 1 + 2**32, 1, 2**63 - 1], [1, 1, 1 + 2**32, 1])}) == 4


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    """Odds of failing for a fair generator: chi² of 64 cells above 130 has p < 2e-6; the seed is fixed anyway."""
    draws = uniforms(np.zeros(64_000), np.arange(64_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=64, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 130


def test_neighbouring_positions_and_seeds_are_uncorrelated() -> None:
    """A correlation of 40,000 fair pairs has a standard deviation of 0.005; the bound is five of them."""
    grid = uniforms(np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200)).reshape(200, 200)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.025
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.025


def _words(text: str) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    return np.array([[int(word, 16) for word in text.split()]], dtype=np.uint32)
