"""Small tokenizers of the families that real models use, trained in a moment and saved as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3_CHAT = """\
{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'\
+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}\
{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
QWEN3_CHAT = """\
{%- set ns = namespace(last_user=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.last_user == messages|length - 1 and message.role == 'user' %}{%- set ns.last_user = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.index0 > ns.last_user and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL_CHAT = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}
{%- endfor %}
"""
LLAMA2_CHAT = """\
{%- if messages[0]['role'] == 'system' %}{%- set loop_messages = messages[1:] %}
{%- set system_message = messages[0]['content'] %}
{%- else %}{%- set loop_messages = messages %}{%- set system_message = false %}{%- endif %}
{%- for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if loop.index0 == 0 and system_message != false %}
{%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{%- else %}{%- set content = message['content'] %}{%- endif %}
{%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{- ' ' + content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}
"""
# The system message is written before the last user message: it moves as the conversation grows.
MOVING_SYSTEM_CHAT = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{%- if loop.last or loop.index0 == messages|length - 2 %}{{- '[INST] ' + system + message['content'] + '[/INST]' }}
{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
{%- else %}{{- message['content'] + eos_token }}{%- endif %}
{%- endfor %}
"""


def corpus() -> Iterator[str]:
    """Yield text with words, numbers, code and other scripts."""
    words = ["the", "a", "of", "tree", "branch", "token", "page", "cache", "and's", "model", "it's", "don't", "we're"]
    words += ["hello", "world", "Hello", "World", "return"]
    for index in range(400):
        yield " ".join(words[(index * step) % len(words)] for step in range(1, 12))
        yield f"def f_{index}(x):\n    return x + {index * 37}\n\n\tfor i in range({index}):\n        pass\n"
        yield (
            "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f " * 2
            + "\u00e9t\u00e9 na\u00efve Stra\u00dfe \U0001f600"
        )


def gpt2(folder: Path) -> Path:
    """Byte-level BPE split by ByteLevel's own pattern; <|endoftext|> is id 0, as its trainers put it first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ["<|endoftext|>"], 600)
    return _save(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama3(folder: Path) -> Path:
    """Llama 3's split (digits by three), `ignore_merges`, and a post-processor that puts the first token."""
    tokenizer = _split_bpe(LLAMA3_SPLIT, ignore_merges=True)
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    _train(tokenizer, [], 700)
    tokenizer.add_special_tokens(specials)
    bos = tokenizer.token_to_id(specials[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", pair=f"{specials[0]} $A $B", special_tokens=[(specials[0], bos)]
    )
    ends = [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ends[0], "model_type": "llama"}))
    return _save(tokenizer, folder, bos_token=specials[0], eos_token="<|eot_id|>", chat_template=LLAMA3_CHAT)


def qwen2(folder: Path) -> Path:
    """Qwen 2's split (digits alone) after NFC, with a mark that is not flagged special."""
    tokenizer = _split_bpe(QWEN2_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    _train(tokenizer, [], 700)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    return _save(tokenizer, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


def o200k(folder: Path) -> Path:
    """A split that looks at upper and lower case; one control token begins with another."""
    tokenizer = _split_bpe(O200K_SPLIT)
    _train(tokenizer, [], 700)
    tokenizer.add_special_tokens(["<|end|>", "<|end|>text|>"])
    return _save(tokenizer, folder, eos_token="<|end|>")


def prefix_space(folder: Path) -> Path:
    """ByteLevel that puts a space before the first word, as RoBERTa's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, ["</s>"], 600)
    return _save(tokenizer, folder, eos_token="</s>")


def shuffled(folder: Path) -> Path:
    """Qwen 2's split with ids in no order: ranks and ids differ. Two control tokens take white space beside them."""
    tokenizer = _split_bpe(QWEN2_SPLIT)
    _train(tokenizer, [], 600)
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {piece: (index * 7 + 3) % len(vocab) for piece, index in vocab.items()}
    assert len(set(spec["model"]["vocab"].values())) == len(vocab), "7 and the size have no common factor"
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    taking = [AddedToken("<|end|>", rstrip=True, normalized=False), AddedToken("<mask>", lstrip=True, normalized=False)]
    tokenizer.add_special_tokens(taking)
    return _save(tokenizer, folder, eos_token="<|end|>")


def unmergeable(folder: Path) -> Path:
    """A byte-level BPE that tiktoken would encode otherwise: "abc" is made of (ab, c), but (b, c) merges first."""
    tokenizer = _split_bpe(QWEN2_SPLIT, ignore_merges=True)
    _train(tokenizer, [], 256)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    for piece in ("bc", "ab", "abc"):
        spec["model"]["vocab"][piece] = len(spec["model"]["vocab"])
    return _save(Tokenizer.from_str(json.dumps(spec)), folder)


def whole_pieces_only(folder: Path) -> Path:
    """Like `unmergeable`, without `ignore_merges`: the token "abc" is never made, in text or alone."""
    unmergeable(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = False
    return _save(Tokenizer.from_str(json.dumps(spec)), folder)


def space_runs(folder: Path) -> Path:
    """Added tokens that are plain vocabulary (runs of spaces, as in GPT-NeoX)."""
    tokenizer = _split_bpe(QWEN2_SPLIT)
    _train(tokenizer, [], 600)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["  ", "    "])
    return _save(tokenizer, folder, eos_token="<|endoftext|>")


def two_splits(folder: Path) -> Path:
    """DeepSeek's way: several splits one after the other, which no single pattern expresses."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[\u4e00-\u9fa5]+"), behavior="isolated"),
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, [], 600)
    tokenizer.add_special_tokens(["<\uff5cend\u2581of\u2581sentence\uff5c>"])
    return _save(tokenizer, folder, eos_token="<\uff5cend\u2581of\u2581sentence\uff5c>")


def llama2(folder: Path) -> Path:
    """SentencePiece's BPE as transformers converts it: a Prepend normaliser, no pre-tokenizer, byte fallback."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _save_sentencepiece(tokenizer, folder)


def metaspace(folder: Path) -> Path:
    """The same vocabulary by the newer way: Metaspace, a space before the first word only."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _save_sentencepiece(tokenizer, folder)


def unigram(folder: Path) -> Path:
    """A unigram model whose vocabulary holds the control tokens as pieces, as T5's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("</s>"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return _save(tokenizer, folder, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


BYTE_LEVEL: dict[str, Callable[[Path], Path]] = {
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen2": qwen2,
    "o200k": o200k,
    "prefix_space": prefix_space,
    "shuffled": shuffled,
    "unmergeable": unmergeable,
    "whole_pieces_only": whole_pieces_only,
    "space_runs": space_runs,
    "two_splits": two_splits,
}
SENTENCEPIECE: dict[str, Callable[[Path], Path]] = {"llama2": llama2, "metaspace": metaspace}
ALL = BYTE_LEVEL | SENTENCEPIECE


def _split_bpe(pattern: str, *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(tokenizer: Tokenizer, specials: list[str], size: int) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)


def _sentencepiece() -> Tokenizer:
    """Train on words that begin with the space mark, then put the bytes where SentencePiece has them (from id 3)."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=["\u2581"])
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def _save_sentencepiece(tokenizer: Tokenizer, folder: Path) -> Path:
    named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(tokenizer, folder, chat_template=LLAMA2_CHAT, **named)


def _save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(fixed | config))
    return folder
