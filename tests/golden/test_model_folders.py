"""What is read of a checkpoint's folder, and how a folder that cannot be used is refused: by field and value."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT_LEN, VOCAB_SIZE, tiny_model

from bough.runtime.models.config import ModelConfig
from bough.runtime.models.folder import resolve_model
from bough.runtime.models.weights import Weights
from bough.runtime.protocol import RequestError
from bough.runtime.runner import load_runner

OLD_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
}
MISTRAL = {**OLD_LLAMA, "architectures": ["MistralForCausalLM"]}
QWEN2 = {**OLD_LLAMA, "architectures": ["Qwen2ForCausalLM"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def copy_of(path: Path, variant: str = "llama", sharded: bool = False) -> Path:
    return Path(shutil.copytree(tiny_model(variant, "float32", sharded), path / "model"))


def refusal(folder: Path) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load_runner(folder, max_total_tokens=CONTEXT_LEN)
    assert caught.value.kind == "unsupported_model"
    return caught.value


def test_an_old_config_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(folder_of(tmp_path, OLD_LLAMA))
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (4, 16, False)
    assert (config.eos_ids, config.bos_id, config.dtype) == ((2, 7), 1, "float16")
    assert (config.rope.theta, config.rope.rope_type) == (10000.0, "default")
    assert (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)


def test_old_and_new_spellings_of_rope_agree(tmp_path: Path) -> None:
    scaling = {**LLAMA3, "original_max_position_embeddings": 1024}
    old = {**OLD_LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**OLD_LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}}
    parsed = ModelConfig.from_folder(folder_of(tmp_path, old))
    assert parsed == ModelConfig.from_folder(folder_of(tmp_path, new))
    assert (parsed.rope.theta, parsed.rope.factor, parsed.rope.original_context_len) == (5e5, 8.0, 1024)


def test_end_ids_of_both_files_count(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert ModelConfig.from_folder(folder_of(tmp_path, OLD_LLAMA)).eos_ids == (2, 7, 9)


@pytest.mark.parametrize(("variant", "biased", "normed"), [("qwen2", True, False), ("qwen3", False, True)])
def test_qwen_has_biases_or_head_norms(variant: str, biased: bool, normed: bool) -> None:
    config = ModelConfig.from_folder(tiny_model(variant))
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == (biased, False, normed)
    assert (config.vocab_size, config.context_len) == (VOCAB_SIZE, CONTEXT_LEN)


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        ({**OLD_LLAMA, "architectures": ["GPT2LMHeadModel"]}, "architectures", "Qwen3ForCausalLM"),
        ({**OLD_LLAMA, "architectures": None}, "architectures", "None"),
        ({**OLD_LLAMA, "hidden_size": "64"}, "hidden_size", "'64'"),
        ({**OLD_LLAMA, "num_hidden_layers": 0}, "num_hidden_layers", "0"),
        ({**OLD_LLAMA, "num_key_value_heads": 3}, "num_key_value_heads", "divisor"),
        ({**OLD_LLAMA, "hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({**OLD_LLAMA, "quantization_config": {"bits": 4}}, "quantization_config", "quantised"),
        ({**OLD_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2}}, "type", "dynamic"),
        ({**OLD_LLAMA, "rope_parameters": {"rope_type": "longrope"}}, "rope_type", "longrope"),
        ({**OLD_LLAMA, "rope_scaling": LLAMA3 | {"factor": None}}, "factor", "None"),
        ({**OLD_LLAMA, "torch_dtype": "float8"}, "torch_dtype", "float8"),
        ({**MISTRAL, "sliding_window": 1024}, "sliding_window", "1024"),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 1024}, "use_sliding_window", "True"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "sliding_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_we_cannot_run_is_refused_by_field_and_value(
    tmp_path: Path, config: dict[str, Any], field: str, words: str
) -> None:
    error = refusal(folder_of(tmp_path, config))
    assert error.details["field"] == field
    assert field in error.message
    assert words in error.message


@pytest.mark.parametrize(
    "config", [{**MISTRAL, "sliding_window": 4096}, {**QWEN2, "use_sliding_window": False, "sliding_window": 9}]
)
def test_a_window_that_never_cuts_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    assert ModelConfig.from_folder(folder_of(tmp_path, config)).context_len == 4096


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    assert "no such model folder" in refusal(tmp_path / "absent").message
    assert "has no config.json" in refusal(tmp_path).message
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path).message
    (tmp_path / "config.json").write_text("[]")
    assert "JSON object" in refusal(tmp_path).message
    assert "neither model.safetensors nor" in refusal(folder_of(tmp_path, OLD_LLAMA)).message


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin, a pickle" in refusal(folder_of(tmp_path, OLD_LLAMA)).message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copy_of(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "1 tensors are missing: model.layers.1.mlp.up_proj.weight" in refusal(folder).message


def test_a_wrong_shape_is_shown_beside_the_expected_one(tmp_path: Path) -> None:
    folder = copy_of(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight has shape (63,), the config asks for (64,)" in refusal(folder).message


def test_unused_tensors_are_listed_and_rotary_buffers_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of(tmp_path, "llama_tied")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.extra", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        tensors[name] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_runner(folder, max_total_tokens=CONTEXT_LEN)
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: 1 tensors are not used: model.extra"]


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "model-00009-of-00009.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = copy_of(tmp_path, sharded=True)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    assert name in refusal(folder).message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = copy_of(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be read" in refusal(folder).message


@pytest.mark.parametrize("sharded", [False, True])
def test_progress_counts_every_byte_once(sharded: bool) -> None:
    folder = tiny_model("llama", "float32", sharded)
    seen: list[tuple[int, int]] = []
    load_runner(folder, max_total_tokens=CONTEXT_LEN, on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(t.nbytes for path in folder.glob("*.safetensors") for t in load_file(path).values())
    )


def test_weights_are_joined_and_converted_on_reading() -> None:
    folder = tiny_model("qwen2")
    names = [f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"]
    tensors = load_file(folder / "model.safetensors")
    with Weights(folder, ModelConfig.from_folder(folder), torch.bfloat16, None) as weights:
        assert torch.equal(weights.take(*names), torch.cat([tensors[name] for name in names]).bfloat16())


def test_names_resolve_to_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    for name in ("./absent", "~/absent", str(tmp_path / "absent"), "a/b/c", "absent"):
        with pytest.raises(RequestError, match="no such model folder"):
            resolve_model(name)

    def offline(name: str, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        raise OSError(f"cannot reach the hub for {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(RequestError, match=r"'owner/name' is neither a folder nor .* cannot reach the hub") as caught:
        resolve_model("owner/name")
    assert caught.value.kind == "unsupported_model"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "fp8"}, "dtype must be one of float32, fp32, bfloat16, bf16, got 'fp8'"),
        ({"device": "cuda:99"}, "device must be 'cpu' or 'cuda', got 'cuda:99': .* CUDA devices?"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu': it is not known"),
        ({"dtype": "float16"}, "dtype must be one of .*, got 'float16'; float16 needs a GPU"),
        ({"mem_fraction": 0.5}, "mem_fraction is of a GPU's memory"),
        ({"attention": "triton"}, "triton attention needs a CUDA device, or Triton's interpreter"),
        ({"max_total_tokens": 0}, "max_total_tokens must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        load_runner(tiny_model(), **arguments)
    assert caught.value.kind == "invalid_request"


def test_the_default_pool_holds_64_contexts_of_a_small_model() -> None:
    runner = load_runner(tiny_model(), page_size=16)
    assert (runner.num_pages, runner.page_size) == (64 * CONTEXT_LEN // 16, 16)
    assert (runner.vocab_size, runner.context_len) == (VOCAB_SIZE, CONTEXT_LEN)
    assert (runner.dtype, runner.device) == ("float32", "cpu")
    assert load_runner(tiny_model(), page_size=5, max_total_tokens=23).num_pages == 5
    assert load_runner(tiny_model(), num_pages=3).num_pages == 3
