"""The tensors of a step: those of plain decodes, which take a shorter way, are those of the definition."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bough.runtime import inputs
from bough.runtime.batch import Batch, IntArray, Row, SampleRequest
from bough.runtime.protocol import SamplingParams

PAGE_SIZE = 4
NONE: IntArray = np.zeros(0, dtype=np.int32)


def ids(*values: int) -> IntArray:
    return np.array(values, dtype=np.int32)


def decode(at: int, page: int, **changes: Any) -> Row:
    """A row that computes the token at that position, in pages of its own, and draws the next."""
    request = SampleRequest(SamplingParams(), 7, at + 1, generated=ids(5), prompt=NONE, forbidden=())
    pages = np.arange(page, page + at // PAGE_SIZE + 1, dtype=np.int32)
    return Row(**{"token_ids": ids(at % 11), "start": at, "pages": pages, "sample": request, **changes})


def built(rows: tuple[Row, ...]) -> inputs.StepInputs:
    return inputs.build_inputs(Batch(rows), PAGE_SIZE, lambda layout: layout)  # type: ignore[arg-type,return-value]


def same(a: object, b: object) -> bool:
    """Whether two fields hold the same, of the same type and dtype."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_plain_decodes_have_the_inputs_of_the_definition(starts: list[int]) -> None:
    rows = tuple(decode(start, 100 * i) for i, start in enumerate(starts))
    short = built(rows)
    with mock.patch.object(inputs, "_is_plain_decode", return_value=False):
        whole = built(rows)
    assert short.is_decode
    assert not whole.is_decode
    for field in {f.name for f in dataclasses.fields(inputs.StepInputs)} - {"is_decode", "attention"}:
        assert same(getattr(short, field), getattr(whole, field)), field
    layouts: Any = short.attention, whole.attention
    for field in {f.name for f in dataclasses.fields(layouts[0])} - {"all_decode"}:
        assert same(*(getattr(layout, field) for layout in layouts)), field
    assert layouts[0].all_decode
    assert same(*(layout.positions() for layout in layouts))


def test_one_row_that_is_more_than_a_decode_makes_the_step_no_plain_one() -> None:
    others: list[dict[str, Any]] = [
        {"sample": None},
        {"token_ids": ids(1, 2), "start": 5},
        {"token_ids": ids(1, 2), "start": 5, "draft": 1},
        {"score_ids": ids(3), "score_at": ids(0)},
    ]
    assert built((decode(6, 0), decode(6, 10))).is_decode
    for changes in others:
        assert not built((decode(6, 0), decode(6, 10, **changes))).is_decode, changes
