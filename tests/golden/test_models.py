"""Our decoder against transformers' on tiny random checkpoints of every architecture, float32."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT_LEN, VARIANTS, Text, generate, logits, oracle, random_ids, texts, tiny_model
from transformers import AutoModelForCausalLM

from bough.runtime.batch import Batch, PageCopy, Row
from bough.runtime.runner import Runner, load_runner

PROMPT_LENS = (1, 7, 16, 33, 90)
NUM_NEW = 12


@cache
def runner(variant: str, page_size: int = 16) -> Runner:
    return load_runner(tiny_model(variant), dtype="float32", page_size=page_size, max_total_tokens=6 * CONTEXT_LEN)


@cache
def expected_tokens(variant: str, length: int) -> list[int]:
    """Return transformers' greedy continuation of `random_ids(length, seed=length)`."""
    model = oracle(variant)
    ids: list[int] = random_ids(length, seed=length).tolist()
    with torch.inference_mode():
        for _ in range(NUM_NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[length:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_as_near_to_the_exact_ones_as_those_of_transformers(variant: str) -> None:
    """Transformers in float64; logits are up to 20 here, so that float32 is off by 2e-4 at worst."""
    ids = random_ids(200, seed=0)
    tokens = torch.tensor(ids[None].astype(np.int64))
    with torch.inference_mode():
        theirs = oracle(variant)(tokens).logits[0]
        exact = deepcopy(oracle(variant)).double()(tokens).logits[0]
    (text,) = texts(runner(variant), [ids])
    ours = logits(runner(variant), text.row(16))
    assert float((ours - exact).abs().max()) <= max(1e-4, 1.5 * float((theirs - exact).abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers_in_a_ragged_batch(variant: str) -> None:
    together = texts(runner(variant), [random_ids(length, seed=length) for length in PROMPT_LENS])
    assert generate(runner(variant), together, NUM_NEW) == [expected_tokens(variant, n) for n in PROMPT_LENS]


@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_greedy_tokens_are_those_of_transformers_in_chunks(page_size: int, chunk: int) -> None:
    together = texts(runner("qwen3", page_size), [random_ids(length, seed=length) for length in PROMPT_LENS])
    expected = [expected_tokens("qwen3", length) for length in PROMPT_LENS]
    assert generate(runner("qwen3", page_size), together, NUM_NEW, chunk) == expected


def test_decode_logits_agree_with_prefill_past_several_key_chunks() -> None:
    """Decode merges chunks of 128 keys; a context of 256 has two, a sequence's first decode after 130 has both."""
    ids = random_ids(250, seed=3)
    with torch.inference_mode():
        expected = oracle("llama")(torch.tensor(ids[None].astype(np.int64))).logits[0].log_softmax(-1)
    (text,) = texts(runner("llama"), [ids[:130]])
    text.prompt_len = 0  # every token counts as drawn: all steps after the prefill take the decode path
    for position in range(130, 250):
        (result,) = runner("llama").execute(Batch((text.row(16, logprobs=0),)))
        assert result.token == int(expected[position - 1].argmax())
        assert result.logprob == pytest.approx(float(expected[position - 1].max()), abs=1e-4)
        text.append(int(ids[position]))


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_forks_share_pages_and_copy_the_partial_one(page_size: int) -> None:
    device = runner("llama", page_size)
    stem = random_ids(37, seed=1)
    tails = [random_ids(9, seed=2), random_ids(20, seed=3)]
    parent, *own = texts(device, [stem, *tails])
    device.execute(Batch((parent.row(page_size),)))
    shared, slots = divmod(37, page_size)
    copies, forks = [], []
    for text, tail in zip(own, tails, strict=True):
        fork = Text(np.concatenate([stem, tail]), np.concatenate([parent.pages[:shared], text.pages[shared:]]))
        fork.done = 37
        copies.append(PageCopy(int(parent.pages[shared]), int(fork.pages[shared]), slots))
        forks.append(fork)
    device.execute(Batch((), tuple(copies)))
    forked = generate(device, forks, NUM_NEW)
    plain = [generate(device, texts(device, [np.concatenate([stem, tail])]), NUM_NEW)[0] for tail in tails]
    assert forked == plain
    with torch.inference_mode():
        ids = torch.tensor(np.concatenate([stem, tails[1]])[None].astype(np.int64))
        assert forked[1][0] == int(oracle("llama")(ids).logits[0, -1].argmax())


def test_copies_happen_before_the_step_and_all_at_once() -> None:
    """A chain 0 -> 1 -> 2 in one batch moves old contents, as a copy-on-write planned by the scheduler expects."""
    pool = runner("llama").pool
    for page in range(3):
        pool.k[0][page].fill_(page)
        pool.v[2][page].fill_(10 + page)
    pool.copy_pages([PageCopy(0, 1, 16), PageCopy(1, 2, 5)])
    assert pool.k[0][1].eq(0).all()
    assert pool.k[0][2, :5].eq(1).all()
    assert pool.k[0][2, 5:].eq(2).all()
    assert pool.v[2][2, :5].eq(11).all()


def test_scores_are_log_probabilities_of_the_given_ids() -> None:
    ids = random_ids(60, seed=5)
    with torch.inference_mode():
        expected = oracle("qwen2")(torch.tensor(ids[None].astype(np.int64))).logits[0].log_softmax(-1)
    (text,) = texts(runner("qwen2"), [ids])
    device = runner("qwen2")
    device.execute(Batch((text.row(16, 40),)))
    row = Row(ids[40:], 40, text.pages[: -(-60 // 16)], score_ids=ids[43:60], score_at=np.arange(2, 19, dtype=np.int32))
    (result,) = device.execute(Batch((row,)))
    assert result.token is None
    assert result.score_logprobs is not None
    np.testing.assert_allclose(result.score_logprobs, expected[np.arange(42, 59), ids[43:60]].numpy(), atol=1e-4)


def test_pages_that_belong_to_nobody_are_never_read() -> None:
    """Unused pages, and the unused slots of used pages, hold NaN."""
    device = runner("mistral")
    expected = generate(device, texts(device, [random_ids(n, seed=n) for n in PROMPT_LENS]), NUM_NEW, 16)
    device.pool.poison(range(device.num_pages))
    found = generate(device, texts(device, [random_ids(n, seed=n) for n in PROMPT_LENS], seed=9), NUM_NEW, 16)
    assert found == expected


def test_a_sharded_16_bit_checkpoint_gives_the_logits_of_its_rounded_weights() -> None:
    folder = tiny_model("llama", "bfloat16", True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    device = load_runner(folder, dtype="fp32", max_total_tokens=CONTEXT_LEN)
    assert (device.config.dtype, device.dtype) == ("bfloat16", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = random_ids(50, seed=4)
    with torch.inference_mode():
        expected = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
    (text,) = texts(device, [ids])
    torch.testing.assert_close(logits(device, text.row(16)), expected, atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    """bfloat16 keeps 8 bits: with logits of up to 8, three layers came within 0.15 on average."""
    device = load_runner(tiny_model("llama", "bfloat16"), dtype="bf16", max_total_tokens=CONTEXT_LEN)
    ids = random_ids(100, seed=4)
    with torch.inference_mode():
        expected = oracle("llama")(torch.tensor(ids[None].astype(np.int64))).logits[0]
    (text,) = texts(device, [ids])
    assert (logits(device, text.row(16)) - expected).abs().mean() < 0.15


def test_warming_up_leaves_no_trace_in_results() -> None:
    device = load_runner(tiny_model("llama"), page_size=4, max_total_tokens=2 * CONTEXT_LEN)
    device.warm_up()
    assert generate(device, texts(device, [random_ids(33, seed=33)]), NUM_NEW) == [expected_tokens("llama", 33)]
    assert device.execute(Batch(())) == []
