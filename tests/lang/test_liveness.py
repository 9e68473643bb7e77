"""When a client pings, and when it gives its peer up: on a clock of the test's own."""

from __future__ import annotations

from bough.liveness import IDLE_S, WATCH_S, Liveness


def test_before_the_welcome_nothing_is_due() -> None:
    life = Liveness("a", 10.0, None, now=0.0)
    assert not life.must_ping(100.0)
    assert life.loss(100.0) is None
    assert life.patience_s(100.0) == IDLE_S


def test_pings_go_out_at_the_peers_pace_one_at_a_time() -> None:
    life = Liveness("a", 10.0, None, now=0.0)
    life.welcomed(heartbeat_s=2.0, epoch=7)
    assert not life.must_ping(1.9)
    assert life.patience_s(0.5) == 1.5
    assert life.must_ping(2.0)
    life.pinged(1, 2.0)
    assert not life.must_ping(9.0)
    assert life.ponged(7) is None
    assert life.must_ping(9.0)


def test_silence_counts_from_the_last_word_or_ping_whichever_is_later() -> None:
    life = Liveness("a", 10.0, None, now=0.0)
    life.welcomed(1.0, 7)
    life.heard(3.0)
    assert life.loss(100.0) is None  # nothing was asked
    life.pinged(1, 100.0)
    assert life.patience_s(104.0) == 6.0
    assert life.loss(110.0) is None
    life.heard(105.0)  # a delta is a sign of life as well
    assert life.loss(115.0) is None
    assert "has not answered a ping for 10 s" in str(life.loss(115.1))


def test_another_epoch_is_another_peer() -> None:
    life = Liveness("a", 10.0, None, now=0.0)
    life.welcomed(1.0, 7)
    assert "was restarted" in str(life.ponged(8))


def test_the_process_is_looked_at_now_and_then() -> None:
    looks: list[None] = []

    def watch() -> str | None:
        looks.append(None)
        return "it died" if len(looks) == 2 else None

    life = Liveness("a", 10.0, watch, now=0.0)
    assert [life.loss(0.1), life.loss(WATCH_S), life.loss(WATCH_S + 0.1)] == [None] * 3
    assert len(looks) == 1
    assert str(life.loss(2 * WATCH_S)) == "it died"
    assert life.patience_s(0.0) == WATCH_S
