"""What a model's chat template writes around each message, without rendering the conversation again and again.

A template is rendered with marks in the place of the contents, once per sequence of roles, and cut at the marks:

    begin(("system",), "user")  + content +  end(("system", "user"))
    "<|im_start|>user\\n"                     "<|im_end|>\\n"

The pieces of a conversation, joined with its contents, are the template's own rendering of it. The exception is a
finished assistant message that the template writes otherwise than its generation prompt begins one (Qwen 3 puts an
empty <think> block there): the text is then what was really produced, generation prompt, content, end. A template whose
text before a message depends on later messages, beyond that, cannot be rendered in pieces; it is refused when that
shows.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bough.runtime.protocol import MAX_TOOLS_CHARS, RequestError
from bough.runtime.text.folder import Json, named_tokens, read_json, refuse

MAX_REMEMBERED: Final = 1024
# A role stands beside control tokens in the rendered text: only a plain word may stand there.
_ROLE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Plain letters and digits pass every filter that templates apply to a content (trim, split, 'in').
_MARK: Final = "Xq7bough{}hguob7qX"
_MARKS: Final = re.compile(r"Xq7bough(\d+)hguob7qX")


@dataclass(frozen=True)
class _Written:
    """A conversation as it was written: edges[i] is the text before content i, `tail` what follows the last."""

    edges: tuple[str, ...]
    tail: str


class ChatTemplate:
    """One model's chat template, by the rules of Hugging Face's `apply_chat_template`.

    special_tokens: bos_token, eos_token and the like, as text. now: what `strftime_now` tells; it is read once, so that
    a conversation renders the same before and after midnight. Raises RequestError("unsupported_model") if the template
    is not valid Jinja.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, str] | None = None, *, now: datetime.datetime | None = None
    ) -> None:
        moment = now or datetime.datetime.now()
        self._variables = dict(special_tokens or {})
        self._tools: list[dict[str, Any]] | None = None
        self._written: OrderedDict[tuple[str, ...], _Written] = OrderedDict()
        try:
            environment = _environment(moment)
            self._template = environment.from_string(template)
            self.has_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(template))
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestError("unsupported_model", f"chat template is not valid: {error}", field="model") from None

    def with_tools(self, definitions: str) -> ChatTemplate:
        """Return the template with the tools it tells of: a JSON array of definitions, as OpenAI's protocol has them.

        Raises RequestError("invalid_request") if that is something else, or if the template tells of no tools.
        """
        if not self.has_tools:
            raise RequestError("invalid_request", "this model's chat template does not tell of tools", field="tools")
        if len(definitions) > MAX_TOOLS_CHARS:
            raise _invalid("tools", f"at most {MAX_TOOLS_CHARS} characters", len(definitions))
        try:
            tools = json.loads(definitions)
        except (ValueError, RecursionError):
            tools = None
        if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
            raise _invalid("tools", "a JSON array of objects", definitions[:80])
        other = copy.copy(self)
        other._tools = tools
        other._written = OrderedDict()
        return other

    def begin(self, roles_before: tuple[str, ...], role: str) -> str:
        """Return the text between what was written for `roles_before` and the content of a new message of `role`.

        For the assistant this is the generation prompt. A template without one gets what it writes before a finished
        message, less trailing spaces (models that are trained on "[/INST] Hello" make the space themselves).
        Raises RequestError("invalid_request") with the template's own words, or if it cannot be rendered in pieces.
        """
        edge, tail = self._seam(roles_before, role)
        if not edge.startswith(tail):
            raise _not_in_pieces(
                (*roles_before, role), f"message {len(roles_before)} ({roles_before[-1]}) is followed by {edge!r} here"
            )
        return edge[len(tail) :]

    def between(self, roles_before: tuple[str, ...], role: str) -> tuple[str, str]:
        """Return the text after the last content of `roles_before`, and before that of a following message of `role`.

        Templates that write neighbouring messages as one (tool results, in Qwen's) end a message otherwise when they
        know the next: all of that is in the first text, and the second is empty. Raises like `begin`.
        """
        edge, tail = self._seam(roles_before, role)
        return (tail, edge[len(tail) :]) if edge.startswith(tail) else (edge, "")

    def _seam(self, roles_before: tuple[str, ...], role: str) -> tuple[str, str]:
        """Return all the text before a new message of `role`, and the part of it that is there without it."""
        return self._write((*roles_before, role)).edges[-1], self._write(roles_before).tail

    def end(self, roles: tuple[str, ...]) -> str:
        """Return the text after the content of the last of these messages. Raises like `begin`."""
        if not roles:
            raise _invalid("roles", "at least one message", roles)
        return self._write(roles).tail

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Return the whole conversation as `apply_chat_template(tokenize=False)` renders it. Raises like `begin`."""
        try:
            return self._template.render(
                messages=messages,
                tools=self._tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            roles = [message.get("role", "") for message in messages]
            raise RequestError(
                "invalid_request",
                f"the chat template refuses the roles {', '.join(roles)}: {error}",
                field="role",
                limit=str(error),
                value=repr(roles),
            ) from None

    def _write(self, roles: tuple[str, ...]) -> _Written:
        """Return how these messages are written one after the other; remembers the last 1,024 sequences of roles."""
        known = self._written.get(roles)
        if known is not None:
            self._written.move_to_end(roles)
            return known
        for role in roles:
            if not _ROLE.fullmatch(role):
                raise _invalid("role", "a word of at most 64 letters, digits, - and _", role)
        start = next((n for n in range(len(roles) - 1, 0, -1) if roles[:n] in self._written), 0)
        written = self._written[roles[:start]] if start else _Written((), "")
        for length in range(start + 1, len(roles) + 1):
            written = self._continue(written, roles[:length])
            self._written[roles[:length]] = written
            if len(self._written) > MAX_REMEMBERED:
                self._written.popitem(last=False)
        return written

    def _continue(self, before: _Written, roles: tuple[str, ...]) -> _Written:
        """Return `before` with the last of `roles` added, after checking that what is written still stands."""
        edges, tail = self._edges(roles)
        for index, (now, then) in enumerate(zip(edges, before.edges, strict=False)):
            if now != then and roles[index] != "assistant":
                raise _not_in_pieces(roles, f"message {index + 1} ({roles[index]}) is introduced by {now!r} here")
        edge = edges[-1]
        if roles[-1] == "assistant":
            edge = self._generation_prompt(roles[:-1], before) or _without_spaces(edge, len(before.tail))
        return _Written((*before.edges, edge), tail)

    def _generation_prompt(self, roles: tuple[str, ...], before: _Written) -> str | None:
        """Return the end of the last message and the generation prompt after it, None if the template has none."""
        if not roles:
            return None  # most templates look at the first message
        found = self._cut(roles, add_generation_prompt=True)
        if found is None or len(found[1]) <= len(before.tail):
            return None
        if not found[1].startswith(before.tail):
            raise _not_in_pieces(roles, f"the generation prompt changes what precedes it to {found[1]!r}")
        return found[1]

    def _edges(self, roles: tuple[str, ...]) -> tuple[list[str], str]:
        """Return the text before each content, and the text after the last one.

        A template that writes nothing for these roles alone (Llama 2: a system message belongs to the user's) is asked
        again with the messages that usually follow; the text after the last content is then left to the next message.
        """
        found = self._cut(roles)
        if found is not None:
            return found
        for following in (("user",), ("user", "assistant")):
            try:
                found = self._cut((*roles, *following))
            except RequestError:
                continue
            if found is not None:
                return found[0][: len(roles)], ""
        raise _not_in_pieces(roles, "it does not write each content once and in order")

    def _cut(self, roles: tuple[str, ...], *, add_generation_prompt: bool = False) -> tuple[list[str], str] | None:
        """Render marks as contents and cut there; None if a content is missing, repeated or moved."""
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        pieces = _MARKS.split(self.render(messages, add_generation_prompt=add_generation_prompt))
        if pieces[1::2] != [str(index) for index in range(len(roles))]:
            return None
        return pieces[:-1:2], pieces[-1]


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Load a model folder's chat template, None if it has none.

    Looked for, in transformers' order, in chat_template.jinja, tokenizer_config.json (a string, or the one named
    "default") and chat_template.json. Raises RequestError("unsupported_model") on files or a template it cannot read.
    """
    config = read_json(folder / "tokenizer_config.json")
    source = _from_file(folder) or _default(config) or _default(read_json(folder / "chat_template.json"))
    return ChatTemplate(source, named_tokens(folder, config)) if source else None


def _from_file(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise refuse(folder, f"{path.name} cannot be read: {error}") from None


def _default(config: Json) -> str | None:
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _without_spaces(edge: str, keep: int) -> str:
    return edge[:keep] + edge[keep:].rstrip(" ")


def _not_in_pieces(roles: tuple[str, ...], why: str) -> RequestError:
    return _invalid("role", f"rendered message by message, which this chat template does not allow: {why}", list(roles))


def _invalid(field: str, limit: str, value: object) -> RequestError:
    return RequestError(
        "invalid_request", f"{field} must be {limit}, got {value!r}", field=field, limit=limit, value=repr(value)
    )


# ----------------------------------------------------------------------------------------- transformers' environment


class _Generation(Extension):
    """{% generation %} marks what the assistant said, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> Any:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: datetime.datetime) -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers renders chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _clock(now)
    return environment


def _clock(now: datetime.datetime) -> Callable[[str], str]:
    return lambda form: now.strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
