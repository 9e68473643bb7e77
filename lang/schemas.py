"""JSON schemas of Python types, and JSON texts read back as their values.

msgspec knows the standard types and reads them; pydantic, where it is installed, its own models and what msgspec does
not take (a union of two dataclasses). The schema is ours in both cases: closed objects, dates and numbers that can be
read back, one way to write blanks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bough.errors import InvalidRequest, InvalidValue
from bough.msgspec_schemas import described_by_msgspec
from bough.pydantic_schemas import described_by_pydantic
from bough.schema_parts import name_of


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
        schema, self._decode = described_by_msgspec(type) or described_by_pydantic(type)
        self.schema = json.dumps(schema, ensure_ascii=False)
        check_schema(self.schema)

    def read(self, text: str) -> Any:
        """Return the value. Raises InvalidValue if the type's own checks refuse it."""
        try:
            return self._decode(text)
        except ValueError as error:  # msgspec's and pydantic's errors are ValueErrors
            raise InvalidValue(f"{name_of(self.type)} refuses {text!r}: {error}", text=text) from error
