"""The stop that is complete first is found, whole, across any cuts, and nothing of it is ever shown before."""

from __future__ import annotations

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.protocol import RequestError
from bough.runtime.text.stops import CONTEXT_CHARS, MAX_STOP_CHARS, StopHit, StopMatcher

TEXT = st.text("abc\n", max_size=24)
STOPS = st.lists(st.text("abc\n", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)
PATTERNS = [
    "ab+c",
    "a|bc",
    "abc|b",
    r"\bab",
    "a{3}",
    "[bc]{2}a",
    r"(?<=a)bb",
    "a.c",
    "(?i)A+B",
    "(a|b)*c",
    r"\n\n?a",
    "b$",
]
PATTERNS += ["a(?=b)", "a(?!b)c", r"(a)\1b", "c(?:ab)?c", "(?>a+)b", "a*+c", "^ab", r"\Aa*b"]
CUTS = st.lists(st.integers(1, 5), min_size=24, max_size=24)


def _deltas(text: str, cuts: list[int]) -> list[str]:
    deltas = []
    for length in cuts:
        deltas.append(text[:length])
        text = text[length:]
    return deltas


def _first_complete(text: str, stops: tuple[str, ...]) -> StopHit | None:
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return StopHit(end - len(longest), end, longest, is_regex=False)
    return None


@settings(max_examples=300)
@given(text=TEXT, stops=STOPS, cuts=CUTS)
def test_the_string_found_is_the_one_complete_first_however_the_text_is_cut(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, ())
    hit = next((hit for delta in _deltas(text, cuts) if (hit := matcher.feed(delta))), None)
    assert hit == _first_complete(text, stops)


@settings(max_examples=300)
@given(text=TEXT, stops=STOPS)
def test_what_may_be_shown_is_all_but_the_longest_beginning_of_a_stop(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops, ())
    for end in range(1, len(text) + 1):
        hit = matcher.feed(text[end - 1])
        if hit:
            assert matcher.safe_len == hit.start
            return
        begun = max(
            length for stop in stops for length in range(len(stop)) if text[:end].endswith(stop[:length]) or not length
        )
        assert matcher.safe_len == end - begun


@settings(max_examples=500)
@given(text=TEXT, patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2).map(tuple), cuts=CUTS)
def test_a_pattern_is_found_as_soon_as_the_text_so_far_has_it_and_nothing_of_it_was_shown(
    text: str, patterns: tuple[str, ...], cuts: list[int]
) -> None:
    matcher = StopMatcher((), patterns)
    so_far, shown = "", 0
    for delta in _deltas(text, cuts):
        so_far += delta
        hit = matcher.feed(delta)
        found = [(match.end(), match.start(), p) for p in patterns if (match := regex.search(p, so_far))]
        assert (hit is None) == (not found)
        assert shown <= matcher.safe_len <= len(so_far)
        shown = matcher.safe_len
        if hit:
            end, start, _ = min(found, key=lambda f: f[:2])
            assert (hit.start, hit.end) == (start, end)
            return


def test_a_string_and_a_pattern_in_one_piece_of_text_give_the_one_complete_first() -> None:
    assert StopMatcher(("cd",), ("bc",)).feed("abcd") == StopHit(1, 3, "bc", is_regex=True)
    assert StopMatcher(("abcd",), ("bc",)).feed("abcd") == StopHit(1, 3, "bc", is_regex=True)
    assert StopMatcher(("ab",), ("bc",)).feed("abcd") == StopHit(0, 2, "ab", is_regex=False)
    assert StopMatcher(("bc",), ("bc",)).feed("abcd") == StopHit(1, 3, "bc", is_regex=False)


def test_without_stops_everything_may_be_shown() -> None:
    matcher = StopMatcher((), ())
    assert matcher.feed("abc") is None
    assert matcher.safe_len == 3


def test_a_long_text_before_the_match_is_forgotten_but_counted() -> None:
    matcher = StopMatcher(("END",), (r"\bstop\b",))
    for _ in range(1000):
        assert matcher.feed("some words that run on ") is None
    assert matcher.safe_len == 23_000
    hit = matcher.feed("stop")
    assert hit == StopHit(23_000, 23_004, r"\bstop\b", is_regex=True)


def test_the_start_of_a_text_is_not_found_again_after_forgetting() -> None:
    matcher = StopMatcher((), ("^stop",))
    assert matcher.feed("x" * (3 * CONTEXT_CHARS)) is None
    assert matcher.feed("stop") is None


@pytest.mark.parametrize(
    ("stop", "stop_regex", "field"),
    [
        (("",), (), "stop"),
        (("a" * (MAX_STOP_CHARS + 1),), (), "stop"),
        (tuple("ab"[i % 2] * 4000 + str(i) for i in range(30)), (), "stop"),
        ((), ("(",), "stop_regex"),
        ((), ("a*",), "stop_regex"),
        ((), ("",), "stop_regex"),
        ((), ("a|",), "stop_regex"),
        ((), ("$",), "stop_regex"),
        ((), ("a" * (MAX_STOP_CHARS + 1),), "stop_regex"),
        ((), ("(" * 2000 + "a" + ")" * 2000,), "stop_regex"),
        ((), (r"(?P<x>a)(?P<x",), "stop_regex"),
        ((), (r"a\p{Nonsense}",), "stop_regex"),
        ((), ("a{99999999999999999999}",), "stop_regex"),
    ],
)
def test_bad_stops_are_refused_by_name(stop: tuple[str, ...], stop_regex: tuple[str, ...], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        StopMatcher(stop, stop_regex)
    assert caught.value.kind == "invalid_request"
    assert caught.value.details["field"] == field
    assert "value" in caught.value.details


def test_a_pattern_that_takes_too_long_is_refused_in_time() -> None:
    matcher = StopMatcher((), (r"(?:a|a|aa)+(?:a|a|aa)+x",), timeout_s=0.05)
    with pytest.raises(RequestError, match="stop_regex must be matched within 50 ms"):
        matcher.feed("a" * 4000)
