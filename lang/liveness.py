"""Whether the peer of a connection still lives: heartbeats, its epoch, and its process.

Pure bookkeeping: it is told what time it is and what was heard, and says what to do. It knows no sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bough.errors import RuntimeLost

WATCH_S: Final = 0.5
"""How often the process is looked at; a disconnect tells its death sooner."""
IDLE_S: Final = 60.0


class Liveness:
    """Decides when to ping, and when the peer is lost."""

    def __init__(self, address: str, silence_s: float, watch: Callable[[], str | None] | None, now: float) -> None:
        self.watch = watch
        self._address = address
        self._silence_s = silence_s
        self._heartbeat_s: float | None = None
        self._epoch = 0
        self._ping: int | None = None
        self._heard_at = self._pinged_at = self._watched_at = now

    def welcomed(self, heartbeat_s: float, epoch: int) -> None:
        """Begin with the heartbeats that the peer asked for."""
        self._heartbeat_s = max(0.05, heartbeat_s)
        self._epoch = epoch

    def heard(self, now: float) -> None:
        """Note that something arrived."""
        self._heard_at = now

    def pinged(self, op: int, now: float) -> None:
        """Note that a ping was sent."""
        self._ping, self._pinged_at = op, now

    def ponged(self, epoch: int) -> RuntimeLost | None:
        """Note the answer to a ping; return the loss if it came from another life of the peer."""
        self._ping = None
        if epoch == self._epoch:
            return None
        return RuntimeLost(f"the runtime at {self._address} was restarted (epoch {epoch})")

    def must_ping(self, now: float) -> bool:
        """Return whether a heartbeat is due."""
        return self._heartbeat_s is not None and self._ping is None and now - self._pinged_at >= self._heartbeat_s

    def loss(self, now: float) -> RuntimeLost | None:
        """Return why the peer is lost, or None."""
        if self.watch is not None and now - self._watched_at >= WATCH_S:
            self._watched_at = now
            reason = self.watch()
            if reason is not None:
                return RuntimeLost(reason)
        if self._ping is None or now - max(self._heard_at, self._pinged_at) <= self._silence_s:
            return None
        return RuntimeLost(
            f"the runtime at {self._address} has not answered a ping for {self._silence_s:g} s: it hangs",
            silence_s=self._silence_s,
        )

    def patience_s(self, now: float) -> float:
        """Return how long to wait for something to arrive before asking again."""
        wait_s = WATCH_S if self.watch is not None else IDLE_S
        if self._heartbeat_s is None:
            return wait_s
        if self._ping is None:
            return min(wait_s, max(0.0, self._pinged_at + self._heartbeat_s - now))
        return min(wait_s, max(0.0, max(self._heard_at, self._pinged_at) + self._silence_s - now))
