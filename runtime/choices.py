"""How a select decides: pure functions from log-probabilities to scores. The definitions are SGLang's, on exact inputs.

logprobs[i][j] is the natural-log probability of token j of choice i given the prompt and the tokens before it;
unconditional[i][j] the same without the prompt, 0.0 where there is nothing before the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bough.runtime.protocol import ChoiceMethod

Logprobs = Sequence[Sequence[float]]


def score_choices(method: ChoiceMethod, logprobs: Logprobs, unconditional: Logprobs | None) -> list[float]:
    """Return one score per choice; the first of the highest is selected."""
    match method:
        case "token_length_normalized":
            return [_mean(row) for row in logprobs]
        case "greedy_token_selection":
            return _greedy(logprobs)
        case "unconditional_likelihood_normalized":
            assert unconditional is not None, "this method needs unconditional log-probabilities"
            return [
                _mean([given - alone for given, alone in zip(row, base, strict=True)])
                for row, base in zip(logprobs, unconditional, strict=True)
            ]


def best(scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first on ties."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def distribution(logprobs: Logprobs) -> list[float]:
    """Return the probability of each choice among the choices: softmax over summed log-probabilities."""
    sums = [math.fsum(row) for row in logprobs]
    top = max(sums)
    weights = [math.exp(value - top) for value in sums]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _greedy(logprobs: Logprobs) -> list[float]:
    """Keep, token position by token position, the choices with the likeliest token; a choice that has ended competes
    with its mean. The score is 1.0 for the first that is left, else the fraction of positions survived."""
    length = max(len(row) for row in logprobs)
    matrix = [[*row, *[_mean(row)] * (length - len(row))] for row in logprobs]
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
