"""The models the benchmarks run: Llama shapes of 30M, 110M and 0.5B parameters with random weights, as folders.

By default 8 layers, hidden 512, 8 heads, 4 KV heads, MLP 1536, vocabulary 8192, tied, bfloat16 (30M). Speed does not
depend on what the weights are, so they are random and seeded.

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
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

VOCAB_SIZE: Final = 8192
_SYLLABLES: Final = ["".join(pair) for pair in product("bdfghjklmnprstvwxyzc", "aeiou")]
_NUM_FIXED: Final = 256 + 2 * len(_SYLLABLES) + 1  # bytes, syllables with and without a space before, end of text
_SPACE: Final = "\u0120"  # how byte-level BPE writes a space
_END: Final = "<|end|>"
_RECIPE: Final = 2  # count up when the recipe changes


@dataclass(frozen=True)
class Size:
    """A Llama shape; a head has 64 dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


SIZES: Final = {
    "30m": Size(hidden=512, layers=8, heads=8, kv_heads=4, mlp=1536),
    "110m": Size(hidden=768, layers=16, heads=12, kv_heads=4, mlp=2048),
    "0.5b": Size(hidden=1024, layers=32, heads=16, kv_heads=4, mlp=4096),
}


def words() -> list[str]:
    """Return the words that are one token each, with the space before them."""
    pairs = product(_SYLLABLES, _SYLLABLES)
    return [f" {left}{right}" for (left, right), _ in zip(pairs, range(VOCAB_SIZE - _NUM_FIXED), strict=False)]


def token_ids(text: str) -> list[int]:
    """Return the ids of a text that consists of `words`, without a tokenizer."""
    return [FIRST_WORD + _PLACES[word] for word in text.split()]


def text_of(ids: Iterable[int]) -> str:
    """Return the text of words' ids. Raises IndexError for an id that is no word's."""
    return "".join(_WORDS[token - FIRST_WORD] if token >= FIRST_WORD else _no_word(token) for token in ids)


def _no_word(token: int) -> str:
    raise IndexError(f"token {token} is no word of the benchmark's models")


def llama_30m(models_dir: Path) -> Path:
    """Return the folder of the 30M model, made now if it is not there."""
    return llama(models_dir, "30m")


def llama(models_dir: Path, size: str) -> Path:
    """Return the folder of the model of that size (a key of SIZES), made now if it is not there."""
    return made(models_dir.expanduser() / f"llama-{size}-{_RECIPE}", SIZES[size])


def made(folder: Path, size: Size) -> Path:
    """Return `folder` with a model of that shape in it, made now if it is not there."""
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(dir=folder.parent))
    try:
        _save_tokenizer(unfinished)
        _save_model(unfinished, size)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


FIRST_WORD: Final = _NUM_FIXED - 1
"""The id of the first word; the last is VOCAB_SIZE - 2."""
_WORDS: Final = words()
_PLACES: Final = {word.strip(): place for place, word in enumerate(_WORDS)}


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


def _save_model(folder: Path, size: Size) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
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
        table[:FIRST_WORD] *= 0.01
        table[-1] *= 0.01
    model.to(torch.bfloat16).save_pretrained(folder)
