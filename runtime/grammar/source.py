"""From the wire's `Grammar` to llguidance's own text; what is wrong with a grammar, in our words. Pure."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, Final

import llguidance

from bough.runtime.protocol import Grammar, RequestError

JSON_STYLE: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": '"\\nrbtf',
}
"""How JSON is written: as json.dumps writes it. With one spelling of white space the names of fields are forced, and no
text is all blanks. There is no \\u among the escapes: half of a surrogate pair is no text. `bough.lark_source` has the
same."""
_KEYWORDS: Final = re.compile(r"Unimplemented keys: \[(.*)\]")
_TOO_LARGE: Final = re.compile(r"too large|too big|limit|fuel|too many|too complex|nested too deeply", re.IGNORECASE)
_MOST_DEPTH: Final = 128
_QUOTED: Final = re.compile(r'"(?:[^"\\\n]|\\.)+"')
_MOST_LITERALS: Final = 64


def llguidance_text(grammar: Grammar, before: str = "") -> str:
    """Return the grammar as llguidance's JSON; `before`: literal text that comes before what the grammar matches.

    Raises RequestError("invalid_request") naming field, keyword and value for what can be told without compiling.
    """
    grammar.check()
    body = _body(grammar)
    if before:
        body["name"] = "body"
        top = {"lark_grammar": f"start: {_literal(before)} @body"}
        return json.dumps({"grammars": [top, body]})
    return json.dumps({"grammars": [body]})


def _body(grammar: Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "regex":
            return {"lark_grammar": f"start: /{llguidance.regex_to_lark(grammar.source, '')}/"}
        case "lark":
            return {"lark_grammar": grammar.source}
        case "choices":
            return {"lark_grammar": "start: " + " | ".join(map(_literal, _choices(grammar.source)))}
        case "json_schema":
            return {"json_schema": _schema(grammar.source)}


def literals_of(grammar: Grammar) -> tuple[str, ...]:
    """Return the quoted texts of Lark source, each once, some dozens at most: what free text may end with."""
    if grammar.kind != "lark":
        return ()
    found: dict[str, None] = {}
    for quoted in _QUOTED.findall(grammar.source):
        with contextlib.suppress(ValueError):  # an escape that JSON does not have
            found[json.loads(quoted)] = None
    return tuple(found)[:_MOST_LITERALS]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _choices(source: str) -> list[str]:
    choices = _parsed("choices", source)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise refused("choices", "a JSON array of non-empty strings", source[:200])
    return choices


def _schema(source: str) -> dict[str, Any]:
    schema = _parsed("json_schema", source)
    if schema is True:
        schema = {}
    if schema is False or not isinstance(schema, dict):
        raise refused("json_schema", "a JSON object that something satisfies", source[:200])
    _check_schema(schema, "#", 0)
    return {**schema, "x-guidance": JSON_STYLE}


def _parsed(kind: str, source: str) -> Any:
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise refused(kind, f"JSON ({error})", source[:200]) from None


def _check_schema(schema: Any, where: str, depth: int) -> None:
    """Refuse what llguidance would take without a word though it changes what is valid."""
    if depth > _MOST_DEPTH:
        raise refused("json_schema", f"nested at most {_MOST_DEPTH} deep", where[:200])
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            _check_schema(item, f"{where}/{index}", depth + 1)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("items"), list):
        raise _unsupported("items", where, "an array of schemas (write it as prefixItems)")
    if "x-guidance" in schema:
        raise _unsupported("x-guidance", where, "options of another library")
    for key, value in schema.items():
        if key not in ("const", "enum", "default", "examples"):
            _check_schema(value, f"{where}/{key}", depth + 1)


def _unsupported(keyword: str, where: str, what: str) -> RequestError:
    return RequestError(
        "invalid_request",
        f"json_schema: {keyword!r} at {where} is not supported as {what}",
        field="grammar",
        keyword=keyword,
        where=where,
    )


def refused(kind: str, limit: str, value: object) -> RequestError:
    """Return the error of a grammar that is not one."""
    return RequestError(
        "invalid_request", f"{kind} must be {limit}, got {value!r}", field="grammar", limit=limit, value=repr(value)
    )


def translated(kind: str, message: str) -> RequestError:
    """Return our error for one of llguidance's messages."""
    lines = message.strip().splitlines() or ["unknown error"]
    reasons = [line for line in lines[1:] if line.startswith("error: ")]  # a regular expression's, after a drawing
    first = "; ".join([lines[0].rstrip(": "), *reasons])[:500]
    keywords = _KEYWORDS.search(first)
    if keywords:
        named = keywords.group(1).replace('"', "")
        return RequestError(
            "invalid_request", f"{kind}: not supported: {named}", field="grammar", keyword=named, reason="unsupported"
        )
    if _TOO_LARGE.search(first):
        return too_complex(kind, first)
    return RequestError("invalid_request", f"{kind}: {first}", field="grammar", reason="invalid")


def too_complex(kind: str, what: str) -> RequestError:
    """Return the error of a grammar that costs more than the runtime spends on one."""
    return RequestError("invalid_request", f"{kind} is too complex: {what}", field="grammar", reason="too_complex")
