"""`Toolbox`: the tools of one state: reads calls, carries them out, shows the model what came of them, in a loop."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from bough.crew import Crew
from bough.errors import InvalidRequest, ToolError
from bough.expressions import Expression, assistant, gen, role, system
from bough.race import Deadline
from bough.sampling import count
from bough.tool_formats import (
    TOOL_FORMATS,
    ToolFormat,
    described,
    template_answer,
    template_calls,
    text_answer,
    text_calls,
)
from bough.tools import Tool, ToolCall, ToolResult, shown, tools_of
from bough.waiting import current_body, running_loop, until, wait, when_done

if TYPE_CHECKING:
    from bough.grammar_nodes import Grammar
    from bough.state import State

OnError: TypeAlias = Literal["feed", "raise"]
ON_ERROR: Final[tuple[OnError, ...]] = ("feed", "raise")
MAX_PARALLEL: Final = 32
"""Most calls of one turn that run at once; the others follow."""


@dataclass(frozen=True)
class ToolRun:
    """How a loop of turns and calls ended. answer: None if it reached its last round without one."""

    answer: str | None
    results: Sequence[ToolResult]
    num_rounds: int


class Toolbox:
    """The tools that a state was told of; made by `s.tools`.

    `run` is the whole loop. For a loop of your own: `calls(text)`, `call(calls)`, `tell(s, results)`.
    """

    def __init__(self, functions: object, form: ToolFormat) -> None:
        if form not in TOOL_FORMATS:
            raise InvalidRequest(f"format must be one of {', '.join(TOOL_FORMATS)}, got {form!r}", field="format")
        self.tools: dict[str, Tool] = tools_of(functions)
        self.format: ToolFormat = form
        self._grammar: Grammar | None = None  # made when first asked for

    def __repr__(self) -> str:
        return f"<Toolbox {', '.join(self.tools)} ({self.format})>"

    # ------------------------------------------------------------------------------------------ what is told

    def described(self) -> str:
        """Return the words that tell of the tools, for the format "text"."""
        return described(self.tools.values())

    def definitions(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates and OpenAI's protocol write them."""
        return [tool.definition() for tool in self.tools.values()]

    def introduce(self, state: State, also: str) -> None:
        """Append a system message that tells of the tools, after what else it shall say.

        With the format "template" the chat template tells of them: in the system message or without one.
        """
        if self.format == "template":
            state._interpreter.tell_tools(json.dumps(self.definitions(), ensure_ascii=False))
            if also:
                state += system(also)
            return
        state += system("\n".join(filter(None, (also, self.described()))))

    # ------------------------------------------------------------------------------------------ one turn

    def grammar(self) -> Grammar:
        """Return what a turn may say: anything, but that its calls are of these tools, with arguments that fit."""
        if self._grammar is None:
            from bough.tool_grammars import turn_grammar

            self._grammar = turn_grammar(self.tools.values(), self.format)
        return self._grammar

    def calls(self, text: str) -> list[ToolCall]:
        """Return the calls in what the model wrote."""
        return text_calls(text) if self.format == "text" else template_calls(text)

    def answer(self, text: str) -> str:
        """Return the answer in what the model wrote without calls."""
        return text_answer(text) if self.format == "text" else template_answer(text)

    def call(
        self, calls: Sequence[ToolCall], on_error: OnError = "feed", state: State | None = None
    ) -> list[ToolResult]:
        """Carry out calls beside each other; return their results in order.

        state: has the results in its run's journal (see `State.recorded`), so that a replay needs no tools; the run's
        `timeout` bounds the calls: then Timeout is raised, an `async def` function is cancelled, and what another one
        returns later is forgotten.

        A call of no tool, arguments that do not fit, or a function that raises: with on_error="feed" the result holds
        the ToolError and its text says it to the model; with "raise" the first one is raised, when all have ended.
        """
        if on_error not in ON_ERROR:
            raise InvalidRequest(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}", field="on_error")
        results = self._call_all(calls, None) if state is None else self._recorded(state, calls)
        if on_error == "raise":
            for result in results:
                if result.error is not None:
                    raise result.error
        return results

    def tell(self, state: State, results: Sequence[ToolResult]) -> None:
        """Append each result as a message of the role "tool"."""
        for result in results:
            state += role("tool", result.text)

    # ------------------------------------------------------------------------------------------ the loop

    def run(
        self,
        state: State,
        *,
        max_rounds: int = 8,
        on_error: OnError = "feed",
        name: str | None = None,
        constrain: bool | None = None,
        **options: Any,
    ) -> ToolRun:
        """Let the model write turns, and carry out their calls, until a turn has none; see `State.run_tools`."""
        limit = count("max_rounds", max_rounds)
        if limit is None:
            raise InvalidRequest("max_rounds must be a whole number, got None", field="max_rounds")
        if constrain not in (None, True, False):
            raise InvalidRequest(f"constrain must be True, False or None, got {constrain!r}", field="constrain")
        if constrain is None:
            constrain = bool(state._interpreter.backend.server_info().get("has_grammars")) and not _is_held(options)
        if constrain:
            options = {**options, "grammar": self.grammar()}
        variable = name or "turn"
        results: list[ToolResult] = []
        for number in range(1, limit + 1):
            state += assistant(self._turn(variable, options))
            text = state[variable]
            calls = self.calls(text)
            if not calls:
                answer = self.answer(text)
                if name is not None:
                    state[name] = answer
                return ToolRun(answer, results, number)
            found = self.call(calls, on_error, state)
            results.extend(found)
            self.tell(state, found)
        return ToolRun(None, results, limit)

    def _turn(self, variable: str, options: dict[str, Any]) -> Expression:
        if self.format == "text" and "stop" not in options:
            options = {**options, "stop": "\nObservation"}  # a model that goes on would invent what the tool says
        return gen(variable, **options)

    # ------------------------------------------------------------------------------------------ calling

    def _recorded(self, state: State, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Carry out the calls of a turn as one recorded value: which of them ends first is not the program's."""
        results: list[ToolResult] = []

        def carry_out() -> list[dict[str, Any]]:
            results.extend(self._call_all(calls, state))
            return [_kept(result) for result in results]

        kept = state.recorded("tools", carry_out)
        return results or [_from_kept(call, result) for call, result in zip(calls, kept, strict=True)]

    def _call_all(self, calls: Sequence[ToolCall], state: State | None) -> list[ToolResult]:
        if not calls:
            return []
        left_s = None if state is None else state._interpreter.time_left()
        if len(calls) == 1 and left_s is None and current_body() is None and running_loop() is None:
            return [self._call_one(calls[0])]
        crew = Crew(min(len(calls), MAX_PARALLEL))
        clock = None if left_s is None else Deadline(left_s)
        futures: list[Future[ToolResult]] = []
        try:
            futures += [self._start(crew, call, left_s) for call in calls]
            for future in futures:  # the thread is given up meanwhile, where it is shared
                _wait(future, clock)
            if state is not None:
                state._interpreter.time_left()  # a call that ended because the time was over has no result
            return [future.result() for future in futures]
        finally:
            if clock is not None:
                clock.stop()
            for future in futures:
                future.cancel()

    def _start(self, crew: Crew, call: ToolCall, left_s: float | None) -> Future[ToolResult]:
        tool, loop = self.tools.get(call.name), running_loop()
        if tool is not None and tool.is_async and loop is not None and current_body() is not None:
            return asyncio.run_coroutine_threadsafe(self._call_async(tool, call), loop)  # its own loop, as it expects
        return crew.start(partial(contextvars.copy_context().run, self._call_one, call, left_s))

    def _call_one(self, call: ToolCall, left_s: float | None = None) -> ToolResult:
        try:
            tool, arguments = self._checked(call)
            value = tool.function(**arguments)
            if tool.is_async:
                value = asyncio.run(_within(value, left_s))
        except Exception as raised:
            return _failed(call, raised)
        return ToolResult(call, shown(value), value)

    async def _call_async(self, tool: Tool, call: ToolCall) -> ToolResult:
        try:
            value = await tool.function(**tool.check(call.arguments))
        except Exception as raised:
            return _failed(call, raised)
        return ToolResult(call, shown(value), value)

    def _checked(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        tool = self.tools.get(call.name)
        if tool is None:
            known = ", ".join(self.tools)
            said = f"there is no tool {call.name!r}" if call.name else f"this is no call: {call.arguments!r}"
            raise ToolError(f"{said}, the tools are {known}", tool=call.name)
        return tool, tool.check(call.arguments)


def _is_held(options: Mapping[str, Any]) -> bool:
    """Whether a turn's own options say already what it has to be."""
    return any(options.get(word) is not None for word in ("regex", "json_schema", "grammar", "type", "dtype"))


async def _within(value: Awaitable[Any], seconds: float | None) -> Any:
    """Await a tool, and cancel it once the run's time is over."""
    return await asyncio.wait_for(value, seconds)


def _wait(future: Future[ToolResult], clock: Deadline | None) -> None:
    """Return once the future is done or the time is over."""
    if clock is None:
        wait(future)
        return
    while not future.done() and not clock.is_over:
        until(partial(clock.or_over, partial(when_done, future)))


def _failed(call: ToolCall, raised: Exception) -> ToolResult:
    if isinstance(raised, ToolError):
        error = raised
    else:
        error = ToolError(f"{call.name} failed: {type(raised).__name__}: {raised}", tool=call.name)
        error.__cause__ = raised
    return ToolResult(call, f"error: {error}", None, error)


def _kept(result: ToolResult) -> dict[str, Any]:
    """Return a result as a journal can hold it."""
    error = result.error
    return {"text": result.text, "value": result.value, "error": None if error is None else error.message}


def _from_kept(call: ToolCall, kept: dict[str, Any]) -> ToolResult:
    """Return a recorded result; of a value that a journal cannot hold, there is the text alone."""
    from bough.journal import lacks

    error = None if kept["error"] is None else ToolError(kept["error"], tool=call.name)
    return ToolResult(call, kept["text"], None if lacks(kept["value"]) else kept["value"], error)
