"""A select against transformers: every method's scores are those of a full rescoring, one sequence per choice.

Tiny random float32 checkpoints, through a real runtime process. With a budget of 32 tokens a step, large tries are
computed in several.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
from processes import within
from tiny_checkpoints import Oracle, tiny_checkpoint

import bough as bo
from bough.runtime.protocol import ChoiceMethod
from bough.runtime.protocol.scoring import distribution, score_choices

# Variant, page size. llama has no token for every prefix of its words; llama_tied is SentencePiece, qwen2 without BOS.
CASES = [("llama", 16), ("llama_tied", 3), ("qwen2", 1)]
# The largest error of a log-probability in float32 over 120 random texts was 2.2e-5, here 1.2e-5 (at a log-probability
# of about 9, where float32 has steps of 1e-6). The former and an eighth to spare for other CPUs' orders of sums.
NOISE = 2.5e-5
METHODS: tuple[ChoiceMethod, ...] = get_args(ChoiceMethod)
WHOLE = "The tree and a branch"
CUT = "The tree and a bra"  # the choices below finish the word
PROMPTS = {
    "several tokens": (WHOLE, (" tree", " branch of the world", " a cache and's token")),
    "each begins the next": (WHOLE, (" tree", " tree of", " tree of the world", " trees", " ")),
    "not ASCII": (
        "na\u00efve ",
        ("\u4f60\u597d", "\u4f60", "\U0001f600 \u4e16\u754c", "\u00ef", "\u4f60\u597d\uff0c\u4e16\u754c"),
    ),
    "a seam inside a word": (CUT, ("nch", "nches of the world", "in", "n", " nch")),
    "one": (WHOLE, (" and the branch of a tree has 1234 pages, it is a model of the world and of the token cache",)),
    "in several steps": (WHOLE, tuple("".join(words) for words in product((" tree", " of", " a", " the"), repeat=3))),
}


class Case:
    """A runtime that serves a checkpoint, and what transformers says about the same checkpoint."""

    def __init__(self, runtime: bo.Runtime, oracle: Oracle) -> None:
        self.runtime = runtime
        self.oracle = oracle
        tokenizer = oracle.tokenizer
        self.neutral: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def choose(self, prompt: str, choices: tuple[str, ...], method: ChoiceMethod) -> tuple[str, dict[str, Any]]:
        state = choose.run(prompt, choices, method, backend=self.runtime)
        return within(60, lambda: (state["best"], state.get_meta_info("best")))

    def without_prompt(self, method: ChoiceMethod, ids: list[int]) -> list[float]:
        if method == "pmi":
            return self.oracle.logprobs([self.neutral, *ids], 1)
        return [0.0, *(self.oracle.logprobs(ids, 1) if len(ids) > 1 else [])]


@bo.function
def choose(s: bo.State, prompt: str, choices: tuple[str, ...], method: ChoiceMethod) -> None:
    s += prompt
    s += bo.select("best", choices, choices_method=method)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-page{case[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    variant, page_size = request.param
    folder = tiny_checkpoint(variant)
    with bo.Runtime(folder, dtype="float32", page_size=page_size, token_budget=32, max_total_tokens=4096) as runtime:
        yield Case(runtime, Oracle(folder))


@pytest.mark.parametrize("name", PROMPTS)
def test_scores_are_those_of_a_full_rescoring(case: Case, name: str) -> None:
    prompt, choices = PROMPTS[name]
    joint = [case.oracle.ids(prompt + choice) for choice in choices]
    tokens = case.choose(prompt, choices, "sum")[1]["choice_token_logprobs"]
    (start,) = {len(ids) - len(row) for ids, row in zip(joint, tokens, strict=True)}
    assert len({tuple(ids[:start]) for ids in joint}) == 1, "what is not scored is the same for all"
    assert start <= len(case.oracle.ids(prompt)), "every byte of a choice is scored"
    # One value per prefix: in transformers a token's value differs in the last bits with the text that follows it.
    known: dict[tuple[int, ...], float] = {}
    given = [
        [
            known.setdefault(tuple(ids[: start + j + 1]), value)
            for j, value in enumerate(case.oracle.logprobs(ids, start))
        ]
        for ids in joint
    ]
    for method in METHODS:
        best, meta = case.choose(prompt, choices, method)
        for ids, row, expected in zip(joint, meta["choice_token_logprobs"], given, strict=True):
            assert [token_id for _, token_id, _ in row] == ids[start:]
            assert [value for value, _, _ in row] == pytest.approx(expected, abs=NOISE, rel=0)
        alone = [case.without_prompt(method, ids[start:]) for ids in joint]
        scores = score_choices(method, given, alone, [len(choice.encode()) for choice in choices])
        num_summed = max(map(len, given)) if method in ("sum", "pmi") else 1
        assert meta["scores"] == pytest.approx(scores, abs=NOISE * num_summed, rel=0)
        assert meta["distribution"] == pytest.approx(distribution(given), abs=NOISE)
        assert best == choices[max(range(len(choices)), key=scores.__getitem__)]


def test_a_seam_inside_a_word_is_where_the_tokenizer_puts_it(case: Case) -> None:
    prompt, choices = PROMPTS["a seam inside a word"]
    joint = [case.oracle.ids(prompt + choice) for choice in choices]
    apart = case.oracle.ids(prompt)
    assert any(ids[: len(apart)] != apart for ids in joint), "no choice merges with the text before it"


def test_each_different_token_is_computed_once_and_the_prompt_not_again(case: Case) -> None:
    prompt, choices = PROMPTS["in several steps"]
    case.runtime.flush_cache()
    whole = len(case.oracle.ids(prompt))
    joint = [case.oracle.ids(prompt + choice) for choice in choices]
    for cached in (0, whole - 1):
        _, meta = case.choose(prompt, choices, "token_length_normalized")
        start = len(joint[0]) - len(meta["choice_token_logprobs"][0])
        followed = {tuple(ids[start:end]) for ids in joint for end in range(start + 1, len(ids))}
        assert meta["cached_tokens"] == min(cached, start - 1)
        assert meta["computed_tokens"] == start - meta["cached_tokens"] + len(followed)


def test_scores_do_not_depend_on_what_is_cached_to_the_bit(case: Case) -> None:
    prompt, choices = PROMPTS["each begins the next"]
    seen = []
    for before in ("", prompt, prompt + choices[2], prompt + " and more"):
        case.runtime.flush_cache()
        if before:
            within(60, choose.run(before, ("x", "y"), "sum", backend=case.runtime).sync)
        seen.append(case.choose(prompt, choices, "sum")[1]["scores"])
    assert all(scores == seen[0] for scores in seen)


@bo.function
def drawn(s: bo.State) -> None:
    s += WHOLE
    forks = s.fork(24)
    forks += bo.select("best", (" tree", " of", " a"), temperature=1.5)
    forks.join()


def test_forks_draw_apart_and_a_run_of_the_same_seed_draws_the_same(case: Case) -> None:
    def values(seed: int) -> list[str]:
        run = drawn.run(backend=case.runtime, seed=seed)
        return within(60, lambda: list(run["best"]))

    first, second, other = values(7), values(7), values(8)
    assert len(set(first)) > 1
    assert first == second
    assert first != other
