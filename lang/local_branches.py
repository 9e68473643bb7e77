"""Branches that the client keeps itself, for backends whose server knows none: order, poison, forks, cancellation.

One thread runs an event loop, and everything that changes a branch happens there. The operations of a branch are
carried out one after the other, those of different branches beside each other, as `bough.backend` promises.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Final, TypeAlias

from bough.backend import Branch
from bough.errors import BoughError, Cancelled, InvalidRequest, RuntimeLost, of
from bough.transcript import EMPTY, Transcript

Outcome: TypeAlias = tuple[Transcript, Any]
"""What the branch holds afterwards, and the operation's result."""
Act: TypeAlias = Callable[[Transcript], "Outcome | Awaitable[Outcome]"]

STOP_S: Final = 5.0


class _Step:
    """One operation of a branch. `heals`: it is carried out on a poisoned branch too, and makes it whole again."""

    __slots__ = ("act", "future", "heals")

    def __init__(self, act: Act, heals: bool) -> None:
        self.act = act
        self.heals = heals
        self.future: Future[Any] = Future()


class _Fork:
    """The point in a branch's order where its children begin."""

    __slots__ = ("children",)

    def __init__(self, children: Sequence[_Branch]) -> None:
        self.children = children


class _Release:
    __slots__ = ()


class _Branch:
    """`parent` and `children` are for cancellation only; who is forgotten hands its children to its parent."""

    __slots__ = ("children", "error", "holds", "id", "is_born", "parent", "queue", "task")

    def __init__(self, branch_id: Branch, is_born: bool) -> None:
        self.id = branch_id
        self.is_born = is_born
        self.holds: Transcript = EMPTY
        self.error: BoughError | None = None
        self.queue: deque[_Step | _Fork | _Release] = deque()
        self.task: asyncio.Task[None] | None = None
        self.parent: _Branch | None = None
        self.children: dict[Branch, _Branch] = {}


class Branches:
    """All branches of one backend, and the thread they are carried out in. Methods may be called from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ids = count(1)
        self._branches: dict[Branch, _Branch] = {}
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix=f"{name}-names"))  # DNS, nothing else
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def __len__(self) -> int:
        return len(self._branches)

    # ------------------------------------------------------------------------------------------ from any thread

    def open(self) -> Branch:
        """Start an empty branch."""
        branch = _Branch(next(self._ids), is_born=True)
        self._call(lambda: self._add([branch]))
        return branch.id

    def fork(self, branch: Branch, number: int) -> list[Branch]:
        """Start branches that hold what this one holds once its earlier operations are done."""
        children = [_Branch(next(self._ids), is_born=False) for _ in range(number)]
        self._call(lambda: self._fork(branch, children))
        return [child.id for child in children]

    def submit(self, branch: Branch, act: Act, *, heals: bool = False) -> Future[Any]:
        """Carry out an operation after the earlier ones of its branch."""
        step = _Step(act, heals)
        if not self._call(lambda: self._enqueue(branch, step)):
            step.future.set_exception(_closed())
        return step.future

    def cancel(self, branch: Branch) -> Future[int]:
        """End every operation of the branch and its descendants; nothing more is carried out on them."""
        ended: Future[int] = Future()
        if not self._call(lambda: ended.set_result(self._cancel(branch, Cancelled("the branch was cancelled")))):
            ended.set_result(0)
        return ended

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches once what was asked before has been carried out."""
        self._call(lambda: self._release(branches))

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Fail whatever runs or waits with RuntimeLost, run `last`, and end the thread. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._stop(last)))
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)

    async def _stop(self, last: Callable[[], Awaitable[None]]) -> None:
        running = [branch.task for branch in self._branches.values() if branch.task is not None]
        for branch in list(self._branches.values()):
            self._cancel(branch.id, _closed())
        if running:
            await asyncio.wait(running, timeout=STOP_S / 2)
        try:
            await last()
        finally:
            self._loop.stop()

    def _call(self, act: Callable[[], object]) -> bool:
        """Have something done on the loop, in the order of the calls; False if it is closed."""
        if self._is_closed:
            return False
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:  # closed in between
            return False
        return True

    # ------------------------------------------------------------------------------------------ on the loop

    def _add(self, branches: Sequence[_Branch]) -> None:
        self._branches.update((branch.id, branch) for branch in branches)

    def _fork(self, branch: Branch, children: Sequence[_Branch]) -> None:
        self._add(children)
        parent = self._branches.get(branch)
        if parent is None:
            for child in children:
                child.error, child.is_born = _not_open(branch), True
            return
        for child in children:
            child.parent = parent
            parent.children[child.id] = child
        parent.queue.append(_Fork(children))
        self._pump(parent)

    def _enqueue(self, branch: Branch, step: _Step) -> None:
        target = self._branches.get(branch)
        if target is None:
            step.future.set_exception(_not_open(branch))
            return
        target.queue.append(step)
        self._pump(target)

    def _release(self, branches: Sequence[Branch]) -> None:
        for branch in branches:
            target = self._branches.get(branch)
            if target is not None:
                target.queue.append(_Release())
                self._pump(target)

    def _pump(self, branch: _Branch) -> None:
        """Carry out what can be carried out, until one takes time."""
        waiting = [branch]
        while waiting:
            at = waiting.pop()
            while at.queue and at.is_born and at.task is None:
                step = at.queue.popleft()
                if isinstance(step, _Step):
                    self._begin(at, step)
                elif isinstance(step, _Fork):
                    self._bear(at, step.children)
                    waiting.extend(step.children)
                else:
                    self._forget(at)

    def _bear(self, parent: _Branch, children: Sequence[_Branch]) -> None:
        for child in children:
            child.holds = parent.holds
            child.error = child.error or (None if parent.error is None else parent.error.for_dependant())
            child.is_born = True

    def _forget(self, branch: _Branch) -> None:
        self._branches.pop(branch.id, None)
        above = branch.parent
        for child in branch.children.values():
            child.parent = above
        if above is not None:
            above.children.pop(branch.id, None)
            above.children.update(branch.children)
        for step in branch.queue:
            if isinstance(step, _Step):
                step.future.set_exception(_not_open(branch.id))
        branch.queue.clear()

    def _begin(self, branch: _Branch, step: _Step) -> None:
        if not step.future.set_running_or_notify_cancel():
            return
        if branch.error is not None and not step.heals:
            step.future.set_exception(branch.error.for_dependant())
            return
        try:
            outcome = step.act(branch.holds)
        except Exception as raised:
            self._fail(branch, step, of(raised))
            return
        if isinstance(outcome, tuple):
            self._succeed(branch, step, outcome)
        else:
            branch.task = self._loop.create_task(self._finish(branch, step, outcome))

    async def _finish(self, branch: _Branch, step: _Step, outcome: Awaitable[Outcome]) -> None:
        try:
            self._succeed(branch, step, await outcome)
        except asyncio.CancelledError:  # by `cancel`, which has poisoned the branch
            step.future.set_exception(branch.error or Cancelled("the operation was cancelled"))
        except Exception as raised:
            self._fail(branch, step, of(raised))
        finally:
            branch.task = None
            self._pump(branch)

    def _succeed(self, branch: _Branch, step: _Step, outcome: Outcome) -> None:
        branch.holds, result = outcome
        if step.heals:
            branch.error = None
        step.future.set_result(result)

    def _fail(self, branch: _Branch, step: _Step, error: BoughError) -> None:
        branch.error = branch.error or error
        step.future.set_exception(error)

    def _cancel(self, root: Branch, error: BoughError) -> int:
        number = 0
        for branch in list(self._family(self._branches.get(root))):
            branch.error = error.again()
            steps, branch.queue = branch.queue, deque()
            for step in steps:
                if isinstance(step, _Step):
                    if step.future.set_running_or_notify_cancel():
                        step.future.set_exception(error.again())
                    number += 1
                else:
                    branch.queue.append(step)
            if branch.task is not None:
                branch.task.cancel()
                number += 1
            self._pump(branch)
        return number

    def _family(self, root: _Branch | None) -> Iterator[_Branch]:
        waiting = [] if root is None else [root]
        while waiting:
            branch = waiting.pop()
            waiting.extend(branch.children.values())
            yield branch


def _closed() -> RuntimeLost:
    return RuntimeLost("the backend was closed")


def _not_open(branch: Branch) -> InvalidRequest:
    return InvalidRequest(f"branch {branch} is not open", branch=branch)
