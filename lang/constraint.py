"""What a `gen` is held to, and what its text then means: a grammar for the runtime, a value for the program.

A `Constraint` is made of at most one of gen's arguments regex, json_schema, grammar, type and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from bough.backend import Generation
from bough.errors import InvalidRequest, Truncated
from bough.runtime import protocol

if TYPE_CHECKING:
    from bough.grammar_nodes import Grammar
    from bough.typed import Shape

OnLimit: TypeAlias = Literal["return", "raise", "continue", "close"]
"""What comes of a text that meets max_tokens, or the context's end, before it is whole; `gen` says what each does."""

ON_LIMIT: Final[tuple[OnLimit, ...]] = ("return", "raise", "continue", "close")
CONTINUED: Final = 16
"""By how much a text that continues may exceed max_tokens."""

_NUMBER_STOPS: Final = (" ", "\n")
DTYPES: Final[Mapping[type, tuple[str, tuple[str, ...]]]] = {
    int: (r"[-+]?[0-9]+[ \n]*", _NUMBER_STOPS),
    float: (r"[-+]?[0-9]+(?:\.[0-9]+)?[ \n]*", _NUMBER_STOPS),
    str: (r'"[^"\n]*"', ()),
    bool: ("True|False", ()),
}
"""SGLang's `dtype`: a pattern and the stops that end it. The result stays a text, with its quotes."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one gen is held to.

    wire: as it is sent; None for free text. shape: what reads the text, if a type was asked for. grammar: its captures
    become variables, names which (with whether there can be several). stop, stop_regex: what ends the text besides the
    gen's own stops. on_limit: what comes of a text that was cut short.
    """

    wire: protocol.Grammar | None
    shape: Shape[Any] | None = None
    grammar: Grammar | None = None
    names: Mapping[str, bool] | None = None
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    on_limit: OnLimit = "raise"

    def params(self, params: protocol.SamplingParams) -> protocol.SamplingParams:
        """Return the parameters with the stops that end such a text, and with room for one that continues."""
        import msgspec

        return msgspec.structs.replace(
            params,
            stop=(*params.stop, *self.stop),
            stop_regex=(*params.stop_regex, *self.stop_regex),
            max_tokens=params.max_tokens * (CONTINUED if self.on_limit == "continue" else 1),
        )

    def value(self, done: Generation) -> Any:
        """Return the value of a finished gen. Raises Truncated if it is not whole, InvalidValue as its type says."""
        self._check_whole(done)
        return done.text if self.shape is None else self.shape.read(done.text)

    def captures(self, done: Generation) -> Mapping[str, Any]:
        """Return the captures of a finished gen. Raises Truncated if its text is not whole."""
        self._check_whole(done)
        if self.grammar is None:
            return done.captures
        from bough.matching import captures_of

        return {**done.captures, **captures_of(self.grammar, done.text)}

    def _check_whole(self, done: Generation) -> None:
        if self.on_limit == "return" or self._is_whole(done):
            return
        other = "continue" if self.wire is None else "close"
        hint = "give more max_tokens" + ("" if self.on_limit == other else f', or on_limit="{other}"')
        raise Truncated(
            f"the text ended by {_why(done)} before it was whole: {done.text!r}; {hint}",
            text=done.text,
            finish_reason=done.finish_reason,
        )

    def _is_whole(self, done: Generation) -> bool:
        if self.wire is None:
            return done.finish_reason == "stop"
        could_go_on = self.shape is not None and bool(self.shape.stop_regex)  # 42 may be the beginning of 425
        if could_go_on and done.finish_reason != "stop" and self.wire.on_limit != "close":
            return False
        return done.is_whole


def _why(done: Generation) -> str:
    return {
        "stop": f"the stop {done.matched_stop!r}",
        "length": "max_tokens",
        "context": "the end of the model's context",
    }[done.finish_reason]


def constraint_of(
    *,
    regex: str | None,
    json_schema: object,
    grammar: object,
    type: Any,
    dtype: Any,
    on_limit: OnLimit | None,
) -> Constraint | None:
    """Return what a gen with these arguments is held to; None if to nothing.

    Raises InvalidRequest if more than one is given, and naming what is wrong with that one.
    """
    given = {"regex": regex, "json_schema": json_schema, "grammar": grammar, "type": type, "dtype": dtype}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidRequest(f"give one of {' and '.join(named)}: each says what the text has to be", field=named[1])
    constraint = _unlimited(regex, json_schema, grammar, type, dtype)
    return constraint if on_limit is None else _limited(constraint, on_limit)


def _limited(constraint: Constraint | None, on_limit: object) -> Constraint:
    """Return the same with what comes of a text that meets a limit. Raises InvalidRequest where that cannot be."""
    import msgspec

    if on_limit not in ON_LIMIT:
        raise InvalidRequest(f"on_limit must be one of {', '.join(ON_LIMIT)}, got {on_limit!r}", field="on_limit")
    limit = on_limit
    constraint = constraint or Constraint(None)
    if limit == "close":
        if constraint.wire is None:
            raise InvalidRequest(
                'on_limit="close" needs regex, json_schema, grammar, type or dtype: free text has no end of its own',
                field="on_limit",
            )
        return replace(constraint, wire=msgspec.structs.replace(constraint.wire, on_limit="close"), on_limit=limit)
    if limit == "return" and constraint.wire is not None and (constraint.shape or constraint.names):
        what = "type" if constraint.shape else "grammar"
        raise InvalidRequest(f'on_limit="return" would give {what} half a text to read', field="on_limit")
    return replace(constraint, on_limit=limit)


def _unlimited(regex: str | None, json_schema: object, grammar: object, type: Any, dtype: Any) -> Constraint | None:
    if regex is not None:
        return _of_regex(regex)
    if json_schema is not None:
        from bough.schemas import schema_text

        return Constraint(protocol.Grammar(kind="json_schema", source=schema_text(json_schema)))
    if grammar is not None:
        return _of_grammar(grammar)
    if type is not None:
        return _of_type(type)
    return None if dtype is None else _of_dtype(dtype)


def _of_regex(pattern: str) -> Constraint:
    from bough.acceptor import check_regex

    check_regex(pattern, "regex")
    if not pattern:
        raise InvalidRequest("regex must not be empty", field="regex")
    return Constraint(protocol.Grammar(kind="regex", source=pattern))


def _of_grammar(given: object) -> Constraint:
    from bough.acceptor import acceptor_of
    from bough.grammar_facts import capture_names
    from bough.grammar_nodes import Json, as_grammar
    from bough.grammars import lark

    grammar = lark(given) if isinstance(given, str) else as_grammar(given)
    acceptor_of(grammar)  # refused at once, not by the runtime
    if isinstance(grammar, Json):
        wire = protocol.Grammar(kind="json_schema", source=grammar.schema)
    else:
        wire = protocol.Grammar(kind="lark", source=grammar.to_lark())
    return Constraint(wire, grammar=grammar, names=capture_names(grammar))


def _of_type(type: Any) -> Constraint:
    from bough.typed import shape_of

    shape = shape_of(type)
    limit: OnLimit = "return" if shape.wire is None else "raise"
    return Constraint(shape.wire, shape=shape, stop_regex=shape.stop_regex, on_limit=limit)


def _of_dtype(dtype: Any) -> Constraint:
    if dtype not in DTYPES:
        known = ", ".join(kind.__name__ for kind in DTYPES)
        raise InvalidRequest(
            f"dtype must be one of {known} (whose results are texts), got {dtype!r}; type= takes any type",
            field="dtype",
        )
    pattern, stop = DTYPES[dtype]
    wire = protocol.Grammar(kind="regex", source=pattern)
    return Constraint(wire, stop=stop, on_limit="return")
