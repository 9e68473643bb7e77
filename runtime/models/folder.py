"""Which folder a model's name means: the bundled one, a path, or a hub id. No torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from bough.runtime.protocol import RequestError

_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja"]


def resolve_model(name: str) -> Path:
    """Return the folder of a model: "pocket" (the bundled one), a folder's path, or a Hugging Face hub id.

    A hub id is fetched into the hub's cache, without anything that is not safetensors, JSON or a tokenizer.
    Raises RequestError("unsupported_model") saying what was looked for and where.
    """
    if name == "pocket":
        return _bundled()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "~", os.sep)) or name.count("/") != 1 or (os.sep != "/" and os.sep in name):
        raise RequestError(
            "unsupported_model",
            f'no such model folder: {name} (nor is it "pocket" or a hub id, owner/name)',
            field="model",
            value=name,
        )
    return _from_hub(name)


def _bundled() -> Path:
    spec = importlib.util.find_spec("bough.runtime.pocket")  # not imported: the recipe is not needed to run the model
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "weights"
        if (folder / "config.json").is_file():
            return folder
    raise RequestError("unsupported_model", "the bundled model is missing from this installation", field="model")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # offline, unknown, private, disk full: all mean that there is no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            "unsupported_model",
            f"{name!r} is neither a folder nor a model the Hugging Face hub could give: {reason}",
            field="model",
            value=name,
        ) from error
