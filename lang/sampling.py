"""How a program names sampling parameters: SGLang's words, checked at once, turned into `SamplingParams`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from bough.errors import InvalidRequest, from_request
from bough.runtime.protocol import MAX_FORK, RequestError, SamplingParams

if TYPE_CHECKING:
    from bough.running import Watching

# Aliases and words that are not fields of SamplingParams but say the same.
_EXTRA_NAMES: Final = frozenset(
    {
        "max_new_tokens",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_text_in_logprobs",
        "n",
        "timeout",
    }
)
_WATCH_NAMES: Final = frozenset({"events", "journal", "budget"})
SAMPLING_NAMES: Final = (frozenset(SamplingParams.__struct_fields__) - {"logprobs"}) | _EXTRA_NAMES | _WATCH_NAMES

# SGLang's names that are not built yet, or that can have no meaning here.
NOT_SUPPORTED: Final = frozenset({"ebnf"})


@dataclass(frozen=True, slots=True)
class Sampling:
    """What one `run` uses where a `gen` says nothing. batch_seed: of the batch that it is an item of."""

    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    timeout_s: float | None = None
    watching: Watching | None = None
    batch_seed: int | None = None

    def params_with(self, overrides: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters with some replaced. Raises InvalidRequest if they contradict each other."""
        if not overrides:
            return self.params
        params = msgspec.structs.replace(self.params, **overrides)
        _check(params)
        return params


DEFAULTS: Final = Sampling()


def sampling_from(given: Mapping[str, object]) -> Sampling:
    """Return the defaults of a run from the sampling names given to it; None means unset."""
    n = count("n", given.get("n")) or DEFAULTS.n
    timeout_s = seconds("timeout", given.get("timeout"))
    if not given:
        return DEFAULTS
    overrides = sampling_overrides(
        {k: v for k, v in given.items() if k not in ("n", "timeout") and k not in _WATCH_NAMES}
    )
    watching = None
    if not _WATCH_NAMES.isdisjoint(given):
        from bough.running import watching_from

        watching = watching_from(given)
    return Sampling(DEFAULTS.params_with(overrides), n, timeout_s, watching)


def sampling_overrides(given: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of SamplingParams that are given and not None, in their exact types.

    Raises InvalidRequest naming field, limit and value. A `min_tokens` without `max_tokens` is compared with the
    run's own `max_tokens`, when both are known.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    if not fields:
        return {}
    _rename(fields)
    for name in ("stop", "stop_regex", "stop_token_ids"):
        if name in fields:
            fields[name] = _as_tuple(name, fields[name])
    if not isinstance(fields.get("logit_bias", {}), Mapping):
        raise InvalidRequest(
            f"logit_bias must map token ids to numbers, got {fields['logit_bias']!r}", field="logit_bias"
        )
    _check_bias_keys(fields.get("logit_bias"))
    exact = _converted(fields)
    values = {name: getattr(exact, name) for name in fields}
    if "min_tokens" in fields and "max_tokens" not in fields:
        exact = msgspec.structs.replace(exact, max_tokens=max(exact.max_tokens, exact.min_tokens))
    _check(exact)
    return values


def _check_bias_keys(bias: object) -> None:
    """Raise InvalidRequest for the first key that is no token id; OpenAI's protocol writes them as texts."""
    for token in bias if isinstance(bias, Mapping) else ():
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidRequest(
                f"logit_bias must map token ids (int) to numbers, got the key {token!r}",
                field="logit_bias",
                value=repr(token),
            )


def refuse_unsupported(where: str, given: Mapping[str, object]) -> None:
    """Raise for keyword arguments that nobody declared: InvalidRequest for SGLang's, TypeError for the rest."""
    for name, value in given.items():
        if name not in NOT_SUPPORTED:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}")
        if value is not None:
            raise InvalidRequest(f"{name} is not supported yet, in {where}", field=name)


def count(name: str, value: object) -> int | None:
    """Return a number of branches, or None. Raises InvalidRequest if it is out of range."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_FORK:
        raise InvalidRequest(
            f"{name} must be a whole number from 1 to {MAX_FORK}, got {value!r}", field=name, limit=MAX_FORK
        )
    return value


def seconds(name: str, value: object) -> float | None:
    """Return a duration in seconds, or None. Raises InvalidRequest if it is not a positive number."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InvalidRequest(f"{name} must be a positive number of seconds, got {value!r}", field=name)
    return float(value)


def _rename(fields: dict[str, object]) -> None:
    if "max_new_tokens" in fields:
        if "max_tokens" in fields:
            raise InvalidRequest("max_new_tokens is another name of max_tokens: give one of them")
        fields["max_tokens"] = fields.pop("max_new_tokens")
    _check_logprob_words(fields.pop("logprob_start_len", None), fields.pop("return_text_in_logprobs", None))
    wanted, top = fields.pop("return_logprob", None), fields.pop("top_logprobs_num", None)
    if wanted is not None and not isinstance(wanted, bool):
        raise InvalidRequest(f"return_logprob must be True or False, got {wanted!r}", field="return_logprob")
    if wanted is False and top:
        raise InvalidRequest("top_logprobs_num needs return_logprob=True", field="top_logprobs_num")
    if top is not None and (not isinstance(top, int) or isinstance(top, bool)):
        raise InvalidRequest(f"top_logprobs_num must be a whole number, got {top!r}", field="top_logprobs_num")
    if wanted or top is not None:
        fields["logprobs"] = top or 0


def _check_logprob_words(start: object, with_text: object) -> None:
    """Accept what asks for the generated tokens' log-probabilities with their text, which is what there is."""
    if start is not None and (start != -1 or isinstance(start, bool)):
        raise InvalidRequest(
            f"logprob_start_len must be -1 (generated tokens only), got {start!r}: the log-probabilities of a prompt "
            "would make the runtime compute again what is cached; select gives those of given texts, "
            'in get_meta_info(name)["choice_token_logprobs"]',
            field="logprob_start_len",
        )
    if with_text is not None and not isinstance(with_text, bool):
        raise InvalidRequest(
            f"return_text_in_logprobs must be True or False, got {with_text!r}", field="return_text_in_logprobs"
        )


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, (str, int)):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise InvalidRequest(f"{name} must be one value or a list of them, got {value!r}", field=name)


def _converted(fields: Mapping[str, object]) -> SamplingParams:
    """Check the types; msgspec's words `Expected `int`, got `str` - at `$.max_tokens`` become one of our sentences."""
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`") or "parameter"
        value = fields.get(name.partition("[")[0])
        what = what.removeprefix("Expected ").replace("`", "")
        raise InvalidRequest(f"{name} must be {what} ({value!r})", field=name, value=repr(value)) from None


def _check(params: SamplingParams) -> None:
    try:
        params.check()
    except RequestError as error:
        raise from_request(error) from None
