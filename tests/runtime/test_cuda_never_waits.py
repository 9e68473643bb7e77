"""Launching a step only enqueues, whatever its rows ask for: shown on a device that holds no values.

PyTorch's "meta" device knows shapes alone: whoever wants a number from it, or an index or a count that depends on one
(item, nonzero, a mask, a copy back), gets an error. Kernels are noted instead of launched; what comes back to the host
is asked for after the launch only, in one place. What goes there is looked at as it passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from h100 import runner_on_an_h100
from launches import Launches, record

from bough.runtime.batch import Batch, PageCopy, Row, SampleRequest
from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.cuda import sampler
from bough.runtime.grammar.constraint import Words
from bough.runtime.protocol import SamplingParams
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence
from bough.runtime.trie import TokenTrie

META = torch.device("meta")
NOTHING = np.zeros(0, dtype=np.int32)


class OneWay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses a copy to the device that would wait for it, and an index on the host into what is on the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        met = [x for x in _flat((*args, *kwargs.values(), result)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in met}) > 1:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            assert named.get("non_blocking") is True, f"{func} waits"
            self.num_copies += 1
        return result


def _flat(values: Any) -> list[Any]:
    return [y for x in values for y in (_flat(x) if isinstance(x, list | tuple) else [x])]


class Back:
    """What comes back to the host, if it were waited for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device == META

    def wait(self) -> Any:
        raise AssertionError("a launch waits for what it computes")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    monkeypatch.setattr(sampler, "Download", Back)
    return record(monkeypatch)


class Even:
    """A constraint that allows even ids."""

    def fill(self, words: Words, forbidden: tuple[int, ...]) -> None:
        words[:] = 0x55555555


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 5},
    {"temperature": 1.0, "min_p": 0.1, "top_p": 0.5, "top_k": 3},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1, "top_k": 9},
    {"temperature": 0.0, "logit_bias": {7: 3.0}},
]


def row_of(index: int, num_new: int, start: int, **changes: Any) -> Row:
    """Return a row of sampling `index`, on pages of its own."""
    params = SamplingParams(**SAMPLING[index % len(SAMPLING)])
    constraint: Any = Even() if changes.pop("is_constrained", False) else None
    generated = np.array([4, 9], dtype=np.int32) if start else NOTHING
    draft = changes.get("draft", 0)
    request = SampleRequest(
        params, index, start + num_new - draft, generated, np.array([2], np.int32), (3,), constraint
    )
    pages = np.arange(index * 10, index * 10 + 10, dtype=np.int32)
    return Row(np.full(num_new, 5, dtype=np.int32), start, pages, request, **changes)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_launch_waits_for_nothing(kv_dtype: torch.dtype, cuda_graphs: bool, launches: Launches) -> None:
    """Prompts; decodes that go on from tokens still on the device; masks; drafts; scores; copies of pages."""
    runner = runner_on_an_h100(kv_dtype, META, cuda_graphs=cuda_graphs)
    count = len(SAMPLING)
    prompts = tuple(row_of(i, 40 + i, 0, is_constrained=i % 2 == 1) for i in range(count))
    decodes = tuple(row_of(i, 1, 40 + i, drawn_by=count - 1 - i) for i in range(count))
    drafted = tuple(row_of(i, 3, 50, draft=2) for i in range(count))
    scored = msgspec.structs.replace(
        row_of(0, 9, 0), sample=None, score_ids=np.arange(8, dtype=np.int32), score_at=np.arange(8, dtype=np.int32)
    )
    copies = (PageCopy(1, 301, 5), PageCopy(2, 302, 16), PageCopy(1, 303, 5))
    with OneWay() as way:
        first = runner.launch(Batch(prompts, copies))
        second = runner.launch(Batch(decodes), first)
        runner.launch(Batch((*decodes[:3], scored)), second)
        runner.launch(Batch(drafted))
        runner.launch(Batch((), copies))
    # The inputs of 4 steps, the numbers of 4 draws, those of a score; the penalised; the pages of 2 steps' copies.
    assert way.num_copies > 12
    names = {launch.kernel for launch in launches.kinds}
    assert {"penalise_kernel", "draw_kernel", "draw_filtered_kernel", "attend_items_kernel"} <= names
    with pytest.raises(AssertionError, match="a launch waits"):
        first.result()


def test_choices_are_scored_without_waiting(launches: Launches) -> None:
    runner = runner_on_an_h100(torch.bfloat16, META)
    scheduler = Scheduler(PrefixCache(runner.num_pages, runner.page_size), token_budget=64, max_running=4)
    scheduler.submit(Sequence(np.arange(2, 20, dtype=np.int32), trie=TokenTrie([[5, 9, 4], [5, 9, 3], [7, 2, 3]])))
    step = scheduler.plan()
    assert step is not None
    assert step.batch.rows[0].trie is not None
    with OneWay():
        runner.launch(step.batch)
    assert launches.count > 0


@pytest.mark.parametrize(
    ("wait", "error", "words"),
    [
        (lambda there, here: there[0].item(), RuntimeError, "item"),
        (lambda there, here: there.nonzero(), NotImplementedError, "nonzero"),
        (lambda there, here: there[there > 0], NotImplementedError, "nonzero"),
        (lambda there, here: there.tolist(), NotImplementedError, "no data"),
        (lambda there, here: there[here], AssertionError, "index.* waits"),
        (lambda there, here: here.to(META), AssertionError, "waits"),
    ],
    ids=["item", "nonzero", "mask", "list", "index", "copy"],
)
def test_what_waits_would_be_noticed(wait: Callable[..., Any], error: type[Exception], words: str) -> None:
    there, here = torch.empty(4, device=META), torch.zeros(2, dtype=torch.int64)
    for is_inference in (False, True):
        with torch.inference_mode(is_inference), OneWay():
            with pytest.raises(error, match=words):
                wait(there, here)
            there[torch.zeros(2, dtype=torch.int64, device=META)].topk(1)
