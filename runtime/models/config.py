"""`ModelConfig`: what the decoder must know of a checkpoint, read from a Hugging Face folder's config.json.

Everything that the decoder cannot do exactly is refused here, by name, before a byte of weights is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, cast

from bough.runtime.protocol import RequestError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("float32", "float16", "bfloat16")

RopeType = Literal["default", "linear", "llama3", "yarn"]
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base `theta` and how long contexts rescale it (`rope_type`; names as in Hugging Face).

    factor: stretch of the context (linear, llama3, yarn). original_context_len: the length trained before stretching
    (llama3, yarn). low_freq_factor, high_freq_factor: llama3's band (Llama 3.1 report, section 3.4.1). beta_fast,
    beta_slow, attention_factor, truncate: yarn's (Peng et al. 2023, section 3); attention_factor is already resolved.
    """

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_context_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder of the Llama family.

    hidden_size, mlp_size: widths; num_heads query heads share num_kv_heads key/value heads of head_dim channels.
    qkv_bias, out_bias, mlp_bias: which linear layers have biases. qk_norm: an RMSNorm per head on q and k (Qwen3).
    context_len: most tokens of a sequence. eos_ids: ids that end a text, config.json's and generation_config.json's.
    dtype: the checkpoint's own, one of `DTYPES`.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    rms_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    context_len: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    dtype: str

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json (and the end ids of generation_config.json, if there is one).

        Raises RequestError("unsupported_model") naming field and value when the folder is not a supported checkpoint.
        """
        if not folder.is_dir():
            raise _refuse(f"no such model folder: {folder}", field="model", value=str(folder))
        fields = _Fields(_read_json(folder / "config.json"), folder)
        generation = folder / "generation_config.json"
        end_ids = _ids(_read_json(generation).get("eos_token_id")) if generation.is_file() else ()
        return _parse(fields, end_ids)


def _refuse(message: str, **details: object) -> RequestError:
    return RequestError("unsupported_model", message, **details)


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _refuse(f"{path.parent} is not a model folder: it has no {path.name}", field=path.name) from None
    except (ValueError, OSError) as error:
        raise _refuse(f"{path} cannot be read: {error}", field=path.name) from None
    if not isinstance(value, dict):
        raise _refuse(f"{path} must hold a JSON object, got {type(value).__name__}", field=path.name)
    return cast(Mapping[str, object], value)


class _Fields:
    """Typed reading of a JSON object; every complaint names the field and the value."""

    def __init__(self, values: Mapping[str, object], folder: Path) -> None:
        self.values = values
        self.folder = folder

    def refuse(self, field: str, expected: str) -> NoReturn:
        value = self.values.get(field)
        raise _refuse(
            f"{self.folder}: config field {field} must be {expected}, got {value!r}", field=field, value=repr(value)
        )

    def count(self, field: str, default: int | None = None) -> int:
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(field, "a whole number of at least 1")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.refuse(field, "a number above 0")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.values.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(field, "true or false")
        return value

    def part(self, field: str) -> _Fields | None:
        value = self.values.get(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(field, "an object")
        return _Fields(value, self.folder)


def _parse(fields: _Fields, generation_end_ids: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(fields)
    _refuse_what_the_decoder_lacks(fields)
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse("num_attention_heads", f"a divisor of hidden_size ({hidden_size}) where head_dim is not given")
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        fields.refuse("head_dim", "even, for rotary pairs")
    context_len = fields.count("max_position_embeddings")
    biased = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, context_len),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM" or biased,
        out_bias=biased and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"),
        mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        context_len=context_len,
        eos_ids=tuple(sorted({*_ids(fields.values.get("eos_token_id")), *generation_end_ids})),
        bos_id=next(iter(_ids(fields.values.get("bos_token_id"))), None),
        dtype=_dtype(fields),
    )


def _architecture(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name not in ARCHITECTURES:
        fields.refuse("architectures", f"one of {', '.join(ARCHITECTURES)}")
    return cast(str, name)


def _refuse_what_the_decoder_lacks(fields: _Fields) -> None:
    """Refuse what would be computed wrongly: quantised weights, other activations, windows shorter than the context."""
    if fields.values.get("quantization_config") is not None:
        fields.refuse("quantization_config", "absent (quantised checkpoints are not supported)")
    if fields.values.get("hidden_act", "silu") not in ("silu", "swish"):
        fields.refuse("hidden_act", "silu")
    if fields.flag("use_sliding_window"):
        fields.refuse("use_sliding_window", "false (sliding-window attention is not supported)")
    layers = fields.values.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        fields.refuse("layer_types", "full_attention in every layer")
    window = fields.values.get("sliding_window")
    ignored = "use_sliding_window" in fields.values  # Qwen writes the width even where the flag switches it off
    if isinstance(window, int) and not ignored and window < fields.count("max_position_embeddings"):
        fields.refuse("sliding_window", "null or at least max_position_embeddings (windows are not supported)")


def _rope(fields: _Fields, context_len: int) -> RopeConfig:
    """Read transformers 5's `rope_parameters`, or the older pair `rope_theta` and `rope_scaling`."""
    scaling = fields.part("rope_parameters") or fields.part("rope_scaling") or _Fields({}, fields.folder)
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    field = "rope_type" if "rope_type" in scaling.values else "type"
    kind = scaling.values.get(field, "default")
    if kind not in _ROPE_TYPES:
        scaling.refuse(field, f"one of {', '.join(_ROPE_TYPES)}")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", scaling.number("factor"))
    original = scaling.count(
        "original_max_position_embeddings", fields.count("original_max_position_embeddings", context_len)
    )
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            scaling.number("factor"),
            original,
            scaling.number("low_freq_factor"),
            scaling.number("high_freq_factor"),
        )
    return _yarn(scaling, theta, original, context_len)


def _yarn(scaling: _Fields, theta: float, original: int, context_len: int) -> RopeConfig:
    factor = scaling.number("factor", context_len / original)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(scaling, factor),
        truncate=scaling.flag("truncate", True),
    )


def _yarn_attention_factor(scaling: _Fields, factor: float) -> float:
    """Return what cos and sin are multiplied by: given, or 0.1 ln(factor) + 1, with DeepSeek's two corrections."""

    def temperature(correction: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * correction * math.log(factor) + 1.0

    if scaling.values.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        return temperature(scaling.number("mscale")) / temperature(scaling.number("mscale_all_dim"))
    return temperature(1.0)


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _dtype(fields: _Fields) -> str:
    field = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    name = fields.values.get(field) or "float32"
    if name not in DTYPES:
        fields.refuse(field, f"one of {', '.join(DTYPES)}")
    return name
