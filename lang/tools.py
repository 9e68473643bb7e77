"""Tools: Python functions that a model may call, with what it is told of them and what it may give them.

The schema comes from the function: its name, its annotations, its docstring (an `Args:` section, or `:param x:` lines,
describe the parameters). Arguments are checked against the annotations, and arrive as the annotated types.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from bough.errors import InvalidRequest, ToolError

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_SECTION: Final = re.compile(r"^\s*(Args|Arguments|Parameters)\s*:\s*$", re.MULTILINE)
_ENTRY: Final = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(\S.*)$")
_PARAM: Final = re.compile(r"^\s*:param\s+(?:[\w\[\], ]+\s)?(\w+)\s*:\s*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ToolCall:
    """What a model wants called. arguments: as it gave them; text where it gave no JSON object. id: its own, if any."""

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


@dataclass(frozen=True)
class ToolResult:
    """What came of a call: the function's value, or the error; `text` is what the model is shown."""

    call: ToolCall
    text: str
    value: Any = None
    error: ToolError | None = None


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; made by `tool`.

    description: the docstring's first paragraph. parameters: a JSON Schema of an object. is_async: `async def`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    is_async: bool
    _struct: type[msgspec.Struct] = field(repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, as if it were not a tool: what it raises is raised, arguments are not checked."""
        return self.function(*args, **kwargs)

    def definition(self) -> dict[str, Any]:
        """Return the tool as chat templates and OpenAI's protocol write it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}

    def signature(self) -> str:
        """Return `name(x, y): description`, in one line."""
        about = " ".join(self.description.split())
        return f"{self.name}({', '.join(self.parameters['properties'])})" + (f": {about}" if about else "")

    def check(self, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
        """Return the arguments as the annotated types; those not given are left out.

        A text is the value of a tool's only parameter, and nothing for a tool without. Raises ToolError naming the
        argument, what it must be and what it is.
        """
        names = list(self.parameters["properties"])
        given = arguments
        if isinstance(given, str):
            if len(names) > 1:
                raise ToolError(
                    f"{self.name} takes {', '.join(names)}: give them as a JSON object, got {given!r}", tool=self.name
                )
            if not names and given.strip():
                raise ToolError(f"{self.name} takes no arguments, got {given!r}", tool=self.name)
            given = {name: given for name in names}
        try:
            checked = msgspec.convert(dict(given), self._struct, strict=isinstance(arguments, Mapping), dec_hook=_read)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `$.")
            name = f"argument {where.rstrip('`')}: " if where else ""
            raise ToolError(f"{self.name}: {name}{what}", tool=self.name, arguments=given) from error
        return {name: getattr(checked, name) for name in names if name in given}


def tool(function: Callable[..., Any] | Tool, *, name: str | None = None, description: str | None = None) -> Tool:
    """Make a tool of a function whose parameters are annotated.

    ::

        def weather(city: str, days: int = 1) -> str:
            '''Tells the weather.

            Args:
                city: a town, in English
                days: how many days ahead
            '''
            return "sun"

        bo.tool(weather).parameters["required"]      # ["city"]

    name, description: in place of the function's own. Raises InvalidRequest naming the parameter that has no
    annotation, a type without a JSON Schema, or no name (`*args`).
    """
    if isinstance(function, Tool):
        return function
    if not callable(function):
        raise InvalidRequest(f"a tool must be a function, got {function!r}", field="tools")
    title = str(name or getattr(function, "__name__", ""))
    if not _NAME.fullmatch(title):
        raise InvalidRequest(f"a tool's name must be at most 64 letters, digits, _ and -, got {title!r}", field="name")
    summary, about = _documented(inspect.getdoc(function) or "")
    struct = _struct(title, function, about)
    is_async = inspect.iscoroutinefunction(function)
    return Tool(title, description or summary, _schema(title, struct), function, is_async, struct)


def tools_of(given: object) -> dict[str, Tool]:
    """Return tools by name. Raises InvalidRequest for none, and for two of one name."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise InvalidRequest(f"tools must be a list of functions that is not empty, got {given!r}", field="tools")
    found: dict[str, Tool] = {}
    for function in given:
        made = tool(function)
        if made.name in found:
            raise InvalidRequest(f"two tools are called {made.name!r}", field="tools")
        found[made.name] = made
    return found


def shown(value: object) -> str:
    """Return a tool's value as the model is shown it: text as it is, anything else as JSON where it can be."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value, enc_hook=_write).decode()
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return str(value)


# ----------------------------------------------------------------------------------------------- schemas


def _struct(title: str, function: Callable[..., Any], about: Mapping[str, str]) -> type[msgspec.Struct]:
    """Return a struct with the function's parameters as fields."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise InvalidRequest(f"tool {title}: its annotations cannot be read: {error}", field="tools") from error
    fields: list[Any] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidRequest(f"tool {title}: {parameter} cannot be given by name", field="tools")
        if parameter.name not in hints:
            raise InvalidRequest(f"tool {title}: the parameter {parameter.name!r} needs an annotation", field="tools")
        hint = hints[parameter.name]
        if parameter.name in about:
            hint = typing.Annotated[hint, msgspec.Meta(description=about[parameter.name])]
        has_default = parameter.default is not parameter.empty
        fields.append((parameter.name, hint, _default(parameter.default)) if has_default else (parameter.name, hint))
    return msgspec.defstruct(title.replace("-", "_"), fields, kw_only=True, forbid_unknown_fields=True)


def _default(value: object) -> Any:
    """Return a default that msgspec takes: it refuses mutable ones that are not empty. Only whether there is one
    counts: what was not given is not passed."""
    return None if isinstance(value, (list, dict, set, bytearray)) else value


def _schema(title: str, struct: type[msgspec.Struct]) -> dict[str, Any]:
    foreign: dict[str, Any] = {}

    def of_foreign(kind: Any) -> dict[str, Any]:
        schema = _foreign(kind)
        foreign.update(schema.pop("$defs", {}))  # its references are meant from the top
        return schema

    try:
        (_,), parts = msgspec.json.schema_components((struct,), schema_hook=of_foreign, ref_template="#/$defs/{name}")
    except TypeError as error:
        raise InvalidRequest(f"tool {title}: {error}", field="tools") from error
    top = dict(parts.pop(struct.__name__))
    top.pop("title", None)
    schema = {"type": "object", "properties": {}, "required": [], **top}
    for about in schema["properties"].values():
        about.pop("default", None)
    definitions = {**parts, **foreign}
    return {**schema, "$defs": definitions} if definitions else schema


def _foreign(kind: Any) -> dict[str, Any]:
    """Return the schema of a pydantic model; msgspec asks for what it does not know."""
    if hasattr(kind, "model_json_schema"):
        schema: dict[str, Any] = kind.model_json_schema()
        return schema
    raise TypeError(f"{kind!r} has no JSON Schema")


def _read(kind: Any, value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        try:
            return kind.model_validate(value)
        except ValueError as error:
            raise ValueError(str(error)) from error
    raise NotImplementedError(f"{kind!r} cannot be read from JSON")


def _write(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise NotImplementedError


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """Return a docstring's first paragraph, and what it says of parameters."""
    about = {name: said.strip() for name, said in _PARAM.findall(text)}
    section = _SECTION.search(text)
    if section is not None:
        for line in text[section.end() :].splitlines()[1:]:
            entry = _ENTRY.match(line)
            if entry is not None:
                about[entry[1]] = entry[2].strip()
            elif not line.strip() or not line[:1].isspace():
                break
    return " ".join(text.partition("\n\n")[0].split()) if not _PARAM.match(text) else "", about
