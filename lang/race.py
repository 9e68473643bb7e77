"""Racing branches: whoever is there first wins, the others are ended in the runtime.

Nobody polls and no branch has a thread: each branch counts what it still has to do and reports once when that is all
done, and the one who waits is woken by the next report.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from bough.errors import BoughError, InvalidRequest, Timeout
from bough.pieces import futures_of
from bough.waiting import until as wait_until

if TYPE_CHECKING:
    from bough.state import State


class FinishLine:
    """The order in which states finish what was appended to them so far, well or not."""

    def __init__(self, states: Sequence[State]) -> None:
        self._lock = threading.Lock()
        self._arrived: deque[int] = deque()
        self._call: Callable[[], None] | None = None
        self._left: list[int] = []
        running = [_unfinished(state) for state in states]
        self._left = [len(futures) for futures in running]
        for number, futures in enumerate(running):
            if not futures:
                self._arrived.append(number)
        for number, futures in enumerate(running):
            for future in futures:
                future.add_done_callback(partial(self._one_done, number))

    def _one_done(self, number: int, _: Future[Any]) -> None:
        with self._lock:
            self._left[number] -= 1
            if self._left[number]:
                return
            self._arrived.append(number)
            call, self._call = self._call, None
        if call is not None:
            call()

    def subscribe(self, call: Callable[[], None]) -> bool:
        """Call back at the next arrival; False if there is one already."""
        with self._lock:
            if self._arrived:
                return False
            self._call = call
            return True

    def next(self, clock: Deadline | None = None) -> int | None:
        """Wait for the next state that has finished, and return its number; None if the deadline passes first."""
        while not self._arrived:
            if clock is None:
                wait_until(self.subscribe)
            elif clock.is_over:
                return None
            else:
                wait_until(partial(clock.or_over, self.subscribe))
        return self._arrived.popleft()


class Deadline:
    """Ends a wait after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._lock = threading.Lock()
        self._call: Callable[[], None] | None = None
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True
        self._timer.start()

    def or_over(self, subscribe: Callable[[Callable[[], None]], bool], call: Callable[[], None]) -> bool:
        """Subscribe a call to something, and to the end of the time: whichever comes first calls, once."""
        once = _Once(call)
        with self._lock:
            if self.is_over:
                return False
            self._call = once
        return subscribe(once)

    def stop(self) -> None:
        """Nobody waits any more."""
        self._timer.cancel()

    def _pass(self) -> None:
        with self._lock:
            self.is_over = True
            call, self._call = self._call, None
        if call is not None:
            call()


class _Once:
    """A call that is made at most once, from whichever thread."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            call, self._call = self._call, None
        if call is not None:
            call()


def race(
    states: Sequence[State], k: int, until: Callable[[State], bool] | None, timeout_s: float | None
) -> list[State]:
    """Return the first k states to finish, or to finish and satisfy `until`, in that order; end all the others."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(states):
        raise InvalidRequest(f"k must be between 1 and the number of branches, {len(states)}, got {k!r}", field="k")
    winners: list[State] = []
    first_error: BaseException | None = None
    is_refused = False  # whether a branch finished and did not satisfy
    clock = None if timeout_s is None else Deadline(timeout_s)
    try:
        line = FinishLine(states)
        for _ in states:
            number = line.next(clock)
            if number is None:
                first_error, is_refused = Timeout(f"no branch won within {timeout_s:g} s", timeout_s=timeout_s), False
                break
            state = states[number]
            error = state.error()
            first_error = first_error or error
            if error is None and until is not None and not until(state):
                is_refused = True
            elif error is None:
                winners.append(state)
                if len(winners) == k:
                    break
    finally:
        if clock is not None:
            clock.stop()
        end_all([state for state in states if not any(state is winner for winner in winners)])
    if not winners and first_error is not None and not is_refused:
        raise first_error
    return winners


def end_all(states: Sequence[State]) -> None:
    """End what runs on states and on their forks, and free the KV that only they have; what was done can be read."""
    branches = [state._interpreter.give_up() for state in states]
    held = [branch for branch in branches if branch is not None]
    if held:
        states[0]._interpreter.backend.release(held)


def _unfinished(state: State) -> list[Future[Any]]:
    """Send what waits to be sent, and return what is not done."""
    interpreter = state._interpreter
    try:
        interpreter.flush()
    except BoughError:  # told by `error()`
        return []
    futures = [future for item in interpreter.items() for future in futures_of(item) if not future.done()]
    last = interpreter._last_extend
    if last is not None and not last.done():
        futures.append(last)
    return futures
