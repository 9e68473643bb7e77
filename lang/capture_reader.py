"""Which part of a text each capture of a grammar holds, where the grammar matches the whole text.

Read by a backtracking machine over the grammar: a stack of what may still be tried, a set of what has failed (so no
place is tried twice for the same rest), and llguidance for the parts without captures. Nothing recurses, so a list of
ten thousand items is as good as one of three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from bough.acceptor import Acceptor, acceptor_of
from bough.grammar_facts import has_captures, is_regular
from bough.grammar_nodes import Alt, Capture, Grammar, Json, Lark, Lit, Repeat, Rule, Seq

Captured: TypeAlias = "tuple[Capture, int, int]"
"""A capture, and the bytes from start to end that it holds."""
_Trail: TypeAlias = "tuple[Captured, _Trail] | None"
_Task: TypeAlias = "Grammar | _Close | _Again"
_Rest: TypeAlias = "_Node | None"


@dataclass(frozen=True, slots=True)
class _Close:
    """The end of a capture that began at `start`."""

    capture: Capture
    start: int


@dataclass(frozen=True, slots=True)
class _Again:
    """A repeat after `count` items, the last of which began at `start`, and was wanted or only tried."""

    repeat: Repeat
    count: int
    start: int
    is_wanted: bool


class _Node:
    """What is to be read next, and the rest after it; equal ones are the same object."""

    __slots__ = ("rest", "task")

    def __init__(self, task: _Task, rest: _Rest) -> None:
        self.task = task
        self.rest = rest


class _Reader:
    """One reading of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._nodes: dict[tuple[object, int], _Node] = {}
        self._acceptors: dict[int, Acceptor] = {}
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._is_leaf: dict[int, bool] = {}

    def read(self, grammar: Grammar) -> list[Captured] | None:
        """Return the captures of the first reading that takes all bytes, in order of their ends."""
        tried: set[tuple[int, int]] = set()
        stack: list[Iterator[tuple[_Rest, int, _Trail]]] = [iter([(self._then(grammar, None), 0, None)])]
        while stack:
            for rest, position, trail in stack[-1]:
                if rest is None:
                    if position == len(self._data):
                        return _in_order(trail)
                    continue
                if (id(rest), position) in tried:
                    continue
                tried.add((id(rest), position))
                stack.append(iter(self._steps(rest, position, trail)))
                break
            else:
                stack.pop()
        return None

    def _then(self, task: _Task, rest: _Rest) -> _Node:
        key = (id(task) if isinstance(task, Grammar) else task, id(rest))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = _Node(task, rest)
        return node

    def _steps(self, node: _Node, position: int, trail: _Trail) -> Iterable[tuple[_Rest, int, _Trail]]:
        """Yield where reading the node's task can lead, the preferred way first."""
        task, rest = node.task, node.rest
        if isinstance(task, _Close):
            yield rest, position, ((task.capture, task.start, position), trail)
        elif isinstance(task, _Again):
            yield from self._repeat(task, rest, position, trail)
        elif self._leaf(task):
            for end in reversed(self._ends_of(task, position)):
                yield rest, end, trail
        elif isinstance(task, Seq):
            for item in reversed(task.items):
                rest = self._then(item, rest)
            yield rest, position, trail
        elif isinstance(task, Alt):
            for item in task.items:
                yield self._then(item, rest), position, trail
        elif isinstance(task, Repeat):
            yield from self._repeat(_Again(task, 0, -1, True), rest, position, trail)
        elif isinstance(task, Capture):
            yield self._then(task.item, self._then(_Close(task, position), rest)), position, trail
        else:
            assert isinstance(task, Rule), "all the others are leaves"
            yield self._then(task.body, rest), position, trail

    def _repeat(self, again: _Again, rest: _Rest, position: int, trail: _Trail) -> Iterable[tuple[_Rest, int, _Trail]]:
        repeat = again.repeat
        is_stuck = position == again.start
        if is_stuck and not again.is_wanted:
            return  # an item that takes nothing would come for ever; the way without it was offered as well
        if not is_stuck and (repeat.max is None or again.count < repeat.max):
            count = again.count + 1 if repeat.max is not None else min(again.count + 1, repeat.min)
            after = self._then(_Again(repeat, count, position, again.count < repeat.min), rest)
            yield self._then(repeat.item, after), position, trail
        if is_stuck or again.count >= repeat.min:  # what took nothing once stands for all that are still wanted
            yield rest, position, trail

    def _leaf(self, grammar: Grammar) -> bool:
        known = self._is_leaf.get(id(grammar))
        if known is None:
            opaque = isinstance(grammar, (Json, Lark)) or (not has_captures(grammar) and is_regular(grammar))
            known = self._is_leaf[id(grammar)] = opaque
        return known

    def _ends_of(self, grammar: Grammar, position: int) -> list[int]:
        if isinstance(grammar, Lit):
            text = grammar.text.encode()
            return [position + len(text)] if self._data.startswith(text, position) else []
        found = self._ends.get((id(grammar), position))
        if found is None:
            acceptor = self._acceptors.get(id(grammar))
            if acceptor is None:
                acceptor = self._acceptors[id(grammar)] = acceptor_of(grammar)
            found = self._ends[id(grammar), position] = acceptor.ends(self._data, position)
        return found


def read(grammar: Grammar, data: bytes) -> list[Captured] | None:
    """Return what was captured where in bytes that the grammar matches; None if it does not."""
    return _Reader(data).read(grammar)


def _in_order(trail: _Trail) -> list[Captured]:
    captured: list[Captured] = []
    while trail is not None:
        captured.append(trail[0])
        trail = trail[1]
    return captured[::-1]
