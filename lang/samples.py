"""Makes texts that a grammar matches, for looking at a grammar, for examples in prompts and for tests.

The grammar is walked where it is ours; JSON, patterns and Lark source are walked byte by byte through llguidance, which
says what may come next. Sizes are kept small: a repeat goes on with a chance of one half, and when the text is long
already, or the rules are deep, the shortest way on is taken.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from bough.acceptor import Acceptor, acceptor_of
from bough.errors import InvalidRequest
from bough.grammar_facts import walk
from bough.grammar_nodes import Alt, Capture, Grammar, Lit, Repeat, Rule, Seq

if TYPE_CHECKING:
    from llguidance import LLMatcher

_END: Final = 256
_ATTEMPTS: Final = 20
_LONG: Final = 48  # bytes after which a leaf ends as soon as it may
_STOPPING: Final = b'"}]) \n.,;:0123456789'  # what is likely to end something, the likeliest first
_PRETTY: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "


def sample(grammar: Grammar, seed: int, max_chars: int) -> str:
    """Return some text that the grammar matches, the same for the same seed.

    Raises InvalidRequest if no text of at most `max_chars` characters was found.
    """
    whole = acceptor_of(grammar)
    for attempt in range(_ATTEMPTS):
        data = _Sampler(grammar, random.Random(f"{seed}/{attempt}"), max_chars).text()
        if data is not None and len(data.decode()) <= max_chars and whole.accepts(data):
            return data.decode()
    raise InvalidRequest(
        f"found no text of at most {max_chars} characters that the grammar matches, in {_ATTEMPTS} attempts",
        field="max_chars",
        limit=max_chars,
    )


class _Sampler:
    """One attempt."""

    def __init__(self, grammar: Grammar, chance: random.Random, max_chars: int) -> None:
        self._grammar = grammar
        self._chance = chance
        self._left = 4 * max_chars  # bytes
        self._heights = _heights(grammar)
        self._acceptors: dict[int, Acceptor] = {}

    def text(self) -> bytes | None:
        """Return a text, or None if this attempt led nowhere."""
        out: list[bytes] = []
        todo: list[tuple[Grammar, int]] = [(self._grammar, 0)]
        while todo:
            node, depth = todo.pop()
            if isinstance(node, Seq):
                todo.extend((item, depth) for item in reversed(node.items))
            elif isinstance(node, Alt):
                todo.append((self._choice(node, depth), depth))
            elif isinstance(node, Repeat):
                todo.extend([(node.item, depth)] * self._count(node, depth))
            elif isinstance(node, Capture):
                todo.append((node.item, depth))
            elif isinstance(node, Rule):
                todo.append((node.body, depth + 1))
            else:
                piece = node.text.encode() if isinstance(node, Lit) else self._leaf(node)
                if piece is None or self._left < 0:
                    return None
                self._left -= len(piece)
                out.append(piece)
        return b"".join(out)

    def _choice(self, node: Alt, depth: int) -> Grammar:
        if depth < 4:
            return self._chance.choice(node.items)
        least = min(self._heights[id(item)] for item in node.items)
        return self._chance.choice([item for item in node.items if self._heights[id(item)] == least])

    def _count(self, node: Repeat, depth: int) -> int:
        count = node.min
        while depth < 4 and (node.max is None or count < node.max) and self._chance.random() < 0.5:
            count += 1
        return count

    def _leaf(self, node: Grammar) -> bytes | None:
        acceptor = self._acceptors.get(id(node))
        if acceptor is None:
            acceptor = self._acceptors[id(node)] = acceptor_of(node)
        return self._walk(acceptor.start())

    def _walk(self, matcher: LLMatcher) -> bytes | None:
        out = bytearray()
        while len(out) <= self._left:
            allowed = _allowed(matcher)
            may_end = matcher.is_accepting()
            if not allowed:
                return bytes(out) if may_end else None
            if may_end and (len(out) > _LONG or self._chance.random() < 0.3):
                return bytes(out)
            out.append(self._byte(allowed, len(out)))
            if not matcher.consume_token(out[-1]):
                return None
        return None

    def _byte(self, allowed: bytes, length: int) -> int:
        """Draw a byte: what ends things when the text is long, else mostly letters, where they may come."""
        stopping = [byte for byte in _STOPPING if byte in allowed]
        if stopping and (length > _LONG or self._chance.random() < 0.2):
            return stopping[0] if length > _LONG else self._chance.choice(stopping)
        pretty = [byte for byte in allowed if byte in _PRETTY]
        if pretty and self._chance.random() < 0.95:
            return self._chance.choice(pretty)
        return self._chance.choice(allowed)


def _allowed(matcher: LLMatcher) -> bytes:
    """Return the bytes that may come next."""
    mask = matcher.compute_bitmask()
    return bytes(value for value in range(_END) if mask[value >> 3] >> (value & 7) & 1)


def _heights(grammar: Grammar) -> dict[int, int]:
    """Return for every part how many rules deep its shallowest text is."""
    nodes = list(walk(grammar))
    deep = len(nodes) + 1
    heights = dict.fromkeys(map(id, nodes), deep)
    grew = True
    while grew:  # a least fixed point, because rules refer to themselves
        found = {id(node): _height(node, heights) for node in nodes}
        grew, heights = found != heights, found
    return heights


def _height(node: Grammar, heights: dict[int, int]) -> int:
    below = [heights[id(child)] for child in node.children()]
    if isinstance(node, Alt):
        return min(below)
    if isinstance(node, Repeat) and node.min == 0:
        return 0
    return max(below, default=0) + isinstance(node, Rule)
