"""How to end a text that a grammar constrains, when the budget runs out: a short way to where it is whole.

llguidance tells which tokens may come next, not how far the end is. So the way is felt for, a choice at a time: first
what leads to other choices than the ones there are now (inside a string only its closing quote does), of those what
usually ends things (quotes, brackets, separators); where every choice leads to the same ones again (a count runs), the
one taken least. When nothing new has come for a while (dots and letters before the @ of an address), something new is
preferred. Forced tokens are taken at once. For JSON this goes straight to the end. The end of free text does not show
in the choices before its last character ("</think>" after anything): for it the grammar's own literals are tried.

A search may take 100 ms, and it runs between two steps. So where a way was known some tokens ago it is tried first:
what was drawn since mostly left it where it was (more of a string) or went along it, and it ends the text from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import llguidance
import numpy as np

from bough.runtime.grammar.vocabulary import Vocabulary

_MOST_TRIED: Final = 6000  # tokens tried in all; about 100 ms
_FIRST_TRIED: Final = 24
_REJOINED: Final = 48  # tokens of a known way that may have been passed
_STALLED: Final = 12
# In this order, where many tokens are allowed; then other single bytes, then some of the longest tokens.
_ENDING: Final = {bytes((byte,)): rank for rank, byte in enumerate(b"\"}]),;:'\n 01.eatfn-[{(")}
_LAST: Final = b"\\"  # in a string of JSON it only begins an escape


@dataclass(slots=True)
class _Trail:
    """What was met on the way: how often each token was taken, which masks were seen, how long nothing was new."""

    taken: Counter[int] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    stalled: int = 0


def closing_path(
    start: llguidance.LLMatcher, vocabulary: Vocabulary, literals: Sequence[str] = (), known: Sequence[int] = ()
) -> list[int] | None:
    """Return tokens after which `start` accepts, few of them; None if none were found. `start` is not changed.

    literals: texts of the grammar that may end free text. known: the way from a state shortly before.
    """
    spelled = [vocabulary.tokenizer.encode(literal, at_start=False) for literal in literals]
    matcher = start.deep_copy()
    path: list[int] = []
    trail = _Trail()
    num_tried = 0
    while num_tried < _MOST_TRIED:
        if matcher.is_accepting():
            return path
        rest = _rejoined(matcher, known)
        if rest is not None:
            return [*path, *rest]
        forced = matcher.compute_ff_tokens()
        if forced:
            if not matcher.consume_tokens(forced):
                return None
            num_tried += 1
            path += forced
            continue
        tokens, following, tried = _choice(matcher, trail, vocabulary, spelled)
        if following is None:
            return None
        matcher = following
        num_tried += tried
        trail.taken[tokens[0]] += 1
        path += tokens
    return None


def _rejoined(matcher: llguidance.LLMatcher, known: Sequence[int]) -> Sequence[int] | None:
    """Return the end of a known way that ends the text from here, the longest; None if none does."""
    for passed in range(min(_REJOINED, len(known))):
        rest = known[passed:]
        following = matcher.deep_copy()
        if following.try_consume_tokens(list(rest)) == len(rest) and following.is_accepting():
            return rest
    return None


def _choice(
    matcher: llguidance.LLMatcher, trail: _Trail, vocabulary: Vocabulary, literals: list[list[int]]
) -> tuple[list[int], llguidance.LLMatcher | None, int]:
    """Return what comes next, the matcher after it (None if there is none), and how many tokens were tried."""
    mask = matcher.compute_bitmask()
    trail.stalled = trail.stalled + 1 if mask in trail.seen else 0
    trail.seen.add(mask)
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")).tolist()
    spelled = [(literal, following) for literal in literals if (following := _after(matcher, literal)) is not None]
    num_tried = len(literals)
    for literal, following in spelled:
        if following.is_accepting():
            return literal, following, num_tried
    tried: list[tuple[int, llguidance.LLMatcher, bytes]] = []
    for some in _candidates(allowed, vocabulary):
        start = len(tried)
        for token in some:
            following = matcher.deep_copy()
            if following.consume_token(token):
                if following.is_accepting():
                    return [token], following, num_tried + len(tried) + 1
                tried.append((token, following, following.compute_bitmask()))
        if trail.stalled < _STALLED:
            for token, following, then in tried[start:]:
                if then != mask:
                    return [token], following, num_tried + len(tried)
    for literal, following in spelled:
        if following.compute_bitmask() not in trail.seen:
            return literal, following, num_tried + len(tried)
    for token, following, then in tried:
        if then not in trail.seen:
            return [token], following, num_tried + len(tried)
    if not tried:
        return [], None, 0
    token, following, _ = min(tried, key=lambda entry: trail.taken[entry[0]])
    return [token], following, num_tried + len(tried)


def _after(matcher: llguidance.LLMatcher, tokens: list[int]) -> llguidance.LLMatcher | None:
    following = matcher.deep_copy()
    return following if following.try_consume_tokens(tokens) == len(tokens) else None


def _candidates(allowed: list[int], vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Return tokens to try, the likeliest to end something first, and more for when none of them helps."""
    pieces = {
        vocabulary.tokenizer.token_bytes(token): token
        for token in allowed
        if token < vocabulary.tokenizer.vocab_size and token not in vocabulary.special_ids
    }
    last = len(_ENDING)
    single = sorted(
        (p for p in pieces if len(p) == 1), key=lambda piece: (piece == _LAST, _ENDING.get(piece, last), piece)
    )
    longer = sorted((p for p in pieces if len(p) > 1), key=lambda piece: (-len(piece), piece))
    first = [*single[:_FIRST_TRIED], *longer[:4]]
    return [pieces[piece] for piece in first], [pieces[piece] for piece in single[_FIRST_TRIED:]]
