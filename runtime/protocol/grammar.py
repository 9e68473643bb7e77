"""What the text of a `generate` must match."""

from __future__ import annotations

from typing import Literal

import msgspec

from bough.runtime.protocol.errors import invalid
from bough.runtime.protocol.limits import MAX_GRAMMAR_CHARS

GrammarKind = Literal["regex", "json_schema", "lark", "choices"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the text of a `generate` must match, from its first character to its last.

    kind and source: "regex": a regular expression (Rust's `regex-syntax`, no look-around, no back-references);
    "json_schema": a JSON Schema as JSON text; "lark": a grammar in llguidance's Lark dialect, whose rules may be marked
    `rule[capture]` or `rule[capture="name"]`; "choices": a JSON array of strings, of which the text is one.
    source has at most MAX_GRAMMAR_CHARS characters.
    on_limit: what happens when `max_tokens` nears before the text is whole. "truncate": it ends there, marked not whole
    (`Generated.is_whole`); "close": it is closed by a short accepting path that still fits.
    jump_forward: tokens that the grammar forces are computed together; without, one by one. The tokens are the same.
    """

    kind: GrammarKind
    source: str
    on_limit: Literal["truncate", "close"] = "truncate"
    jump_forward: bool = True

    def check(self) -> None:
        """Raise `RequestError("invalid_request")` if the source is empty or too long."""
        if not 1 <= len(self.source) <= MAX_GRAMMAR_CHARS:
            size = f"{len(self.source)} characters"
            raise invalid("grammar", f"1 to {MAX_GRAMMAR_CHARS} characters of {self.kind}", size)
