"""Random JSON schemas of the kind that programs write: everything that grammars support, nested."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)$", "[0-9]+", "^a.*z$", "^[a-f0-9]{8}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
NAMES = ("name", "age", "size of it", "k\u00fcche", "x", "y", 'q"', "list")


class Schemas:
    """A stream of schemas from one seed; each is satisfiable."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def next(self) -> dict[str, Any]:
        """Return a schema, some with definitions that it refers to."""
        schema = self._object(3) if self._rng.random() < 0.7 else self._any(3)
        if self._rng.random() < 0.3:
            schema = {
                "type": "object",
                "properties": {"value": schema, "tree": {"$ref": "#/$defs/node"}},
                "required": ["value", "tree"],
                "additionalProperties": False,
                "$defs": {"node": self._node()},
            }
        return schema

    def _node(self) -> dict[str, Any]:
        """A recursive definition."""
        below: dict[str, Any] = {
            "type": "array",
            "items": {"$ref": "#/$defs/node"},
            "maxItems": self._rng.randint(0, 2),
        }
        either = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        return {
            "type": "object",
            "properties": {"leaf": self._scalar(), "below": self._rng.choice([below, either])},
            "required": ["leaf", *(["below"] if self._rng.random() < 0.5 else [])],
            "additionalProperties": False,
        }

    def _any(self, depth: int) -> dict[str, Any]:
        makers = [self._scalar, self._scalar, self._scalar]
        if depth > 0:
            makers += [lambda: self._object(depth - 1), lambda: self._array(depth - 1), lambda: self._either(depth - 1)]
        return self._rng.choice(makers)()

    def _scalar(self) -> dict[str, Any]:
        return self._rng.choice([self._string, self._integer, self._number, self._enum, self._plain])()

    def _plain(self) -> dict[str, Any]:
        return self._rng.choice(
            [{"type": "boolean"}, {"type": "null"}, {"const": self._rng.choice([3, "x", None, [1, "a"], {"k": True}])}]
        )

    def _string(self) -> dict[str, Any]:
        kind = self._rng.random()
        if kind < 0.3:
            return {"type": "string", "pattern": self._rng.choice(PATTERNS)}
        if kind < 0.5:
            return {"type": "string", "format": self._rng.choice(FORMATS)}
        low = self._rng.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + self._rng.randint(0, 12)}

    def _integer(self) -> dict[str, Any]:
        low = self._rng.randint(-1000, 1000)
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + self._rng.randint(0, 5000)}
        if self._rng.random() < 0.2:
            schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 10}
        if self._rng.random() < 0.2:
            schema = {"type": "integer", "multipleOf": self._rng.randint(2, 7), "minimum": 0, "maximum": 500}
        return schema

    def _number(self) -> dict[str, Any]:
        low = round(self._rng.uniform(-50, 50), 2)
        return {"type": "number", "minimum": low, "maximum": round(low + self._rng.uniform(0.5, 100), 2)}

    def _enum(self) -> dict[str, Any]:
        values = ["red", "a b", 'quo"te', "\u00e9t\u00e9", 1, 2.5, None, True, [1], {"a": "b"}]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 4))}

    def _array(self, depth: int) -> dict[str, Any]:
        low = self._rng.randint(0, 2)
        schema = {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._rng.randint(0, 2),
        }
        if self._rng.random() < 0.2:
            schema = {
                "type": "array",
                "prefixItems": [self._any(depth), self._any(depth)],
                "items": False,
                "minItems": 2,
            }
        return schema

    def _either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._rng.randint(2, 3))]}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._rng.sample(
            ["name", "age", "size of it", "k\u00fcche", "x", "y", 'q"', "list"], self._rng.randint(1, 4)
        )
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._rng.random() < 0.7],
            "additionalProperties": False,
        }
        kind = self._rng.random()
        if kind < 0.1:
            schema |= {"additionalProperties": {"type": "integer"}, "required": names, "maxProperties": len(names) + 1}
        elif kind < 0.2:
            schema = {"allOf": [schema, {"type": "object", "required": names[:1]}]}
        return schema
