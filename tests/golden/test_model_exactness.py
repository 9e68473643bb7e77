"""The same bits, whatever the batch, the chunks and the cache: logits of whole models compared with torch.equal."""

from __future__ import annotations

from functools import cache

import msgspec
import numpy as np
import pytest
import torch
from tiny_models import CONTEXT_LEN, Text, generate, logits, random_ids, texts, tiny_model

from bough.runtime.batch import Batch, PageCopy
from bough.runtime.inputs import build_inputs
from bough.runtime.runner import Runner, load_runner

DTYPES = ["float32", "bfloat16"]
VARIANTS = ["llama_biased", "qwen3", "wide"]
LENS = (130, 1, 7, 16, 33, 90, 2, 5, 61)

pytestmark = [pytest.mark.parametrize("dtype", DTYPES), pytest.mark.parametrize("variant", VARIANTS)]


@cache
def runner(variant: str, dtype: str) -> Runner:
    return load_runner(tiny_model(variant), dtype=dtype, page_size=8, max_total_tokens=12 * CONTEXT_LEN)


def test_prefill_is_the_same_alone_and_among_strangers(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    for length in LENS:
        alone, *others = texts(device, [random_ids(length, seed=length), *(random_ids(n, seed=n) for n in LENS)])
        expected = logits(device, alone.row(8))
        alone.done = 0
        assert torch.equal(logits(device, alone.row(8), *(other.row(8) for other in others)), expected)


def test_prefill_is_the_same_in_chunks(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    (text,) = texts(device, [random_ids(150, seed=1)])
    expected = logits(device, text.row(8))
    for chunk in (1, 5, 16, 37, 149):
        (text,) = texts(device, [text.ids], seed=chunk)
        parts = [logits(device, text.row(8, chunk)) for _ in range(-(-150 // chunk))]
        assert torch.equal(torch.cat(parts), expected), chunk


def test_the_last_layer_of_the_wanted_tokens_alone_is_that_of_all(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    drawing, scoring, unread = texts(device, [random_ids(n, seed=n) for n in (140, 90, 20)])
    at = np.array([0, 3, 88, 89], dtype=np.int32)
    scores = msgspec.structs.replace(scoring.row(8), score_ids=scoring.ids[at], score_at=at)  # and draws: twice wanted
    rows = (drawing.row(8), scores, msgspec.structs.replace(unread.row(8), sample=None))
    plan, narrow = device.attention.plan, device.attention.narrow
    with torch.inference_mode():
        for together, kept in ((rows, 5), (rows[2:], 0), (rows[:1], 1)):
            whole = build_inputs(Batch(together), 8, plan)
            narrowed = build_inputs(Batch(together), 8, plan, narrow)
            assert whole.last is None
            assert narrowed.last is not None
            assert len(narrowed.last.tokens) == kept
            hidden, stored = [], []
            for inputs in (whole, narrowed):
                for kv in device.pool.layers:
                    kv.k.zero_(), kv.v.zero_()
                hidden.append(device.model.forward(inputs, device.pool))
                stored.append(torch.stack([torch.stack((kv.k, kv.v)) for kv in device.pool.layers]))
            assert torch.equal(*hidden)
            assert torch.equal(*stored)


def test_decode_is_the_same_alone_and_in_every_batch_size(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    steps = 6
    together = texts(device, [random_ids(length, seed=length) for length in LENS])
    whole = _decode_logprobs(device, together, steps)
    for count in (1, 2, 3, 6):
        part = _decode_logprobs(device, texts(device, [t.ids[: t.prompt_len] for t in together[:count]], 5), steps)
        assert part == whole[:count]


def test_a_fork_is_the_same_as_a_text_of_its_own(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    stem, tail = random_ids(43, seed=2), random_ids(30, seed=3)
    whole, parent, own = texts(device, [np.concatenate([stem, tail]), stem, tail])
    expected = logits(device, whole.row(8))[43:]
    device.execute(Batch((parent.row(8),)))
    fork = Text(whole.ids, np.concatenate([parent.pages[:5], own.pages[5:]]))
    fork.done = 43
    device.execute(Batch((), (PageCopy(int(parent.pages[5]), int(fork.pages[5]), 3),)))
    assert torch.equal(logits(device, fork.row(8)), expected)


def test_generated_tokens_are_the_same_in_chunks_and_batches(variant: str, dtype: str) -> None:
    device = runner(variant, dtype)
    together = texts(device, [random_ids(length, seed=length) for length in LENS])
    expected = generate(device, together, 8)
    for i, chunk in enumerate((1, 3, 16, 40)):
        (text,) = texts(device, [together[i].ids[: together[i].prompt_len]], seed=chunk)
        assert generate(device, [text], 8, chunk) == [expected[i]]


def _decode_logprobs(device: Runner, together: list[Text], steps: int) -> list[list[tuple[tuple[float, int], ...]]]:
    """Return, per text and step, the exact log-probabilities of the 50 likeliest next tokens."""
    found: list[list[tuple[tuple[float, int], ...]]] = [[] for _ in together]
    for _ in range(steps):
        results = device.execute(Batch(tuple(text.row(8, logprobs=50) for text in together)))
        for text, result, record in zip(together, results, found, strict=True):
            record.append(result.top)
            text.append(result.token)
    return found
