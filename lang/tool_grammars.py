"""What a model may write in a turn in which it can call tools: free text, and calls that can be read and carried out.

A call that begins is a call of a tool there is, with arguments that fit it; everything else stays free. The grammars
hold to what `bough.tool_formats` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bough.errors import InvalidRequest
from bough.grammar_nodes import Grammar, Json, lit
from bough.grammars import json_schema, many, one_of, optional, rx, separated, until
from bough.tool_formats import ToolFormat
from bough.tools import Tool

_BARE: Final[Mapping[str, str]] = {
    "string": r"([^\n{][^\n]*)?",  # a brace begins a JSON object
    "integer": "-?(0|[1-9][0-9]{0,17})",
    "number": r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?",
    "boolean": "true|false",
}
"""How an only argument is written as it is, by its type."""

_OPEN: Final = "<tool_call>"


def turn_grammar(tools: Iterable[Tool], form: ToolFormat) -> Grammar:
    """Return the grammar of a turn in which these tools may be called."""
    return _text_turn(list(tools)) if form == "text" else _template_turn(list(tools))


def _text_turn(tools: list[Tool]) -> Grammar:
    """Lines, of which those that begin with "Action" are calls."""
    bare, as_object = [], []
    for tool in tools:
        head, pattern = f"Action: {tool.name}[", _bare(tool)
        if pattern is None:
            as_object.append((head, _arguments(tool)))
        else:
            bare.append(head + rx(pattern) + "]")
    line = one_of([rx(_no_line_with("Action")), *bare])
    turns = [separated(line, "\n")]
    more = one_of(["\n" + call for call in bare] + [f"\n{head}" + given + "]" for head, given in as_object])
    # The text before a call with an object and the call's head are one lexeme: nobody knows of a line that begins with
    # "A" which of both it is.
    turns += [many(line + "\n") + head + given + "]" + many(more) for head, given in as_object]
    return one_of(turns)


def _template_turn(tools: list[Tool]) -> Grammar:
    """Text, then calls as JSON in tags; a model that marks its calls in another way is free to."""
    call = one_of([_call(tool) for tool in tools])
    inside = optional("\n") + call + optional("\n") + "</tool_call>"
    first = until(_OPEN) + _OPEN + inside
    return one_of([until(_OPEN), first + many(optional("\n") + lit(_OPEN) + inside)])


def _bare(tool: Tool) -> str | None:
    """Return the pattern of an only argument that is written as it is; None where a JSON object is needed."""
    properties = tool.parameters["properties"]
    if not properties:
        return ""
    if len(properties) > 1:
        return None
    (schema,) = properties.values()
    is_plain = schema.keys() <= {"type", "description", "title"}
    return _BARE.get(schema.get("type")) if is_plain else None


def _no_line_with(word: str) -> str:
    """Return a pattern of the lines that do not begin with a word, blanks aside."""
    parts = [rf"([^{word[0]} \t\n][^\n]*)?"]
    parts += [rf"{word[:end]}([^{word[end]}\n][^\n]*)?" for end in range(1, len(word))]
    return rf"[ \t]*({'|'.join(parts)})"


def _arguments(tool: Tool) -> Grammar:
    return _json(dict(tool.parameters))


def _call(tool: Tool) -> Grammar:
    arguments = dict(tool.parameters)
    definitions = arguments.pop("$defs", None)
    properties = {"name": {"const": tool.name}, "arguments": arguments}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return _json({**schema, "$defs": definitions} if definitions else schema, tool.name)


def _json(schema: dict[str, Any], name: str | None = None) -> Grammar:
    """Return the texts of a schema; of one with keywords that cannot be kept to, any object: it is checked anyway."""
    try:
        return json_schema(schema)
    except InvalidRequest:
        if name is None:
            return Json('{"type": "object"}')
        return json_schema({"type": "object", "properties": {"name": {"const": name}, "arguments": {"type": "object"}},
                            "required": ["name", "arguments"], "additionalProperties": False})  # fmt: skip
