"""What a runtime that loads tells those who wait: pure, on a clock of the test's own."""

from __future__ import annotations

import io
import threading

import pytest

from bough.runtime.loading import LINE_S, QUIET_S, Display, Loading, Stage, describe


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def loading(clock: Clock, shown: list[tuple[str, bool]]) -> Loading:
    """Not entered: the test is the thread that watches."""
    return Loading("m", lambda text, is_line: shown.append((text, is_line)), clock)


def test_a_fast_start_shows_nothing(loading: Loading, clock: Clock, shown: list[tuple[str, bool]]) -> None:
    loading.enter("reading weights")
    clock.now += QUIET_S - 0.01
    loading.tick()
    assert shown == []
    clock.now += 0.01
    loading.tick()
    assert shown == [("loading m: reading weights, 2 s", False)]


def test_weights_are_told_with_their_share_and_the_time_left(clock: Clock) -> None:
    stage = Stage("reading weights", 10.0, done_bytes=250_000_000, total_bytes=1_000_000_000)
    assert describe("m", stage, 10.5) == "loading m: reading weights 25% of 1.0 GB"  # too early for a rate
    assert describe("m", stage, 14.0) == "loading m: reading weights 25% of 1.0 GB, 12 s left"
    nearly = Stage("reading weights", 10.0, done_bytes=999, total_bytes=1000)
    assert describe("m", nearly, 14.0).endswith("1 s left")
    done = Stage("reading weights", 10.0, done_bytes=990_000_000, total_bytes=990_000_000)
    assert describe("m", done, 14.0) == "loading m: reading weights 100% of 990 MB"


def test_a_stage_without_bytes_tells_how_long_it_takes(
    loading: Loading, clock: Clock, shown: list[tuple[str, bool]]
) -> None:
    loading.enter("reading weights")
    loading.advance(5, 10)
    clock.now += 3
    loading.enter("warming up")
    clock.now += 4
    loading.tick()
    assert shown == [("loading m: warming up, 4 s", True)]


def test_a_line_is_due_every_few_seconds_only(loading: Loading, clock: Clock, shown: list[tuple[str, bool]]) -> None:
    while clock.now < 100 + 4 * LINE_S:
        clock.now += 0.25
        loading.tick()
    lines = [text for text, is_line in shown if is_line]
    assert lines == [f"loading m: starting, {seconds} s" for seconds in (5, 10, 15, 20)]
    assert len(shown) == (4 * LINE_S - QUIET_S) / 0.25 + 1


def test_a_stage_without_a_name_shows_nothing(loading: Loading, clock: Clock, shown: list[tuple[str, bool]]) -> None:
    loading.enter("")
    clock.now += 60
    loading.tick()
    assert shown == []


def test_a_long_name_is_cut_at_its_beginning() -> None:
    text = describe("an-organisation-with-a-name/and-a-model-instruct", Stage("warming up", 0.0), 3.0)
    assert text == "loading …me/and-a-model-instruct: warming up, 3 s"


def test_a_terminal_has_one_line_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    display = Display(stream, "b: ")
    display.show("0123456789", True)
    display.show("half", False)
    display.erase()
    assert stream.getvalue() == "\rb: 01234567" + "\rb: half    " + "\r       " + "\r"


def test_a_log_has_lines_that_are_due_and_nothing_to_take_away() -> None:
    stream = io.StringIO()
    display = Display(stream)
    display.show("not yet", False)
    display.show("a line", True)
    display.erase()
    assert stream.getvalue() == "a line\n"


def test_a_stream_that_nobody_reads_stops_no_start() -> None:
    stream = Terminal()
    display = Display(stream)
    stream.close()
    display.show("text", True)
    display.erase()


def test_the_thread_that_watches_ends_with_the_start(loading: Loading) -> None:
    with loading:
        assert "bough-loading" in {thread.name for thread in threading.enumerate()}
    assert "bough-loading" not in {thread.name for thread in threading.enumerate()}
