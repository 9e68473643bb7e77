"""A user's program that has everything public in it, for `mypy --strict`: what a type checker has to know.

It is checked, not run: `make check` checks it, tests/lang/test_public.py sees to it that no public name is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import bough as bo


@dataclass
class Person:
    name: str
    age: int


def calculator(expression: str) -> int:
    """Computes a number."""
    return len(expression)


CARD: bo.Grammar = (
    bo.lit("Name: ")
    + bo.capture("name", bo.rx("[A-Z][a-z]+"))
    + bo.optional(", " + bo.capture("age", type=int))
    + bo.many(bo.one_of(["!", "?"]), max=2)
    + bo.separated(bo.substring_of("tea or chess"), ", ", max=2)
    + bo.until("\n")
)
NESTED: bo.Grammar = bo.rule("nested", lambda: "(" + bo.optional(NESTED) + ")")
OTHERS: Sequence[bo.Grammar] = (
    bo.json_schema({"type": "integer"}),
    bo.json_type(list[int]),
    bo.of_type(Person),
    bo.lark('start: "a"'),
)


class Shortest(bo.ChoicesSamplingMethod):
    """A choices method of one's own."""

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[object]],
        output_token_logprobs: Sequence[Sequence[object]],
        unconditional_token_logprobs: Sequence[Sequence[object]] | None = None,
    ) -> bo.ChoicesDecision:
        return bo.ChoicesDecision(min(choices, key=len), {"means": list(normalized_prompt_logprobs)})


@bo.function
def everything(s: bo.State, question: str) -> int:
    s += bo.system("Be brief.") + bo.user(question) + bo.role("tool", "12")
    s += bo.system_begin() + "a" + bo.system_end() + bo.user_begin() + "b" + bo.user_end()
    s += bo.role_begin("tool") + "c" + bo.role_end("tool") + bo.assistant_begin() + "d" + bo.assistant_end()
    expression: bo.Expression = bo.assistant(bo.gen("answer", max_tokens=8, stop=["\n"], on_limit="close"))
    s += expression
    s += bo.gen_int("number") + bo.gen_string("word") + bo.separate_reasoning(bo.gen("deep"))
    s += bo.assistant(bo.think("thought", keep=False) + bo.gen("card", grammar=CARD))
    age: bo.Var[int] = s.gen(int, "age")
    person: bo.Var[Person] = s.gen(Person, "person")
    total: int = age.value + person.value.age + len(person.text)
    for method in (
        bo.token_length_normalized,
        bo.total_likelihood,
        bo.byte_length_normalized,
        bo.greedy_token_selection,
        bo.unconditional_likelihood_normalized,
        bo.pmi,
        Shortest(),
    ):
        s += bo.select("best", ["yes", "no"], choices_method=method)
    branching(s)
    searching(s)
    calling(s)
    return total


def branching(s: bo.State) -> None:
    forks: bo.Group = s.fork(["a", "b"], names=["first", "second"])
    forks += bo.gen("draft", return_logprob=True)
    forks["first"] += lambda_text(forks[0].arg)
    winners: list[bo.State] = bo.race(list(forks), 1, until=lambda f: bool(f["draft"]), timeout=1.0)
    forks.check(lambda draft: bool(draft)).join("gather")
    cells: bo.Cells = s["draft"]
    errors: Sequence[BaseException | None] = cells.errors
    mark: bo.Checkpoint = s.checkpoint()
    s.rewind(mark)
    with s.checkpoint() as span:
        s += "a page"
    recomputed: int = s.replace(span, "(a page)") + s.drop(span)
    with s.scratch() as t, s.copy() as c:
        t += "x"
        c += "y"
    with s.branches(2) as scope:
        scope.best(bo.mean_logprob)
    likely: tuple[str, int, float] = s.peek(3)[0]
    s.set_var("notes", (winners, errors, recomputed, likely, s.entropy()))


def lambda_text(arg: object) -> str:
    return f"about {arg}"


def searching(s: bo.State) -> None:
    step = bo.gen("idea", return_logprob=True)
    winner: bo.State = s.best_of(2, step, score=lambda b: float(len(b["idea"])))
    with s.beam(2, step, depth=1) as beams, s.search(step, rounds=1, branching=2) as leaves:
        print(winner.text(), len(beams), leaves[0]["idea"])
    tree = bo.TreeSearch(s, step, branching=2)
    nodes: list[bo.SearchNode] = tree.select()
    tree.expand(nodes)


def calling(s: bo.State) -> None:
    adder: bo.Tool = bo.tool(calculator, name="adder")
    s.tools([calculator, adder], system="You may call.")
    done = s.run_tools(max_rounds=2, on_error="feed", name="tooled")
    results: Sequence[bo.ToolResult] = done.results
    calls: list[bo.ToolCall] = [result.call for result in results]
    answer: str | None = done.answer
    today: str = s.recorded("today", lambda: "Monday")
    s.set_var("calls", (calls, answer, today))


def watching(backend: bo.Backend) -> None:
    state: bo.State = everything.run("Why?", backend=backend, journal="j", budget=bo.Budget(max_seconds=9), events=True)
    event: bo.Event
    for event in state.events():
        kind: str = event.kind
        print(kind, event.branch)
    usage: bo.RunUsage = state.usage
    journal: bo.Journal = bo.Journal("j")
    again: bo.State = bo.replay(journal, everything, backend=backend)
    played = everything.run("Why?", backend=bo.ReplayBackend("j"))
    items: list[bo.ItemState] = everything.run_batch([{"question": "a"}], retries=bo.Retries(times=2), backend=backend)
    for item in everything.run_batch([("a",)], order="completion", backend=backend):
        place: int = item.index
        print(place, item.error())
    print(usage.computed_tokens, again.text(), played.messages(), items[0].is_saved, state.tree())


@bo.function
async def on_a_loop(s: bo.State, question: str) -> str:
    s += bo.user(question) + bo.assistant(bo.gen("answer"))
    forks = s.fork(2)
    forks += bo.gen("x")
    (first,) = await bo.arace(list(forks))
    return str(await first.get("x"))


async def loops(backend: bo.Backend) -> None:
    states = await asyncio.gather(*[on_a_loop.arun(q, backend=backend) for q in ("a", "b")])
    async for chunk in states[0].text_async_iter("answer"):
        print(chunk)
    async for item in on_a_loop.arun_batch([("a",)], backend=backend):
        print(item.index)


def backends(kind: Literal["own", "shared", "sglang", "script", "http"]) -> bo.Backend:
    backend: bo.Backend
    if kind == "own":
        backend = bo.Runtime("pocket", exact=True)
    elif kind == "shared":
        backend = bo.RuntimeClient("ipc:///run/user/1000/bough/s")
    elif kind == "sglang":
        backend = bo.RuntimeEndpoint("ipc:///run/user/1000/bough/s")
    elif kind == "http":
        backend = bo.OpenAI("model", base_url="http://127.0.0.1:1/v1")
    else:
        backend = bo.ScriptedBackend(["a"])
    bo.set_default_backend(backend)
    bo.flush_cache(backend)
    print(bo.get_server_info(backend))
    return backend


def failures(program: bo.Program, format: bo.ReasoningFormat) -> bo.Generation | None:
    try:
        program.bind(question="Why?").run()
        bo.separate_reasoning(bo.gen("x"), format)
    except (bo.InvalidRequest, bo.InvalidValue, bo.ContextOverflow, bo.Truncated, bo.CheckFailed, bo.UnknownVariable):
        return None
    except (bo.BlockingRead, bo.ProgramError, bo.ToolError, bo.BudgetExceeded, bo.Cancelled, bo.Timeout):
        return None
    except (bo.Overloaded, bo.ResourceExhausted, bo.RuntimeLost, bo.ReplayMismatch, bo.BackendError):
        return None
    except (bo.UnsupportedByBackend, bo.UnsupportedModel, bo.ProtocolMismatch) as error:
        details: object = error.details
        print(details, isinstance(error, bo.errors.BoughError))
    except bo.BoughError:
        raise
    return None


def pictures() -> None:
    bo.image("a.png")


def films() -> None:
    bo.video("a.mp4", 8)
