"""Schemas of the types that msgspec describes: the standard ones, classes with fields, its own structs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

from bough import scalars
from bough.errors import InvalidRequest
from bough.schema_parts import ANY, Schema, bounded, text_matching
from bough.type_limits import needs_pydantic


def described_by_msgspec(type: Any) -> tuple[Schema, Callable[[str], Any]] | None:
    """Return schema and reader of a type that msgspec knows; None if it does not, or something inside is foreign."""
    if needs_pydantic(type):
        return None
    try:
        info = inspect.type_info(type)
        decoder = msgspec.json.Decoder(type)
    except (TypeError, NameError):
        return None
    try:
        return _Writer().whole(info), decoder.decode
    except _Foreign:
        return None


class _Foreign(Exception):
    """Something that msgspec leaves to others is inside a type."""


class _Writer:
    """Writes one type's schema; classes become definitions, so that they can refer to themselves."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._definitions: Schema = {}

    def whole(self, info: inspect.Type) -> Schema:
        """Return the schema with its definitions."""
        schema = self._schema(info)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _schema(self, info: inspect.Type) -> Schema:
        match info:
            case inspect.Metadata(type=inner, extra_json_schema=extra):
                return {**self._schema(inner), **(extra or {})}
            case inspect.UnionType(types=types):
                return {"anyOf": [self._schema(part) for part in types]}
            case inspect.CustomType():
                raise _Foreign
            case inspect.AnyType():
                return self._any()
            case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType() | inspect.NamedTupleType():
                return {"$ref": f"#/$defs/{self._definition(info)}"}
        scalar = _of_scalar(info)
        return self._of_container(info) if scalar is None else scalar

    def _any(self) -> Schema:
        self._definitions.setdefault("JSON", ANY)
        return {"$ref": "#/$defs/JSON"}

    def _of_container(self, info: inspect.Type) -> Schema:
        match info:
            case inspect.TupleType(item_types=items):
                return _tuple([self._schema(item) for item in items], len(items))
            case inspect.DictType(key_type=key, value_type=value):
                entries = self._entries(key, self._schema(value))
                return {"type": "object", **entries, **_lengths(info, "Properties")}
        assert isinstance(info, (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType)), info
        return {"type": "array", "items": self._schema(info.item_type), **_lengths(info, "Items")}

    def _entries(self, key: inspect.Type, value: Schema) -> Schema:
        """Return what the properties of a dict may be: JSON's keys are text, of which other keys can be read."""
        if isinstance(key, inspect.AnyType) or (isinstance(key, inspect.StrType) and key.pattern is None):
            return {"additionalProperties": value}
        pattern = _key_pattern(key)
        if pattern is None:
            raise InvalidRequest(f"the keys of a dict must be single values, got {key}", field="type")
        return {"patternProperties": {f"^(?:{pattern})$": value}, "additionalProperties": False}

    def _definition(self, info: _Class) -> str:
        cls = info.cls
        if cls not in self._names:
            taken = {"JSON", *self._names.values()}
            base = re.sub(r"\W", "_", getattr(cls, "__name__", "T"))
            name = next(n for n in (base, *(f"{base}_{i}" for i in range(2, len(taken) + 2))) if n not in taken)
            self._names[cls] = name
            self._definitions[name] = {}
            self._definitions[name] = self._of_class(info)
        return self._names[cls]

    def _of_class(self, info: _Class) -> Schema:
        tag: dict[str, Schema] = {}
        if isinstance(info, inspect.StructType) and info.tag_field is not None:
            tag = {info.tag_field: {"const": info.tag}}
        fields = {field.encode_name: self._schema(field.type) for field in info.fields}
        required = [*tag, *(field.encode_name for field in info.fields if field.required)]
        if isinstance(info, inspect.NamedTupleType) or (isinstance(info, inspect.StructType) and info.array_like):
            return _tuple([*tag.values(), *fields.values()], len(required))
        return {
            "type": "object",
            "properties": {**tag, **fields},
            "required": required,
            "additionalProperties": False,
        }


_Class: TypeAlias = "inspect.StructType | inspect.DataclassType | inspect.TypedDictType | inspect.NamedTupleType"


def _of_scalar(info: inspect.Type) -> Schema | None:
    match info:
        case inspect.NoneType():
            return {"type": "null"}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.IntType() | inspect.FloatType():
            return _number(info)
        case inspect.EnumType(cls=cls):
            return {"enum": [member.value for member in cls]}
        case inspect.LiteralType(values=values):
            return {"enum": list(values)}
        case inspect.StrType(pattern=pattern):
            return {"type": "string", **({"pattern": pattern} if pattern else {}), **_lengths(info, "Length")}
        case inspect.BytesType() | inspect.ByteArrayType() | inspect.MemoryViewType():
            return text_matching(scalars.BASE64)
    text = _pattern_of_text(info)
    return None if text is None else text_matching(text)


def _pattern_of_text(info: inspect.Type) -> str | None:
    """Return the pattern of a type that JSON writes as text."""
    match info:
        case inspect.DateType():
            return scalars.DATE
        case inspect.TimeType(tz=tz):
            return scalars.clock(tz)
        case inspect.DateTimeType(tz=tz):
            return scalars.moment(tz)
        case inspect.TimeDeltaType():
            return scalars.DURATION
        case inspect.DecimalType():
            return scalars.DECIMAL
        case inspect.UUIDType():
            return scalars.UUID
    return None


def _key_pattern(info: inspect.Type) -> str | None:
    match info:
        case inspect.Metadata(type=inner):
            return _key_pattern(inner)
        case inspect.StrType(pattern=pattern):
            return pattern
        case inspect.IntType():
            return scalars.INT
        case inspect.EnumType(cls=cls):
            return "|".join(re.escape(str(member.value)) for member in cls)
        case inspect.LiteralType(values=values):
            return "|".join(re.escape(str(value)) for value in values)
    return _pattern_of_text(info)


def _number(info: inspect.IntType | inspect.FloatType) -> Schema:
    bounds = {"exclusiveMinimum": info.gt, "minimum": info.ge, "exclusiveMaximum": info.lt, "maximum": info.le}
    schema: Schema = {"type": "integer" if isinstance(info, inspect.IntType) else "number"}
    schema |= {name: value for name, value in bounds.items() if value is not None}
    if info.multiple_of is not None:
        schema["multipleOf"] = info.multiple_of
    return bounded(schema)


def _tuple(items: Sequence[Schema], required: int) -> Schema:
    return {
        "type": "array",
        "prefixItems": list(items),
        "minItems": required,
        "maxItems": len(items),
        "items": False,
    }


def _lengths(info: Any, what: str) -> Schema:
    bounds = {f"min{what}": info.min_length, f"max{what}": info.max_length}
    return {name: value for name, value in bounds.items() if value is not None}
