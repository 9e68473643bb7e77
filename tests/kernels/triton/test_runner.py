"""The runner of a GPU against the CPU's on tiny checkpoints: whole steps, as graphs and kernel by kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import torch
from tiny_models import CONTEXT_LEN, Text, generate, random_ids, texts, tiny_model

from bough.kernels.cuda_attention import Kernels
from bough.kernels.paged_kv import PagedKV
from bough.kernels.reference import dequantised
from bough.kernels.tree_costs import ESTIMATED, TreeCosts
from bough.runtime import sampler
from bough.runtime.batch import Batch, PageCopy, Row, RowResult, SampleRequest
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.cuda.runner import CudaRunner, CudaStep
from bough.runtime.cuda.sampler import sample
from bough.runtime.grammar.constraint import Words
from bough.runtime.grammar.masks import Masks
from bough.runtime.pipeline import Launcher, Pipeline
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie

# Padding's rows hold what lay in memory; no other row reads them.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@cache
def cpu_runner(variant: str, kv_dtype: str | None = None) -> Runner:
    return load_runner(tiny_model(variant), dtype="float32", max_total_tokens=6 * CONTEXT_LEN, kv_dtype=kv_dtype)


@cache
def gpu_runner(variant: str, device: torch.device, **options: Any) -> CudaRunner:
    name = None if device.type == "cpu" else device.type
    runner = load_runner(
        tiny_model(variant),
        dtype="float32",
        device=name,
        max_total_tokens=6 * CONTEXT_LEN,
        attention="triton",
        **options,
    )
    assert isinstance(runner, CudaRunner)
    runner.pool.poison(range(runner.num_pages))
    return runner


def test_tokens_are_those_of_the_cpu_in_a_ragged_batch(device: torch.device) -> None:
    """Prefill in tiles and as short extends, then decodes of 3 rows, padded to 4, as one captured step."""
    runner = gpu_runner("qwen3", device)
    expected, found = (
        generate(each, texts(each, [random_ids(length, seed=length) for length in (1, 4, 17)]), 3)
        for each in (cpu_runner("qwen3"), runner)
    )
    assert found == expected
    assert runner.graphs is not None
    assert runner.graphs.num_replays >= 1


def test_a_loaded_runner_plans_and_captures_by_the_costs_that_were_measured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(ESTIMATED, item_tokens=32.0, source="measured")
    timed: list[tuple[torch.Size, torch.dtype]] = []

    def calibrate(kernels: Kernels, kv: PagedKV, dtype: torch.dtype) -> TreeCosts:
        timed.append((kv.k.shape, dtype))
        return measured

    monkeypatch.setattr("bough.runtime.cuda.runner.calibrate", calibrate)
    runner = gpu_runner.__wrapped__("qwen3", device)
    assert timed == [(runner.pool.k[0].shape, torch.float32)]
    assert runner.attention.kernels is not None
    assert runner.attention.kernels.options.costs == measured
    assert runner.figures() == measured.figures()
    assert cpu_runner("qwen3").figures() == {}


def test_steps_of_single_kernels_give_the_same_tokens(device: torch.device) -> None:
    runner = gpu_runner("llama_biased", device, cuda_graphs=False)
    assert runner.graphs is None
    expected, found = (
        generate(each, texts(each, [random_ids(3, seed=3)]), 2) for each in (cpu_runner("llama_biased"), runner)
    )
    assert found == expected


def test_branches_that_share_pages_decode_as_on_the_cpu(device: torch.device) -> None:
    """A prefix of 6 pages read once for 3 branches, whose last pages are copies made in the step before they part."""
    found = []
    for runner in (cpu_runner("llama_tied"), gpu_runner("llama_tied", device)):
        (trunk,) = texts(runner, [random_ids(100, seed=1)])
        generator = torch.Generator().manual_seed(0)
        for pages in (*runner.pool.k, *runner.pool.v):  # as if a prefill had been here
            written = torch.randn(7, *pages.shape[1:], generator=generator)
            pages[torch.from_numpy(trunk.pages[:7]).long().to(pages.device)] = written.to(pages.device)
        free = np.setdiff1d(np.arange(runner.num_pages, dtype=np.int32), trunk.pages)
        branches = []
        for i in range(3):
            branch = Text(trunk.ids, np.concatenate([trunk.pages[:6], free[2 * i : 2 * i + 2]]))
            branch.done = 99
            branches.append(branch)
        copies = tuple(PageCopy(int(trunk.pages[6]), int(branch.pages[6]), 99 % 16) for branch in branches)
        rows = tuple(_seeded(branch.row(runner.page_size, temperature=1.0), i) for i, branch in enumerate(branches))
        tokens = [result.token for result in runner.execute(Batch(rows, copies))]
        for branch, token in zip(branches, tokens, strict=True):
            branch.append(token)
        found.append((tokens, generate(runner, branches, 1)))
    assert found[0] == found[1]


def _seeded(row: Row, seed: int) -> Row:
    assert row.sample is not None
    return msgspec.structs.replace(row, sample=msgspec.structs.replace(row.sample, seed=seed))


@pytest.mark.parametrize(("kv_dtype", "name"), [(None, "float32"), ("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_scores_are_those_of_the_cpu(device: torch.device, kv_dtype: str | None, name: str) -> None:
    """The CPU has no fp8: what is stored may be 1/16 off, and the scores by what comes of that."""
    ids = random_ids(6, seed=3)
    scores, keys = [], []
    on_cpu = cpu_runner("llama_tied", kv_dtype if kv_dtype != "fp8" else None)
    for runner in (on_cpu, gpu_runner("llama_tied", device, kv_dtype=kv_dtype)):
        assert runner.kv_dtype == (name if runner is not on_cpu or kv_dtype != "fp8" else "float32")
        (text,) = texts(runner, [ids])
        row = msgspec.structs.replace(
            text.row(16, 5), score_ids=ids[1:], score_at=np.arange(5, dtype=np.int32), sample=None
        )
        (result,) = runner.execute(Batch((row,)))
        assert result.score_logprobs is not None
        scores.append(result.score_logprobs)
        first = runner.pool.layers[0]
        meant = first.k if first.k_scales is None else dequantised(first)[0]
        keys.append(meant.cpu()[int(text.pages[0]), :5].float())
    torch.testing.assert_close(keys[1], keys[0], atol=1e-3 if kv_dtype != "int8" else 0.1, rtol=0.0626)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-3 if kv_dtype != "fp8" else 0.5)
    assert kv_dtype != "fp8" or not np.allclose(scores[1], scores[0], atol=1e-4)


def test_choices_are_scored_as_on_the_cpu(device: torch.device) -> None:
    """A trie's plan counts in slots, whatever the pool's pages: nodes lie scattered, and paths cross."""
    choices = [[5, 9, 9, 4], [5, 9, 3], [5, 8, 1], [7, 2, 3]]
    found = []
    for runner in (cpu_runner("llama_tied"), gpu_runner("llama_tied", device)):
        scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=64, max_running=4)
        sequence = Sequence(random_ids(14, seed=8), trie=TokenTrie(choices))
        scheduler.submit(sequence)
        step = scheduler.plan()
        assert step is not None
        assert step.batch.rows[0].trie is not None
        (outcome,) = scheduler.commit(step, runner.execute(step.batch))
        assert outcome.result.score_logprobs is not None
        found.append(outcome.result.score_logprobs)
    assert len(found[0]) == 10, "every different token once"
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_exact_results_do_not_depend_on_the_batch_or_on_how_a_token_came_about(
    device: torch.device, kv_dtype: str | None
) -> None:
    """Keys of a token that was drawn, and of the same token computed with the prompt beside strangers: equal bits."""
    runner = gpu_runner("llama_tied", device, exact=True, kv_dtype=kv_dtype)
    (alone,) = texts(runner, [random_ids(3, seed=5)], seed=1)
    generate(runner, [alone], 2)
    written = _keys(runner, alone)
    again, stranger = texts(runner, [alone.ids, random_ids(2, seed=6)], seed=2)
    again.ids = alone.ids[:4]
    runner.execute(Batch((again.row(16), stranger.row(16))))
    assert torch.equal(_keys(runner, again), written)


def _keys(runner: Runner, text: Text) -> torch.Tensor:
    return torch.stack([k.cpu()[torch.from_numpy(text.pages[:1]).long(), :4].float() for k in runner.pool.k])


class Only:
    """A constraint that allows even ids."""

    def fill(self, words: Words, forbidden: tuple[int, ...]) -> None:
        words[:] = 0x55555555
        assert forbidden == (3,)


SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2, "logprobs": 0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"temperature": 0.0, "logit_bias": {7: 30.0, 8: -2.0}},
)


@pytest.mark.parametrize("constrained", [False, True])
def test_the_sampler_draws_what_the_cpu_s_draws(constrained: bool, device: torch.device) -> None:
    logits = torch.randn(len(SAMPLING) * 3, 2100, generator=torch.Generator().manual_seed(2)) * 3
    requests = [
        SampleRequest(
            SamplingParams(**SAMPLING[i % len(SAMPLING)]),
            seed=i,
            position=i + 5,
            generated=np.array([4, 9, 4], dtype=np.int32),
            prompt=np.array([2, 9], dtype=np.int32),
            forbidden=(3,),
            constraint=Only() if constrained and i % 2 else None,  # type: ignore[arg-type]
        )
        for i in range(len(logits))
    ]
    expected = sampler.sample(logits.clone(), requests, Masks())
    found = sample(logits.to(device), requests, Masks())
    assert [draw.token for draw in found] == [draw.token for draw in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-6)
        assert [token for _, token in ours.top] == [token for _, token in theirs.top]


def test_rows_that_cannot_be_drawn_are_named(device: torch.device) -> None:
    request = SampleRequest(
        SamplingParams(temperature=1.0, top_k=2), 0, 0, np.zeros(0, np.int32), np.zeros(0, np.int32), (0, 1, 2)
    )
    free = msgspec.structs.replace(request, forbidden=())
    with pytest.raises(FloatingPointError, match="every token is forbidden in row 1"):
        sample(torch.zeros(2, 3, device=device), [free, request], Masks())
    broken = torch.zeros(2, 3, device=device)
    broken[1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite in row 1"):
        sample(broken, [free, free], Masks())


Draws: TypeAlias = tuple[int | None, float | None, tuple[int, ...]]


def _ahead(runner: CudaRunner, prompts: list[Text], count: int, params: list[dict[str, Any]]) -> list[list[Draws]]:
    """Prefill and draw `count` tokens of each text, each step launched before the one before is taken back.

    The host learns every token two launches after it was drawn, as in a runtime whose steps overlap.
    """
    flying: list[CudaStep] = []
    found: list[list[Draws]] = [[] for _ in prompts]
    for k in range(count):
        rows = []
        for i, text in enumerate(prompts):
            if k:
                text.append(0)  # stands in the place of a token that only the device knows
            row = _seeded(text.row(runner.page_size, **params[i]), seed=i)
            assert row.sample is not None
            if k:
                known = msgspec.structs.replace(row.sample, generated=row.sample.generated[:-1])
                drawn_by = len(prompts) - 1 - i if k % 2 else i
                row = msgspec.structs.replace(row, drawn_by=drawn_by, sample=known)
            rows.append(row)
        order = rows if k % 2 else rows[::-1]  # the row of a text changes from step to step
        flying.append(runner.launch(Batch(tuple(order)), flying[-1] if flying else None))
        for row in rows:
            row.token_ids[:] = 0  # a batch is read during the launch only
        if len(flying) == 2:
            _take(flying.pop(0), found, k - 1)
    _take(flying.pop(0), found, count - 1)
    return found


def _take(step: CudaStep, found: list[list[Draws]], k: int) -> None:
    results = step.result() if k % 2 else step.result()[::-1]
    for draws, result in zip(found, results, strict=True):
        draws.append(_draws_of(result))


def _draws_of(result: RowResult) -> Draws:
    likeliest = tuple(token for _, token in result.top)
    return result.token, None if result.logprob is None else round(result.logprob, 4), likeliest


def test_steps_launched_ahead_draw_the_same_tokens(device: torch.device) -> None:
    """Rows of every kind of sampling, that change places from step to step, go on from tokens the host never saw."""
    runner = gpu_runner("llama_tied", device)
    params: list[dict[str, Any]] = [{}, {"temperature": 1.0, "logprobs": 2}, {"temperature": 0.8, "top_k": 7}]
    prompts = [random_ids(length, seed=length) for length in (2, 5, 3)]
    together, cpu = texts(runner, prompts, seed=3), cpu_runner("llama_tied")
    expected: list[list[Draws]] = [[] for _ in prompts]
    known = texts(cpu, prompts)
    for _ in range(3):
        rows = [_seeded(text.row(16, **params[i]), i) for i, text in enumerate(known)]
        for text, draws, result in zip(known, expected, cpu.execute(Batch(tuple(rows))), strict=True):
            text.append(result.token)
            draws.append(_draws_of(result))
    assert _ahead(runner, together, 3, params) == expected


def test_a_step_behind_one_that_could_not_draw_does_no_harm(device: torch.device) -> None:
    """The token carried over is one of the vocabulary even so; what is wrong is told when the step is taken back."""
    runner = gpu_runner("llama_tied", device)
    (bad, good) = texts(runner, [random_ids(3, seed=8), random_ids(4, seed=9)])
    row = bad.row(16, temperature=1.0, top_k=3)
    assert row.sample is not None
    everything = msgspec.structs.replace(row.sample, forbidden=tuple(range(runner.vocab_size)))
    first = runner.launch(Batch((msgspec.structs.replace(row, sample=everything),)))
    bad.append(0)
    behind = msgspec.structs.replace(bad.row(16), drawn_by=0)
    second = runner.launch(Batch((behind, good.row(16))), first)
    with pytest.raises(FloatingPointError, match="every token is forbidden in row 0"):
        first.result()
    (again,) = texts(runner, [random_ids(4, seed=9)], seed=2)
    assert second.result()[1].token == runner.execute(Batch((again.row(16),)))[0].token


def test_steps_that_overlap_give_what_one_after_another_gives(device: torch.device) -> None:
    """A prompt in chunks, one that shares it and goes on in a copied page, one that ends early; kernel by kernel."""
    texts_of = []
    prompt = random_ids(9, seed=12)
    for runner, overlap in (
        (cpu_runner("llama_tied"), False),
        (gpu_runner("llama_tied", device, cuda_graphs=False), True),
    ):
        assert isinstance(runner, Launcher) == overlap
        pipeline = Pipeline(runner, runner if isinstance(runner, Launcher) else None)
        scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=8, max_running=4)
        sequences = []
        for seed, (length, count) in enumerate(((9, 3), (8, 1), (2, 2))):
            params = SamplingParams(temperature=float(seed), max_tokens=count)
            sequences.append(Sequence(prompt[:length], params=params, seed=seed))
            scheduler.submit(sequences[-1])
        while scheduler.has_work or pipeline:
            pipeline.fill(scheduler)
            step, results = pipeline.take()
            assert not isinstance(results, Exception)
            for outcome in scheduler.commit(step, results):
                done = outcome.sequence
                if done.params is not None and len(done.generated) == done.params.max_tokens:
                    scheduler.finish(done)
        texts_of.append([sequence.generated.tolist() for sequence in sequences])
    assert texts_of[0] == texts_of[1]
