"""Schemas of the types that pydantic describes, made so that what they let through can be read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from bough import scalars
from bough.errors import InvalidRequest
from bough.schema_parts import ANY, JSON, Schema, bounded, name_of, text_matching
from bough.type_limits import refuse_meta


def described_by_pydantic(type: Any) -> tuple[Schema, Callable[[str], Any]]:
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
        schema = dict(_tightened(adapter.json_schema(schema_generator=_generator())))  # it may be JSON itself
        if JSON in _values(schema):
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
            return text_matching(scalars.DECIMAL)

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
        return JSON
    if "properties" in out:
        out.setdefault("additionalProperties", False)
    if out.get("type") in ("integer", "number"):
        out = bounded(out)
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
