"""What a `Program` has for batches: `run_batch` and `arun_batch`, and how one item is run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from bough.backend import Backend, chosen
from bough.errors import InvalidRequest
from bough.sampling import Sampling
from bough.state import State

if TYPE_CHECKING:
    from bough.abatch import AsyncBatch
    from bough.batch import Batch, Errors, Order
    from bough.items import ItemState
    from bough.retries import Retries


class BatchRuns:
    """The batches of a program."""

    if TYPE_CHECKING:  # the program's own
        _bound: dict[str, Any]
        _signature: inspect.Signature

        def _split(self, kwargs: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]: ...
        def _body(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None: ...
        async def _on_loop(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None: ...

    @overload
    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        max_in_flight: int | None = None,
        generator_style: Literal[False] = False,
        order: None = None,
        errors: Errors = "return",
        resume: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        retries: Retries | int = 0,
        backend: Backend | None = None,
        **sampling: Any,
    ) -> list[ItemState]: ...
    @overload
    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        max_in_flight: int | None = None,
        generator_style: Literal[True],
        order: Order | None = None,
        errors: Errors = "return",
        resume: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        retries: Retries | int = 0,
        backend: Backend | None = None,
        **sampling: Any,
    ) -> Iterator[ItemState]: ...
    @overload
    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        max_in_flight: int | None = None,
        generator_style: bool = False,
        order: Order,
        errors: Errors = "return",
        resume: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        retries: Retries | int = 0,
        backend: Backend | None = None,
        **sampling: Any,
    ) -> Iterator[ItemState]: ...
    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        max_in_flight: int | None = None,
        generator_style: bool = False,
        order: Order | None = None,
        errors: Errors = "return",
        resume: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        retries: Retries | int = 0,
        backend: Backend | None = None,
        **sampling: Any,
    ) -> list[ItemState] | Iterator[ItemState]:
        """Run the program once per item (a dict of arguments, or a tuple of positional ones); return states in order.

        ::

            for state in answer.run_batch(items, order="completion", resume="answers.jsonl", retries=3):
                print(state.index, state.error() or state["answer"])

        Whatever goes wrong in one item, in the program or in the backend, is that state's `error()` and costs no other
        item anything. `state.index` is the item's place; defaults for the gens are given as to `run`. With `seed=` each
        item has a seed of its own, which follows from that and its index: equal items draw different texts, and the
        same ones the next time.

        max_in_flight (SGLang: num_threads): most items in flight at once. Fewer are if more would not fit the runtime's
        KV cache, by what the items so far needed. They share a few threads: an item gives its thread up where it reads.
        A program must not hold a lock over a read that other items want too.
        order: iterate as results come: in the order of the items ("input") or of their ends ("completion").
        generator_style=True is SGLang's name for iterating, in the order of the items. Leaving the loop early ends what
        is in flight. Without either, a list is returned once all items are done.
        errors: "return" hands failed items out like the others; "raise" ends the batch at the first.
        resume: a file to which each item's result is added as it ends, as a line of JSON (mode 0600). Run again with
        the same items, those that ended well are read from it and can be read only; the others are run.
        retries: a number, or `bo.Retries`: which failures are tried again, how often, and how long to wait.
        progress_bar: show items, generated tokens per second and cache hits on standard error.
        """
        from bough.batch import run_batch

        batch = self._batch(
            batch_kwargs, sampling, backend, num_threads=num_threads, max_in_flight=max_in_flight,
            generator_style=generator_style, order=order, errors=errors, resume=resume, progress_bar=progress_bar,
            retries=retries,
        )  # fmt: skip
        states = run_batch(batch)
        return states if batch.options.is_lazy else list(states)

    def arun_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any] | Sequence[Any]],
        *,
        max_in_flight: int | None = None,
        order: Order = "input",
        errors: Errors = "return",
        resume: str | os.PathLike[str] | None = None,
        progress_bar: bool = False,
        retries: Retries | int = 0,
        backend: Backend | None = None,
        **sampling: Any,
    ) -> AsyncBatch:
        """Run a batch on the running event loop, without a thread; await the list of states, or iterate over them.

        ::

            states = await answer.arun_batch(items, max_in_flight=500)
            async for state in answer.arun_batch(items, order="completion"):
                print(state.index, await state.get("answer"))

        Everything else is as in `run_batch`. A cancelled task ends what is in flight.
        """
        from bough.abatch import AsyncBatch  # asyncio is not imported before somebody awaits

        return AsyncBatch(
            self._batch(
                batch_kwargs,
                sampling,
                backend,
                num_threads="auto",
                max_in_flight=max_in_flight,
                generator_style=True,
                order=order,
                errors=errors,
                resume=resume,
                progress_bar=progress_bar,
                retries=retries,
            )
        )

    # ------------------------------------------------------------------------------------------ one item

    def _batch(
        self,
        items: Sequence[Mapping[str, Any] | Sequence[Any]],
        given: Mapping[str, Any],
        backend: Backend | None,
        **options: Any,
    ) -> Batch:
        """Return a batch that has not begun. Raises InvalidRequest for what cannot be, before anything runs."""
        from bough.batch import Batch, Options
        from bough.program import Program

        target = chosen(backend)
        sampling, rest = self._split(given)
        if rest:
            raise TypeError(f"run_batch() got an unexpected keyword argument {next(iter(rest))!r}")
        if not isinstance(items, Iterable):
            raise InvalidRequest(f"a batch must be a list of items, got {items!r}", field="batch_kwargs")
        calls = [self._call_of(index, item) for index, item in enumerate(items)]
        assert isinstance(self, Program), "these are a program's batches"
        return Batch(self, calls, target, sampling, Options.of(**options))

    def _call_of(self, index: int, item: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return one item as arguments. Raises InvalidRequest, before anything runs, if they do not fit the program."""
        if isinstance(item, Mapping):
            args, kwargs = (), dict(item)
        elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
            args, kwargs = tuple(item), {}
        else:
            raise InvalidRequest(f"item {index} of a batch must be a dict or a tuple of arguments, got {item!r}")
        try:
            self._signature.bind(None, *args, **{**self._bound, **kwargs})
        except TypeError as error:
            raise InvalidRequest(f"item {index} of the batch does not fit {self!r}: {error}") from None
        return args, kwargs

    def _arguments_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all the arguments that the program runs with, by name."""
        bound = self._signature.bind(None, *args, **{**self._bound, **kwargs})
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def _attempt(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run one item of a batch to the end of all it appended; whatever goes wrong is the state's `error()`."""
        run = state._run
        assert run is not None, "an item of a batch has a run"
        try:
            self._body(state, args, kwargs)
        except Exception as error:
            run.finish(error)
        else:
            run.finish(None)
        state.sync()

    async def _attempt_on_loop(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Do the same on the running event loop."""
        run = state._run
        assert run is not None, "an item of a batch has a run"
        try:
            await self._on_loop(state, args, kwargs)
        except Exception as error:
            run.finish(error)
        else:
            run.finish(None)
        await state.async_()
