"""What a batch gives back for an item: its state, or what a results file kept of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bough.backend import Backend
from bough.errors import InvalidRequest
from bough.sampling import Sampling
from bough.state import State
from bough.streaming import Run
from bough.usage import replies_below

RETURNED: Final = "<ret_value>"
"""Stands for the program's return value among the names of variables."""


@dataclass(frozen=True)
class ItemUsage:
    """Tokens of all gens and selects of an item, forks included. prompt = cached + computed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0

    @property
    def written_tokens(self) -> int:
        """Tokens whose KV the item wrote: computed for it, not found in the cache."""
        return self.computed_tokens + self.completion_tokens


class ItemState(State):
    """The state of one item of a batch.

    index: the item's place in the batch, from 0. num_attempts: how many times its program was run.
    """

    __slots__ = ("index", "num_attempts")

    index: int
    num_attempts: int

    @classmethod
    def of(cls, index: int, num_attempts: int, backend: Backend, sampling: Sampling, title: str) -> ItemState:
        """Return the new state of an item."""
        state = cls(backend, sampling, title=title)
        state._run = Run()  # readers do not wait for the body: nobody has the state before it has ended
        state.index = index
        state.num_attempts = num_attempts
        return state

    def __repr__(self) -> str:
        """Return which item it is, and its variables; nothing is waited for."""
        return super().__repr__().replace(":", f" item {self.index}:", 1)

    @property
    def is_saved(self) -> bool:
        """Whether this was read from a results file, and not run."""
        return False


@dataclass(frozen=True)
class Saved:
    """What a results file keeps of an item that ended well. `unsaved`: why a variable is not kept."""

    text: str
    messages: list[dict[str, str]]
    variables: Mapping[str, Any]
    meta: Mapping[str, Any]
    ret_value: Any
    unsaved: Mapping[str, str]
    usage: ItemUsage
    num_attempts: int


class SavedState(ItemState):
    """An item that ended well in an earlier run, read from its results file. It can be read, and takes no more text."""

    __slots__ = ("_saved",)

    _saved: Saved

    @classmethod
    def read(cls, index: int, saved: Saved, backend: Backend, sampling: Sampling, title: str) -> SavedState:
        """Return the state of an item that is not run again."""
        state = cls(backend, sampling, title=title)
        state._run = Run()
        state._run.finish(None)
        state.index, state.num_attempts, state._saved = index, saved.num_attempts, saved
        state += saved.text
        state._interpreter.close(InvalidRequest("this result was read from a file, nothing can be appended to it"))
        state._variables = dict(saved.variables)
        state._return_value = saved.ret_value
        return state

    @property
    def is_saved(self) -> bool:
        """Whether this was read from a results file, and not run."""
        return True

    def _find(self, name: str) -> Any:
        self._check_saved(name)
        return super()._find(name)

    def _check_saved(self, name: str) -> None:
        reason = self._saved.unsaved.get(name)
        if reason is not None:
            raise InvalidRequest(f"{name!r} was not kept in the results file: {reason}", field=name)

    def messages(self) -> list[dict[str, str]]:
        """Return the closed messages."""
        return [dict(message) for message in self._saved.messages]

    def get_meta_info(self, name: str) -> Any:
        """Return what a gen or select cost and why it ended."""
        if name not in self._saved.meta:
            return super().get_meta_info(name)
        return self._saved.meta[name]

    @property
    def ret_value(self) -> Any:
        """What the program's body returned."""
        self._check_saved(RETURNED)
        return self._return_value


def usage_of(state: State) -> ItemUsage:
    """Return what a state cost that is done; calls that are not, or that failed, count nothing."""
    if isinstance(state, SavedState):
        return state._saved.usage
    totals = [0, 0, 0, 0]
    for future in replies_below(state._interpreter.first):
        if future.done() and future.exception() is None:
            usage = future.result().usage
            totals[0] += usage.prompt_tokens
            totals[1] += usage.cached_tokens
            totals[2] += usage.computed_tokens
            totals[3] += usage.completion_tokens
    return ItemUsage(*totals)
