"""`Engine`: carries operations out, in order per branch. Between the server and the scheduler; no sockets, no devices.

A turn of the loop is `handle` for each request that arrived, then `step`. A request either ends at once, or queues on
its branch; what reaches the front of the queue ends at once too, or becomes work that is in flight for some steps.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from bough.runtime.branch import Branch, Poison
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.grammar.compiler import GrammarKey
from bough.runtime.inflight import InFlight
from bough.runtime.lifecycle import Progress
from bough.runtime.operation import Operation, check_ids, failed
from bough.runtime.private_texts import private_texts
from bough.runtime.protocol import (
    MAX_FORK,
    Buffer,
    Cancel,
    Cancelled,
    Credit,
    Drain,
    Extend,
    Extended,
    Flush,
    Fork,
    Generate,
    Ok,
    Open,
    Ping,
    Pong,
    Release,
    Request,
    RequestError,
    Rollback,
    Score,
    Select,
    Stat,
    Stats,
)
from bough.runtime.scheduler import Scheduler
from bough.runtime.selection import Selection
from bough.runtime.session import Session
from bough.runtime.work import Generation, Work

log = logging.getLogger(__name__)


class Engine:
    """Owns the branches of all sessions and what runs on them. One thread calls it."""

    def __init__(
        self,
        config: RuntimeConfig,
        scheduler: Scheduler,
        in_flight: InFlight,
        composer: Composer,
        *,
        epoch: int,
        wire_stats: Callable[[], dict[str, int | float | str]] = dict,
        on_compiled: Callable[[GrammarKey, RequestError | None], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.epoch = epoch
        self.is_draining = False
        self._in_flight = in_flight
        self._composer = composer
        self._wire_stats = wire_stats
        self._on_compiled = on_compiled
        self._compiling: dict[GrammarKey, list[Operation]] = {}
        self._clock = clock
        self._timed: dict[Operation, None] = {}
        self._drains: list[Operation] = []
        self._num_branches = 0
        self._num_queued = 0
        self._ready: deque[Branch] = deque()  # branches whose queues may have something to carry out
        self._is_pumping = False

    # ------------------------------------------------------------------------------------------ requests

    def handle(self, session: Session, request: Request, buffers: Items[Buffer], now: float | None = None) -> None:
        """Take a request in that arrived `now`. Whatever is wrong with it is answered; nothing is raised."""
        if isinstance(request, Credit):
            self._grant(session, request)
            return
        timeout_s = getattr(request, "timeout_s", None)
        operation = Operation(request.op, session, request, buffers, self._clock() if now is None else now, timeout_s)
        try:
            check_ids(request)
            session.register(operation)
        except RequestError as error:
            session.reply(failed(request.op, error))
            return
        try:
            self._dispatch(operation, request)
        except RequestError as error:
            operation.fail(error)
        except Exception as error:  # a bug of ours costs this operation, not the loop
            log.exception("%s failed", type(request).__name__.lower())
            self._fail(operation, RequestError("internal", f"{type(error).__name__}: {error}"))

    def _dispatch(self, operation: Operation, request: Request) -> None:
        session = operation.session
        match request:
            case Open():
                self._admit_work()
                self._open(session, request)
                operation.end(Ok(op=request.op))
            case Extend() | Generate() | Select() | Score() | Rollback():
                if not isinstance(request, Rollback):
                    self._admit_work()
                self._enqueue(operation, session.branch(request.branch))
            case Fork():
                self._admit_work()
                self._announce(operation, request)
            case Release():
                self._release(operation, request)
            case Cancel():
                self._cancel(operation, request)
            case Stat():
                operation.end(Stats(op=request.op, values=self.stats()))
            case Flush():
                self.scheduler.cache.flush()
                operation.end(Ok(op=request.op))
            case Ping():
                operation.end(self._pong(request.op))
            case Drain():
                self.is_draining = True
                self._drains.append(operation)
            case _:
                raise RequestError("protocol", f"{type(request).__name__.lower()} is not expected here")

    def _admit_work(self) -> None:
        if self.is_draining:
            raise RequestError("overloaded", "the runtime is draining and takes no new work", retry_after_s=0)
        if self._num_queued >= self.config.max_waiting:
            raise RequestError(
                "overloaded",
                f"{self._num_queued} operations wait, the limit is {self.config.max_waiting}: try again later",
                limit=self.config.max_waiting,
                retry_after_s=1.0,
            )

    def _open(self, session: Session, request: Open) -> None:
        self._new_branch(session, request.branch, (request.branch,)).begin(self._composer.empty_tail())

    def _new_branch(self, session: Session, branch_id: int, path: tuple[int, ...]) -> Branch:
        if branch_id in session.branches:
            raise RequestError("invalid_request", f"branch {branch_id} is open already", branch=branch_id)
        if self._num_branches >= self.config.max_branches:
            raise self._too_many_branches()
        branch = Branch(branch_id, path)
        session.branches.add(branch)
        self._num_branches += 1
        return branch

    def _too_many_branches(self) -> RequestError:
        limit = self.config.max_branches
        message = f"{self._num_branches} branches are open, the limit is {limit}: release some"
        return RequestError("overloaded", message, limit=limit, retry_after_s=1.0)

    def _announce(self, operation: Operation, request: Fork) -> None:
        """Make a fork's children known at once, so that what is sent for them can queue until they are born."""
        if not 1 <= len(request.children) <= MAX_FORK:
            raise RequestError(
                "invalid_request", f"children must be between 1 and {MAX_FORK} ids, got {len(request.children)}"
            )
        session = operation.session
        parent = session.branch(request.branch)
        if self._num_branches + len(request.children) > self.config.max_branches:
            raise self._too_many_branches()
        if session.branches.has_any(request.children) or len(set(request.children)) != len(request.children):
            raise RequestError("invalid_request", f"children must be new, distinct ids, got {request.children[:8]}")
        operation.brood = session.branches.add_brood(parent, request.children)
        self._num_branches += len(request.children)
        self._enqueue(operation, parent)

    def _enqueue(self, operation: Operation, branch: Branch) -> None:
        operation.branch = branch
        if operation.deadline is not None:
            self._timed[operation] = None
        branch.pending.append(operation)
        self._num_queued += 1
        self._pump(branch)

    # ------------------------------------------------------------------------------------------ branches

    def _pump(self, branch: Branch) -> None:
        """Carry out what is queued on a branch until something has to run, and on those that this sets free.

        Never nested: what carrying out sets free waits its turn, so that a queue of any length needs no deep stack.
        """
        self._ready.append(branch)
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            while self._ready:
                self._drain_queue(self._ready.popleft())
        finally:
            self._is_pumping = False

    def _drain_queue(self, branch: Branch) -> None:
        while branch.is_born and branch.current is None and branch.pending:
            operation = branch.pending.popleft()
            if operation.progress is Progress.ENDED:  # while it waited: only what was sent after it depends on it
                branch.poison = branch.poison or operation.poison
                continue
            self._num_queued -= 1
            self._carry_out(operation, branch)

    def _carry_out(self, operation: Operation, branch: Branch) -> None:
        request = operation.request
        operation.progress = Progress.RUNNING
        try:
            if isinstance(request, Fork):
                self._bear(operation, branch)
            if branch.poison is not None and not isinstance(request, Release | Rollback):
                poison = branch.poison
                error = RequestError("dependency_failed", f"depends on a failed operation: {poison.message}")
                operation.fail(error, cause=poison.op)
                return
            self._execute(operation, branch, request)
        except RequestError as error:
            self._fail(operation, error)
        except Exception as error:  # a bug of ours costs this operation, not the loop
            log.exception("%s failed", type(request).__name__.lower())
            self._fail(operation, RequestError("internal", f"{type(error).__name__}: {error}"))

    def _bear(self, fork: Operation, parent: Branch) -> None:
        """Let the children of a fork, those already sent for and the others, begin where their parent is."""
        heritage = Branch(parent.id, parent.path)
        heritage.inherit(parent)
        assert fork.brood is not None, "a fork has children"
        self._ready.extend(fork.brood.bear(heritage))

    def _execute(self, operation: Operation, branch: Branch, request: Request) -> None:
        match request:
            case Extend():
                rendered = self._composer.extend(branch, request, operation.buffers)
                operation.end(Extended(op=request.op, length=len(branch.log), rendered=rendered))
            case Fork():
                operation.end(Ok(op=request.op))
            case Rollback():
                self._composer.rollback(branch, request)
                operation.end(Extended(op=request.op, length=len(branch.log)))
            case Generate():
                self._generate(operation, branch, request)
            case Select() | Score():
                self._start(operation, branch, self._composer.selection(operation, branch, request))
            case Release():
                self._forget(operation.session, branch)
            case _:
                raise AssertionError(f"{type(request).__name__} does not run on a branch")

    def _release(self, operation: Operation, request: Release) -> None:
        """Queue the end of each branch behind what was sent for it; answered at once, for it cannot fail."""
        session = operation.session
        for branch_id in request.branches:
            if session.branches.drop_untouched(branch_id):
                self._num_branches -= 1
                continue
            branch = session.branches.get(branch_id)
            if branch is not None:
                ending = Operation(operation.id, session, Release(op=operation.id, branches=[branch_id]), (), 0.0)
                self._enqueue(ending, branch)
        operation.end(Ok(op=request.op))

    def _forget(self, session: Session, branch: Branch) -> None:
        """Take a branch out, and end what was sent for it after its release."""
        session.branches.remove(branch)
        self._num_branches -= 1
        left = [operation for operation in branch.pending if operation.progress is not Progress.ENDED]
        branch.pending.clear()
        self._num_queued -= len(left)
        gone = RequestError("invalid_request", f"branch {branch.id} was released before")
        for operation in left:
            self._bear_poisoned(operation, gone)
            if not isinstance(operation.request, Release):
                operation.fail(gone)
        branch.release()

    # ------------------------------------------------------------------------------------------ work

    def _start(self, operation: Operation, branch: Branch, work: Work) -> None:
        operation.work = work
        branch.current = operation
        if not self._in_flight.start(work):
            self._complete(work)

    def _generate(self, operation: Operation, branch: Branch, request: Generate) -> None:
        """Start a generate, or let it wait until its grammar is compiled."""
        key = self._composer.wanted_grammar(branch, request)
        if key is not None and self._composer.grammars.find(key) is None:
            branch.current = operation
            self._compiling.setdefault(key, []).append(operation)
            return
        self._start(operation, branch, self._composer.generation(operation, branch, request))

    def take_compiled(self) -> None:
        """Start what waited for grammars that are compiled by now."""
        for key in self._composer.grammars.take_finished():
            if self._on_compiled is not None:
                self._on_compiled(key, self._composer.grammars.error_of(key))
            for operation in self._compiling.pop(key, ()):
                if operation.progress is Progress.ENDED:
                    continue
                branch, request = operation.branch, operation.request
                assert branch is not None
                assert isinstance(request, Generate)
                try:
                    self._generate(operation, branch, request)
                except RequestError as error:
                    self._fail(operation, error)
                except Exception as error:  # a bug of ours costs this operation, not the loop
                    log.exception("a generate with a grammar failed")
                    self._fail(operation, RequestError("internal", f"{type(error).__name__}: {error}"))

    @property
    def num_compiling(self) -> int:
        """Operations that wait for a grammar."""
        return sum(op.progress is not Progress.ENDED for waiting in self._compiling.values() for op in waiting)

    def step(self, now: float | None = None) -> bool:
        """Run one step if there is work; True if something ran. now: the time, for deadlines."""
        self.expire(self._clock() if now is None else now)
        self.take_compiled()
        did_run, ended = self._in_flight.step()
        for end in ended:
            if end.error is not None:
                self._fail(end.work.operation, end.error)
                continue
            try:
                self._complete(end.work)
            except Exception as error:  # a bug of ours costs this operation, not the loop
                log.exception("an operation could not be completed")
                self._fail(end.work.operation, RequestError("internal", f"{type(error).__name__}: {error}"))
        return did_run

    def _complete(self, work: Work) -> None:
        if isinstance(work, Generation):
            self._complete_generation(work)
        else:
            self._complete_selection(work)

    def _grant(self, session: Session, request: Credit) -> None:
        operation = session.operations.get(request.target)
        if operation is not None and isinstance(operation.work, Generation) and request.tokens > 0:
            self._in_flight.grant(operation.work, request.tokens)

    def _complete_generation(self, work: Generation) -> None:
        branch = work.operation.branch
        assert branch is not None
        if work.num_replaced:
            branch.take_back(work.num_replaced)
        branch.log.extend(work.kept_ids())
        branch.tail.follow_tokens()
        branch.tail.append(work.leftover)
        branch.set_seam()
        reply, buffers = work.reply(len(branch.log), self._clock())
        self._end(work.operation, branch, lambda: work.operation.end(reply, buffers))

    def _complete_selection(self, work: Selection) -> None:
        branch = work.operation.branch
        assert branch is not None
        index = work.decide()
        if isinstance(work.operation.request, Select):
            self._composer.follow_choice(branch, work.choices[index])
        reply = work.reply(len(branch.log), self._clock())
        self._end(work.operation, branch, lambda: work.operation.end(reply))

    def _end(self, operation: Operation, branch: Branch, send: Callable[[], None]) -> None:
        branch.current = None
        send()
        self._pump(branch)

    def _fail(self, operation: Operation, error: RequestError) -> None:
        """End an operation with an error and poison its branch; what waits on the branch fails in turn."""
        if operation.progress is Progress.ENDED:
            return
        if operation.work is not None:
            self._in_flight.stop(operation.work)
            spent = operation.work.partial(self._clock())  # what was drawn and spent is not lost with the operation
            error = RequestError(error.kind, error.message, **{**error.details, **spent})
        branch, was_queued = operation.branch, operation.progress is Progress.QUEUED
        operation.poison = Poison(operation.id, error.kind, error.message)
        operation.fail(error)
        if branch is None or was_queued:
            return
        branch.poison = branch.poison or operation.poison
        if branch.current is operation:
            branch.current = None
            self._pump(branch)

    # ------------------------------------------------------------------------------------------ ends

    def _cancel(self, operation: Operation, request: Cancel) -> None:
        session = operation.session
        if (request.target is None) == (request.branch is None):
            raise RequestError("invalid_request", "cancel takes either target or branch")
        start = None
        if request.target is not None:
            target = session.operations.get(request.target)
            doomed = [target] if target is not None and target.branch is not None else []
        else:
            assert request.branch is not None
            start = session.branches.get(request.branch)
            doomed = [op for branch in (start.descendants() if start else ()) for op in self._unfinished(branch)]
        private = private_texts(start, doomed) if request.discard and start is not None else ()
        count = self.cancel_operations(doomed, RequestError("cancelled", "the operation was cancelled"))
        for tokens, keep in private:
            self.scheduler.cache.discard(session.namespace, tokens, keep)
        operation.end(Cancelled(op=request.op, count=count))

    def _unfinished(self, branch: Branch) -> list[Operation]:
        running = [branch.current] if branch.current is not None else []
        waiting = (op for op in branch.pending if op.progress is Progress.QUEUED)
        return [*running, *(op for op in waiting if not isinstance(op.request, Release))]

    def cancel_operations(self, doomed: Items[Operation], error: RequestError) -> int:
        """End the given operations with `error`; return how many were still unfinished."""
        count = 0
        for operation in doomed:
            if operation.progress is Progress.ENDED:
                continue  # ended as a consequence of an earlier one
            count += 1
            if operation.progress is Progress.QUEUED:
                self._num_queued -= 1
            self._bear_poisoned(operation, error)
            self._fail(operation, error)
        return count

    def _bear_poisoned(self, operation: Operation, error: RequestError) -> None:
        """The children of a fork that will not happen are born failed, so that what waits for them ends."""
        if operation.brood is None or operation.brood.is_born:
            return
        heritage = Branch(0, ())
        heritage.begin(self._composer.empty_tail())
        heritage.poison = Poison(operation.id, error.kind, error.message)
        for child in operation.brood.bear(heritage):
            self._pump(child)

    def expire(self, now: float) -> None:
        """End the operations whose deadline is over."""
        self._timed = {op: None for op in self._timed if op.progress is not Progress.ENDED}
        late = [op for op in self._timed if op.deadline is not None and op.deadline <= now]
        for operation in late:
            waited = f"{now - operation.arrived_at:.3f}"
            self.cancel_operations([operation], RequestError("timeout", f"not finished after {waited} s"))

    def close(self, session: Session) -> None:
        """Forget a client: cancel what runs, release what it holds."""
        gone = RequestError("cancelled", "the client is gone")
        for branch in session.branches.touched():
            self.cancel_operations(self._unfinished(branch), gone)
        for branch in session.branches.touched():  # what was cancelled may have set releases free
            self._forget(session, branch)
        self._num_branches -= len(session.branches)
        session.branches.clear()
        self._drains = [operation for operation in self._drains if operation.session is not session]

    def check(self) -> None:
        """Look whether the bookkeeping is sound, and mend it if not. Costs O(everything): call it when idle."""
        self._in_flight.check()

    @property
    def has_work(self) -> bool:
        """Whether a step could do something now."""
        return self._in_flight.has_work

    @property
    def num_unfinished(self) -> int:
        """Operations that run or wait."""
        return self._num_queued + len(self._in_flight) + self.num_compiling

    def next_deadline(self) -> float | None:
        """The earliest time, on the engine's clock, at which an operation times out."""
        return min((op.deadline for op in self._timed if op.deadline is not None), default=None)

    def end_drains(self) -> None:
        """Answer who asked for a drain, once nothing is unfinished."""
        for operation in self._drains:
            operation.end(Ok(op=operation.id))
        self._drains = []

    # ------------------------------------------------------------------------------------------ figures

    def stats(self) -> dict[str, int | float | str]:
        """Counters since start and gauges of now, flat."""
        counters, cache = self.scheduler.counters, self.scheduler.cache
        return {
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "computed_tokens": counters.computed_tokens,
            "recomputed_tokens": counters.recomputed_tokens,
            "generated_tokens": counters.generated_tokens,
            "steps": counters.steps,
            "evictions": cache.num_evictions,
            "discarded_pages": cache.num_discarded,
            "preemptions": counters.preemptions,
            "rebuilds": counters.rebuilds,
            "drafted_tokens": counters.drafted_tokens,
            "accepted_tokens": counters.accepted_tokens,
            "total_pages": cache.num_pages,
            "free_pages": cache.allocator.num_free,
            "cached_pages": cache.tree.num_cached_pages(),
            "page_size": cache.page_size,
            "num_nodes": cache.tree.num_nodes,
            "num_branches": self._num_branches,
            "num_running": len(self.scheduler.running),
            "num_waiting": self.scheduler.num_waiting,
            "num_queued": self._num_queued,
            **self._wire_stats(),
        }

    def _pong(self, op: int) -> Pong:
        return Pong(
            op=op,
            epoch=self.epoch,
            steps=self.scheduler.counters.steps,
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            phase="draining" if self.is_draining else "serving",
        )
