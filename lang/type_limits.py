"""Whose limits a type carries: `Annotated` holds what msgspec reads (`Meta`), or pydantic (`Field`), and each of the
two passes over the other's without a word. So who reads a type follows from the limits in it.
"""

from __future__ import annotations

import builtins
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from bough.errors import InvalidRequest

_PYDANTIC: Final = frozenset({"annotated_types", "pydantic", "pydantic_core"})
_META_LIMITS: Final = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")


def needs_pydantic(type: Any) -> bool:
    """Return whether a limit or a class anywhere in the type is pydantic's, of which msgspec would see nothing."""
    return any(_is_pydantics(note) for note in _notes(type))


def refuse_meta(type: Any) -> None:
    """Raise InvalidRequest if a type that pydantic has to read holds limits that only msgspec knows."""
    for note in _notes(type):
        if isinstance(note, msgspec.Meta) and any(getattr(note, name) is not None for name in _META_LIMITS):
            raise InvalidRequest(
                f"{note} is a limit for msgspec, in a type that pydantic reads: write it as pydantic.Field(...)",
                field="type",
                value=repr(note),
            )


def _notes(type: Any) -> Iterator[Any]:
    """Yield the metadata of every `Annotated` in a type, the defaults of its dataclasses, and its pydantic classes."""
    seen: list[Any] = []
    waiting = [type]
    while waiting:
        part = waiting.pop()
        if any(part is other for other in seen):
            continue
        seen.append(part)
        yield from getattr(part, "__metadata__", ())
        arguments = () if typing.get_origin(part) is typing.Literal else typing.get_args(part)
        waiting.extend(arguments)
        waiting.append(getattr(part, "__supertype__", None) or getattr(part, "__value__", None))
        if isinstance(part, builtins.type):
            if hasattr(part, "__pydantic_core_schema__"):
                yield _PydanticClass
            if dataclasses.is_dataclass(part):
                yield from (field.default for field in dataclasses.fields(part))
            waiting.extend(_hints(part))


class _PydanticClass:
    """Stands for a class that pydantic made, whose checks only pydantic carries out."""


def _hints(cls: Any) -> list[Any]:
    if not hasattr(cls, "__annotations__"):
        return []
    try:
        return list(typing.get_type_hints(cls, include_extras=True).values())
    except (NameError, TypeError, AttributeError):  # msgspec and pydantic say what is wrong with it
        return []


def _is_pydantics(note: Any) -> bool:
    if note is _PydanticClass or hasattr(note, "__get_pydantic_core_schema__"):
        return True
    return any(base.__module__.partition(".")[0] in _PYDANTIC for base in type(note).__mro__)
