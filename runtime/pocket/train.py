"""Train `pocket` on generated conversations and write a folder that transformers can load.

The learning rate warms up, stays, and decays to zero, so that a run can be shortened by
decaying earlier. The examples of step n depend only on the seed and n: a resumed run sees what an
unbroken one would.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bough.runtime.pocket import tasks, tokenizer
from bough.runtime.pocket.muon import Muon

Shape = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """What was run. `shapes` maps rows and length of a batch to its share of the steps."""

    seed: int = 1
    steps: int = 3300
    warmup: int = 100
    decay: int = 2000
    copying_first: int = 900
    optimizer: str = "muon"
    matrix_rate: float = 0.02
    rate: float = 3e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    threads: int = 2
    compiled_up_to: int = 512
    shapes: tuple[tuple[Shape, float], ...] = (
        ((24, 256), 0.56),
        ((12, 512), 0.26),
        ((6, 1024), 0.10),
        ((3, 2048), 0.08),
    )


def model_config(bpe: Tokenizer) -> LlamaConfig:
    """About 2.9 M parameters; positions were trained up to 2,048."""
    return LlamaConfig(
        vocab_size=tokenizer.VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=tokenizer.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=bpe.token_to_id(tokenizer.TURN_END),
        pad_token_id=bpe.token_to_id(tokenizer.END_OF_TEXT),
    )


def _row(rng: Random, bpe: Tokenizer, length: int, copying: bool) -> tuple[list[int], list[float]]:
    """Whole examples after each other until the row is full; the first starts at position 0."""
    ids: list[int] = []
    weights: list[float] = []
    weighting = tasks.COPYING_FIRST if copying else tasks.EVERYTHING
    while len(ids) < length:
        left = length - len(ids)
        if left >= 400 and rng.random() < (0.4 if length == 512 else 0.8):
            example = tasks.long_facts(rng, "train", rng.randint(int(left * 0.4), int(left * 0.9)))
        else:
            example = tasks.draw(rng, weighting)
        more_ids, more_weights = tokenizer.encode(bpe, example)
        ids += more_ids
        weights += more_weights
    return ids[:length], weights[:length]


def batch(recipe: Recipe, bpe: Tokenizer, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and loss weights of a step."""
    rng = Random(f"{recipe.seed} {step}")
    copying = step < recipe.copying_first
    shapes = recipe.shapes[:1] if copying else recipe.shapes
    rows, length = rng.choices([s for s, _ in shapes], [share for _, share in shapes])[0]
    made = [_row(rng, bpe, length, copying) for _ in range(rows)]
    return torch.tensor([ids for ids, _ in made]), torch.tensor([weights for _, weights in made])


def rate_at(recipe: Recipe, step: int) -> float:
    """The factor on the learning rates: a linear warm-up, a level, then one minus the root of what is done."""
    done = max(0.0, 1 - (recipe.steps - step) / recipe.decay)
    return min(1.0, (step + 1) / recipe.warmup, 1 - math.sqrt(done))


def optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices inside the layers if the recipe says so."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in chosen]
    betas = (0.9, 0.95)
    if recipe.optimizer != "muon":
        groups: list[dict[str, Any]] = [
            {"params": inner, "weight_decay": recipe.weight_decay},
            {"params": others},
        ]
        return [torch.optim.AdamW(groups, lr=recipe.rate, betas=betas, weight_decay=0.0)]
    return [
        Muon(inner, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.rate, betas=betas, weight_decay=0.0),
    ]


class Training:
    """The model, its optimizers, and where the run stands."""

    def __init__(self, recipe: Recipe, bpe: Tokenizer) -> None:
        torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.bpe = bpe
        self.model = LlamaForCausalLM(model_config(bpe))
        self.fast = torch.compile(self.model, dynamic=False) if recipe.compiled_up_to else self.model
        self.optimizers = optimizers(recipe, self.model)
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []

    def save(self, path: Path) -> None:
        """Keep all that a resumed run needs."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": (self.step, self.tokens, self.seconds, self.curve),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds, self.curve = state["progress"]

    def one_step(self) -> float:
        """Train on one batch."""
        ids, weights = batch(self.recipe, self.bpe, self.step)
        model = self.fast if ids.size(1) <= self.recipe.compiled_up_to else self.model
        factor = rate_at(self.recipe, self.step)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        said = wanted == 1.0
        return float(losses.detach()[said].mean())

    def run(self, state: Path, every: int) -> None:
        """Train to the end of the recipe, saving and logging on the way."""
        recent: list[float] = []
        while self.step < self.recipe.steps:
            start = time.perf_counter()
            recent.append(self.one_step())
            self.seconds += time.perf_counter() - start
            if self.step % 20 == 0 or self.step == self.recipe.steps:
                mean = sum(recent) / len(recent)
                speed = self.tokens / self.seconds
                print(
                    f"step {self.step} loss {mean:.4f} tokens {self.tokens} tokens/s {speed:.0f}",
                    flush=True,
                )
            if self.step % 100 == 0 or self.step == self.recipe.steps:
                self.curve.append((self.step, round(sum(recent) / len(recent), 4)))
                recent.clear()
            if every and self.step % every == 0:
                self.save(state)


def write_config(folder: Path, bpe: Tokenizer) -> None:
    """Write config.json and generation_config.json over those that come with the weights."""
    config = model_config(bpe)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=[bpe.token_to_id(tokenizer.TURN_END), bpe.token_to_id(tokenizer.END_OF_TEXT)],
        pad_token_id=bpe.token_to_id(tokenizer.END_OF_TEXT),
    ).save_pretrained(folder)


def write_weights(folder: Path, model: LlamaForCausalLM) -> None:
    """Write model.safetensors in bfloat16, the tied embedding once."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)


def report(training: Training) -> dict[str, object]:
    """What training.json records."""
    return {
        "recipe": asdict(training.recipe),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": training.step,
        "tokens": training.tokens,
        "minutes": round(training.seconds / 60, 1),
        "final_loss": training.curve[-1][1] if training.curve else None,
        "loss_curve": training.curve,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train pocket.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--decay", type=int, default=Recipe.decay)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default=Recipe.optimizer)
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler")
    parser.add_argument("--tokenizer", type=Path, help="folder of a finished tokenizer to use")
    parser.add_argument("--state", type=Path, help="file for the state of the run; continued if it exists")
    parser.add_argument("--every", type=int, default=100, help="steps between two saved states")
    options = parser.parse_args()
    recipe = Recipe(
        steps=options.steps,
        decay=min(options.decay, options.steps),
        threads=options.threads,
        optimizer=options.optimizer,
        compiled_up_to=0 if options.no_compile else Recipe.compiled_up_to,
    )
    folder: Path = options.out
    if options.tokenizer:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).exists():
                shutil.copy(options.tokenizer / name, folder / name)
        bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        bpe = tokenizer.build()
        tokenizer.save(bpe, folder)
    training = Training(recipe, bpe)
    if options.state and options.state.exists():
        training.load(options.state)
    training.run(options.state, options.every if options.state else 0)
    write_weights(folder, training.model)
    write_config(folder, bpe)
    (folder / "training.json").write_text(json.dumps(report(training), indent=1) + "\n")


if __name__ == "__main__":
    main()
