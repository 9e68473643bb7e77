"""The model the benchmarks run: a 30M-parameter Llama shape with random weights, as a Hugging Face folder.

8 layers, hidden 512, 8 heads, 4 KV heads, MLP 1536, vocabulary 8192, tied, bfloat16. Speed does not depend on what the
weights are, so they are random and seeded.

Its tokenizer is an ordinary byte-level BPE whose merges are written down rather than trained: 7,735 words such as
" bavo" are exactly one token each, so a prompt of n words has n tokens, and any other text still falls back to bytes.
Text stands for tokens one to one, and the whole path from text to text is measured. The embeddings of tokens that are
not words are scaled down, so that greedy continuations consist of words, and the layers' weights are large beside the
embeddings, so that they are not one word for ever.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

VOCAB_SIZE: Final = 8192
_SYLLABLES: Final = ["".join(pair) for pair in product("bdfghjklmnprstvwxyzc", "aeiou")]
_NUM_FIXED: Final = 256 + 2 * len(_SYLLABLES) + 1  # bytes, syllables with and without a space before, end of text
_SPACE: Final = "\u0120"  # how byte-level BPE writes a space
_END: Final = "<|end|>"
_RECIPE: Final = "llama-30m-2"  # count up when the recipe changes


def words() -> list[str]:
    """Return the words that are one token each, with the space before them."""
    pairs = product(_SYLLABLES, _SYLLABLES)
    return [f" {left}{right}" for (left, right), _ in zip(pairs, range(VOCAB_SIZE - _NUM_FIXED), strict=False)]


def token_ids(text: str) -> list[int]:
    """Return the ids of a text that consists of `words`, without a tokenizer."""
    return [_FIRST_WORD + _PLACES[word] for word in text.split()]


def llama_30m(models_dir: Path) -> Path:
    """Return the model's folder, made now if it is not there."""
    folder = models_dir.expanduser() / _RECIPE
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=folder.parent))
    try:
        _save_tokenizer(unfinished)
        _save_model(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


_FIRST_WORD: Final = _NUM_FIXED - 1
_PLACES: Final = {word.strip(): place for place, word in enumerate(words())}


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for left, right in [
        *((syllable[0], syllable[1]) for syllable in _SYLLABLES),
        *((_SPACE, syllable) for syllable in _SYLLABLES),
        *((_SPACE + word[1:3], word[3:]) for word in words()),
    ]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _save_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB_SIZE - 1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table *= 0.2
        table[:_FIRST_WORD] *= 0.01
        table[-1] *= 0.01
    model.to(torch.bfloat16).save_pretrained(folder)
