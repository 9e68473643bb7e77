"""What a `State` can do with tools: tell the model of them, and carry out the calls that it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from bough.errors import InvalidRequest

if TYPE_CHECKING:
    from bough.state import State
    from bough.tool_formats import ToolFormat
    from bough.toolbox import OnError, Toolbox, ToolRun
    from bough.tools import Tool


class ToolCalling:
    """The part of a state that is about tools."""

    __slots__ = ()

    def tools(
        self, functions: Sequence[Callable[..., Any] | Tool], *, system: str = "", format: ToolFormat | None = None
    ) -> Toolbox:
        """Tell the model of functions that it may call, in a system message; return them as a `Toolbox`.

        ::

            def calculator(expression: str) -> int:
                "Computes a number."
                ...

            s.tools([calculator], system="You are a careful assistant.")
            s += bo.user("What is 17 + 25?")
            done = s.run_tools(max_rounds=4, name="answer", max_tokens=64)
            done.answer, done.results

        system: what the message says besides. format: "template" tells of them through the chat template's own `tools`
        variable, "text" in plain words; by default the former where the model has it. Both are in
        `bough.tool_formats`. A fork has its parent's tools. Raises InvalidRequest for functions without annotations.
        """
        from bough.toolbox import Toolbox

        state = cast("State", self)
        if format is None:
            format = "template" if state._interpreter.backend.server_info().get("has_tools") else "text"
        box = Toolbox(functions, format)
        box.introduce(state, system)
        state._toolbox = box
        return box

    def run_tools(
        self,
        *,
        max_rounds: int = 8,
        on_error: OnError = "feed",
        name: str | None = None,
        constrain: bool | None = None,
        **options: Any,
    ) -> ToolRun:
        """Let the model write turns, and carry out the calls in them, until a turn has none: that is the answer.

        Calls of one turn run beside each other, in threads; an `async def` function is awaited. max_rounds: most
        turns; without an answer after them, `answer` is None. on_error: "feed" tells the model what went wrong, "raise"
        raises ToolError. name: the variable that the answer is put in. options: of each turn's `gen`.
        constrain: hold each turn to a grammar, so that what begins as a call is one of these tools with arguments that
        fit, and a call that `max_tokens` cuts raises Truncated; by default where the backend is a runtime, or an HTTP
        server that takes Lark grammars. A script says what it says.
        """
        state = cast("State", self)
        if state._toolbox is None:
            raise InvalidRequest("this state has no tools: call s.tools([...]) first")
        return state._toolbox.run(
            state, max_rounds=max_rounds, on_error=on_error, name=name, constrain=constrain, **options
        )

    async def arun_tools(
        self,
        *,
        max_rounds: int = 8,
        on_error: OnError = "feed",
        name: str | None = None,
        constrain: bool | None = None,
        **options: Any,
    ) -> ToolRun:
        """Do as `run_tools`, leaving the event loop free."""
        from bough.onloop import on_loop

        return await on_loop(
            self.run_tools, max_rounds=max_rounds, on_error=on_error, name=name, constrain=constrain, **options
        )
