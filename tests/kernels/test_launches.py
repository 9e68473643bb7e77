"""What a runner launches over many steps: few compilations, all of the kinds that are compiled ahead of time."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from h100 import VOCAB_SIZE, runner_on_an_h100
from launches import Launch, Launches, record

from bough.kernels.aot import Variant, is_aligned, variants
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.cuda.runner import CudaRunner
from bough.runtime.protocol import SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie

CPU = torch.device("cpu")
SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0, "logit_bias": {7: 3.0}},
)


def serve(runner: CudaRunner, num_steps: int) -> int:
    """Serve prompts of all lengths, some over one prefix, with every option and some choices; return the steps run."""
    rng = np.random.default_rng(0)
    scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=384, max_running=70)
    prefix = rng.integers(2, VOCAB_SIZE, 200, dtype=np.int32)
    for done in range(num_steps):
        if len(scheduler.running) < 5:
            for i in range(int(rng.integers(1, 60))):
                own = rng.integers(2, VOCAB_SIZE, int(rng.integers(1, 90)), dtype=np.int32)
                prompt = np.concatenate([prefix, own]) if rng.random() < 0.7 else own
                params = SamplingParams(max_tokens=int(rng.integers(1, 30)), ignore_eos=True, **SAMPLING[i % 5])
                scheduler.submit(Sequence(prompt, params=params, seed=i))
            scheduler.submit(Sequence(prefix, trie=TokenTrie([[5, 9, 4], [5, 9, 3], [7, 2, 3]])))
        step = scheduler.plan()
        if step is None:
            return done
        for outcome in scheduler.commit(step, runner.execute(step.batch)):
            sequence = outcome.sequence
            if sequence.params is None:
                is_complete = sequence.num_computed >= sequence.goal
            else:
                is_complete = len(sequence.generated) == sequence.params.max_tokens
            if is_complete:
                scheduler.finish(sequence)
    return num_steps


def kinds_of(launch: Launch) -> set[tuple[str, str, bool]]:
    return {(name, kind, value == "D") for name, kind, value in launch.arguments if kind != "constexpr"}


def kinds_ahead(variant: Variant) -> set[tuple[str, str, bool]]:
    return {(name, kind, is_aligned(name, kind)) for name, kind in variant.types.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_two_hundred_varied_steps_need_few_compilations_and_none_that_was_not_tried_ahead(
    kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compilation takes a second, in which nothing else runs. A number that is 1, or no multiple of 16, costs one."""
    runner = runner_on_an_h100(kv_dtype, CPU)
    launches: Launches = record(monkeypatch)
    with torch.inference_mode():
        runner.warm_up()
        warm = set(launches.kinds)
        assert serve(runner, 200) == 200
    assert launches.count > 2000
    per_kernel = Counter(launch.kernel for launch in launches.kinds)
    # norm with and without a residual; items of two widths; items, tiles in pages of 16 and of one slot
    most = {"rms_norm_kernel": 2, "attend_items_kernel": 4, "prefill_attention_kernel": 2}
    assert {kernel: count for kernel, count in per_kernel.items() if count > most.get(kernel, 1)} == {}
    late = {launch.kernel for launch in launches.kinds - warm}
    assert late <= {"attend_items_kernel", "prefill_attention_kernel"}, "those of tries"
    ahead: defaultdict[str, list[set[tuple[str, str, bool]]]] = defaultdict(list)
    for variant in variants():
        ahead[variant.kernel.fn.__name__].append(kinds_ahead(variant))
    untried = [launch for launch in launches.kinds if kinds_of(launch) not in ahead[launch.kernel]]
    assert untried == []
