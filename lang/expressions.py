"""Immutable pieces that a program appends to its state: text, gen, select, roles.

An expression is a value: it can be kept, combined with `+`, and appended to any number of states::

    verdict = assistant("Verdict: " + select("verdict", ["yes", "no"]))
    for fork in forks:
        fork += verdict
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from bough.choices import ChoicesSamplingMethod, literal, token_length_normalized
from bough.errors import InvalidRequest
from bough.runtime.protocol import CHOICE_METHODS, MAX_CHOICES, MAX_TEMPERATURE, ChoiceMethod
from bough.sampling import count, refuse_unsupported, sampling_overrides, seconds

if TYPE_CHECKING:
    from bough.constraint import Constraint, OnLimit
    from bough.grammar_nodes import Grammar

ChoicesMethod: TypeAlias = "ChoiceMethod | ChoicesSamplingMethod"


class Expression:
    """The base of all expressions; `+` joins them with each other and with text."""

    __slots__ = ()

    def __add__(self, other: object) -> Concat:
        return Concat((*self.pieces(), *pieces_of(other)))

    def __radd__(self, other: object) -> Concat:
        return Concat((*pieces_of(other), *self.pieces()))

    def __format__(self, spec: str) -> str:
        """Raise InvalidRequest: in an f-string an expression would become its description, for the model to read."""
        raise InvalidRequest(
            f'{self!r} cannot be part of an f-string: join it with +, as in "Answer: " + bo.gen("answer")'
        )

    def pieces(self) -> tuple[Piece, ...]:
        """Return the atomic pieces in order."""
        return (cast("Piece", self),)


@dataclass(frozen=True, slots=True)
class Gen(Expression):
    """A hole that the model fills; made by `gen`."""

    name: str | None
    overrides: Mapping[str, Any]
    n: int | None
    timeout_s: float | None
    constraint: Constraint | None = None
    heal: bool = True


@dataclass(frozen=True, slots=True)
class Select(Expression):
    """A hole that the model fills with one of some choices; made by `select`."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesMethod
    timeout_s: float | None
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleBegin(Expression):
    """Opens a message of a role."""

    role: str


@dataclass(frozen=True, slots=True)
class RoleEnd(Expression):
    """Closes the open message, which must be of this role (None: of any)."""

    role: str | None = None


@dataclass(frozen=True, slots=True)
class SeparateReasoning(Expression):
    """Parts the variables before it into reasoning and answer; made by `separate_reasoning`. Writes nothing."""

    names: tuple[str, ...]
    suffix: str
    reasoning: Callable[[str], str]
    answer: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class ThoughtBegin(Expression):
    """Where a thought begins that is to be forgotten; made by `think`."""


@dataclass(frozen=True, slots=True)
class ThoughtEnd(Expression):
    """Where it ends."""


@dataclass(frozen=True, slots=True)
class Concat(Expression):
    """Pieces after each other."""

    items: tuple[Piece, ...]

    def pieces(self) -> tuple[Piece, ...]:
        """Return the atomic pieces in order."""
        return self.items

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.items)


Piece: TypeAlias = str | Gen | Select | RoleBegin | RoleEnd | SeparateReasoning | ThoughtBegin | ThoughtEnd


def pieces_of(value: object) -> tuple[Piece, ...]:
    """Return the pieces of text or of an expression. Raises InvalidRequest for anything else."""
    if isinstance(value, str):
        return (str(value),)
    if isinstance(value, Expression):
        return value.pieces()
    raise InvalidRequest(f"only text and expressions can be appended to a state, got {value!r}", value=repr(value))


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | type[Any] | None = None,
    grammar: Grammar | str | None = None,
    type: Any = None,
    dtype: type[Any] | None = None,
    on_limit: OnLimit | None = None,
    on_truncation: OnLimit | None = None,
    heal: bool | None = None,
    timeout: float | None = None,
    **unsupported: object,
) -> Gen | Select:
    """Let the model write here, and call what it writes `name`.

    What it writes can be held to one of these:

    *   `regex`: a regular expression (`bough.rx` says of which dialect);
    *   `json_schema`: a JSON schema, as a dict, its JSON text or a pydantic model; the result is the JSON text;
    *   `grammar`: a grammar of `bough.grammars`, whose captures become variables as well, or Lark source;
    *   `type`: a type, of which the result is a value: `gen("age", type=int)`, `gen("who", type=list[Person])`;
    *   `dtype`: int, float, str or bool as in SGLang; the result is a text.

    `on_limit` (also called `on_truncation`) says what comes of a text that meets `max_tokens`, or the end of the
    model's context, before it ends by itself or by a stop:

    *   `"return"`: it is read as it is, and `get_meta_info(name)["finish_reason"]` tells; the default of free text;
    *   `"raise"`: reading it raises Truncated, whose details hold the text; the default of what is held to a grammar;
    *   `"continue"`: the model goes on to the text's own end, for at most 16 times `max_tokens`, within the context and
        the run's budget; if that is not enough, reading it raises Truncated;
    *   `"close"`: it is closed in the shortest way that its grammar allows.

    The text itself, streams of it and what follows it are the same with all of them but "continue" and "close".

    `heal=False` takes the prompt's last token as it is. Otherwise, where the vocabulary has longer tokens that begin
    with the text of the last ones, those are drawn again together with what follows, so that it does not matter where
    a prompt ends ("http:" is followed by "//"). Never a role's text, or tokens that the model drew.

    None means the run's default, then `SamplingParams`' (128 tokens, temperature 1). `n` > 1 gives a list of n values;
    the text goes on with the first (with a `seed`, the i-th uses seed + i). `timeout` is in seconds. With `choices`
    this is `select`. A name used twice: the last one wins. Without a name only the text grows.

    Raises InvalidRequest naming the field, its limit and the value.
    """
    if unsupported:
        refuse_unsupported("gen", unsupported)
    given = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "stop_regex": stop_regex,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": logit_bias,
        "seed": seed,
        "ignore_eos": ignore_eos,
        "return_logprob": return_logprob,
        "logprob_start_len": logprob_start_len,
        "top_logprobs_num": top_logprobs_num,
        "return_text_in_logprobs": return_text_in_logprobs,
    }
    if choices is not None:
        held = {"regex": regex, "json_schema": json_schema, "grammar": grammar, "type": type, "dtype": dtype}
        other = {"n": n, **held, "on_limit": on_limit, "on_truncation": on_truncation, "heal": heal}
        return _gen_as_select(name, choices, choices_method, timeout, {**given, **other})
    if choices_method is not None:
        raise InvalidRequest("choices_method needs choices", field="choices_method")
    if on_truncation is not None:
        if on_limit is not None:
            raise InvalidRequest("on_truncation is another name of on_limit: give one of them", field="on_truncation")
        on_limit = on_truncation
    if heal not in (None, True, False):
        raise InvalidRequest(f"heal must be True or False, got {heal!r}", field="heal")
    constraint = None
    if any(value is not None for value in (regex, json_schema, grammar, type, dtype, on_limit)):
        constraint = _constraint(name, given, regex, json_schema, grammar, type, dtype, on_limit)
    overrides = sampling_overrides(given)
    return Gen(_variable(name), overrides, count("n", n), seconds("timeout", timeout), constraint, heal is not False)


def _constraint(
    name: str | None,
    given: Mapping[str, object],
    regex: str | None,
    json_schema: object,
    grammar: object,
    type: Any,
    dtype: Any,
    on_limit: OnLimit | None,
) -> Constraint | None:
    """Return what the gen is held to. Raises InvalidRequest if other arguments cannot go with it."""
    from bough.constraint import constraint_of

    constraint = constraint_of(
        regex=regex, json_schema=json_schema, grammar=grammar, type=type, dtype=dtype, on_limit=on_limit
    )
    if constraint is None or constraint.wire is None:
        return constraint
    if given["ignore_eos"]:
        raise InvalidRequest(
            "ignore_eos cannot go with a grammar, which says itself where a text ends", field="ignore_eos"
        )
    for field in ("stop", "stop_regex"):
        if given[field] and constraint.wire.kind == "json_schema":
            raise InvalidRequest(f"{field} would cut JSON, which ends by itself", field=field)
    if name is not None and name in (constraint.names or ()):
        raise InvalidRequest(f"{name!r} is both the gen's name and a capture of its grammar", field="name")
    return constraint


def _gen_as_select(
    name: str | None,
    choices: Sequence[str],
    method: ChoicesMethod | None,
    timeout: float | None,
    given: Mapping[str, object],
) -> Select:
    for field, value in given.items():
        if value is not None and field != "temperature":
            raise InvalidRequest(f"{field} has no effect on a choice between given texts", field=field)
    temperature = given["temperature"]
    return select(
        name,
        choices,
        0.0 if temperature is None else cast(float, temperature),
        method or token_length_normalized,
        timeout,
    )


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod = token_length_normalized,
    timeout: float | None = None,
) -> Select:
    """Let the model choose one of some texts, and call the choice `name`.

    choices_method: `token_length_normalized`, `greedy_token_selection`, `unconditional_likelihood_normalized`,
    `total_likelihood` ("sum"), `byte_length_normalized`, `pmi`, or a `ChoicesSamplingMethod` of your own. The best
    choice is taken, the first on ties. With a temperature above 0 no method decides: the choice is drawn from the
    model's own distribution over the choices, at that temperature.

    Raises InvalidRequest for empty, duplicate or non-text choices, for a temperature outside 0 to 100, and for a
    temperature together with a method other than the default or "sum".
    """
    method = _method(choices_method)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise InvalidRequest(f"temperature must be a number, got {temperature!r}", field="temperature")
    if not 0 <= temperature <= MAX_TEMPERATURE:
        limits = f"temperature must be between 0 and {MAX_TEMPERATURE:g}, got {temperature!r}"
        raise InvalidRequest(limits, field="temperature")
    if temperature and method not in ("token_length_normalized", "sum"):
        raise InvalidRequest(
            f"choices_method has no effect at temperature {temperature}: the choice is drawn", field="choices_method"
        )
    found = _checked_choices(choices)
    return Select(_variable(name), found, method, seconds("timeout", timeout), float(temperature))


def _method(given: object) -> ChoicesMethod:
    """Return a named method as its name, another as it is."""
    if isinstance(given, str) and given in (*CHOICE_METHODS, "total_likelihood"):
        return literal("sum" if given == "total_likelihood" else given)
    if isinstance(given, ChoicesSamplingMethod):
        return given
    raise InvalidRequest(
        f"choices_method must be one of {', '.join(CHOICE_METHODS)}, or a ChoicesSamplingMethod, got {given!r}",
        field="choices_method",
    )


def _checked_choices(choices: object) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise InvalidRequest(f"choices must be a list of texts, got {choices!r}", field="choices")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"choices must hold 1 to {MAX_CHOICES} texts, got {len(choices)}", field="choices")
    seen: dict[str, int] = {}
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise InvalidRequest(f"choices[{index}] must be a text that is not empty, got {choice!r}", field="choices")
        if choice in seen:
            raise InvalidRequest(f"choices[{index}] repeats choices[{seen[choice]}]: {choice!r}", field="choices")
        seen[choice] = index
    return tuple(seen)


def _variable(name: object) -> str | None:
    if name is not None and (not isinstance(name, str) or not name):
        raise InvalidRequest(f"a variable's name must be a text that is not empty, got {name!r}", field="name")
    return name


def role_begin(name: str) -> RoleBegin:
    """Open a message of any role that the model's chat template knows."""
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"a role must be a text that is not empty, got {name!r}", field="role")
    return RoleBegin(name)


def role_end(name: str | None = None) -> RoleEnd:
    """Close the open message; with a name, it must be of that role."""
    return RoleEnd(name)


def role(name: str, expr: str | Expression | None = None) -> Concat:
    """Return a whole message of any role, for example "tool"."""
    inside = () if expr is None else pieces_of(expr)
    return Concat((role_begin(name), *inside, RoleEnd(name)))


def system(expr: str | Expression | None = None) -> Concat:
    """Return a whole system message."""
    return role("system", expr)


def user(expr: str | Expression | None = None) -> Concat:
    """Return a whole user message."""
    return role("user", expr)


def assistant(expr: str | Expression | None = None) -> Concat:
    """Return a whole assistant message."""
    return role("assistant", expr)


def system_begin() -> RoleBegin:
    """Open a system message."""
    return RoleBegin("system")


def system_end() -> RoleEnd:
    """Close a system message."""
    return RoleEnd("system")


def user_begin() -> RoleBegin:
    """Open a user message."""
    return RoleBegin("user")


def user_end() -> RoleEnd:
    """Close a user message."""
    return RoleEnd("user")


def assistant_begin() -> RoleBegin:
    """Open an assistant message."""
    return RoleBegin("assistant")


def assistant_end() -> RoleEnd:
    """Close an assistant message."""
    return RoleEnd("assistant")
