"""Many bodies on a few threads: a hub is one thread that goes on with whichever of its bodies can.

A body that blocks its thread (I/O of its own, a lock) holds up the bodies of its hub, so others get threads of their
own: `Hubs.watch` starts more when all are held up. A body must not wait for a gen while it holds a lock that another
body of the batch wants: as in any code that shares a thread, the other would stop the thread that has to give it back.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from greenlet import getcurrent, greenlet

from bough.errors import Cancelled
from bough.waiting import Body, Subscribe

if TYPE_CHECKING:
    from bough.loopthread import LoopThread

T = TypeVar("T")

log = logging.getLogger(__name__)

FIRST_THREADS: Final = 4
MAX_THREADS: Final = 32
TICK_S: Final = 0.1
"""A hub that has not come back from a body for so long is held up."""
STALL_S: Final = 30.0
"""After so long a hub that is held up while others of its bodies could go on is named in the log."""

Job = Callable[[], object]


class HubBody(Body):
    """A body on a hub's thread, in a context of its own."""

    def __init__(self, run: Job, hub: Hub, context: contextvars.Context) -> None:
        super().__init__(run)
        self.hub = hub
        self.gr_context = context

    def suspend(self, subscribe: Subscribe) -> None:
        """Let the hub's other bodies go on until `subscribe` has called back. Raises Cancelled once it is stopped."""
        hub, here = self.hub, getcurrent()
        hub.check()
        if subscribe(partial(hub.ready.put, here)):
            hub.suspended.add(here)
            assert self.parent is not None, "a hub's thread is the parent of its bodies"
            self.parent.switch()
            hub.check()

    def run_coroutine(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the batch's event loop; the hub's other bodies go on meanwhile."""
        return self.hub.hubs.loop_thread().run(make)


class Hub:
    """One thread and its bodies. `take` returns what to start next, or None; `patience_s` how long until it might."""

    def __init__(self, name: str, hubs: Hubs) -> None:
        self.ready: SimpleQueue[greenlet | None] = SimpleQueue()  # None: there may be something to take
        self.suspended: set[greenlet] = set()
        self.is_stopped = False
        self.is_asleep = False
        self.turn = 0  # odd while a body runs
        self.since = 0.0
        self.hubs = hubs
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def check(self) -> None:
        """Raise Cancelled if the batch was stopped."""
        if self.is_stopped:
            raise Cancelled("the batch was stopped before this item had ended")

    def stop(self) -> None:
        """End all bodies where they wait, and the thread."""
        self.is_stopped = True
        self.ready.put(None)

    def _work(self) -> None:
        while not self.is_stopped:
            self._step()
        for body in list(self.suspended):  # `check` raises in each
            self._resume(body)

    def _step(self) -> None:
        try:
            body = self.ready.get_nowait()
        except Empty:
            if self._started() or self._slept():
                return
            self.is_stopped = True
        else:
            self._resume(body)

    def _started(self) -> bool:
        job = self.hubs.take()
        if job is None:
            return False
        self._run(HubBody(job, self, self.hubs.context.copy()))
        return True

    def _slept(self) -> bool:
        """Sleep until a body can go on or there may be something to take; False if the batch is over."""
        self.is_asleep = True  # before looking: whoever makes something takable after that wakes this hub
        try:
            if not self._started():
                if self.hubs.is_over():
                    return False
                self._resume(self.ready.get(timeout=self.hubs.patience_s()))
        except Empty:
            pass
        finally:
            self.is_asleep = False
        return True

    def _resume(self, body: greenlet | None) -> None:
        self.is_asleep = False
        if body is not None:
            self.suspended.discard(body)
            self._run(body)

    def _run(self, body: greenlet) -> None:
        self.since = time.monotonic()
        self.turn += 1
        try:
            body.switch()
        finally:
            self.turn += 1


class Hubs:
    """The hubs of one batch."""

    def __init__(
        self,
        name: str,
        most: int,
        take: Callable[[], Job | None],
        is_over: Callable[[], bool],
        patience_s: Callable[[], float | None],
    ) -> None:
        self.context = contextvars.copy_context()
        self.take = take
        self.is_over = is_over
        self.patience_s = patience_s
        self._name = name
        self._most = min(most, MAX_THREADS)
        self._seen: list[int] = []
        self._is_reported = False
        self._lock = threading.Lock()
        self._loop_thread: LoopThread | None = None
        self._hubs: list[Hub] = []

    def start(self) -> None:
        """Start the first threads."""
        for _ in range(min(FIRST_THREADS, self._most)):
            self._add()

    def __len__(self) -> int:
        return len(self._hubs)

    def _add(self) -> None:
        hub = Hub(f"{self._name}-{len(self._hubs)}", self)
        self._hubs.append(hub)  # before it begins: an interrupt may come at any time, and then it has to be stopped
        hub.start()

    def loop_thread(self) -> LoopThread:
        """Return the thread that the batch's `async def` programs run on; the first call starts it."""
        from bough.loopthread import LoopThread  # asyncio is not imported before an async program runs

        with self._lock:
            if self._loop_thread is None:
                self._loop_thread = LoopThread(f"{self._name}-loop")
            return self._loop_thread

    def nudge(self) -> None:
        """Let those hubs that sleep see whether there is something to take."""
        for hub in self._hubs:
            if hub.is_asleep:
                hub.ready.put(None)

    def watch(self) -> None:
        """Start as many threads again if every one has been held up by a single body since the last call."""
        seen, self._seen = self._seen, [hub.turn for hub in self._hubs]
        stuck = [hub for hub, turn in zip(self._hubs, seen, strict=False) if hub.turn == turn and turn % 2]
        if len(stuck) < len(self._hubs):
            return
        for _ in range(min(len(self._hubs), self._most - len(self._hubs))):
            self._add()
        self._report(stuck)

    def _report(self, stuck: list[Hub]) -> None:
        late = [hub for hub in stuck if time.monotonic() - hub.since > STALL_S and not hub.ready.empty()]
        if late and not self._is_reported:
            self._is_reported = True
            log.warning(
                "%d of %d threads of a batch have been held up for %g s by a program that blocks while others could go "
                "on. Does it read a variable while it holds a lock?", len(late), len(self._hubs), STALL_S,
            )  # fmt: skip

    def stop(self) -> None:
        """End all bodies where they wait, and the threads; does not wait for them."""
        for hub in self._hubs:
            hub.stop()
        with self._lock:
            if self._loop_thread is not None:
                self._loop_thread.stop()
