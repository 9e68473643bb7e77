"""Fixtures for tests that need a real runtime process; it starts when the first such test runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import bough as bo


@pytest.fixture(scope="session")
def pocket() -> Iterator[bo.Runtime]:
    """The bundled model on a runtime that all tests share: look at differences of its counters, not at totals."""
    with bo.Runtime(seed=5) as runtime:
        yield runtime
