"""`@function` and what it makes: a `Program` that can be run, run in batches, streamed and bound."""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, overload

from bough.backend import Backend, chosen
from bough.batchruns import BatchRuns
from bough.errors import InvalidRequest
from bough.running import Running, with_events
from bough.sampling import SAMPLING_NAMES, Sampling, count, sampling_from
from bough.state import State
from bough.streaming import Run

_RESERVED: Final = ("stream", "backend")


class Program(BatchRuns):
    """A Python function whose first parameter is the state it writes to."""

    def __init__(self, func: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        self._func = func
        self._bound = dict(bound or {})
        self._signature = inspect.signature(func)
        parameters = list(self._signature.parameters.values())
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            raise InvalidRequest(
                f"{func.__name__}: a program's first parameter is its state, as in def {func.__name__}(s)"
            )
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise InvalidRequest(
                f"{func.__name__}: a program returns, it cannot yield; its text is what it appends to its state"
            )
        self.is_async = inspect.iscoroutinefunction(func)
        self._names = frozenset(parameter.name for parameter in parameters[1:])
        for name in _RESERVED:
            if name in self._names:
                raise InvalidRequest(f"{func.__name__}: the parameter {name!r} is taken by run() itself")
        self.__name__: str = func.__name__
        functools.update_wrapper(self, func)

    def __repr__(self) -> str:
        return f"<program {self._func.__name__}{self._signature}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Return the program's name, by which another process imports it, as it would a function."""
        if not self._bound:
            return self._func.__qualname__
        return _rebound, (self._func.__module__, self._func.__qualname__, self._bound)

    def bind(self, **arguments: Any) -> Program:
        """Return the program with some of its arguments given; a later argument of the same name wins."""
        unknown = [name for name in arguments if name not in self._names]
        if unknown and not self._takes_any_keyword():
            raise TypeError(f"{self._func.__name__}() has no parameter {unknown[0]!r}")
        return Program(self._func, {**self._bound, **arguments})

    def __call__(self, *args: Any, **kwargs: Any) -> State:
        """Run the program; the same as `run`."""
        return self.run(*args, **kwargs)

    def run(self, *args: Any, stream: bool = False, backend: Backend | None = None, **kwargs: Any) -> State:
        """Run the program on a new state and return the state; `state.ret_value` is what the body returned.

        Returns when the body ends; what it did not read may still be computed, and waits where it is read. With
        `stream=True` the body runs in a thread of its own, `run` returns at once, and `state.text_iter()` follows it;
        an exception of the body is then raised by reads.

        Besides the program's arguments it takes defaults for every gen that does not say otherwise: max_tokens (or
        max_new_tokens), min_tokens, n, stop, stop_token_ids, stop_regex, temperature, top_p, top_k, min_p,
        frequency_penalty, presence_penalty, repetition_penalty, logit_bias, seed, ignore_eos, return_logprob,
        top_logprobs_num, timeout. Where a program has a parameter of such a name, it is the program's. From `seed` each
        gen gets a seed of its own, by its place in the program: the same run gives the same texts, its branches differ.
        Without one, the run draws one: `state.seed` tells it, to run the same again.

        `timeout` is for the whole run, in seconds from its begin: no gen or select of it, forks included, goes on for
        longer, and one that would begin later raises Timeout. A gen's own `timeout` is for that gen, within the run's.

        Who watches: `events=True` keeps a log for `state.events()` (stream=True does too), `journal="file"` records the
        run for `bough.replay`, `budget=bough.Budget(...)` stops it when it has cost enough.
        """
        target = chosen(backend)
        sampling, arguments = self._split(kwargs)
        if stream:
            return self._start(target, sampling, args, arguments)
        return self.start(target, sampling, args, arguments)

    def start(self, backend: Backend, sampling: Sampling, args: Sequence[Any], kwargs: Mapping[str, Any]) -> State:
        """Run the program with defaults that were checked already; `run` is the face of this."""
        state = State(backend, sampling, title=self._func.__name__)
        self._body(state, args, kwargs)
        return state

    async def arun(self, *args: Any, stream: bool = False, backend: Backend | None = None, **kwargs: Any) -> State:
        """Run the program on the running event loop, without a thread, and return its state; else as `run`.

        ::

            states = await asyncio.gather(*[answer.arun(question, backend=backend) for question in questions])
            print(await states[0].get("answer"))

        The program may be `async def` or not: where it reads what is not there yet, the loop goes on with others. With
        `stream=True` it returns at once, and `async for chunk in state.text_async_iter()` follows it. If the task is
        cancelled, so is what the program left running.
        """
        target = chosen(backend)
        sampling, arguments = self._split(kwargs)
        if stream:
            return self._start_on_loop(target, sampling, args, arguments)
        state = State(target, sampling, title=self._func.__name__)
        await self._on_loop(state, args, arguments)
        return state

    # ------------------------------------------------------------------------------------------ one run

    def _split(self, kwargs: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """Part sampling defaults from the program's own arguments."""
        if not kwargs:
            return sampling_from(kwargs), {}
        ours = {k: v for k, v in kwargs.items() if k in SAMPLING_NAMES and k not in self._names}
        return sampling_from(ours), {k: v for k, v in kwargs.items() if k not in ours}

    def _body(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the function; programs that it runs without a backend use this one."""
        if self.is_async:
            from bough.onloop import block_on

            return block_on(lambda: self._async_body(state, args, kwargs), self._func.__name__)
        arguments = {**self._bound, **kwargs}
        with Running(state, self._func, args, arguments):
            state._return_value = self._func(state, *args, **arguments)
        return None

    async def _async_body(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        arguments = {**self._bound, **kwargs}
        with Running(state, self._func, args, arguments):
            state._return_value = await self._func(state, *args, **arguments)

    async def _on_loop(self, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Run the function on the running event loop; if it is ended from outside, end what it left running."""
        from bough.onloop import in_body, on_loop

        try:
            if self.is_async:
                await in_body(lambda: self._async_body(state, args, kwargs))
            else:
                await on_loop(self._body, state, args, kwargs)
        except Exception:
            raise
        except BaseException:  # cancelled, interrupted
            state.cancel()
            raise

    def _start(self, backend: Backend, sampling: Sampling, args: Sequence[Any], kwargs: Mapping[str, Any]) -> State:
        self._signature.bind(None, *args, **{**self._bound, **kwargs})
        run = Run()
        state = State(backend, with_events(sampling), title=self._func.__name__, run=run)
        context = contextvars.copy_context()
        body = functools.partial(context.run, self._run_body, run, state, args, kwargs)
        threading.Thread(target=body, name=f"bough-{self._func.__name__}", daemon=True).start()
        return state

    def _run_body(self, run: Run, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        run.begin()
        error: BaseException | None = None
        try:
            self._body(state, args, kwargs)
        except BaseException as raised:  # whatever ended the body is told to those who read
            error = raised
        finally:
            run.finish(error)

    def _start_on_loop(
        self, backend: Backend, sampling: Sampling, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> State:
        import asyncio

        self._signature.bind(None, *args, **{**self._bound, **kwargs})
        loop = asyncio.get_running_loop()
        run = Run(loop)
        state = State(backend, with_events(sampling), title=self._func.__name__, run=run)
        run.task = loop.create_task(self._run_on_loop(run, state, args, kwargs))
        return state

    async def _run_on_loop(self, run: Run, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        run.begin()
        error: BaseException | None = None
        try:
            await self._on_loop(state, args, kwargs)
        except BaseException as raised:  # whatever ended the body is told to those who read
            error = raised
            if not isinstance(raised, Exception):
                raise
        finally:
            run.finish(error)

    def _takes_any_keyword(self) -> bool:
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._signature.parameters.values())


@overload
def function(func: Callable[..., Any]) -> Program: ...
@overload
def function(
    func: None = None, *, num_api_spec_tokens: int | None = None
) -> Callable[[Callable[..., Any]], Program]: ...
def function(
    func: Callable[..., Any] | None = None, *, num_api_spec_tokens: int | None = None
) -> Program | Callable[[Callable[..., Any]], Program]:
    """Make a program of a function whose first parameter, of any name, is the state. Bare or called.

    num_api_spec_tokens: SGLang's hint to ask a paid API for more text than one gen needs; it never changes a result,
    and here it changes nothing at all.
    """
    count("num_api_spec_tokens", num_api_spec_tokens)
    return Program if func is None else Program(func)


def _rebound(module: str, name: str, arguments: Mapping[str, Any]) -> Program:
    """Return a program, found by its name, with arguments bound."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Program), "it was pickled under this name"
    return found.bind(**arguments)
