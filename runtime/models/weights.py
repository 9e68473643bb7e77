"""Safetensors -> tensors by name: where a model's folder is, what it must hold, and reading it piece by piece.

Only safetensors is read: a pickle can run code. Names and shapes are compared with the config before any weight is
read, so a wrong checkpoint fails in milliseconds and says what is wrong.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from bough.runtime.models.config import ModelConfig
from bough.runtime.protocol import RequestError

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
Shape = tuple[int, ...]

_INDEX = "model.safetensors.index.json"


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the name and shape of every tensor a checkpoint of this config must hold, as transformers names them."""
    hidden, kv_size, q_size = (
        config.hidden_size,
        config.num_kv_heads * config.head_dim,
        config.num_heads * config.head_dim,
    )
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = [
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.out_bias),
        ("mlp.gate_proj", config.mlp_size, hidden, config.mlp_bias),
        ("mlp.up_proj", config.mlp_size, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, config.mlp_size, config.mlp_bias),
    ]
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", config.head_dim), ("self_attn.k_norm", config.head_dim)]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, size in norms:
            shapes[f"{prefix}{name}.weight"] = (size,)
        for name, rows, columns, biased in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if biased:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


class Weights:
    """The checked, still unread tensors of one checkpoint; `take` reads one. Use as a context manager.

    on_progress(done_bytes, total_bytes) is called after each read, in bytes of the files. Raises
    RequestError("unsupported_model") listing missing tensors or naming the one whose shape is wrong (both shapes);
    tensors nobody asked for are listed in one warning.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        on_progress: OnProgress | None,
        device: torch.device | None = None,
    ) -> None:
        self._folder = folder
        self.dtype = dtype
        self._device = device
        self._on_progress = on_progress
        self._files = {path: _open(path) for path in _files(folder)}
        self._where = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._expected = expected_tensors(config)
        self._check_names(config)
        self._check_shapes()
        self._sizes = {name: self._size_bytes(name) for name in self._expected}
        self._done_bytes, self._total_bytes = 0, sum(self._sizes.values())

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()  # safetensors unmaps a file when its handle goes

    def has(self, name: str) -> bool:
        """Tell whether this architecture has the tensor `name`."""
        return name in self._expected

    def take(self, *names: str) -> torch.Tensor:
        """Read tensors, joined along their first dimension, in the dtype asked for."""
        parts = [self._read(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, name: str) -> torch.Tensor:
        tensor = cast(torch.Tensor, self._files[self._where[name]].get_tensor(name))
        self._done_bytes += self._sizes[name]
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, self._total_bytes)
        # A copy even where the dtype fits: the file's mapping is not ours to keep.
        return tensor.to(self._device, self.dtype, copy=True)

    def _check_names(self, config: ModelConfig) -> None:
        missing = sorted(self._expected.keys() - self._where.keys())
        if missing:
            raise RequestError(
                "unsupported_model",
                f"{self._folder}: {len(missing)} tensors are missing: {_some(missing)}",
                field="weights",
                value=len(missing),
            )
        unexpected = [name for name in self._where if name not in self._expected and not name.endswith(".inv_freq")]
        if config.tie_embeddings:  # some checkpoints hold the tied matrix twice
            unexpected = [name for name in unexpected if name != "lm_head.weight"]
        if unexpected:
            log.warning("%s: %d tensors are not used: %s", self._folder, len(unexpected), _some(sorted(unexpected)))

    def _check_shapes(self) -> None:
        for name, expected in self._expected.items():
            found = tuple(self._files[self._where[name]].get_slice(name).get_shape())
            if found != expected:
                raise RequestError(
                    "unsupported_model",
                    f"{self._folder}: tensor {name} has shape {found}, the config asks for {expected}",
                    field=name,
                    value=str(found),
                )

    def _size_bytes(self, name: str) -> int:
        view = self._files[self._where[name]].get_slice(name)
        count = 1
        for size in view.get_shape():
            count *= size
        return count * _BYTES.get(view.get_dtype(), 4)


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: the index's shards, or the one file."""
    index = folder / _INDEX
    if index.is_file():
        return _shards(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise RequestError(
            "unsupported_model",
            f"{folder} holds only {pickled[0]}, a pickle that could run code: convert it to safetensors",
            field="weights",
            value=pickled[0],
        )
    raise RequestError("unsupported_model", f"{folder} has neither model.safetensors nor {_INDEX}", field="weights")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError("unsupported_model", f"{index} is not a weight index: {error!r}", field=_INDEX) from None
    # A name with a folder in it could point anywhere on this machine.
    bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    absent = [name for name in names if name not in bad and not (index.parent / name).is_file()]
    if bad or absent or not names:
        raise RequestError(
            "unsupported_model",
            f"{index} names files that are not there: {_some([*map(str, bad), *absent])}",
            field=_INDEX,
        )
    return [index.parent / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RequestError("unsupported_model", f"{path} cannot be read: {error}", field=path.name) from None


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
