"""`run_batch`: many items of one program, a bounded number in flight, on a few threads.

Each item is a body (waiting.py) on one of the batch's hubs (hub.py); book.py decides which starts when. Results are
handed to the caller as they end, or put in order; one reader takes them, in any thread or in a body of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec

from bough.backend import Backend
from bough.book import Book
from bough.errors import BoughError, InvalidRequest, ProgramError
from bough.hub import TICK_S, Hubs, Job
from bough.inflight import InFlight, capacity_of, most_in_flight
from bough.items import ItemState, SavedState, usage_of
from bough.progress import Progress
from bough.results import ResultsFile, keys_of
from bough.retries import Retries, retries_from
from bough.sampling import Sampling
from bough.seeds import of_item, seed_of_batch
from bough.streaming import Feed
from bough.waiting import current_body

if TYPE_CHECKING:
    from bough.program import Program

Order: TypeAlias = Literal["input", "completion"]
Errors: TypeAlias = Literal["return", "raise"]
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a batch is run; see `Program.run_batch`."""

    most: int
    is_lazy: bool
    order: Order
    errors: Errors
    resume: str | os.PathLike[str] | None
    progress_bar: bool
    retries: Retries

    @classmethod
    def of(
        cls,
        *,
        num_threads: int | str,
        max_in_flight: int | None,
        generator_style: bool,
        order: Order | None,
        errors: Errors,
        resume: str | os.PathLike[str] | None,
        progress_bar: bool,
        retries: Retries | int,
    ) -> Options:
        """Return the options. Raises InvalidRequest naming the one that cannot be."""
        if resume is not None and not isinstance(resume, (str, os.PathLike)):
            raise InvalidRequest(f"resume must be the path of a file, got {resume!r}", field="resume")
        for name, value, allowed in (
            ("order", order, (None, *_ORDERS)),
            ("errors", errors, _ERRORS),
        ):
            if value not in allowed:
                raise InvalidRequest(f"{name} must be one of {allowed}, got {value!r}", field=name)
        return cls(
            most=most_in_flight(num_threads, max_in_flight),
            is_lazy=bool(generator_style) or order is not None,
            order=order or "input",
            errors=errors,
            resume=resume,
            progress_bar=progress_bar,
            retries=retries_from(retries),
        )


_ORDERS: Final = ("input", "completion")
_ERRORS: Final = ("return", "raise")


class Batch:
    """The items of one call of `run_batch` or `arun_batch`: what is to be run, and what has come of it."""

    def __init__(
        self, program: Program, calls: Sequence[Call], backend: Backend, sampling: Sampling, options: Options
    ) -> None:
        self.program = program
        self.options = options
        self.news = Feed()  # after each result
        self._calls = calls
        self._backend = backend
        self._sampling = sampling
        self._seed = seed_of_batch(sampling.params.seed, backend)
        self._results: deque[ItemState] = deque()
        self._lock = threading.Lock()  # of the file and the progress bar
        self._file: ResultsFile | None = None
        self._keys: list[str] = []
        saved = self._open_file()
        todo = [index for index in range(len(calls)) if index not in saved]
        bound = InFlight(options.most, capacity_of(backend.server_info()))
        self.book = Book(todo, bound, options.retries, is_lazy=options.is_lazy)
        self.failure: BaseException | None = None
        self._progress = Progress(len(calls), len(saved)) if options.progress_bar else None
        self._live: set[ItemState] = set()
        for state in saved.values():
            self._results.append(state)

    def __len__(self) -> int:
        return len(self._calls)

    # ------------------------------------------------------------------------------------------ what is run

    def call_of(self, index: int, attempt: int) -> tuple[ItemState, Call]:
        """Return a new state for a try of an item, and the arguments of its program."""
        state = ItemState.of(index, attempt, self._backend, self._sampling_of(index), self.program.__name__)
        self._live.add(state)
        if self.book.is_stopped:  # in between: `stop` has not seen it
            state.cancel()
        return state, self._calls[index]

    def _sampling_of(self, index: int) -> Sampling:
        params = msgspec.structs.replace(self._sampling.params, seed=of_item(self._seed, index))
        return replace(self._sampling, params=params, batch_seed=self._seed)

    def ended(self, state: ItemState) -> None:
        """Take in that a try has ended; its state is done. Hands the result over, or has it tried again."""
        self._live.discard(state)
        error, usage = state.error(), usage_of(state)
        is_over = self.book.ended(state.index, error, usage.written_tokens, time.monotonic())
        if is_over and not self.book.is_stopped:
            try:
                with self._lock:
                    if self._file is not None:
                        self._file.append(self._keys[state.index], state, error)
                    if self._progress is not None:
                        self._progress.ended(usage, error)
            except BaseException as problem:  # a full disk: the batch cannot keep what it promised to keep
                self.failed(problem)
            self._results.append(state)
        self.news.notify()

    def failed(self, error: BaseException) -> None:
        """Take in what no item can be blamed for: it ends the batch, and is raised by its reader."""
        if self.failure is None:
            self.failure = error
        self.book.stop()
        self.news.notify()

    def stop(self) -> None:
        """Start nothing more, end what is in flight in the backend, and close the file."""
        self.book.stop()
        for state in list(self._live):
            state.cancel()
        with self._lock:
            if self._file is not None:
                self._file.close()
            if self._progress is not None:
                self._progress.close()

    # ------------------------------------------------------------------------------------------ what comes of it

    def ready(self, ordered: dict[int, ItemState], num_given: int) -> ItemState | None:
        """Return the next result that is there, in the order asked for; None if it has to be waited for."""
        if self.failure is not None:
            raise self.failure
        while self._results:
            state = self._results.popleft()
            if self.options.order == "completion":
                return self._checked(state)
            ordered[state.index] = state
        found: ItemState | None = ordered.pop(num_given, None)
        return None if found is None else self._checked(found)

    def _checked(self, state: ItemState) -> ItemState:
        if not state.is_saved:
            self.book.consumed()
        error = state.error() if self.options.errors == "raise" else None
        if error is None:
            return state
        if isinstance(error, BoughError):
            raise error.again() from error.__cause__
        raise ProgramError(
            f"item {state.index} of the batch: the program raised {type(error).__name__}: {error}", index=state.index
        ) from error

    # ------------------------------------------------------------------------------------------ the file

    def _open_file(self) -> dict[int, SavedState]:
        if self.options.resume is None:
            return {}
        program = self.program
        arguments = [program._arguments_of(args, kwargs) for args, kwargs in self._calls]
        self._keys = keys_of(program.__name__, arguments, [self._sampling.params, self._sampling.n])
        self._file = ResultsFile(self.options.resume)
        saved: dict[int, SavedState] = {}
        for index, key in enumerate(self._keys):
            found = self._file.saved.get(key)
            if found is not None:
                sampling = self._sampling_of(index)
                saved[index] = SavedState.read(index, found, self._backend, sampling, program.__name__)
        return saved


def run_batch(batch: Batch) -> Iterator[ItemState]:
    """Run a batch on threads; yield its results, in the order asked for. Leaving the iterator ends the batch."""
    hubs: Hubs | None = None
    ordered: dict[int, ItemState] = {}
    try:
        if not batch.book.is_over:
            hubs = _hubs(batch)  # nothing runs before `start`: whatever interrupts that finds what to stop
            hubs.start()
        for num_given in range(len(batch)):
            while True:
                seen = batch.news.version  # read before looking: what comes in between is news
                state = batch.ready(ordered, num_given)
                if state is not None:
                    break
                _wait(batch, seen, hubs)
            yield state
            if hubs is not None:
                hubs.nudge()  # what was started may have been bounded by this reader
    finally:
        try:
            batch.stop()
        finally:
            if hubs is not None:
                hubs.stop()


def _wait(batch: Batch, seen: int, hubs: Hubs | None) -> None:
    """Return once there is news; meanwhile see to it that the hubs are not all held up."""
    if hubs is None or current_body() is not None:
        batch.news.wait(seen)
        return
    over = threading.Event()
    if batch.news.call_once(seen, over.set):
        while not over.wait(TICK_S):
            hubs.watch()


def _hubs(batch: Batch) -> Hubs:
    book, program = batch.book, batch.program

    def take() -> Job | None:
        taken = book.take(time.monotonic())
        return None if taken is None else partial(run, *taken)

    def run(index: int, attempt: int) -> None:
        try:
            state, (args, kwargs) = batch.call_of(index, attempt)
            program._attempt(state, args, kwargs)
            batch.ended(state)
        except BaseException as error:  # nothing of the item's own: that is its result
            batch.failed(error)
        hubs.nudge()

    name, most = f"bough-batch-{program.__name__}", min(batch.options.most, len(batch))
    hubs = Hubs(name, most, take, lambda: book.is_over, lambda: book.patience_s(time.monotonic()))
    return hubs
