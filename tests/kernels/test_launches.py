"""What a runner launches over many steps: few compilations, all of the kinds that are compiled ahead of time."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from launches import Launch, Launches, record

from bough.kernels.aot import Variant, is_aligned, variants
from bough.kernels.attention import Attention
from bough.kernels.cuda_attention import choose_kernels
from bough.kernels.triton_rows import TritonRows
from bough.runtime.cache.kv_pool import KVPool
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.cuda.runner import CudaRunner
from bough.runtime.models.config import ModelConfig, RopeConfig
from bough.runtime.models.llama import DeviceParts, Llama
from bough.runtime.models.weights import expected_tensors
from bough.runtime.protocol import SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie

CPU = torch.device("cpu")
VOCAB_SIZE = 2112
SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0, "logit_bias": {7: 3.0}},
)


class Zeros:
    """Weights of a shape, all 0."""

    dtype = torch.bfloat16

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = expected_tensors(config)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def take(self, *names: str) -> torch.Tensor:
        shape = (sum(self._shapes[name][0] for name in names), *self._shapes[names[0]][1:])
        return torch.zeros(shape, dtype=self.dtype)


def runner_on_an_h100(kv_dtype: torch.dtype) -> CudaRunner:
    """Return a runner with the kernels of an H100, on the CPU: they can be launched there, but not run."""
    config = ModelConfig(
        "LlamaForCausalLM", 128, 2, 8, 2, 128, 192, VOCAB_SIZE, 1e-5, RopeConfig(theta=1e4),
        True, False, False, False, False, 4096, (1,), 0, "bfloat16",
    )  # fmt: skip
    attention = Attention(8, 2, 128, "triton", True, choose_kernels(8, 2, 128, kv_dtype, (9, 0), 132))
    model = Llama(config, Zeros(config), DeviceParts(TritonRows(4096, CPU), None), CPU)  # type: ignore[arg-type]
    pool = KVPool(2, 600, 16, 2, 128, kv_dtype, CPU)
    return CudaRunner(model, pool, torch.bfloat16, CPU, attention=attention)


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
    runner = runner_on_an_h100(kv_dtype)
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
