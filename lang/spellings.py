"""SGLang's spellings of what has another name here, so that its programs run with `import bough as sgl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from bough.errors import InvalidRequest, UnsupportedModel
from bough.expressions import Gen, gen

# SGLang's ServerArgs, and the argument of `Runtime` that means the same.
_RENAMED: Final[Mapping[str, str]] = {
    "random_seed": "seed",
    "max_running_requests": "max_running",
    "chunked_prefill_size": "token_budget",
    "launch_timeout": "start_timeout",
}
# What may be given as it is SGLang's default or says what is so here anyway.
_TRIVIAL: Final[Mapping[str, tuple[object, ...]]] = {
    "tokenizer_mode": ("auto",),
    "load_format": ("auto", "safetensors"),
    "trust_remote_code": (False,),
    "tp_size": (1,),
    "dp_size": (1,),
    "pp_size": (1,),
    "ep_size": (1,),
    "nnodes": (1,),
    "node_rank": (0,),
    "quantization": (None,),
    "is_embedding": (False,),
    "skip_tokenizer_init": (False,),
    "enable_deterministic_inference": (False,),
}

NOT_HERE: Final[Mapping[str, str]] = {
    "Engine": "Runtime is both: a process of its own, and a backend of programs",
    "Anthropic": "use OpenAI(model, base_url=...) with an endpoint that speaks OpenAI's protocol",
    "VertexAI": "use OpenAI(model, base_url=...) with an endpoint that speaks OpenAI's protocol",
    "LiteLLM": "use OpenAI(model, base_url=...) with an endpoint that speaks OpenAI's protocol",
    "Crusoe": "use OpenAI(model, base_url=...) with an endpoint that speaks OpenAI's protocol",
    "global_config": "nothing is configured for the whole process: use set_default_backend and the arguments of run",
    "ServerArgs": "give them to Runtime",
}
"""SGLang's names that stay unknown, and what to use."""


def gen_int(name: str | None = None, **options: Any) -> Gen:
    """Let the model write a whole number; takes what `gen` takes, but for choices, regex and json_schema.

    ::

        s += "The answer is " + bo.gen_int("answer")
    """
    return _typed(name, int, "gen_int", options)


def gen_string(name: str | None = None, **options: Any) -> Gen:
    """Let the model write a text in double quotes; takes what `gen` takes, but for choices, regex and json_schema.

    ::

        s += "His name is " + bo.gen_string("name")
    """
    return _typed(name, str, "gen_string", options)


def _typed(name: str | None, dtype: type, where: str, options: Mapping[str, Any]) -> Gen:
    for word in ("dtype", "type", "choices", "choices_method", "regex", "json_schema"):
        if word in options:
            raise TypeError(f"{where} got an unexpected keyword argument {word!r}")
    made = gen(name, dtype=dtype, **options)
    assert isinstance(made, Gen), "no choices, no select"
    return made


def image(expr: object) -> NoReturn:
    """Raise UnsupportedModel: no model here reads images."""
    raise UnsupportedModel("images are not supported: no model here reads them", field="image")


def video(path: str, num_frames: int) -> NoReturn:
    """Raise UnsupportedModel: no model here reads videos."""
    raise UnsupportedModel("videos are not supported: no model here reads them", field="video")


def runtime_arguments(given: Mapping[str, object]) -> dict[str, Any]:
    """Return SGLang's server arguments as arguments of `Runtime`.

    Those that say what is so here anyway are left out. Raises InvalidRequest where they say anything else, and
    TypeError for arguments that have no meaning here.
    """
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        if name in _RENAMED:
            arguments[_RENAMED[name]] = value
        elif name == "disable_radix_cache":
            arguments["radix_cache"] = not value
        elif name not in _TRIVIAL:
            raise TypeError(f"Runtime() got an unexpected keyword argument {name!r}")
        elif value not in _TRIVIAL[name]:
            raise InvalidRequest(f"{name} can only be {_TRIVIAL[name][0]!r}, got {value!r}", field=name)
    return arguments


def endpoint_address(address: object, unused: Sequence[tuple[str, object]]) -> str:
    """Check what a `RuntimeEndpoint` was given; return the address."""
    if not isinstance(address, str) or not address:
        raise InvalidRequest(
            f"an endpoint's address must be a text that is not empty, got {address!r}", field="base_url"
        )
    if address.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"{address} is an HTTP server, a runtime listens on ipc:// or tcp://; for a server that speaks OpenAI's "
            f"protocol use OpenAI(model, base_url={address.rstrip('/') + '/v1'!r})",
            field="base_url",
            value=address,
        )
    for name, value in unused:
        if value is not None:
            raise InvalidRequest(
                f"{name} has no meaning for a runtime: keys are CURVE's (server_public_key, public_key, secret_key), "
                "the chat template is the model's own",
                field=name,
            )
    return address
