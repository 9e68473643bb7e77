"""The simulator of the scheduler: the same figures every time, and an optimum that counting agrees with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import simulate
from shapes import SHAPES, Shape, longest_request, optimum, working_set
from simulate import Setting


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.name))
def test_the_optimum_is_what_walking_a_trie_counts(shape: Shape) -> None:
    programs = shape.programs(6)
    trie: dict[tuple[int, int], int] = {}
    computed: set[int] = set()
    drawn: set[int] = set()
    total = 0
    for request in (request for program in programs for request in program):
        ids = request.prompt.tolist()
        goal = len(ids) if request.output is not None else len(ids) - 1
        total += goal
        ids = ids[:goal] if request.output is None else ids + request.output.tolist()[:-1]
        node = 0
        for position, token in enumerate(ids):
            node = trie.setdefault((node, token), len(trie) + 1)
            (computed if position < goal else drawn).add(node)
    assert optimum(programs) == (1 - len(computed - drawn) / total, 1 - len(computed) / total)


@pytest.mark.parametrize("policy", ["lpm", "fcfs"])
def test_the_same_trace_gives_the_same_report_and_no_hit_rate_beats_the_optimum(policy: str) -> None:
    for shape in (SHAPES[1], SHAPES[-1]):
        programs = shape.programs(40, seed=3)
        setting = Setting(policy=policy, pool_tokens=2 * longest_request(programs), concurrency=8)
        first, second = (replace(simulate.simulate(programs, setting), us_per_step=0.0) for _ in range(2))
        assert first == second
        assert first.requests == sum(map(len, programs))
        assert 0 < first.hit_rate <= first.optimum


def test_in_a_pool_that_holds_everything_only_the_last_token_of_a_prompt_is_computed_again() -> None:
    programs = SHAPES[-1].programs(60)
    pool = 2 * working_set(programs, len(programs))
    report = simulate.simulate(programs, Setting(pool_tokens=pool))
    assert report.evictions == report.preemptions == 0
    assert report.optimum - report.hit_rate <= report.requests / report.prompt_tokens
