"""A step on the device: its inputs in buffers that never move, one upload, and a CUDA graph where the step is small."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from bough.kernels.attention import Attention
from bough.kernels.cuda_attention import Capacity, DevicePlan, Launches, PlanBuffers, StepPlan
from bough.kernels.tree_plan import Int32Array
from bough.runtime.inputs import StepInputs

log = logging.getLogger(__name__)

GRAPH_SIZES: Final = (1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), 160, 192, 224, 256)
_LEAST = Capacity(64, 4096, 256, 256, 256, 512, 512, 16)
_GRAPHS_LEAST = Capacity(GRAPH_SIZES[-1], 65_536, 2048, 2048, 2048, 4096, 2048, 0)
# Token ids, positions, slots; twice as much room for what is wanted, for a token may be so twice; what is carried over,
# which tokens and from where.
_SECTIONS = 7

Forward = Callable[[StepInputs], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Carried:
    """Input ids that the step before draws, and that have not left the device.

    at: (num_carried,) int32, which of this step's tokens they are; source: (num_carried,) int32, which of `tokens`, the
    ids drawn by the step before, (num_draws,) int32 on the device.
    """

    at: Int32Array
    source: Int32Array
    tokens: torch.Tensor


class StepBuffers:
    """The inputs of one step at a time. `write` makes room where a step needs more than any before it."""

    def __init__(self, attention: Attention, device: torch.device, least: Capacity = _LEAST) -> None:
        assert attention.kernels is not None, "buffers are for a GPU's kernels"
        self._attention = attention
        self._kernels = attention.kernels
        self._device = device
        self._buffers = self._make(least)

    @property
    def capacity(self) -> Capacity:
        return self._buffers.capacity

    def reserve(self, inputs: StepInputs) -> bool:
        """Make room for a step. Returns whether the buffers moved, so that what was captured with them is void."""
        capacity = self.capacity
        needed = _needed(inputs)
        if all(value <= getattr(capacity, name) for name, value in asdict(needed).items()):
            return False
        grown = {name: max(getattr(capacity, name), _power_of_two(value)) for name, value in asdict(needed).items()}
        self._buffers = self._make(replace(capacity, **grown))
        return True

    def write(self, inputs: StepInputs, carried: Carried | None) -> None:
        """Copy a step's inputs to the device, in one copy, and there the ids carried over; `reserve` has made room."""
        size = self.capacity.num_tokens
        numbers = np.zeros(_SECTIONS * size, dtype=np.int32)
        numbers[2 * size : 3 * size] = -1  # padding's keys and values are not kept
        parts = (inputs.token_ids, inputs.positions, inputs.slots, inputs.wanted)
        for index, part in enumerate(parts):
            numbers[index * size : index * size + len(part)] = part.numpy()
        if carried is not None:
            numbers[5 * size : 5 * size + len(carried.at)] = carried.at
            numbers[6 * size : 6 * size + len(carried.source)] = carried.source
        assert isinstance(inputs.attention, StepPlan)
        self._buffers.write(inputs.attention, numbers)
        if carried is not None:
            token_ids, at, source = (self._buffers.extra[i * size :] for i in (0, 5, 6))
            known = carried.tokens.index_select(0, source[: len(carried.source)])
            token_ids.index_copy_(0, at[: len(carried.at)].long(), known)

    def inputs(self, num_tokens: int, launches: Launches, end_position: int, wanted: torch.Tensor) -> StepInputs:
        """Return what was written as a model takes it, padded to `num_tokens`."""
        size = self.capacity.num_tokens
        token_ids, positions, slots = (self._buffers.extra[i * size : i * size + num_tokens] for i in range(3))
        plan = DevicePlan(self._buffers, launches, self._kernels)
        none = np.zeros(0, dtype=np.int64)
        return StepInputs(token_ids, positions, slots, end_position, plan, wanted, (), (), none)

    def wanted(self, count: int) -> torch.Tensor:
        """Return the first `count` of the tokens whose hidden states are wanted, as written."""
        return self._buffers.extra[3 * self.capacity.num_tokens :][:count]

    def _make(self, capacity: Capacity) -> PlanBuffers:
        heads, dim = self._attention.num_heads, self._attention.head_dim
        return PlanBuffers(capacity, heads, dim, self._device, _SECTIONS * capacity.num_tokens)


class EagerSteps:
    """Runs steps of any size, kernel by kernel."""

    def __init__(self, forward: Forward, attention: Attention, device: torch.device) -> None:
        self._forward = forward
        self._buffers = StepBuffers(attention, device)

    def run(self, inputs: StepInputs, carried: Carried | None = None) -> torch.Tensor:
        """Return the hidden states of the tokens wanted, (num_wanted, hidden_size)."""
        self._buffers.reserve(inputs)
        self._buffers.write(inputs, carried)
        assert isinstance(inputs.attention, StepPlan)
        launches = Launches.of(inputs.attention)
        wanted = self._buffers.wanted(len(inputs.wanted))
        return self._forward(self._buffers.inputs(len(inputs.token_ids), launches, inputs.end_position, wanted))


class GraphSteps:
    """Runs steps without prefill tiles and tries, of at most `GRAPH_SIZES[-1]` tokens, one graph per padded size.

    A size is captured when it is first met, after it has run once: Triton compiles at a first launch, and cuBLAS takes
    its workspace. Graphs share one memory pool, since one runs at a time and its result is used before the next.
    page_size: of the pool, in which these plans count. end_position: above every position, so that the rotary table
    never moves. On a CPU (Triton's interpreter) the captured work is called again instead, on the same buffers.
    """

    def __init__(
        self, forward: Forward, attention: Attention, device: torch.device, end_position: int, page_size: int
    ) -> None:
        self._forward = forward
        self._device = device
        self._page_size = page_size
        self._end_position = end_position
        self._buffers = StepBuffers(attention, device, _GRAPHS_LEAST)
        self._graphs: dict[tuple[int, Launches], _Graph] = {}
        self._every = torch.arange(GRAPH_SIZES[-1], dtype=torch.int32, device=device)
        self._pool = _memory_pool(device)
        self.num_replays = 0

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def serves(self, inputs: StepInputs) -> bool:
        """Tell whether a step may run here."""
        plan = inputs.attention
        assert isinstance(plan, StepPlan)
        is_small = not len(plan.tiles) and len(inputs.token_ids) <= GRAPH_SIZES[-1]
        # A trie's plan names every slot of every node's past: buffers would grow for it, and graphs be lost.
        return is_small and plan.page_size == self._page_size

    def run(self, inputs: StepInputs, carried: Carried | None = None) -> torch.Tensor:
        """Return the hidden states of the tokens wanted, (num_wanted, hidden_size); valid until the next step."""
        if self._buffers.reserve(inputs):
            log.info("the buffers of captured steps grew: %s", self._buffers.capacity)
            self._forget()
        self._buffers.write(inputs, carried)
        assert isinstance(inputs.attention, StepPlan)
        num_tokens = next(size for size in GRAPH_SIZES if size >= len(inputs.token_ids))
        key = (num_tokens, Launches.of(inputs.attention))
        graph = self._graphs.get(key)
        if graph is None:
            padded = self._buffers.inputs(*key, self._end_position, self._every[:num_tokens])
            hidden = self._forward(padded)
            self._graphs[key] = _capture(lambda: self._forward(padded), self._device, self._pool)
        else:
            hidden = graph()
            self.num_replays += 1
        return hidden.index_select(0, self._buffers.wanted(len(inputs.wanted)))

    def _forget(self) -> None:
        """Drop all graphs, and their pool: PyTorch refuses a capture into one that has lost its last graph."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # one of them may be running
        self._graphs.clear()
        self._pool = _memory_pool(self._device)


_Graph = Callable[[], torch.Tensor]


def _memory_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _capture(work: _Graph, device: torch.device, pool: Any) -> _Graph:
    """Return what does `work` again on the same tensors."""
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    # Of this thread only: what another one asks of the device meanwhile must not void the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def _needed(inputs: StepInputs) -> Capacity:
    plan = inputs.attention
    assert isinstance(plan, StepPlan)
    needed = Capacity.of(plan)
    return replace(needed, num_tokens=max(needed.num_tokens, len(inputs.wanted) // 2 + 1))


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
