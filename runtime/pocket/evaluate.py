"""Exact answers of `pocket` on held-out prompts, greedy, through plain transformers.

Every graded assistant turn is asked for with the right turns before it; an example counts when
all of them are right.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from bough.runtime.pocket import tasks, tokenizer
from bough.runtime.pocket.example import Example

WEIGHTS = Path(__file__).parent / "weights"
ROWS = 25


@dataclass(frozen=True)
class Prompt:
    """What to continue, the right continuation, and which example it belongs to."""

    example: int
    ids: list[int]
    expected: str
    raw: bool


def prompts_of(index: int, example: Example, bpe: Tokenizer) -> list[Prompt]:
    """The graded turns of an example as prompts."""
    if example.pieces:
        last = max(i for i, (_, learnt) in enumerate(example.pieces) if learnt)
        text = "".join(text for text, _ in example.pieces[:last])
        return [Prompt(index, bpe.encode(text).ids, example.pieces[last][0], True)]
    messages = list(example.messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"][-example.graded :]
    prompts: list[Prompt] = []
    for turn in turns:
        text = "".join(tokenizer.render(message) for message in messages[:turn])
        ids = bpe.encode(f"{text}{tokenizer.TURN_START}assistant\n").ids
        prompts.append(Prompt(index, ids, messages[turn]["content"], False))
    return prompts


def _id(bpe: Tokenizer, token: str) -> int:
    number = bpe.token_to_id(token)
    assert number is not None
    return number


class Asker:
    """Greedy continuation of many prompts at once."""

    def __init__(self, folder: Path) -> None:
        self.bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()  # type: ignore[no-untyped-call]
        self.pad = _id(self.bpe, tokenizer.END_OF_TEXT)
        self.end = _id(self.bpe, tokenizer.TURN_END)

    @torch.no_grad()
    def ask(self, prompts: Sequence[Prompt]) -> list[str]:
        """The continuations, up to the end of the turn or, for raw text, of the line."""
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        room = max(len(self.bpe.encode(prompt.expected).ids) for prompt in prompts) + 8
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            max_new_tokens=room,
            eos_token_id=[self.end, self.pad],
            pad_token_id=self.pad,
        )
        out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        texts = self.bpe.decode_batch(out[:, width:].tolist())
        return [
            text.strip().split("\n")[0] if prompt.raw else text for prompt, text in zip(prompts, texts, strict=True)
        ]


def grade(asker: Asker, name: str, count: int, show: int = 0) -> float:
    """The share of examples answered exactly; up to `show` wrong answers are printed."""
    examples = tasks.evaluation(name, count)
    prompts = [p for i, e in enumerate(examples) for p in prompts_of(i, e, asker.bpe)]
    prompts.sort(key=lambda prompt: len(prompt.ids))
    right = [True] * count
    for start in range(0, len(prompts), ROWS):
        group = prompts[start : start + ROWS]
        for prompt, got in zip(group, asker.ask(group), strict=True):
            if not examples[prompt.example].check(prompt.expected, got):
                right[prompt.example] = False
                if show:
                    show -= 1
                    print(f"--- {name}\n{asker.bpe.decode(prompt.ids[-120:])}")
                    print(f"wanted {prompt.expected!r}\ngot    {got!r}")
    return sum(right) / count


def main() -> None:
    """Grade every task, print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description="Evaluate pocket on held-out prompts.")
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--per-task", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="names of tasks")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each task")
    options = parser.parse_args()
    start = time.perf_counter()
    asker = Asker(options.model)
    table: dict[str, float] = {}
    for name in options.only or tasks.TASKS:
        table[name] = round(grade(asker, name, options.per_task, options.show), 3)
        print(f"{name:<16} {table[name]:>6.2f} {options.per_task:>5}", flush=True)
    mean = round(sum(table.values()) / len(table), 3)
    print(f"{'mean':<16} {mean:>6.2f}")
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"exact": table, "mean": mean, "per_task": options.per_task, "seconds": seconds}))


if __name__ == "__main__":
    main()
