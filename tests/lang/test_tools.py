"""Tools: schemas from functions, checked arguments, calls beside each other, and the loop that carries them out."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jsonschema
import msgspec
import pydantic
import pytest

import bough as bo
from bough import State
from bough.crew import Crew
from bough.tool_formats import template_calls, text_answer, text_calls
from bough.toolbox import Toolbox

FACTS = {"price of the lamp": "36"}


def calculator(expression: str) -> int:
    """Computes a sum.

    Args:
        expression: two numbers and a plus
    """
    left, right = expression.split("+")
    return int(left) + int(right)


def lookup(key: str) -> str:
    """Finds a fact."""
    return FACTS[key]


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


@dataclass
class Place:
    city: str
    country: str = "Norway"


class Span(pydantic.BaseModel):
    begin: int
    end: int


class Spans(pydantic.BaseModel):
    spans: list[Span]


def weather(
    place: Place,
    days: Annotated[int, msgspec.Meta(ge=1, le=9)],
    unit: Unit = Unit.C,
    kind: Literal["sun", "rain"] = "sun",
) -> list[Any]:
    """Tells the weather
    of a place.

    :param place: where
    :param int days: how many days ahead

    More words, which the model is not told.
    """
    return [place, days, unit, kind]


# ------------------------------------------------------------------------------------------------ schemas


def test_a_tool_is_what_its_function_says() -> None:
    made = bo.tool(weather)
    assert (made.name, made.description, made.is_async) == ("weather", "Tells the weather of a place.", False)
    assert made.signature() == "weather(place, days, unit, kind): Tells the weather of a place."
    assert made.parameters["required"] == ["place", "days"]
    properties = made.parameters["properties"]
    assert properties["days"]["description"] == "how many days ahead"
    assert properties["days"]["type"] == "integer"
    assert properties["kind"]["enum"] == ["rain", "sun"]
    assert made.parameters["additionalProperties"] is False
    jsonschema.Draft202012Validator.check_schema(made.parameters)
    jsonschema.validate({"place": {"city": "Oslo"}, "days": 2, "unit": "celsius"}, made.parameters)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"place": {"city": "Oslo"}, "days": 0}, made.parameters)
    assert made.definition()["function"]["name"] == "weather"
    assert bo.tool(calculator).parameters["properties"]["expression"]["description"] == "two numbers and a plus"
    assert bo.tool(calculator, name="sum", description="Adds.").signature() == "sum(expression): Adds."
    assert bo.tool(made) is made


def untyped(x) -> int:  # type: ignore[no-untyped-def]
    return 1


def many(*xs: int) -> int:
    return 1


class Odd:
    pass


def odd(x: Odd) -> int:
    return 1


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ([], "tools must be a list of functions that is not empty"),
        ("f", "tools must be a list of functions"),
        ([3], "a tool must be a function, got 3"),
        ([lambda x: x], "a tool's name must be"),
        ([untyped], "tool untyped: the parameter 'x' needs an annotation"),
        ([many], r"tool many: \*xs: int cannot be given by name|tool many: \*xs: 'int' cannot be given by name"),
        ([odd], "tool odd: .*has no JSON Schema"),
        ([lookup, lookup], "two tools are called 'lookup'"),
    ],
)
def test_functions_that_cannot_be_tools_are_refused_with_the_reason(functions: Any, words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        State(bo.ScriptedBackend()).tools(functions)


def test_a_tool_can_be_called_like_its_function() -> None:
    tool = bo.tool(calculator)
    assert tool("2+3") == tool(expression="2+3") == 5
    with pytest.raises(ValueError, match="not enough values"):  # the function's own, not a ToolError
        tool("2")


def test_arguments_arrive_as_the_annotated_types() -> None:
    given = bo.tool(weather).check({"place": {"city": "Oslo"}, "days": 2, "unit": "fahrenheit"})
    assert given == {"place": Place("Oslo"), "days": 2, "unit": Unit.F}
    assert weather(**given)[3] == "sun"

    def total(of: Spans) -> int:
        return sum(span.end - span.begin for span in of.spans)

    nested = bo.tool(total).parameters
    jsonschema.validate({"of": {"spans": [{"begin": 1, "end": 2}]}}, nested)
    with pytest.raises(jsonschema.ValidationError, match="'end' is a required property"):
        jsonschema.validate({"of": {"spans": [{"begin": 1}]}}, nested)

    def between(span: Span, also: list[Span] | None = None) -> int:
        return span.end - span.begin

    made = bo.tool(between)
    assert made.check({"span": {"begin": 1, "end": 4}})["span"] == Span(begin=1, end=4)
    assert made.parameters["properties"]["span"]["properties"]["begin"]["type"] == "integer"
    with pytest.raises(bo.ToolError, match="end"):
        made.check({"span": {"begin": 1}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"place": {"city": "Oslo"}}, "weather: Object missing required field `days`"),
        ({"place": {"city": "Oslo"}, "days": "2"}, "weather: argument days: Expected `int`, got `str`"),
        ({"place": {"city": "Oslo"}, "days": 10}, "weather: argument days: Expected `int` <= 9"),
        ({"place": {}, "days": 2}, "argument place: Object missing required field `city`"),
        ({"place": {"city": "Oslo"}, "days": 2, "wind": 1}, "unknown field `wind`"),
        ({"place": {"city": "Oslo"}, "days": 2, "kind": "snow"}, "argument kind: Invalid enum value 'snow'"),
        ("Oslo", "weather takes place, days, unit, kind: give them as a JSON object, got 'Oslo'"),
    ],
)
def test_arguments_that_do_not_fit_name_the_argument(arguments: Any, words: str) -> None:
    with pytest.raises(bo.ToolError, match=words) as caught:
        bo.tool(weather).check(arguments)
    assert caught.value.details["tool"] == "weather"


def test_a_bare_text_is_the_only_argument() -> None:
    def double(number: int) -> int:
        return 2 * number

    assert bo.tool(double).check("21") == {"number": 21}
    assert bo.tool(lookup).check(" a key") == {"key": " a key"}
    with pytest.raises(bo.ToolError, match="argument number: Expected `int`"):
        bo.tool(double).check("many")

    def now() -> str:
        return "noon"

    assert bo.tool(now).check("") == {}
    with pytest.raises(bo.ToolError, match="now takes no arguments, got 'x'"):
        bo.tool(now).check("x")


# ------------------------------------------------------------------------------------------------ reading calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("Thought: I add.\nAction: calculator[1 + 2]", [("calculator", "1 + 2")]),
        ("Action: a[1]\nAction: b(2)", [("a", "1"), ("b", "2")]),
        ('Action: w[{"city": "Oslo", "days": 2}]', [("w", {"city": "Oslo", "days": 2})]),
        ("Action: list[[1, 2]]", [("list", "[1, 2]")]),
        ("Action: now[]", [("now", "")]),
        ("Thought: I know.\nAnswer: Action: a[1]", []),
        ("There is no call here.", []),
    ],
)
def test_calls_in_text(text: str, calls: Any) -> None:
    assert [(call.name, call.arguments) for call in text_calls(text)] == calls


def test_the_answer_in_text() -> None:
    assert text_answer("Thought: I know.\nAnswer: 42\nindeed") == "42\nindeed"
    assert text_answer(" Hello. ") == "Hello."


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>', [("a", {"x": 1})]),
        (
            'I look.\n<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b"}',
            [("a", {}), ("b", {})],
        ),
        ('[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}, "id": "abc"}]', [("a", {"x": 1})]),
        ('<|python_tag|>{"name": "a", "parameters": {"x": 1}}', [("a", {"x": 1})]),
        ('{"name": "a", "arguments": "{\\"x\\": 1}"}', [("a", {"x": 1})]),
        ("<tool_call>{oops}</tool_call>", [("", "{oops}")]),
        ('{"price": 3}', []),
        ("[1, 2]", []),
        ("Hello.", []),
    ],
)
def test_calls_as_chat_templates_write_them(text: str, calls: Any) -> None:
    assert [(call.name, call.arguments) for call in template_calls(text)] == calls


# ------------------------------------------------------------------------------------------------ the loop


def agent_of(functions: Sequence[Callable[..., Any]], **options: Any) -> bo.Program:
    @bo.function
    def agent(s: State, question: str) -> Any:
        s.tools(functions, system="Be careful.")
        s += bo.user(question)
        return s.run_tools(name="answer", **options)

    return agent


SCRIPT = [
    "Thought: I need the price.\nAction: lookup[price of the lamp]",
    "Thought: I add.\nAction: calculator[36 + 12]",
    "Thought: I know.\nAnswer: 48",
]


def test_turns_and_calls_until_the_answer() -> None:
    backend = bo.ScriptedBackend({"answer": SCRIPT})
    state = agent_of([calculator, lookup]).run("The lamp plus 12?", backend=backend)
    done = state.ret_value
    assert (done.answer, done.num_rounds) == ("48", 3)
    assert state["answer"] == "48"
    assert [(result.call.name, result.value, result.text) for result in done.results] == [
        ("lookup", "36", "36"),
        ("calculator", 48, "48"),
    ]
    messages = state.messages()
    assert messages[0] == {
        "role": "system",
        "content": "Be careful.\nYou can use these tools:\ncalculator(expression): Computes a sum.\n"
        "lookup(key): Finds a fact.\nWrite Thought and Action: tool[argument], or Thought and Answer.",
    }
    assert [message["role"] for message in messages[1:]] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant")
    ]
    assert messages[3]["content"] == "36"


def test_what_goes_wrong_is_told_to_the_model() -> None:
    turns = [
        "Action: fly[away]",
        "Action: calculator[one]",
        'Action: calculator[{"expression": 3}]',
        "Action: lookup[nothing]",
        "Answer: I give up",
    ]
    state = agent_of([calculator, lookup]).run("?", backend=bo.ScriptedBackend({"answer": turns}))
    errors = [result.error for result in state.ret_value.results]
    told = [message["content"] for message in state.messages() if message["role"] == "tool"]
    assert told == [
        "error: there is no tool 'fly', the tools are calculator, lookup",
        "error: calculator failed: ValueError: not enough values to unpack (expected 2, got 1)",
        "error: calculator: argument expression: Expected `str`, got `int`",
        "error: lookup failed: KeyError: 'nothing'",
    ]
    assert [type(error.__cause__) for error in errors] == [
        type(None), ValueError, msgspec.ValidationError, KeyError,
    ]  # fmt: skip
    assert state.ret_value.answer == "I give up"


def test_or_is_raised_where_it_was_asked_for() -> None:
    agent = agent_of([lookup], on_error="raise")
    with pytest.raises(bo.ToolError, match="lookup failed: KeyError: 'x'") as caught:
        agent.run("?", backend=bo.ScriptedBackend({"answer": "Action: lookup[x]"}))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(bo.InvalidRequest, match="on_error must be one of feed, raise"):
        agent_of([lookup], on_error="ignore").run("?", backend=bo.ScriptedBackend({"answer": "Action: lookup[x]"}))


def test_a_loop_is_bounded() -> None:
    backend = bo.ScriptedBackend({"answer": "Action: calculator[1 + 1]"})
    state = agent_of([calculator], max_rounds=3).run("?", backend=backend)
    assert (state.ret_value.answer, state.ret_value.num_rounds, len(state.ret_value.results)) == (None, 3, 3)
    for bad in (0, None):
        with pytest.raises(bo.InvalidRequest, match="max_rounds"):
            agent_of([calculator], max_rounds=bad).run("?", backend=backend)
    with pytest.raises(bo.InvalidRequest, match="has no tools"):
        State(backend).run_tools()


def test_calls_of_one_turn_run_beside_each_other_in_their_order() -> None:
    both = threading.Barrier(2, timeout=10)
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="")

    def meet(name: str) -> str:
        both.wait()  # each waits for the other
        return trace.get() + name

    turns = ["Action: meet[first]\nAction: meet[second]", "Answer: done"]
    trace.set("seen by ")
    state = agent_of([meet]).run("?", backend=bo.ScriptedBackend({"answer": turns}))
    told = [message["content"] for message in state.messages() if message["role"] == "tool"]
    assert told == ["seen by first", "seen by second"]


def test_branches_have_their_parents_tools_and_loops_of_their_own() -> None:
    s = State(bo.ScriptedBackend(lambda text, params: "Answer: 2" if "tool\n" in text else "Action: calculator[1 + 1]"))
    s.tools([calculator])
    forks = s.fork(2)
    for fork in forks:
        fork += bo.user("?")
        assert fork.run_tools().answer == "2"


def test_values_are_shown_as_text_or_json() -> None:
    def record(key: str) -> dict[str, Any]:
        return {"a": [1, None], "unit": Unit.C}

    def model(key: str) -> Span:
        return Span(begin=1, end=2)

    def thing(key: str) -> object:
        return {1, 2}.__class__

    calls = [bo.ToolCall(name, "k") for name in ("record", "model", "thing")]
    results = Toolbox([record, model, thing], "text").call(calls)
    assert [result.text for result in results] == [
        '{"a":[1,null],"unit":"celsius"}',
        '{"begin":1,"end":2}',
        "<class 'set'>",
    ]


# ------------------------------------------------------------------------------------------------ async


async def later(key: str) -> str:
    """Finds a fact, later."""
    await asyncio.sleep(0)
    return f"{key} in {threading.current_thread().name}"


def test_an_async_tool_runs_in_a_plain_program() -> None:
    state = agent_of([later]).run("?", backend=bo.ScriptedBackend({"answer": ["Action: later[a]", "Answer: x"]}))
    assert state.ret_value.results[0].value.startswith("a in ")


def test_a_tool_that_hangs_holds_up_no_run_for_longer_than_its_timeout() -> None:
    over = threading.Event()

    def hang(key: str) -> str:
        over.wait()
        return key

    program, backend = agent_of([hang]), bo.ScriptedBackend(lambda *_: "Action: hang[a]")
    try:
        with pytest.raises(bo.Timeout, match="run's timeout"):
            program.run("?", backend=backend, timeout=0.05)
        with pytest.raises(bo.Timeout, match="run's timeout"):
            asyncio.run(program.arun("?", backend=backend, timeout=0.05))
        (state,) = program.run_batch([{"question": "?"}], backend=backend, timeout=0.05)
        assert isinstance(state.error(), bo.Timeout)
    finally:
        over.set()


@pytest.mark.parametrize("is_on_loop", [False, True])
def test_an_async_tool_is_cancelled_when_the_runs_time_is_over(is_on_loop: bool) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def hang(key: str) -> str:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return key

    program, backend = agent_of([hang]), bo.ScriptedBackend(lambda *_: "Action: hang[a]")

    async def on_loop() -> None:
        with pytest.raises(bo.Timeout):
            await program.arun("?", backend=backend, timeout=0.05)
        while begun.is_set() and not cancelled.is_set():
            await asyncio.sleep(0.001)

    while not begun.is_set():  # a slow machine may use up the time before the call
        if is_on_loop:
            asyncio.run(on_loop())
        else:
            with pytest.raises(bo.Timeout):
                program.run("?", backend=backend, timeout=0.05)
    assert cancelled.wait(60)


def test_a_crew_carries_out_in_order_and_leaves_out_what_was_cancelled() -> None:
    crew, gate, met = Crew(1), threading.Event(), list[int]()
    first = crew.start(lambda: gate.wait(60))
    rest = [crew.start(partial(met.append, number)) for number in range(3)]
    assert rest[1].cancel()
    gate.set()
    assert first.result(60)
    for future in (rest[0], rest[2]):
        future.result(60)
    assert met == [0, 2]
    with pytest.raises(ZeroDivisionError):
        crew.start(lambda: 1 // 0).result(60)


def test_an_async_program_awaits_its_tools_on_its_own_loop() -> None:
    met: list[asyncio.AbstractEventLoop] = []

    async def here(key: str) -> str:
        met.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return key.upper()

    @bo.function
    async def agent(s: State, question: str) -> Any:
        s.tools([here, lookup])
        s += bo.user(question)
        return await s.arun_tools(name="answer")

    async def main() -> Any:
        turns = ["Action: here[a]\nAction: here[b]\nAction: lookup[price of the lamp]", "Answer: done"]
        state = await agent.arun("?", backend=bo.ScriptedBackend({"answer": turns}))
        return asyncio.get_running_loop(), state.ret_value

    loop, done = asyncio.run(main())
    assert [result.text for result in done.results] == ["A", "B", "36"]
    assert done.answer == "done"
    assert met == [loop, loop]
