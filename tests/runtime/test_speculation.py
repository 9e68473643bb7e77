"""Drafts: where they come from, when they are tried, and that they change nothing but the number of steps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.batch import Batch, Row, RowResult, SampleRequest
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.draft_costs import measure_draft_costs
from bough.runtime.drafts import (
    FIRST_CREDIT,
    FIRST_DRAFT,
    LEAST_MATCH,
    MOST_DRAFT,
    MOST_LOSS,
    MOST_SAVED,
    DraftCosts,
    NgramTable,
    Pace,
    repeated,
)
from bough.runtime.protocol import SamplingParams
from bough.runtime.sequence import Sequence
from bough.runtime.speculation import Speculator
from bough.runtime.vector import IntArray

IDS = st.lists(st.integers(1, 4), max_size=40)


def ids(*tokens: int) -> IntArray:
    return np.array(tokens, dtype=np.int32)


def test_a_text_goes_on_as_it_did_after_its_longest_repeated_suffix() -> None:
    text = ids(9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 6, 7, 9, 1, 2, 3)
    assert repeated(text, 2).tolist() == [4, 5], "9 1 2 3 is longer than the later 1 2 3"
    assert repeated(text[1:], 2).tolist() == [6, 7]


def test_two_equal_tokens_are_no_repetition() -> None:
    assert len(repeated(ids(1, 2, 5, 6, 1, 2), 4)) == 0
    assert len(repeated(ids(1, 2), 4)) == 0


def test_a_text_in_circles_goes_on_in_circles() -> None:
    assert repeated(ids(1, 2, 3, 1, 2, 3, 1), 7).tolist() == [2, 3, 1, 2, 3, 1, 2]


@given(text=IDS, count=st.integers(0, 9))
def test_a_repetition_is_there_exactly_when_the_last_tokens_stand_earlier(text: list[int], count: int) -> None:
    tail = text[-LEAST_MATCH:]
    starts = [i for i in range(len(text) - LEAST_MATCH) if text[i : i + LEAST_MATCH] == tail]
    draft = repeated(ids(*text), count).tolist()
    assert len(draft) == (count if starts and len(text) > LEAST_MATCH else 0)
    if draft:
        agreeing = [agreement(text, i + LEAST_MATCH) for i in starts]
        best = [i for i, length in zip(starts, agreeing, strict=True) if length == max(agreeing)]
        assert draft[0] == text[best[-1] + LEAST_MATCH]


def agreement(text: list[int], end: int) -> int:
    """How many tokens before `end` are those at the end of the text; 16 are enough."""
    return max(n for n in range(min(end, 16) + 1) if text[end - n : end] == text[len(text) - n :])


def test_what_siblings_said_is_followed_in_their_namespace_only() -> None:
    table = NgramTable()
    table.learn("a", ids(1, 2, 3, 4, 5))
    assert table.follow("a", ids(7, 1, 2, 3), 9).tolist() == [4, 5]
    assert len(table.follow("b", ids(7, 1, 2, 3), 9)) == 0
    assert len(table.follow("a", ids(2, 3), 9)) == 0


def test_what_was_said_long_ago_is_forgotten() -> None:
    table = NgramTable(most=4)
    table.learn("a", ids(1, 2, 3, 4))
    table.learn("a", ids(*range(10, 20)))
    assert table.follow("a", ids(1, 2, 3), 1).tolist() == [4]
    table.learn("a", ids(*range(30, 40)))
    assert len(table.follow("a", ids(1, 2, 3), 1)) == 0


def test_the_tree_goes_on_after_what_is_published_and_what_is_not_yet() -> None:
    cache = PrefixCache(32, 2)

    def publish(*tokens: int) -> None:
        lease = cache.acquire(None, ids(*tokens), len(tokens), headroom=0)
        assert lease is not None
        cache.publish(lease, ids(*tokens))
        cache.release(lease)

    publish(1, 2, 3, 4, 5, 6, 7)
    publish(1, 2, 3, 4, 8, 9)
    lease = cache.acquire(None, ids(1, 2, 3), 2, headroom=0)
    assert lease is not None
    cases = {(1, 2): [3, 4, 8, 9], (1, 2, 3): [4, 8, 9], (1, 2, 3, 4, 5): [6, 7], (1, 2, 3, 4): [8, 9], (1, 2, 7): []}
    clock = cache.tree.clock
    for tokens, expected in cases.items():
        assert cache.continuation(lease, ids(*tokens), 9).tolist() == expected
        assert cache.continuation(lease, ids(*tokens), 1).tolist() == expected[:1]
    assert len(cache.continuation(lease, ids(1, 2, 3, 4, 5, 6, 7), 9)) == 0
    assert cache.tree.clock == clock


COSTS = DraftCosts(row=0.1, draft=0.03, look=0.002)


def turns(pace: Pace, count: int, share: float, value: float = 1.1, costs: DraftCosts = COSTS, first: int = 1) -> float:
    """Let drafts come true with probability `share` a token; return what they won, in tokens, cost subtracted."""
    rng, before = np.random.default_rng(0), (pace.drafted, pace.accepted)
    num_drafts = 0
    for turn in range(first, first + count):
        if allowed := pace.allowed(turn, value, costs):
            num_drafts += 1
            pace.record(allowed, next((i for i in range(allowed) if rng.random() >= share), allowed), costs)
    rows = pace.drafted - before[0]
    return pace.accepted - before[1] - (costs.draft * num_drafts + costs.row * rows) / value


def test_drafts_that_come_true_grow_and_others_stop() -> None:
    pace = Pace()
    assert pace.allowed(1, 1.1, COSTS) == FIRST_DRAFT, "the first draft is short: nothing is known of it yet"
    for _ in range(8):
        pace.record(4, 4, COSTS)
    assert pace.allowed(2, 1.1, COSTS) == MOST_DRAFT
    drafted = pace.drafted
    turns(pace, 1000, share=0.0, first=3)
    assert pace.drafted - drafted < 60, "what does not pay is tried ever more rarely, one token at a time"
    turn = pace.wakes_at
    assert pace.allowed(turn - 1, 1.1, COSTS) == 0
    for _ in range(3):
        pace.record(pace.allowed(turn, 1.1, COSTS), 1, COSTS)
    assert pace.allowed(turn + 1, 1.1, COSTS) > 1, "and again when it does"


@given(
    share=st.sampled_from([0.0, 0.05, 0.2]),
    value=st.floats(0.05, 1.1),
    row=st.floats(0.01, 0.3),
    draft=st.floats(0.0, 1.0),
)
def test_drafts_that_do_not_pay_take_little_of_a_sequences_time(
    share: float, value: float, row: float, draft: float
) -> None:
    costs = DraftCosts(row=row, draft=draft, look=0.0)
    won = turns(Pace(), 5000, share, value, costs)
    dearest = (draft + MOST_DRAFT * row) / value
    assert won > -(MOST_LOSS * 5000 + MOST_SAVED + dearest)


@given(look=st.floats(0.0, 0.5), value=st.floats(0.05, 1.1))
def test_looks_that_find_nothing_take_little_of_a_sequences_time(look: float, value: float) -> None:
    pace, costs, looks = Pace(), DraftCosts(look=look), 0
    for turn in range(1, 2001):
        if pace.allowed(turn, value, costs):
            looks += 1
            pace.missed(costs)
    assert (looks - 1) * look / value <= MOST_LOSS * 2000 + FIRST_CREDIT
    assert looks > 1, "it never stops for good"


def test_what_the_host_takes_for_a_draft_decides_too() -> None:
    won, drafted = {}, {}
    for draft in (0.01, 0.9):
        pace = Pace()
        won[draft] = turns(pace, 500, share=0.5, value=0.9, costs=DraftCosts(row=0.05, draft=draft, look=0.0))
        drafted[draft] = pace.drafted
    assert won[0.01] > 200
    assert drafted[0.9] < 60, "a token comes true of each draft, and costs more than it saves"


@given(share=st.floats(0.01, 1), least=st.floats(0.001, 0.999))
def test_a_draft_ends_where_a_token_more_would_cost_more_than_it_gains(share: float, least: float) -> None:
    count = Pace(drafted=1, share=share).allowed(1, 1.0, DraftCosts(row=least))
    assert 1 <= count <= MOST_DRAFT
    assert count == 1 or share**count >= least * (1 - 1e-9)
    assert count == MOST_DRAFT or share ** (count + 1) < least * (1 + 1e-9)


def test_what_pays_in_a_small_step_does_not_in_a_large_one() -> None:
    speculator = Speculator(100, costs=DraftCosts(row=0.1, draft=0.0, look=0.0))
    drafted = {}
    for num_tokens in (1, 32):
        pace = Pace()
        turns(pace, 300, share=0.6, value=speculator.value(num_tokens), costs=speculator.costs)
        drafted[num_tokens] = pace.drafted
    assert drafted[1] > 300, "one token in ten of a step's time, and more than half come true"
    assert drafted[32] < 60, "a row takes three quarters of what a token gains"


def test_a_sequence_that_never_drafts_right_is_tried_again() -> None:
    pace = Pace()
    turns(pace, 100_000, share=0.0)
    assert 0 < pace.share < 0.1
    assert pace.drafted > 50


def test_costs_are_measured_in_steps_of_this_runner() -> None:
    class Slow:
        """A step takes so much that nothing else counts; a token more takes a tenth of it."""

        context_len, num_pages, page_size = 100, 8, 16
        seconds = 0.0

        def execute(self, batch: Batch) -> list[RowResult]:
            self.seconds += 50.0 + 5.0 * len(batch.rows[0].token_ids)
            return []

    slow = Slow()
    costs = measure_draft_costs(slow, clock=lambda: slow.seconds + time.perf_counter())
    assert costs.row == pytest.approx(0.1, rel=0.01)
    assert 0 <= costs.look < 0.01
    assert 0 < costs.draft < 0.01, "the host's time is real, and next to nothing of fifty seconds"


def test_what_was_followed_by_one_and_then_by_another_is_doubtful_until_they_agree() -> None:
    table = NgramTable()
    for token, expected in ((7, [7]), (7, [7]), (8, []), (8, [8]), (9, []), (8, []), (8, [8])):
        table.learn(None, ids(1, 2, 3, token))
        assert table.follow(None, ids(1, 2, 3), 1).tolist() == expected


def test_a_records_keys_are_drafted_and_its_values_are_not() -> None:
    speculator = Speculator(1000)
    for value in (40, 41, 42):
        sequence = Sequence(ids(9), params=SamplingParams())
        for token in (1, 2, 3, value, 4, 5, 6, 7):
            sequence.append(token)
        speculator.learn(sequence)
    assert speculator.draft(None, ids(9, 1, 2, 3), ids(), 8).tolist() == []
    assert speculator.draft(None, ids(3, 50, 4, 5, 6), ids(), 8).tolist() == [7]


def test_siblings_learn_what_was_drawn_once_and_no_prompt() -> None:
    speculator = Speculator(100)
    sequence = Sequence(ids(1, 2, 3, 4, 5), params=SamplingParams())
    speculator.learn(sequence)
    for token in (6, 7, 8):
        sequence.append(token)
    speculator.learn(sequence)
    assert speculator.draft(None, ids(3, 4, 5), ids(), 9).tolist() == [6, 7, 8]
    assert len(speculator.draft(None, ids(1, 2, 3), ids(), 9)) == 0
    sequence.append(9)
    speculator.learn(sequence)
    assert speculator.draft(None, ids(6, 7, 8), ids(), 9).tolist() == [9]


def test_every_draw_after_a_draft_is_asked_for_as_plain_decoding_asks() -> None:
    params = SamplingParams(min_tokens=4, max_tokens=20, frequency_penalty=0.5, seed=9)
    none = ids()
    first = SampleRequest(params, 9, 12, generated=ids(5, 6), prompt=none, forbidden=(3,))
    row = Row(ids(6, 7, 8, 9), 11, ids(0), first, draft=3)
    asked = [(draw.position, draw.generated.tolist(), draw.forbidden) for draw in row.draws()]
    assert asked == [
        (12, [5, 6], (3,)),
        (13, [5, 6, 7], (3,)),
        (14, [5, 6, 7, 8], ()),
        (15, [5, 6, 7, 8, 9], ()),
    ]


def test_a_sequence_under_a_grammar_drafts_nothing_until_it_is_free() -> None:
    constraint = AnyToken()
    sequence = Sequence(ids(1, 2), params=SamplingParams(), constraint=constraint)
    sequence.append(3)
    sequence.forget_rows(2)
    assert not sequence.is_drawing
    constraint.is_free = True
    assert sequence.is_drawing


class AnyToken:
    is_ended = is_free = False
    num_forced = 0

    def fill(self, words: object, forbidden: tuple[int, ...] = ()) -> None:
        raise AssertionError("nothing is drawn here")

    def begin(self) -> list[int]:
        return []

    def advance(self, token: int) -> list[int]:
        return [token]


def test_what_is_cut_off_was_never_computed() -> None:
    sequence = Sequence(ids(1, 2, 3), params=SamplingParams())
    for token in (4, 5, 6, 7):
        sequence.append(token)
    sequence.num_computed = 6
    assert sequence.cut(2) == 2
    assert sequence.tokens.view().tolist() == [1, 2, 3, 4, 5]
    assert (sequence.goal, sequence.num_publishable) == (5, 4)
    assert sequence.cut(2) == 0


@settings(max_examples=50)
@given(text=IDS, cached=IDS, count=st.integers(1, 8))
def test_a_draft_is_never_longer_than_asked_and_the_tree_comes_first(
    text: list[int], cached: list[int], count: int
) -> None:
    speculator = Speculator(100)
    sequence = Sequence(ids(1), params=SamplingParams())
    for token in text:
        sequence.append(token)
    speculator.learn(sequence)
    draft = speculator.draft(None, ids(*text), ids(*cached), count)
    assert len(draft) <= count
    if cached:
        assert draft.tolist() == cached[:count]
