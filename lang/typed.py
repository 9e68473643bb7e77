"""Values instead of texts: how the model writes a type, and what reads it.

=====================================================  ===============================================================
type                                                   what is written
=====================================================  ===============================================================
int, float, Decimal                                    42, -3.5, 1e9: without quotes, at most 18 digits before the point
bool                                                   true, false, True or False
date, time, datetime, timedelta                        2024-02-29, 18:30:00, 2024-02-29T18:30:00Z, P1DT02H30M00S
UUID, an Enum, a Literal                               its value, without quotes
str                                                    free text, without quotes; nothing constrains it
list, dict, tuple, set, Optional, Union, dataclass,    JSON, as Python writes it, in which text, dates and enums of text
TypedDict, NamedTuple, msgspec.Struct, pydantic        are quoted; a class is an object with its fields in order
=====================================================  ===============================================================

The grammar lets nothing through that cannot be read: there is no 30th of February.
"""

from __future__ import annotations

import builtins
import enum
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import msgspec

from bough import scalars
from bough.errors import InvalidRequest
from bough.grammar_nodes import Grammar, Json, Rx
from bough.grammars import one_of
from bough.runtime import protocol

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Shape(Generic[T_co]):
    """How the model writes a type.

    grammar: what it may write. read: makes the value of a text that the grammar matches, and raises InvalidValue if
    the type's own checks refuse it. stop_regex: what ends a text that could always go on, as a number can; it is not
    part of the text. wire: the grammar as it is sent; None for free text.
    """

    type: Any
    grammar: Grammar
    read: Callable[[str], T_co]
    wire: protocol.Grammar | None
    stop_regex: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        """Whether it is written as JSON."""
        return isinstance(self.grammar, Json)


def shape_of(type: Any) -> Shape[Any]:
    """Return how the model writes a type. Raises InvalidRequest naming the part of it that has no form."""
    type = _unwrapped(type)
    try:
        return _shape_of(type)
    except TypeError:  # a type that cannot be hashed, as an Annotated with a dict
        return _shape_of.__wrapped__(type)


@lru_cache(maxsize=256)
def _shape_of(type: Any) -> Shape[Any]:
    if type is str:
        return Shape(str, Rx("(?s:.*)"), str, None)
    if isinstance(type, builtins.type) and type in scalars.BARE:
        return _of_pattern(type)
    if isinstance(type, enum.EnumMeta):
        members: list[Any] = list(type)
        return _of_choices(type, [(_written(member), member) for member in members])
    if typing.get_origin(type) is typing.Literal:
        return _of_choices(type, [(str(value), value) for value in typing.get_args(type)])
    from bough.schemas import Reading

    reading = Reading(type)
    wire = protocol.Grammar(kind="json_schema", source=reading.schema)
    return Shape(type, Json(reading.schema), reading.read, wire)


def _unwrapped(type: Any) -> Any:
    """Return what a NewType or a type alias stands for."""
    while True:
        inner = getattr(type, "__supertype__", None) or (
            type.__value__ if type.__class__.__name__ == "TypeAliasType" else None
        )
        if inner is None:
            return type
        type = inner


def _of_pattern(kind: type[Any]) -> Shape[Any]:
    pattern, charset, read = scalars.BARE[kind]
    if not charset:
        return Shape(kind, Rx(pattern), read, protocol.Grammar(kind="regex", source=pattern))
    # A number could always go on. Were only digits and the end of the text allowed after "42", a model that wants to
    # write " apples" would be made to choose between two things it does not want. So whatever is no part of a number
    # is allowed too, ends it, and is taken off again, as any stop is.
    other = f"[^{charset}]"
    wire = protocol.Grammar(kind="regex", source=f"(?:{pattern}){_tail(other)}")
    return Shape(kind, Rx(pattern), read, wire, (other,))


def _tail(other: str) -> str:
    return f"(?:{other}(?s:.*))?"


def ending_itself(grammar: protocol.Grammar, stop_regex: tuple[str, ...]) -> tuple[protocol.Grammar, tuple[str, ...]]:
    """Return a number's grammar without what may follow it, and the stops without what ends it there.

    For a backend that knows regular expressions but no stop_regex: there the text has to end by itself.
    """
    if grammar.kind == "regex" and stop_regex and grammar.source.endswith(_tail(stop_regex[-1])):
        source = grammar.source.removesuffix(_tail(stop_regex[-1]))
        return msgspec.structs.replace(grammar, source=source), stop_regex[:-1]
    return grammar, stop_regex


def _of_choices(type: Any, choices: Sequence[tuple[str, Any]]) -> Shape[Any]:
    values: dict[str, Any] = {}
    for text, value in choices:
        if not text or text in values:
            why = "is written as nothing" if not text else f"is written like {values[text]!r}"
            raise InvalidRequest(f"{type!r}: {value!r} {why}", field="type", value=repr(value))
        values[text] = value
    if not values:
        raise InvalidRequest(f"{type!r} has no values", field="type")
    wire = protocol.Grammar(kind="choices", source=json.dumps(list(values), ensure_ascii=False))
    return Shape(type, one_of(list(values)), values.__getitem__, wire)


def _written(member: enum.Enum) -> str:
    """Return the text of a member: its value, or its name where the value has no plain text."""
    value = member.value
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else member.name
