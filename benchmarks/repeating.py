"""Texts that repeat others or do not, for `bench_speculation.py`: prompts, and where weights are random, what is said.

For the bundled model prompts whose answers it writes itself, JSON records with the same keys and other values, and
made-up words said again; and random tokens, which are put in the place of its own, for it falls into circles. For a
shape with random weights the same as token ids: records of five fields, keys of seven tokens, values of one to three;
a passage of the prompt in which every twelfth token is another; and what it draws at temperature 1, which is random.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final, Literal

import numpy as np
from models import FIRST_WORD, VOCAB_SIZE

from bough.runtime.batch import Batch, Row, RowResult
from bough.runtime.models.folder import resolve_model
from bough.runtime.pocket.words import CITIES, JOBS, PEOPLE, made_up
from bough.runtime.runner import Runner
from bough.runtime.text.tokenizer import load_tokenizer
from bough.runtime.vector import IntArray

Workload = Literal["siblings", "copying", "random"]
WORKLOADS: Final[tuple[Workload, ...]] = ("siblings", "copying", "random")
PROMPT_LEN: Final = 96  # tokens, of texts that are not the bundled model's
TEXT_LEN: Final = 64
_FIELDS: Final = 5
_KEY_LEN: Final = 7
_CHANGED: Final = 12


@dataclass(frozen=True)
class Ask:
    """A prompt; text: what is said to it, where the model does not decide."""

    prompt: IntArray
    text: list[int] | None = None


class Asked:
    """Prompts for the bundled model. eos: what ends its answers."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(resolve_model("pocket"))
        (self.eos,) = self._tokenizer.encode("<|im_end|>", special=True)

    def asks(self, workload: Workload, count: int, rng: Random) -> list[Ask]:
        """Return as many prompts that differ in what they say."""
        if workload == "random":
            return [self._noise(rng) for _ in range(count)]
        return [self._ask(_record(rng) if workload == "siblings" else _words(rng)) for _ in range(count)]

    def _noise(self, rng: Random) -> Ask:
        ids = [rng.randrange(self._tokenizer.vocab_size) for _ in range(PROMPT_LEN + TEXT_LEN)]
        return Ask(
            np.array(ids[:PROMPT_LEN], dtype=np.int32), [token for token in ids[PROMPT_LEN:] if token != self.eos]
        )

    def _ask(self, asked: str) -> Ask:
        text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        return Ask(np.array(self._tokenizer.encode(text, special=True), dtype=np.int32))


class Told:
    """Prompts and texts for random weights."""

    eos = None

    def __init__(self) -> None:
        self._keys = [_ids(Random(field), _KEY_LEN) for field in range(_FIELDS + 1)]

    def asks(self, workload: Workload, count: int, rng: Random) -> list[Ask]:
        """Return as many prompts, with texts unless the workload is random."""
        return [self._ask(workload, rng) for _ in range(count)]

    def _ask(self, workload: Workload, rng: Random) -> Ask:
        prompt = _ids(rng, PROMPT_LEN)
        if workload == "random":
            return Ask(np.array(prompt, dtype=np.int32))
        text = self._record(rng) if workload == "siblings" else _passage(rng, prompt)
        return Ask(np.array(prompt, dtype=np.int32), text)

    def _record(self, rng: Random) -> list[int]:
        fields = [(*key, *_ids(rng, rng.randint(1, 3))) for key in self._keys[:_FIELDS]]
        return [token for field in (*fields, self._keys[-1]) for token in field]


class Scripted:
    """A runner that takes the time of its model and draws the texts it is given, a sequence's by its seed."""

    def __init__(self, runner: Runner, texts: list[list[int]]) -> None:
        self._runner = runner
        self._texts = texts

    def execute(self, batch: Batch) -> list[RowResult]:
        """Compute a step; return what the texts say."""
        self._runner.execute(batch)
        return [self._result(row) for row in batch.rows]

    def _result(self, row: Row) -> RowResult:
        if row.sample is None:
            return RowResult()
        said = self._texts[row.sample.seed][len(row.sample.generated) :]
        draft = row.token_ids[len(row.token_ids) - row.draft :].tolist()
        num_true = next((i for i, token in enumerate(draft) if said[i] != token), row.draft)
        return RowResult(said[0], further=tuple(RowResult(token) for token in said[1 : 1 + num_true]))


def _record(rng: Random) -> str:
    name, city, job = (rng.choice(words) for words in (PEOPLE, CITIES, JOBS))
    return (
        f"Extract name, age, city, job as JSON.\n{name}, {rng.randint(20, 90)}, lives in {city} and works as a {job}."
    )


def _words(rng: Random) -> str:
    return "Repeat: " + " ".join(made_up(rng, "eval") for _ in range(10))


def _passage(rng: Random, prompt: list[int]) -> list[int]:
    begin = rng.randrange(PROMPT_LEN - TEXT_LEN)
    text = prompt[begin : begin + TEXT_LEN]
    for changed in range(_CHANGED - 1, TEXT_LEN, _CHANGED):
        text[changed : changed + 1] = _ids(rng, 1)
    return text


def _ids(rng: Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, VOCAB_SIZE - 1) for _ in range(count)]
