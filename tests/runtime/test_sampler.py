"""The sampler against a slow, plain definition; distributions; independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bough.runtime.batch import SampleRequest
from bough.runtime.protocol import SamplingParams
from bough.runtime.rng import uniforms
from bough.runtime.sampler import greedy, is_greedy, sample, score

VOCAB_SIZE = 50


def request(
    seed: int = 0,
    position: int = 0,
    generated: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    **params: Any,
) -> SampleRequest:
    ids = np.array(generated, dtype=np.int32), np.array(prompt, dtype=np.int32)
    return SampleRequest(SamplingParams(**params), seed, position, *ids, forbidden)


def plain_draw(logits: list[float], r: SampleRequest, point: float) -> int | None:
    """Return the token that inverts the plain distribution, None if the point is too near an edge to tell.

    Nearer than float32 tells apart (1e-6) either neighbour is right; for 50 tokens the odds are 1e-4 a draw.
    """
    cumulative = np.cumsum(plain_weights(logits, r))
    if np.abs(cumulative / cumulative[-1] - point).min() < 1e-6:
        return None
    return int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))


def random_logits(rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def plain_weights(logits: list[float], r: SampleRequest) -> list[float]:
    """Return unnormalised weights of the distribution that is drawn from, by the definitions, one token at a time."""
    p, values = r.params, list(logits)
    for token in {*r.prompt.tolist(), *r.generated.tolist()} if p.repetition_penalty != 1 else set():
        values[token] *= 1 / p.repetition_penalty if values[token] > 0 else p.repetition_penalty
    for token in r.generated.tolist():
        values[token] -= p.frequency_penalty
    for token in set(r.generated.tolist()):
        values[token] -= p.presence_penalty
    for token, bias in p.logit_bias.items():
        values[token] += bias
    for token in r.forbidden:
        values[token] = -math.inf
    weights = [math.exp((value - max(values)) / p.temperature) for value in values]
    total, before = sum(weights), 0.0
    ranking = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = [0.0] * len(weights)
    for rank, token in enumerate(ranking):
        in_k = p.top_k == -1 or rank < p.top_k
        in_p = p.top_p == 1 or before < p.top_p * total
        if in_k and in_p and weights[token] >= p.min_p * weights[ranking[0]]:
            kept[token] = weights[token]
        before += weights[token]
    return kept


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.5},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.2},
    {"min_p": 0.02, "top_p": 0.9, "top_k": 12, "temperature": 1.7},
    {"frequency_penalty": 1.1, "presence_penalty": -0.7, "generated": (3, 3, 3, 9, 14)},
    {"repetition_penalty": 1.8, "generated": (3, 3, 9), "prompt": (1, 2, 2, 9)},
    {"logit_bias": {4: 5.0, 7: -100.0}},
    {"forbidden": (0, 5, 11), "top_p": 0.9},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_a_draw_inverts_the_cumulative_distribution_of_the_plain_definition(parameters: dict[str, Any]) -> None:
    rows = [request(seed=seed, position=seed * 3, **parameters) for seed in range(200)]
    logits = random_logits(200, seed=1)
    points = uniforms([r.seed for r in rows], [r.position for r in rows])
    draws = sample(logits.clone(), rows)
    for row, r, point, draw in zip(logits.tolist(), rows, points, draws, strict=True):
        assert draw.token == plain_draw(row, r, point) or plain_draw(row, r, point) is None


@pytest.mark.parametrize("parameters", [*PARAMETERS[4:7], {"top_k": 256}, {"top_k": 300}, {"top_p": 0.999}], ids=str)
@pytest.mark.parametrize("levels", [3, 1000])
def test_the_cut_is_right_far_down_and_among_equals(parameters: dict[str, Any], levels: int) -> None:
    """1,000 tokens with few distinct logits: the candidates looked at first seldom settle where to cut."""
    rows = [request(seed=seed, **parameters) for seed in range(30)]
    logits = (random_logits(30, seed=5, vocab_size=1000) * levels / 9).round() * 9 / levels
    points = uniforms([r.seed for r in rows], [r.position for r in rows])
    for row, r, point, draw in zip(logits.tolist(), rows, points, sample(logits.clone(), rows), strict=True):
        assert draw.token == plain_draw(row, r, point) or plain_draw(row, r, point) is None


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 40_000])
def test_a_row_gives_the_same_bits_alone_and_among_strangers(vocab_size: int) -> None:
    """40,000 is above the size from which PyTorch gives parts of one row to several threads."""
    rows = [request(seed=i, position=i, logprobs=3, **parameters) for i, parameters in enumerate(PARAMETERS)]
    logits, ids = random_logits(len(rows), seed=2, vocab_size=vocab_size), np.arange(len(rows), dtype=np.int32)
    together, scores = sample(logits.clone(), rows), score(logits, ids)
    for i, row in enumerate(rows):
        assert sample(logits[i : i + 1].clone(), [row]) == [together[i]]
        assert score(logits[i : i + 1], ids[i : i + 1]) == scores[i]


def test_a_filter_that_keeps_everything_changes_no_draw() -> None:
    logits = random_logits(100, seed=3)
    plain = sample(logits.clone(), [request(seed=i) for i in range(100)])
    filtered = sample(logits.clone(), [request(seed=i, top_k=VOCAB_SIZE, top_p=1 - 1e-12) for i in range(100)])
    assert plain == filtered


def test_draws_follow_the_distribution() -> None:
    """20,000 draws; odds of failing for a right sampler: chi² with 49 degrees of freedom above 110 has p < 2e-6."""
    logits = random_logits(1, seed=4) / 2
    draws = sample(logits.expand(20_000, -1).clone(), [request(seed=9, position=i) for i in range(20_000)])
    expected = logits[0].double().softmax(-1).numpy() * 20_000
    counts = np.bincount([draw.token for draw in draws], minlength=VOCAB_SIZE)
    assert ((counts - expected) ** 2 / expected).sum() < 110


def test_temperature_zero_takes_the_lowest_of_equally_likely_ids() -> None:
    for vocab_size in (5, 50, 5000):
        logits = torch.zeros(3, vocab_size)
        logits[1, vocab_size // 2 :] = 1
        logits[2, [vocab_size - 1, 2]] = 4
        tokens = [draw.token for draw in sample(logits, [request(temperature=0.0)] * 3)]
        assert tokens == [0, vocab_size // 2, 2]


def test_greedy_respects_bias_and_forbidden_ids() -> None:
    logits = torch.arange(6).float().repeat(3, 1)
    rows = [
        request(temperature=0.0, forbidden=(5,)),
        request(temperature=0.0, logit_bias={0: 10.0}),
        request(temperature=0.0, logit_bias={0: 10.0}, forbidden=(0, 5, 4)),
    ]
    assert [draw.token for draw in sample(logits, rows)] == [4, 0, 3]


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = random_logits(20, seed=5)
    draws = sample(logits.clone(), [request(seed=i, temperature=1e-30) for i in range(20)])
    assert [draw.token for draw in draws] == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(2, seed=6)
    expected = logits.double().log_softmax(-1)
    first, second = sample(
        logits.clone(), [request(temperature=0.0, logit_bias={3: 100.0}, logprobs=4), request(temperature=0.5)]
    )
    assert first.token == 3
    assert first.logprob == pytest.approx(float(expected[0, 3]), abs=1e-12)
    values, ids = expected[0].topk(4)
    assert [token for _, token in first.top] == ids.tolist()
    assert [logprob for logprob, _ in first.top] == pytest.approx(values.tolist(), abs=1e-12)
    assert (second.logprob, second.top) == (None, ())


def test_asking_for_no_alternatives_gives_the_tokens_own_logprob() -> None:
    (draw,) = sample(random_logits(1, seed=7), [request(temperature=0.0, logprobs=0)])
    assert draw.logprob is not None
    assert draw.top == ()


def test_score_reads_log_probabilities() -> None:
    logits, ids = random_logits(9, seed=8), np.arange(9, dtype=np.int32) * 5
    np.testing.assert_allclose(
        score(logits, ids), logits.double().log_softmax(-1)[np.arange(9), ids].numpy(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_their_row(value: float) -> None:
    logits = random_logits(3)
    logits[1, 7] = value
    with pytest.raises(FloatingPointError, match="row 1"):
        sample(logits, [request()] * 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidding_every_token_is_an_error(temperature: float) -> None:
    with pytest.raises(FloatingPointError, match="row 0"):
        sample(torch.zeros(1, 4), [request(temperature=temperature, forbidden=(0, 1, 2, 3))])


def test_plain_greedy_requests_are_drawn_by_one_look_at_the_logits() -> None:
    logits = random_logits(9)
    plain = [request(temperature=0.0)] * 9
    assert all(map(is_greedy, plain))
    assert greedy(logits.bfloat16()) == sample(logits.bfloat16().float(), plain)
    others: list[dict[str, Any]] = [{"logprobs": 0}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 0.1}]
    assert not any(is_greedy(request(temperature=0.0, **other)) for other in others)
    assert not is_greedy(request(temperature=0.5))
    assert not is_greedy(request(temperature=0.0, forbidden=(4,)))
    logits[5, 7] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite in row 5"):
        greedy(logits)
