"""A model that cannot be served: the error says why, soon, and nothing of the attempt stays behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import within
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_checkpoint

import bough as bo


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')


def unsupported_architecture(folder: Path) -> None:
    _change(folder, architectures=["MambaForCausalLM"])


def sliding_window(folder: Path) -> None:
    _change(folder, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=32)


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_template(folder: Path) -> None:
    _change(folder, "tokenizer_config.json", chat_template="{% for message in %}")


def _change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))


DAMAGES: dict[Callable[[Path], None], str] = {
    missing: "no such model folder: {folder}",
    without_config: "{folder} is not a model folder: it has no config.json",
    broken_json: "{folder}/config.json cannot be read",
    unsupported_architecture: "MambaForCausalLM",
    sliding_window: "sliding_window",
    missing_tensor: "1 tensors are missing: model.layers.1.mlp.up_proj.weight",
    pickle_only: "{folder} holds only pytorch_model.bin, a pickle that could run code",
    without_tokenizer: "tokenizer.json",
    broken_template: "chat template is not valid",
}


class Attempts:
    """One attempt to serve each damaged copy, several at a time, with everything temporary in `scratch`."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        with ThreadPoolExecutor(3) as pool:
            self.errors = dict(zip(DAMAGES, pool.map(self._attempt, DAMAGES), strict=True))

    def folder(self, damage: Callable[[Path], None]) -> Path:
        return self.scratch / "models" / damage.__name__

    def _attempt(self, damage: Callable[[Path], None]) -> BaseException | None:
        folder = self.folder(damage)
        shutil.copytree(tiny_checkpoint(), folder)
        damage(folder)
        try:
            within(60, lambda: bo.Runtime(folder)).shutdown()
        except Exception as error:
            return error
        return None


@pytest.fixture(scope="module")
def attempts() -> Iterator[Attempts]:
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="bough-e2e-") as scratch:
        tiny_checkpoint()
        tempfile.tempdir = scratch
        try:
            yield Attempts(Path(scratch))
        finally:
            tempfile.tempdir = before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_model_that_cannot_be_served_is_refused_by_name(attempts: Attempts, damage: Callable[[Path], None]) -> None:
    error = attempts.errors[damage]
    assert isinstance(error, bo.UnsupportedModel), repr(error)
    assert DAMAGES[damage].format(folder=attempts.folder(damage)) in str(error)
    assert "Traceback" not in str(error)


def test_a_refused_model_leaves_no_process_and_no_folder(attempts: Attempts) -> None:
    assert [path.name for path in attempts.scratch.iterdir()] == ["models"]
    mark = str(attempts.scratch).encode()
    commands = {path: _command(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    assert not [path for path, command in commands.items() if mark in command]


def _command(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


@pytest.mark.parametrize("model", ["", 7, None])
def test_what_is_no_model_at_all_is_an_invalid_request(model: Any) -> None:
    with pytest.raises(bo.InvalidRequest, match='model must be "pocket", a folder or a hub id'):
        bo.Runtime(model)
