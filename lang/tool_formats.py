"""How tools are told to a model, and how its calls are read.

"template": the definitions go through the chat template's own `tools` variable, and calls come as models are trained to
write them: JSON in <tool_call> tags (Hermes, Qwen), after [TOOL_CALLS] (Mistral), or alone (Llama 3.1).

"text": for all other models, plain words in the system message, and a call is a line::

    Action: calculator[17 + 25]                         the only argument, as it is
    Action: weather[{"city": "Oslo", "days": 2}]        arguments as a JSON object
    Answer: 42
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final, Literal, TypeAlias

from bough.tools import Tool, ToolCall

ToolFormat: TypeAlias = Literal["text", "template"]
TOOL_FORMATS: Final[tuple[ToolFormat, ...]] = ("text", "template")

_ACTION: Final = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*([\w-]+)[ \t]*(?:\[(.*)\]|\((.*)\))[ \t]*$", re.MULTILINE)
_ANSWER: Final = re.compile(r"^[ \t]*Answer[ \t]*:[ \t]*(.*)", re.MULTILINE | re.DOTALL)
_TAGGED: Final = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL: Final = "[TOOL_CALLS]"
_PYTHON_TAG: Final = "<|python_tag|>"


def described(tools: Iterable[Tool]) -> str:
    """Return the words that tell a model of its tools, for the format "text"."""
    each = list(tools)
    lines = ["You can use these tools:", *(tool.signature() for tool in each)]
    if any(len(tool.parameters["properties"]) > 1 for tool in each):
        lines.append('Several arguments are a JSON object: tool[{"name": value}].')
    lines.append("Write Thought and Action: tool[argument], or Thought and Answer.")
    return "\n".join(lines)


def text_calls(text: str) -> list[ToolCall]:
    """Return the calls of a turn in the format "text"; none after an answer."""
    answer = _ANSWER.search(text)
    actions = _ACTION.finditer(text, 0, len(text) if answer is None else answer.start())
    return [ToolCall(match[1], _arguments(match[2] if match[2] is not None else match[3])) for match in actions]


def text_answer(text: str) -> str:
    """Return what follows "Answer:", or the whole text."""
    answer = _ANSWER.search(text)
    return (text if answer is None else answer[1]).strip()


def template_calls(text: str) -> list[ToolCall]:
    """Return the calls of a turn as models with a `tools` template write them.

    A call that is not JSON is a call of the tool "" with the text as arguments, so that the model can be told.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        return [call for part in tagged for call in _json_calls(part) or [ToolCall("", part)]]
    if _MISTRAL in text:
        part = text.partition(_MISTRAL)[2].strip()
        return _json_calls(part) or [ToolCall("", part)]
    return _json_calls(text.replace(_PYTHON_TAG, "").strip()) or []


def template_answer(text: str) -> str:
    """Return the text without blanks at its ends."""
    return text.strip()


def _arguments(inside: str) -> dict[str, Any] | str:
    try:
        found = json.loads(inside)
    except ValueError:
        return inside
    return found if isinstance(found, dict) else inside


def _json_calls(text: str) -> list[ToolCall] | None:
    """Return the calls that a JSON text is, None if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls = []
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            return None
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _arguments(arguments)
        if not isinstance(arguments, (dict, str)):
            return None
        calls.append(ToolCall(one["name"], arguments, one.get("id")))
    return calls
