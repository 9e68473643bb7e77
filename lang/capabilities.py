"""What a backend that is not bough's own runtime can do; what it cannot is an error that names the capability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from bough.errors import InvalidRequest, UnsupportedByBackend
from bough.runtime.protocol import Grammar, SamplingParams

EVERYWHERE: Final = frozenset(
    {"max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "stop"}
)
"""Sampling parameters that OpenAI's protocol itself has."""

EXTENSIONS: Final = frozenset(
    {"min_tokens", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "stop_regex", "ignore_eos"}
    | {"regex", "json_schema", "lark", "choices", "continue_final_message"}
)
"""What servers add to the protocol, each in its own words."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend declares.

    roles: messages. plain_text: generating outside messages. logprobs: of what is generated. select: scoring given
    choices exactly. extensions: what the server takes beyond the protocol, by our name, and its own name for it.
    json_schema: whether the protocol's `response_format` may be used. tools: whether its `tools` may.
    """

    roles: bool
    plain_text: bool
    select: bool
    json_schema: bool
    tools: bool = False
    logprobs: bool = True
    extensions: Mapping[str, str] = field(default_factory=dict)

    @property
    def sampling(self) -> frozenset[str]:
        """The sampling parameters that may differ from their defaults."""
        return EVERYWHERE | (EXTENSIONS & self.extensions.keys())

    def check_sampling(self, params: SamplingParams) -> None:
        """Raise UnsupportedByBackend for the first parameter that asks for what the server does not know."""
        defaults = SamplingParams()
        for name in SamplingParams.__struct_fields__:
            if name == "logprobs":
                if params.logprobs is not None:
                    require(self.logprobs, "logprobs", "return log-probabilities")
            elif getattr(params, name) != getattr(defaults, name):
                require(name in self.sampling, name, f"sample with {name}={getattr(params, name)!r}")

    def check_grammar(self, grammar: Grammar | None) -> None:
        """Raise UnsupportedByBackend for a constraint that the server does not know."""
        if grammar is None:
            return
        has_it = grammar.kind in self.extensions or (grammar.kind == "json_schema" and self.json_schema)
        require(has_it, grammar.kind, f"constrain what it generates by {grammar.kind}")
        require(grammar.on_limit == "truncate", "on_limit", "close a constrained text when max_tokens nears")


def require(is_there: bool, capability: str, what: str) -> None:
    """Raise UnsupportedByBackend, naming the capability and what it would be needed for."""
    if not is_there:
        raise UnsupportedByBackend(f"this backend cannot {what} (capability {capability!r})", capability=capability)


def extensions_of(given: object) -> dict[str, str]:
    """Return the extensions a user declares: names, or a mapping from our names to the server's."""
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, (list, tuple, set, frozenset)):
        named = {name: name for name in given}
    else:
        raise InvalidRequest(f"extensions must be names, or a mapping from our names to the server's, got {given!r}")
    for name, theirs in named.items():
        if name not in EXTENSIONS:
            known = ", ".join(sorted(EXTENSIONS))
            raise InvalidRequest(f"an extension must be one of {known}, got {name!r}", field="extensions")
        if not isinstance(theirs, str) or not theirs:
            raise InvalidRequest(f"the server's name of {name} must be a text, got {theirs!r}", field="extensions")
    return named
