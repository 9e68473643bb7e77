"""Types, grammars and thoughts on a real runtime: what the model writes can always be read, or says that it cannot."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pydantic
import pytest
from processes import within

import bough as bo

SEEDS = range(3)


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclass
class Person:
    name: Annotated[str, msgspec.Meta(max_length=12)]
    age: Annotated[int, msgspec.Meta(ge=0, le=150)]
    born: dt.date
    likes: Annotated[list[Color], msgspec.Meta(max_length=3)]


class Reading(TypedDict):
    at: dt.datetime
    level: Annotated[float, msgspec.Meta(ge=0, lt=10)] | None


class Ticket(pydantic.BaseModel):
    id: Annotated[int, pydantic.Field(ge=1, le=9999)]
    open: bool
    color: Color


@dataclass
class Seat:
    row: Literal[1, 2, 3]
    color: Color


Small = Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=99)]], msgspec.Meta(min_length=1, max_length=3)]


def read(state: bo.State, name: str) -> Any:
    return within(60, lambda: state[name])


@bo.function
def fill(s: bo.State, type: Any, **options: Any) -> None:
    s += bo.user("Write something.")
    s += bo.assistant("Here: " + bo.gen("x", type=type, max_tokens=96, **options))


@pytest.mark.parametrize(
    "type",
    [
        int, float, bool, Color, Literal["yes", "no", "maybe"], dt.date, dt.time, dt.datetime, Small, dict[str, Small],
        tuple[bool, Color], Person, Reading, Ticket, Annotated[int, msgspec.Meta(ge=5, le=7)] | None, Seat | Ticket,
    ],
    ids=repr,
)  # fmt: skip
def test_every_value_of_a_type_is_one(pocket: bo.Runtime, type: Any) -> None:
    for state in [fill.run(type, on_limit="close", backend=pocket, seed=seed) for seed in SEEDS]:
        value = read(state, "x")
        assert bo.of_type(type).match("".join(state.text_iter("x"))) is not None
        if isinstance(type, type_of_classes) and not issubclass(type, dict):
            assert isinstance(value, type)


type_of_classes = type


def test_a_budget_that_ends_raises_or_closes(pocket: bo.Runtime) -> None:
    @bo.function
    def short(s: bo.State, on_limit: Any) -> None:
        s += "Some words: " + bo.gen("x", type=list[str], max_tokens=8, on_limit=on_limit)

    cut = short.run("raise", backend=pocket, seed=1)
    with pytest.raises(bo.Truncated):
        within(60, lambda: cut["x"])
    closed = short.run("close", backend=pocket, seed=1)
    assert isinstance(within(60, lambda: closed["x"]), list)
    assert closed.get_meta_info("x")["completion_tokens"] <= 8


def test_one_gen_fills_a_template_with_captures(pocket: bo.Runtime) -> None:
    likes = bo.separated(bo.capture("likes", bo.one_of(["tea", "chess", "rain"])), ", ", min=1, max=3)
    card = (
        "Name: " + bo.capture("name", bo.rx("[A-Z][a-z]{1,8}")) + "\nAge: " + bo.capture("age", type=int) + "\n" + likes
    )

    @bo.function
    def introduce(s: bo.State) -> None:
        s += bo.user("Introduce yourself.") + bo.assistant(
            bo.gen("card", grammar=card, max_tokens=80, on_limit="close")
        )

    for seed in SEEDS:
        state = introduce.run(backend=pocket, seed=seed)
        text = read(state, "card")
        assert text.startswith(f"Name: {state['name']}\nAge: {state['age']}\n")
        assert text.endswith(", ".join(state["likes"]))
        assert card.match(text) is not None


def test_values_grow_while_the_model_writes_them(pocket: bo.Runtime) -> None:
    state = fill.run(Person, on_limit="close", stream=True, backend=pocket, seed=1)
    values = within(60, lambda: list(state.value_iter("x")))
    assert isinstance(values[-1], Person)
    assert all(isinstance(value, dict) for value in values[:-1])
    assert [*values[-2]] == ["name", "age", "born", "likes"]
    assert len(values) > 4


def test_a_number_ends_where_the_model_goes_on_with_words(pocket: bo.Runtime) -> None:
    @bo.function
    def count(s: bo.State) -> None:
        s += "I have " + bo.gen("n", type=int, max_tokens=24) + " apples."

    for seed in SEEDS:
        state = count.run(backend=pocket, seed=seed)
        assert within(60, state.text) == f"I have {state['n']} apples."


def test_a_forgotten_thought_leaves_the_text_and_context_it_would_have_had_without(pocket: bo.Runtime) -> None:
    @bo.function
    def thoughtful(s: bo.State) -> None:
        s += bo.user("What is 17 + 25?")
        s += bo.assistant(
            bo.think("thought", max_tokens=24, min_tokens=8, keep=False)
            + bo.gen("answer", max_tokens=12, temperature=0)
        )
        s += bo.user("And twice that?") + bo.assistant(bo.gen("twice", max_tokens=12, temperature=0))

    state = thoughtful.run(backend=pocket, seed=3)
    thought = within(60, lambda: state["thought"])
    assert thought
    assert "<think>" not in within(60, state.text)
    assert thought not in state.text()
    assert state.get_meta_info("thought")["completion_tokens"] <= 24

    @bo.function
    def plain(s: bo.State) -> None:
        s += bo.user("What is 17 + 25?") + bo.assistant(state["answer"])
        s += bo.user("And twice that?") + bo.assistant(bo.gen("twice", max_tokens=12, temperature=0))

    again = plain.run(backend=pocket)
    assert within(60, lambda: again["twice"]) == state["twice"]
    assert again.get_meta_info("twice")["prompt_tokens"] == state.get_meta_info("twice")["prompt_tokens"]
