"""How a select decides: what each `ChoiceMethod` makes of log-probabilities.

In the protocol because both sides decide: the runtime for its clients, the language for backends that only return
log-probabilities.

    token_length_normalized               the mean over the tokens (SGLang's, and the default)
    greedy_token_selection                what greedy decoding among the choices takes, token by token (SGLang's)
    unconditional_likelihood_normalized   the mean gain over the same tokens without any context (SGLang's)
    sum                                   the log-likelihood of the whole choice
    byte_length_normalized                the same per byte of the choice's text
    pmi                                   the same less that after a neutral context, the BOS (or EOS) token alone:
                                          pointwise mutual information, after Holtzman et al. 2021 (arXiv 2104.08315)

logprobs[i][j] is the natural-log probability of token j of choice i given the prompt and the tokens before it;
unconditional[i][j] the same without the prompt, 0.0 where there is nothing before the token (pmi: the neutral one is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

ChoiceMethod = Literal[
    "token_length_normalized",
    "greedy_token_selection",
    "unconditional_likelihood_normalized",
    "sum",
    "byte_length_normalized",
    "pmi",
]
CHOICE_METHODS: Final[tuple[str, ...]] = get_args(ChoiceMethod)

Logprobs: TypeAlias = Sequence[Sequence[float]]
"""[i][j]: the natural-log probability of token j of choice i."""


def score_choices(
    method: ChoiceMethod, logprobs: Logprobs, unconditional: Logprobs | None, num_bytes: Sequence[int] = ()
) -> list[float]:
    """Return one score per choice; the first of the highest is selected.

    num_bytes[i]: the length of choice i in UTF-8, for byte_length_normalized; unconditional: for the methods that
    compare with it.
    """
    match method:
        case "token_length_normalized":
            return [mean(row) for row in logprobs]
        case "greedy_token_selection":
            return _greedy(logprobs)
        case "sum":
            return [math.fsum(row) for row in logprobs]
        case "byte_length_normalized":
            return [math.fsum(row) / count for row, count in zip(logprobs, num_bytes, strict=True)]
    assert unconditional is not None, "this method needs unconditional log-probabilities"
    gains = [
        [given - alone for given, alone in zip(row, base, strict=True)]
        for row, base in zip(logprobs, unconditional, strict=True)
    ]
    return [math.fsum(row) if method == "pmi" else mean(row) for row in gains]


def best(scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first on ties."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def distribution(logprobs: Logprobs, temperature: float = 1.0) -> list[float]:
    """Return the probability of each choice among the choices: softmax over summed log-probabilities / temperature."""
    sums = [math.fsum(row) / temperature for row in logprobs]
    top = max(sums)
    weights = [math.exp(value - top) for value in sums]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw(shares: Sequence[float], point: float) -> int:
    """Return the first index whose cumulative share is above `point`, in [0, 1); never one without a share."""
    total, last = 0.0, 0
    target = point * math.fsum(shares)
    for index, share in enumerate(shares):
        total += share
        if share > 0:
            last = index
            if total > target:
                break
    return last


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def _greedy(logprobs: Logprobs) -> list[float]:
    """Keep, token position by token position, the choices with the likeliest token; a choice that has ended competes
    with its mean. The score is 1.0 for the first that is left, else the fraction of positions survived."""
    length = max(len(row) for row in logprobs)
    matrix = [[*row, *[mean(row)] * (length - len(row))] for row in logprobs]
    survived = [0] * len(matrix)
    remaining = list(range(len(matrix)))
    for position in range(length):
        top = max(matrix[i][position] for i in remaining)
        remaining = [i for i in remaining if matrix[i][position] == top]
        for i in remaining:
            survived[i] = position + 1
        if len(remaining) == 1:
            break
    scores = [count / (length + 1) for count in survived]
    scores[remaining[0]] = 1.0
    return scores
