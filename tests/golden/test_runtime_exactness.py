"""The whole runtime against transformers: greedy tokens do not depend on how the work was arranged.

Tiny random float32 checkpoints of each architecture, through a real runtime process. With a budget of 32 tokens a step,
the short prompts are computed whole and the long ones in chunks, beside the decodes of others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import within
from tiny_checkpoints import VARIANTS, Oracle, tiny_checkpoint
from unhealed import Unhealed

import bough as bo

NUM_NEW = 10
SHORT = "The tree and a branch"
LONG = "def f_7(x):\n    return x + 259\n\nIt's a model of the world, and the branch of a tree has 1234 pages. " * 2
PROMPTS = (SHORT, LONG, "Hello World", "x", "\u4f60\u597d\uff0c\u4e16\u754c na\u00efve \U0001f600 token cache")
CASES = [*((variant, 16) for variant in VARIANTS), ("llama", 1), ("qwen3", 1)]


class Case:
    """A runtime that serves a checkpoint, and what transformers says about the same checkpoint."""

    def __init__(self, runtime: bo.Runtime, oracle: Oracle) -> None:
        self.runtime = runtime
        self.backend = Unhealed(runtime)
        self.oracle = oracle

    def run(self, prompt: str, num_new: int = NUM_NEW) -> bo.State:
        return continued.run(prompt, backend=self.backend, max_tokens=num_new, ignore_eos=True)

    def expected(self, prompt: str) -> list[int]:
        return self.oracle.greedy(self.oracle.ids(prompt), NUM_NEW)


@bo.function
def continued(s: bo.State, prompt: str) -> None:
    s += prompt
    s += bo.gen("new", temperature=0)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-page{case[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    variant, page_size = request.param
    folder = tiny_checkpoint(variant)
    with bo.Runtime(folder, dtype="float32", page_size=page_size, token_budget=32, max_total_tokens=8192) as runtime:
        yield Case(runtime, Oracle(folder))


@pytest.fixture(autouse=True)
def cold(case: Case) -> None:
    case.runtime.flush_cache()


def ids_of(state: bo.State, name: str = "new") -> list[int]:
    meta = within(60, lambda: state.get_meta_info(name))
    ids: list[int] = meta["token_ids"]
    return ids


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["whole", "chunked"])
def test_one_run_gives_transformers_tokens(case: Case, prompt: str) -> None:
    steps = case.runtime.stats()["steps"]
    state = case.run(prompt)
    assert ids_of(state) == case.expected(prompt)
    meta = state.get_meta_info("new")
    assert meta["prompt_tokens"] == meta["computed_tokens"] == len(case.oracle.ids(prompt))
    chunks = -(-meta["prompt_tokens"] // 32)
    assert int(case.runtime.stats()["steps"]) - int(steps) == chunks + NUM_NEW - 1
    assert chunks > 1 if prompt is LONG else chunks == 1


def test_different_prompts_at_once_give_transformers_tokens(case: Case) -> None:
    states = continued.run_batch(
        [{"prompt": prompt} for prompt in PROMPTS], backend=case.backend, max_tokens=NUM_NEW, ignore_eos=True
    )
    assert [ids_of(state) for state in states] == [case.expected(prompt) for prompt in PROMPTS]


def test_a_second_run_takes_all_but_the_last_token_from_the_cache(case: Case) -> None:
    first, second = (case.run(LONG) for _ in range(2))
    assert ids_of(first) == ids_of(second) == case.expected(LONG)
    again = case.run(LONG)
    assert ids_of(again) == case.expected(LONG)
    assert again.get_meta_info("new")["cached_tokens"] == len(case.oracle.ids(LONG)) - 1


def test_flushing_changes_what_is_cached_and_not_what_is_said(case: Case) -> None:
    assert ids_of(case.run(LONG)) == case.expected(LONG)
    case.runtime.flush_cache()
    state = case.run(LONG)
    assert ids_of(state) == case.expected(LONG)
    assert state.get_meta_info("new")["cached_tokens"] == 0


def test_forks_compute_nothing_but_their_own_text(case: Case) -> None:
    suffixes = [f"\n{number} and the world" for number in (1, 22, 333)]

    @bo.function
    def tree(s: bo.State) -> None:
        s += LONG
        s += bo.gen("trunk", temperature=0)
        forks = s.fork(3)
        forks += suffixes
        forks += bo.gen("new", temperature=0)
        forks.join()

    state = tree.run(backend=case.backend, max_tokens=NUM_NEW, ignore_eos=True)
    trunk = case.oracle.ids(LONG) + ids_of(state, "trunk")
    metas = within(60, lambda: state.get_meta_info("new"))
    for suffix, meta in zip(suffixes, metas, strict=True):
        own = case.oracle.ids_after(suffix)
        assert meta["token_ids"] == case.oracle.greedy(trunk + own, NUM_NEW)
        assert meta["prompt_tokens"] == len(trunk) + len(own)
        assert meta["computed_tokens"] <= len(own) + 1  # the token drawn last has no keys and values yet
