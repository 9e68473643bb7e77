"""JSON schemas of Python types, and JSON texts read back as their values.

msgspec knows the standard types and reads them; pydantic, where it is installed, its own models and what msgspec does
not take (a union of two dataclasses). The schema is ours in both cases: closed objects, dates and numbers that can be
read back, one way to write blanks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import inspect

from bough import scalars
from bough.errors import InvalidRequest, InvalidValue
from bough.type_limits import needs_pydantic, refuse_meta

Schema: TypeAlias = dict[str, Any]

_JSON: Final[Schema] = {"$ref": "#/$defs/JSON"}
ANY: Final[Schema] = {
    "anyOf": [
        {"type": "object", "additionalProperties": _JSON},
        {"type": "array", "items": _JSON},
        {"type": "string"},
        {"type": "number", "minimum": -scalars.MAX_JSON_FLOAT, "maximum": scalars.MAX_JSON_FLOAT},
        {"type": "boolean"},
        {"type": "null"},
    ]
}
"""Any JSON, as the definition `JSON`."""


def schema_text(schema: object) -> str:
    """Return a schema, given as JSON text, a dict or a pydantic model, as checked JSON text.

    Raises InvalidRequest naming what is wrong, or the keyword that cannot be kept to.
    """
    from bough.acceptor import check_schema

    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return Reading(schema).schema
    parsed: object = schema
    if isinstance(schema, str):
        try:
            parsed = json.loads(schema)
        except ValueError as error:
            raise InvalidRequest(f"json_schema is not JSON: {error}", field="json_schema") from None
    if parsed is True:
        parsed = {}
    if isinstance(parsed, Mapping) and "x-guidance" in parsed:
        raise InvalidRequest("json_schema: options under 'x-guidance' are not supported", field="json_schema")
    if not isinstance(parsed, Mapping):
        raise InvalidRequest(
            f"json_schema must be a dict, its JSON text or a pydantic model, got {schema!r}", field="json_schema"
        )
    try:
        text = json.dumps(parsed, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"json_schema cannot be written as JSON: {error}", field="json_schema") from None
    check_schema(text)
    return text


class Reading:
    """A type as JSON: its `schema` (JSON text), and `read`, which makes a value of a text of that schema."""

    __slots__ = ("_decode", "schema", "type")

    def __init__(self, type: Any) -> None:
        """Raises InvalidRequest naming the part of the type that has no JSON form."""
        from bough.acceptor import check_schema

        self.type = type
        schema, self._decode = _of_msgspec(type) or _of_pydantic(type)
        self.schema = json.dumps(schema, ensure_ascii=False)
        check_schema(self.schema)

    def read(self, text: str) -> Any:
        """Return the value. Raises InvalidValue if the type's own checks refuse it."""
        try:
            return self._decode(text)
        except ValueError as error:  # msgspec's and pydantic's errors are ValueErrors
            raise InvalidValue(f"{name_of(self.type)} refuses {text!r}: {error}", text=text) from error


def name_of(type: Any) -> str:
    """Return a type as one writes it."""
    return type.__qualname__ if hasattr(type, "__qualname__") and not hasattr(type, "__args__") else repr(type)


# ---------------------------------------------------------------------------------------------- msgspec


def _of_msgspec(type: Any) -> tuple[Schema, Callable[[str], Any]] | None:
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
            return _pattern(scalars.BASE64)
    text = _pattern_of_text(info)
    return None if text is None else _pattern(text)


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
    return _bounded(schema)


def _bounded(schema: Schema) -> Schema:
    """Return the schema of a number with the bounds that it lacks, where they leave it any value."""
    limit = scalars.MAX_INT if schema["type"] == "integer" else scalars.MAX_JSON_FLOAT
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    if least is None and (most is None or most > -limit):
        schema = {**schema, "minimum": -limit}
    if most is None and (least is None or least < limit):
        schema = {**schema, "maximum": limit}
    return schema


def _pattern(text: str) -> Schema:
    return {"type": "string", "pattern": f"^(?:{text})$"}


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


# ---------------------------------------------------------------------------------------------- pydantic


def _of_pydantic(type: Any) -> tuple[Schema, Callable[[str], Any]]:
    """Return schema and reader of a type that pydantic knows. Raises InvalidRequest for any other."""
    try:
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticUserError
    except ImportError:
        raise InvalidRequest(
            f"{_culprit(type)} has no JSON form that msgspec knows; pydantic, which knows more, is not installed",
            field="type",
        ) from None
    try:
        refuse_meta(type)
        adapter: TypeAdapter[Any] = TypeAdapter(type)
        schema = dict(_tightened(adapter.json_schema(schema_generator=_generator())))  # it may be _JSON itself
        if _JSON in _values(schema):
            schema.setdefault("$defs", {})["JSON"] = ANY
    except (PydanticUserError, TypeError, NameError, AttributeError) as error:
        why = str(error).partition("\n")[0]
        raise InvalidRequest(f"{_culprit(type)} has no JSON form: {why}", field="type", value=repr(type)) from error
    return schema, adapter.validate_json


def _generator() -> Any:
    """Return pydantic's generator of schemas, with a form for decimals and none for complex numbers."""
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            return _pattern(scalars.DECIMAL)

        def complex_schema(self, schema: Any) -> dict[str, Any]:
            return self.handle_invalid_for_json_schema(schema, "complex")

    return Generator


_FORMATS: Final[Mapping[str, str]] = {
    "date": scalars.DATE,
    "time": scalars.clock(None),
    "date-time": scalars.moment(None),
    "uuid": scalars.UUID,
    "duration": scalars.DURATION,
    "binary": r"[ -!#-\[\]-~]*",
}


def _tightened(schema: Any) -> Any:
    """Return a schema of pydantic with everything pinned down that could not be read back."""
    if not isinstance(schema, Mapping):
        return schema
    out: Schema = {}
    for key, value in schema.items():
        if key in ("properties", "$defs", "patternProperties"):
            out[key] = {name: _tightened(part) for name, part in value.items()}
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            out["anyOf" if key == "oneOf" else key] = [_tightened(part) for part in value]
        elif key in ("items", "additionalProperties"):
            out[key] = _tightened(value)
        elif key not in ("title", "description", "discriminator", "uniqueItems", "default", "examples"):
            out[key] = value
    if not out:
        return _JSON
    if "properties" in out:
        out.setdefault("additionalProperties", False)
    if out.get("type") in ("integer", "number"):
        out = _bounded(out)
    if out.get("type") == "string" and out.get("format") in _FORMATS:
        out["pattern"] = f"^(?:{_FORMATS[out.pop('format')]})$"
    return out


def _values(schema: Any) -> list[Any]:
    """Return everything inside a schema that is a schema, or could be one."""
    found, waiting = [], [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            found.append(part)
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return found


def _culprit(type: Any) -> str:
    """Return the innermost part of a type that cannot be, by name."""
    import typing

    for part in typing.get_args(type):
        if part is not Ellipsis and not isinstance(part, (str, int, bytes)) and not _is_known(part):
            return f"{_culprit(part)} in {name_of(type)}"
    hints = getattr(type, "__annotations__", {}) if hasattr(type, "__mro__") else {}
    for name, part in hints.items():
        if not isinstance(part, str) and not _is_known(part):
            return f"{_culprit(part)} (field {name!r} of {name_of(type)})"
    return name_of(type)


def _is_known(part: Any) -> bool:
    try:
        msgspec.json.schema(part)
    except (TypeError, NameError):
        return False
    return True
