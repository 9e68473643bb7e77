"""What the schemas of types are made of, whether msgspec or pydantic describes the type."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from bough import scalars

Schema: TypeAlias = dict[str, Any]

JSON: Final[Schema] = {"$ref": "#/$defs/JSON"}
ANY: Final[Schema] = {
    "anyOf": [
        {"type": "object", "additionalProperties": JSON},
        {"type": "array", "items": JSON},
        {"type": "string"},
        {"type": "number", "minimum": -scalars.MAX_JSON_FLOAT, "maximum": scalars.MAX_JSON_FLOAT},
        {"type": "boolean"},
        {"type": "null"},
    ]
}
"""Any JSON, as the definition `JSON`."""


def name_of(type: Any) -> str:
    """Return a type as one writes it."""
    return type.__qualname__ if hasattr(type, "__qualname__") and not hasattr(type, "__args__") else repr(type)


def bounded(schema: Schema) -> Schema:
    """Return the schema of a number with the bounds that it lacks, where they leave it any value."""
    limit = scalars.MAX_INT if schema["type"] == "integer" else scalars.MAX_JSON_FLOAT
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    if least is None and (most is None or most > -limit):
        schema = {**schema, "minimum": -limit}
    if most is None and (least is None or least < limit):
        schema = {**schema, "maximum": limit}
    return schema


def text_matching(pattern: str) -> Schema:
    """Return the schema of a text that a regular expression matches as a whole."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}
