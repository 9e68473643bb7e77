"""Tiny random checkpoints of every supported architecture, written by transformers itself, and a runner driven by hand.

Token ids only: there is no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import msgspec
import numpy as np
import torch
import transformers

from bough.runtime.batch import Batch, IntArray, Row, SampleRequest
from bough.runtime.inputs import build_inputs
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner

VOCAB_SIZE = 320
CONTEXT_LEN = 256

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,  # large enough that attention is far from uniform and logits differ clearly
}

# name -> (configuration class, changes to _SHAPE)
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_biased": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama3_rope": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear_rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "yarn_rope": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    # Sizes at which one row alone and the same row among others differed in bits on Zen 4 (an inner size of 1,408).
    "wide": (
        transformers.LlamaConfig,
        {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": 2},
    ),
}


@cache
def tiny_model(variant: str = "llama", dtype: str = "float32", sharded: bool = False) -> Path:
    """Return the folder of a seeded checkpoint; made once per process. Biases and norms are random too."""
    folder = Path(mkdtemp(prefix=f"bough-tiny-{variant}-"))
    model = oracle(variant).to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": "100KB"} if sharded else {}))
    return folder


def oracle(variant: str = "llama") -> Any:
    """Return transformers' own model of a variant, float32, with the weights that `tiny_model` writes."""
    config_class, changes = VARIANTS[variant]
    config = config_class(**{**_SHAPE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.data.normal_(0, 0.3)
    return model.eval()


class Text:
    """A sequence driven by hand: token ids whose KV lies, or will lie, in the pages it was given."""

    def __init__(self, ids: IntArray, pages: IntArray) -> None:
        self.ids = ids
        self.pages = pages
        self.prompt_len = len(ids)
        self.done = 0  # tokens whose KV is in the pool

    def row(self, page_size: int, count: int | None = None, **params: Any) -> Row:
        """Return a row of the next `count` tokens (None: all that are left), drawing greedily after the last one."""
        end = len(self.ids) if count is None else min(self.done + count, len(self.ids))
        request = None
        if end == len(self.ids):
            request = SampleRequest(
                SamplingParams(**{"temperature": 0.0, **params}),
                seed=7,
                position=end,
                generated=self.ids[self.prompt_len :],
                prompt=self.ids[: self.prompt_len],
                forbidden=(),
            )
        row = Row(self.ids[self.done : end], self.done, self.pages[: -(-end // page_size)], request)
        self.done = end
        return row

    def append(self, token: int | None) -> None:
        """Add the token just drawn."""
        assert token is not None, "this row drew no token"
        self.ids = np.append(self.ids, np.int32(token))


def random_ids(count: int, seed: int) -> IntArray:
    """Return `count` token ids, no special ones."""
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, count).astype(np.int32)


def texts(runner: Runner, prompts: Sequence[IntArray], seed: int = 0) -> list[Text]:
    """Give each prompt its own shuffled pages, enough for a whole context."""
    order = np.random.default_rng(seed).permutation(runner.num_pages).astype(np.int32)
    each = -(-runner.context_len // runner.page_size)
    return [Text(ids, order[i * each : (i + 1) * each]) for i, ids in enumerate(prompts)]


def generate(runner: Runner, together: Sequence[Text], count: int, chunk: int | None = None) -> list[list[int]]:
    """Prefill all texts in chunks, then draw `count` tokens of each, all in the same batches; return the tokens."""
    drawn: list[list[int]] = [[] for _ in together]
    while any(len(tokens) < count for tokens in drawn):
        active = [i for i, tokens in enumerate(drawn) if len(tokens) < count]
        results = runner.execute(Batch(tuple(together[i].row(runner.page_size, chunk) for i in active)))
        for i, result in zip(active, results, strict=True):
            if result.token is not None:
                drawn[i].append(result.token)
                together[i].append(result.token)
    return drawn


def logits(runner: Runner, row: Row, *others: Row) -> torch.Tensor:
    """Run rows as one step; return (num_new, vocab_size) float32 logits after every new token of the first."""
    everywhere = np.arange(len(row.token_ids), dtype=np.int32)
    probe = msgspec.structs.replace(row, sample=None, score_ids=row.token_ids, score_at=everywhere)
    rest = tuple(msgspec.structs.replace(other, score_ids=None) for other in others)
    with torch.inference_mode():
        batch = Batch((probe, *rest))
        inputs = build_inputs(batch, runner.page_size, runner.attention.plan)
        hidden = runner.model.forward(inputs, runner.pool)
        return runner.model.logits(hidden[-len(row.token_ids) :])
