"""The byte-level BPE of `pocket`, its chat template, and examples as tokens with loss weights.

Digits are never merged, so that a number is always spelt out. The identifiers are the 256 bytes,
then the merged tokens in the order of their merges, then the special tokens: a rank-based encoder
reads the same file without a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bough.runtime.pocket import tasks
from bough.runtime.pocket.example import Example, Message

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, TURN_START, TURN_END)
VOCABULARY = 1280
CONTEXT = 4096
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
BACKGROUND = 0.05


def render(message: Message) -> str:
    """One turn as the chat template writes it."""
    return f"{TURN_START}{message['role']}\n{message['content']}{TURN_END}\n"


def _corpus(examples: int, seed: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(examples):
        example = tasks.draw(rng, tasks.EVERYTHING)
        for message in example.messages:
            yield f"{message['role']}\n"
            yield message["content"]
        if example.pieces:
            yield "".join(text for text, _ in example.pieces)


def build(examples: int = 20_000, seed: int = 0) -> Tokenizer:
    """Train on generated conversations; special tokens come after the last merge."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(examples, seed), trainer)
    bpe.add_special_tokens(list(SPECIALS))
    return bpe


def save(bpe: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def pieces_of(example: Example) -> list[tuple[str, bool]]:
    """An example cut where the loss weight changes; a turn's end is learnt with its text."""
    if example.pieces:
        return [*example.pieces, (END_OF_TEXT, False)]
    pieces: list[tuple[str, bool]] = []
    for message in example.messages:
        if message["role"] == "assistant":
            pieces += [
                (f"{TURN_START}assistant\n", False),
                (message["content"] + TURN_END, True),
                ("\n", False),
            ]
        else:
            pieces.append((render(message), False))
    return [*pieces, (END_OF_TEXT, False)]


def encode(bpe: Tokenizer, example: Example) -> tuple[list[int], list[float]]:
    """Tokens and loss weights: 1 for what the model should say, little for the rest."""
    pieces = pieces_of(example)
    ends: list[int] = []
    for text, _ in pieces:
        ends.append((ends[-1] if ends else 0) + len(text))
    coded = bpe.encode("".join(text for text, _ in pieces))
    weights: list[float] = []
    index = 0
    for start, _ in coded.offsets:
        while start >= ends[index]:
            index += 1
        weights.append(1.0 if pieces[index][1] else BACKGROUND)
    return coded.ids, weights


def main() -> None:
    """Train the tokenizer and write it."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of pocket.")
    parser.add_argument("--out", type=Path, required=True)
    save(build(), parser.parse_args().out)


if __name__ == "__main__":
    main()
