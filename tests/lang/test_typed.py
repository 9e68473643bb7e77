"""Typed values: what a type is written as, what is read back, and what a constrained gen says when it is not whole."""

# ruff: noqa: UP007, UP045 (both ways to write a union are types that users give)
from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import enum
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, TypedDict, Union

import annotated_types
import jsonschema
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bough as bo
from bough import State
from bough.partial import NOTHING, partial_json
from bough.schemas import Reading
from bough.typed import shape_of


def test_object_is_any_json_and_spoils_no_later_type() -> None:
    assert shape_of(object).read('{"a": [1]}') == {"a": [1]}
    assert json.loads(Reading(object).schema) == json.loads(Reading(object).schema)
    assert shape_of(list[Any]).read("[1, null]") == [1, None]


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.Enum):
    LOW = 1
    HIGH = 2
    ODD = (3, 4)


@dataclass
class Person:
    name: str
    age: int
    born: dt.date
    friends: list[Person] = field(default_factory=list)
    color: Color = Color.RED


class Movie(TypedDict, total=False):
    title: str
    year: Annotated[int, msgspec.Meta(ge=1900, le=2100)]


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Tagged(msgspec.Struct, tag="one"):
    a: int


class Model(pydantic.BaseModel):
    id: uuid.UUID
    when: dt.datetime
    price: decimal.Decimal
    tags: set[str] = set()
    inner: Optional[Model] = None


@dataclass
class Other:
    z: bool


@dataclass
class Limited:
    few: Annotated[list[Annotated[int, pydantic.Field(ge=5, le=7)]], pydantic.Field(max_length=2)]
    code: Annotated[str, pydantic.StringConstraints(pattern="^[A-Z]{3}$")] = "AAA"


@pydantic.dataclasses.dataclass
class Odd:
    n: Annotated[int, pydantic.Field(gt=0)]

    @pydantic.field_validator("n")
    @classmethod
    def odd(cls, n: int) -> int:
        if n % 2 == 0:
            raise ValueError("even")
        return n


@dataclass
class Mixed:
    low: Annotated[int, msgspec.Meta(ge=5)]
    short: Annotated[str, pydantic.Field(max_length=3)]


class OfModel(pydantic.BaseModel):
    low: Annotated[int, msgspec.Meta(ge=5)]


UserId = NewType("UserId", int)

BARE = [
    int, float, bool, str, Color, Level, Literal["a", 1, True, None], dt.date, dt.time, dt.datetime, dt.timedelta,
    decimal.Decimal, uuid.UUID, UserId,
]  # fmt: skip
COMPOSITE = [
    list[int], list[str], dict[str, float], dict[int, bool], dict[Color, list[dt.time]], dict[dt.date, int],
    tuple[int, str], tuple[float, ...], set[int], frozenset[str], Optional[int], int | None,
    Union[int, str, list[bool]],
    Optional[Color], list[Literal["a", 2]], Person, list[Person], Movie, Point, Tagged, Model, list[Model],
    Person | Other,
    Model | Other, Any, list, dict, None, bytes, Annotated[float, msgspec.Meta(gt=0, lt=1)],
    Annotated[str, msgspec.Meta(max_length=5)], Annotated[list[int], msgspec.Meta(min_length=2, max_length=3)],
    dict[str, Optional[Union[dt.datetime, list[Point]]]],
]  # fmt: skip


@pytest.mark.parametrize("type", BARE + COMPOSITE, ids=repr)
def test_every_text_of_a_type_is_read_back_as_its_value(type: Any) -> None:
    shape = shape_of(type)
    for seed in range(6):
        text = shape.grammar.sample(seed, max_chars=4000)
        value = shape.read(text)
        if shape.is_json:
            schema = json.loads(Reading(type).schema)
            jsonschema.validate(json.loads(text), schema)
            assert _type_of(type).validate_python(value) == value


def _type_of(type: Any) -> pydantic.TypeAdapter[Any]:
    """An independent judge of values."""
    try:
        return pydantic.TypeAdapter(type)
    except pydantic.errors.PydanticUserError:  # what pydantic does not take is judged by being read
        return pydantic.TypeAdapter(Any)
    except pydantic.PydanticSchemaGenerationError:
        return pydantic.TypeAdapter(Any)


@pytest.mark.parametrize(
    ("type", "text", "value"),
    [
        (int, "-42", -42),
        (float, "1.5e3", 1500.0),
        (bool, "True", True),
        (bool, "false", False),
        (str, 'as "it" is', 'as "it" is'),
        (Color, "green", Color.GREEN),
        (Level, "2", Level.HIGH),
        (Level, "ODD", Level.ODD),
        (Literal["a", 1, True, None], "None", None),
        (Literal["a", 1, True, None], "1", 1),
        (dt.date, "2024-02-29", dt.date(2024, 2, 29)),
        (dt.time, "18:30:00.5", dt.time(18, 30, 0, 500_000)),
        (dt.datetime, "2024-01-31T00:00:00Z", dt.datetime(2024, 1, 31, tzinfo=dt.timezone.utc)),
        (dt.timedelta, "P1DT02H00M30S", dt.timedelta(days=1, hours=2, seconds=30)),
        (list[dt.date], '["2024-02-29"]', [dt.date(2024, 2, 29)]),
        (Person, '{"name": "A", "age": 3, "born": "2000-01-01"}', Person("A", 3, dt.date(2000, 1, 1))),
        (dict[int, Point], '{"1": [2, 3.5]}', {1: Point(2, 3.5)}),
        (Person | Other, '{"z": true}', Other(True)),
        (Optional[int], "null", None),
    ],
)
def test_a_gen_of_a_type_gives_its_value_and_the_state_keeps_the_text(type: Any, text: str, value: Any) -> None:
    s = State(bo.ScriptedBackend([text]))
    s += "It is " + bo.gen("x", type=type, max_tokens=100)
    assert s["x"] == value
    assert s["x"].__class__ is value.__class__
    assert s.text() == "It is " + text


@pytest.mark.parametrize(
    ("type", "text"),
    [
        (int, "4.2"),
        (int, "1,000"),
        (int, "007"),
        (int, "1" * 19),
        (bool, "yes"),
        (Color, "blue"),
        (dt.date, "2023-02-29"),
        (dt.date, "2024-04-31"),
        (dt.date, "1900-02-29"),
        (dt.time, "24:00:00"),
        (list[int], "[1,2]"),
        (list[int], '["1"]'),
        (tuple[int, str], "[1]"),
        (Person, '{"name": "A", "age": 3, "born": "2000-01-01", "shoe": 44}'),
        (Movie, '{"year": 1800}'),
        (dict[int, str], '{"a": "b"}'),
        (dict[str, Any], '{"a": 1e999}'),
        (list[str], '["\\ud800"]'),
    ],
)
def test_a_script_that_says_what_the_type_excludes_is_told_so(type: Any, text: str) -> None:
    s = State(bo.ScriptedBackend([text]))
    s += bo.gen("x", type=type, max_tokens=100)
    with pytest.raises(bo.BackendError, match=r"does not match|ends too early"):
        s["x"]


@given(st.dates(min_value=dt.date(1000, 1, 1)))
@settings(max_examples=100, deadline=None)
def test_every_date_from_the_year_1000_on_can_be_written(day: dt.date) -> None:
    assert shape_of(dt.date).grammar.match(day.isoformat()) is not None


@pytest.mark.parametrize(
    ("type", "words"),
    [
        (Callable[[int], int], "Callable"),
        (list[Callable[[int], int]], r"Callable\[\[int\], int\] in list"),
        (dict[tuple[int, int], str], "keys of a dict"),
        (enum.Enum("Empty", []), "has no values"),
        (enum.Enum("Blank", {"A": ""}), "is written as nothing"),
        (Literal["1", 1], "is written like"),
        (type("Foreign", (), {}), "Foreign has no JSON form"),
        (Mixed, r"msgspec\.Meta\(ge=5\) is a limit for msgspec, in a type that pydantic reads"),
        (list[OfModel], r"msgspec\.Meta\(ge=5\) is a limit for msgspec"),
    ],
)
def test_a_type_that_cannot_be_is_refused_by_the_name_of_its_part(type: Any, words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.gen("x", type=type)


def test_a_value_that_the_types_own_checks_refuse_is_a_typed_error() -> None:
    class Even(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def even(cls, n: int) -> int:
            if n % 2:
                raise ValueError("odd")
            return n

    s = State(bo.ScriptedBackend(['{"n": 3}']))
    s += bo.gen("x", type=Even)
    with pytest.raises(bo.InvalidValue, match="odd"):
        s["x"]
    assert s.text() == '{"n": 3}'


@pytest.mark.parametrize(
    ("type", "allowed", "refused"),
    [
        (Annotated[int, pydantic.Field(ge=5, le=7)], "6", "102"),
        (Annotated[int, pydantic.Field(ge=5), "a note"], "6", "4"),
        (Annotated[int, "a note"], "102", "1.5"),
        (Optional[Annotated[int, annotated_types.Gt(4)]], "5", "4"),
        (Annotated[list[int], annotated_types.Len(2, 3)], "[1, 2]", "[1]"),
        (pydantic.PositiveInt, "1", "0"),
        (Limited, '{"few": [5, 7]}', '{"few": [5, 8]}'),
        (Limited, '{"few": [5], "code": "XYZ"}', '{"few": [5], "code": "XY"}'),
        (list[Limited], '[{"few": [6]}]', '[{"few": [5, 6, 7]}]'),
        (Odd, '{"n": 1}', '{"n": 0}'),
    ],
)
def test_limits_that_pydantic_knows_hold_wherever_they_stand(type: Any, allowed: str, refused: str) -> None:
    grammar = shape_of(type).grammar
    assert grammar.match(allowed) is not None
    assert grammar.match(refused) is None


def test_the_checks_of_a_pydantic_dataclass_are_carried_out() -> None:
    assert shape_of(Odd).read('{"n": 3}') == Odd(3)
    with pytest.raises(bo.InvalidValue, match="even"):
        shape_of(Odd).read('{"n": 2}')


# ---------------------------------------------------------------------------------------------- gen's arguments


def test_a_number_ends_at_what_is_no_part_of_it() -> None:
    s = State(bo.ScriptedBackend(["42 apples", "-3.5 or so", "18:30:00\n"]))
    s += bo.gen("a", type=int) + "|" + bo.gen("b", type=float) + "|" + bo.gen("c", type=dt.time)
    assert (s["a"], s["b"], s["c"]) == (42, -3.5, dt.time(18, 30))
    assert s.text() == "42|-3.5|18:30:00"


def test_dtype_keeps_sglangs_texts() -> None:
    s = State(bo.ScriptedBackend(["42 ", "1.5\n", "True", '"a b"']))
    for name, dtype in (("i", int), ("f", float), ("b", bool), ("s", str)):
        s += bo.gen(name, dtype=dtype)
    assert [s[name] for name in "ifbs"] == ["42", "1.5", "True", '"a b"']


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regex": "[ab]+"}, "abba"),
        ({"json_schema": {"type": "array"}}, "[1]"),
        ({"json_schema": '{"type": "array"}'}, "[1]"),
        ({"json_schema": Model}, None),
        ({"grammar": 'start: "a" | "b"'}, "b"),
        ({"grammar": bo.lit("a") | "b"}, "b"),
        ({"grammar": bo.json_type(list[int])}, "[1, 2]"),
    ],
)
def test_an_untyped_constraint_gives_the_text(options: dict[str, Any], text: str | None) -> None:
    said = text or bo.json_type(Model).sample(1)
    s = State(bo.ScriptedBackend([said, "?"]))
    s += bo.gen("x", **options) + " " + bo.gen("y", **options)
    assert s["x"] == said
    with pytest.raises(bo.BackendError, match="the script says"):
        s["y"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "a", "type": int}, "give one of regex and type"),
        ({"grammar": "start: /a/", "dtype": int}, "give one of grammar and dtype"),
        ({"choices": ["a"], "type": int}, "type has no effect on a choice"),
        ({"regex": "(a"}, r"regex\('\(a'\).*unclosed group"),
        ({"regex": ""}, "regex must not be empty"),
        ({"regex": r"\bword"}, "lookaround"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"dtype": list}, "dtype must be one of int, float, str, bool"),
        ({"type": int, "ignore_eos": True}, "ignore_eos cannot go with a grammar"),
        ({"type": list[int], "stop": "]"}, "stop would cut JSON"),
        ({"json_schema": "{}", "stop_regex": "x"}, "stop_regex would cut JSON"),
        ({"on_limit": "close"}, 'on_limit="close" needs regex'),
        ({"type": int, "on_limit": "cut"}, "on_limit must be one of return, raise, continue, close, got 'cut'"),
        ({"type": int, "on_limit": "return"}, "would give type half a text"),
        ({"on_limit": "raise", "on_truncation": "raise"}, "on_truncation is another name of on_limit"),
        ({"heal": "no"}, "heal must be True or False, got 'no'"),
        ({"choices": ["a"], "heal": False}, "heal has no effect on a choice"),
        ({"grammar": bo.capture("x", "a")}, "'x' is both the gen's name and a capture"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.gen("x", **options)


def test_a_text_that_was_cut_short_raises_where_it_is_read_and_only_there() -> None:
    said = '{"title": "A B C D"}'
    for options in ({"type": Movie}, {"json_schema": {"type": "object"}}, {"regex": r"\{.*\}"}):
        s = State(bo.ScriptedBackend([said, "next"]))
        s += bo.gen("x", max_tokens=2, **options) + bo.gen("y")
        with pytest.raises(bo.Truncated, match="ended by max_tokens before it was whole") as caught:
            s["x"]
        assert caught.value.details == {"text": '{"title": "A', "finish_reason": "length"}
        assert s["y"] == "next"
        assert s.get_meta_info("x")["finish_reason"] == "length"
        assert s.text() == '{"title": "Anext'
    s = State(bo.ScriptedBackend(["ab;"]))
    s += bo.gen("x", regex="[a-z]+;", stop=";")
    with pytest.raises(bo.Truncated, match="ended by the stop ';'"):
        s["x"]


def test_the_state_tells_the_backend_what_to_do_at_the_limit() -> None:
    raising, closing = bo.gen("x", type=list[int]), bo.gen("x", type=list[int], on_limit="close")
    assert isinstance(raising, bo.expressions.Gen)
    assert isinstance(closing, bo.expressions.Gen)
    assert raising.constraint is not None
    assert closing.constraint is not None
    assert raising.constraint.wire is not None
    assert closing.constraint.wire is not None
    assert (raising.constraint.wire.on_limit, closing.constraint.wire.on_limit) == ("truncate", "close")


# ---------------------------------------------------------------------------------------------- captures and lists


def test_captures_become_variables_of_the_state() -> None:
    likes = bo.separated(bo.capture("likes", bo.one_of(["tea", "chess"])), ", ", min=1)
    card = "Name: " + bo.capture("name", bo.rx("[A-Z][a-z]+")) + "\nAge: " + bo.capture("age", type=int) + "\n" + likes
    s = State(bo.ScriptedBackend(["Name: Ada\nAge: 36\ntea, chess", "Name: Bob\nAge: 7\ntea"]))
    s += bo.gen("card", grammar=card)
    assert (s["name"], s["age"], s["likes"]) == ("Ada", 36, ["tea", "chess"])
    assert s.get_meta_info("age")["finish_reason"] == "stop"
    s += bo.gen(grammar=card)
    assert (s["name"], s["age"], s["likes"], s["card"]) == ("Bob", 7, ["tea"], "Name: Ada\nAge: 36\ntea, chess")


def test_n_gives_lists_of_values_and_of_captures_and_a_join_gathers_them() -> None:
    s = State(bo.ScriptedBackend(["1", "2", "k=3", "k=4", "5", "6"]))
    s += bo.gen("x", type=int, n=2) + bo.gen(grammar="k=" + bo.capture("k", type=int), n=2)
    assert (s["x"], s["k"]) == ([1, 2], [3, 4])
    forks = s.fork(2)
    for f in forks:
        f += bo.gen("z", type=int)
    forks.join()
    assert s["z"] == [5, 6]


# ---------------------------------------------------------------------------------------------- Var and growing values


def test_a_var_knows_its_type_and_waits_when_it_is_read() -> None:
    backend = bo.ScriptedBackend(["7", '["a"]'])
    with backend.paused():
        s = State(backend)
        age = s.gen(int, "age")
        names = s.gen(list[str])
        assert "not computed yet" in repr(age)
    value: int = age.value
    assert (value + 1, age.text, s["age"], names.value) == (8, "7", 7, ["a"])
    assert age.meta["finish_reason"] == "stop"
    assert asyncio.run(age.get()) == 7


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10,
), st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_prefix_of_json_is_a_value_that_only_grows(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only) + " "
    last: Any = NOTHING
    for end in range(len(text) + 1):
        seen = partial_json(text[:end])
        assert _grew(last, seen)
        last = seen
    assert last == value


def _grew(old: Any, new: Any) -> bool:
    """Whether the new value holds all that the old one did."""
    if old is NOTHING:
        return True
    if isinstance(old, str):
        return isinstance(new, str) and new.startswith(old)
    if isinstance(old, list):
        return isinstance(new, list) and len(new) >= len(old) and all(map(_grew, old, new))
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and _grew(old[key], new[key]) for key in old)
    return bool(old == new)


def test_values_grow_while_they_are_written_and_end_as_the_type() -> None:
    @bo.function
    def people(s: State) -> None:
        s += bo.gen("who", type=list[Other | Point]) + bo.gen("n", type=int) + bo.gen("t")

    said = ['[{"z": true}, [1, 2.5]]', "42", "some words here"]
    state = people.run(stream=True, backend=bo.ScriptedBackend(said))
    values = list(state.value_iter("who"))
    assert values == [[{}], [{"z": True}], [{"z": True}, [1]], [{"z": True}, [1, 2.5]], [Other(True), Point(1, 2.5)]]
    assert list(state.value_iter("n")) == [42]
    assert list(state.value_iter("t")) == ["some", "some words", "some words here"]
    assert "".join(state.text_iter("who")) == said[0]

    async def follow() -> list[Any]:
        return [value async for value in state.value_async_iter("who")]

    assert asyncio.run(follow()) == values
    still = people.run(backend=bo.ScriptedBackend(said))
    assert list(still.value_iter("who")) == [[Other(True), Point(1, 2.5)]]
    assert list(still.text_iter("who")) == [said[0]]


def test_a_growing_value_that_is_cut_short_ends_with_the_error() -> None:
    @bo.function
    def numbers(s: State) -> None:
        s += bo.gen("x", type=list[int], max_tokens=2)

    state = numbers.run(stream=True, backend=bo.ScriptedBackend(["[1, 2, 3]"]))
    values = state.value_iter("x")
    assert [next(values), next(values)] == [[1], [1, 2]]
    with pytest.raises(bo.Truncated):
        next(values)
