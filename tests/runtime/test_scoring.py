"""How a select decides, on figures that can be checked by hand."""

from __future__ import annotations

import math

import pytest

from bough.runtime.protocol import ChoiceMethod
from bough.runtime.protocol.scoring import best, distribution, draw, score_choices


def test_the_default_compares_means_so_that_length_does_not_matter() -> None:
    scores = score_choices("token_length_normalized", [[-1.0, -1.0, -1.0], [-1.5]], None)
    assert scores == [-1.0, -1.5]


def test_greedy_follows_the_likeliest_token_position_by_position() -> None:
    logprobs = [[-0.1, -5.0], [-0.2, -0.1], [-0.1, -0.3]]
    assert best(score_choices("greedy_token_selection", logprobs, None)) == 2


def test_greedy_lets_a_choice_that_ended_compete_with_its_mean() -> None:
    assert best(score_choices("greedy_token_selection", [[-0.1], [-0.1, -0.5]], None)) == 0
    assert best(score_choices("greedy_token_selection", [[-0.1], [-0.1, -0.05]], None)) == 1


def test_a_tie_is_won_by_the_first() -> None:
    methods: list[ChoiceMethod] = ["token_length_normalized", "greedy_token_selection"]
    for method in methods:
        assert best(score_choices(method, [[-1.0], [-1.0]], None)) == 0


def test_unconditional_normalisation_prefers_what_the_prompt_made_likelier() -> None:
    scores = score_choices("unconditional_likelihood_normalized", [[-1.0], [-2.0]], [[-1.0], [-4.0]])
    assert scores == [0.0, 2.0]


def test_the_distribution_is_over_whole_choices_and_sums_to_one() -> None:
    shares = distribution([[math.log(0.2), math.log(0.5)], [math.log(0.3)]])
    assert shares == pytest.approx([0.25, 0.75])
    assert sum(distribution([[-1000.0], [-1001.0]])) == pytest.approx(1.0)


def test_a_temperature_sharpens_or_flattens_the_distribution() -> None:
    shares = distribution([[math.log(0.2)], [math.log(0.4)]], 0.5)
    assert shares == pytest.approx([0.2, 0.8])


def test_sum_and_bytes_and_pmi_count_whole_choices() -> None:
    given, alone = [[-1.0, -2.0], [-2.5]], [[-3.0, -2.0], [-3.0]]
    assert score_choices("sum", given, None) == [-3.0, -2.5]
    assert score_choices("byte_length_normalized", given, None, [6, 2]) == [-0.5, -1.25]
    assert score_choices("pmi", given, alone) == [2.0, 0.5]


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    shares = [0.25, 0.0, 0.75]
    assert [draw(shares, point) for point in (0.0, 0.2, 0.25, 0.9, 1 - 2**-53)] == [0, 0, 2, 2, 2]
    assert draw([0.0, 1.0, 0.0], 1 - 2**-53) == 1
