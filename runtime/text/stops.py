"""Stop strings and stop patterns over text that grows token by token.

Strings: one automaton for all of them (Aho and Corasick 1975), a step per character however many stops there are; its
depth is the length of the longest suffix that begins a stop, which is exactly what a stream has to hold back.
Patterns: searched from the first place where a match may have begun, by the `regex` package's partial matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import regex  # type: ignore[import-untyped]

from bough.runtime.protocol import RequestError

MAX_STOP_CHARS: Final = 4096
MAX_STOP_CHARS_TOGETHER: Final = 65_536
# Kept before the place where a match may begin, for look-behind and word boundaries.
CONTEXT_CHARS: Final = 4096


@dataclass(frozen=True)
class StopHit:
    """A stop found in the text fed: characters [start, end). `stop` is the string or pattern, as it was given."""

    start: int
    end: int
    stop: str
    is_regex: bool


class StopMatcher:
    """Finds the stop that is complete first.

    Strings: the one with the smallest end, so the hit does not depend on how the text was cut into tokens; of several
    with that end the longest. Patterns: the leftmost match in the text so far, looked for after every `feed`; the end
    of the text so far counts as the end of the text ($, \\b, look-ahead). A feed with hits of both kinds reports the
    one with the smaller end, then the smaller start, then the string.

    stop: at most 4,096 characters each and 65,536 together. stop_regex: at most 4,096 characters each; one that matches
    the empty string is refused. timeout_s: most seconds that the search for one pattern in one `feed` may take.
    Raises RequestError("invalid_request") naming field, limit and value.
    """

    def __init__(self, stop: tuple[str, ...], stop_regex: tuple[str, ...], *, timeout_s: float = 0.05) -> None:
        _check_strings(stop)
        self._automaton = _Automaton(stop) if stop else None
        self._state = 0
        self._patterns = [_Pattern(source, timeout_s) for source in stop_regex]
        self._num_chars = 0
        self._hit: StopHit | None = None

    def feed(self, delta: str) -> StopHit | None:
        """Append text and return the stop it completes, if any. After a hit nothing more may be fed."""
        assert self._hit is None, "generation ended at the first stop"
        hits = [hit for hit in (self._feed_automaton(delta), *self._feed_patterns(delta)) if hit]
        self._num_chars += len(delta)
        if hits:
            self._hit = min(hits, key=lambda hit: (hit.end, hit.start))
        return self._hit

    @property
    def safe_len(self) -> int:
        """How many characters of the text so far no stop can begin before: they can be shown. In [0, text length]."""
        if self._hit:
            return self._hit.start
        begun = self._automaton.depths[self._state] if self._automaton else 0
        return min([self._num_chars - begun, *(pattern.begun for pattern in self._patterns)])

    def _feed_automaton(self, delta: str) -> StopHit | None:
        automaton = self._automaton
        if automaton is None:
            return None
        for index, char in enumerate(delta):
            self._state = automaton.step(self._state, char)
            found = automaton.found[self._state]
            if found is not None:
                end = self._num_chars + index + 1
                return StopHit(end - len(found), end, found, is_regex=False)
        return None

    def _feed_patterns(self, delta: str) -> list[StopHit | None]:
        return [pattern.feed(delta) for pattern in self._patterns]


class _Automaton:
    """States are the prefixes of the stops; state 0 is the empty one.

    children[s]: next char -> state. fallback[s]: the longest proper suffix of s that is a state. depths[s]: its length.
    found[s]: the longest stop that is a suffix of s, None if none is.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self.fallback = [0] * len(self.children)
        self._link()

    def step(self, state: int, char: str) -> int:
        """Return the state after `char`; amortised O(1)."""
        while True:
            following = self.children[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fallback[state]

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self.children[state].get(char)
            if following is None:
                following = len(self.children)
                self.children[state][char] = following
                self.children.append({})
                self.depths.append(self.depths[state] + 1)
                self.found.append(None)
            state = following
        self.found[state] = stop

    def _link(self) -> None:
        # Breadth first: a fallback is shorter than its state, so it is finished before it is needed.
        queue = list(self.children[0].values())
        for state in queue:
            for char, following in self.children[state].items():
                self.fallback[following] = self.step(self.fallback[state], char)
                if self.found[following] is None:
                    self.found[following] = self.found[self.fallback[following]]
                queue.append(following)


class _Pattern:
    """One stop pattern and the stretch of text it still has to look at.

    dropped  |  context  |  a match may begin here ...
    0     offset       begun
    """

    def __init__(self, source: str, timeout_s: float) -> None:
        if len(source) > MAX_STOP_CHARS:
            raise _invalid("stop_regex", f"at most {MAX_STOP_CHARS} characters", len(source))
        self._source = source
        self._timeout_s = timeout_s
        self._text = ""
        self._offset = 0
        self.begun = 0
        try:
            self._compiled: Any = regex.compile(source)
            matches_nothing = self._compiled.search("", timeout=timeout_s) is not None
        except TimeoutError:
            raise self._too_slow() from None
        except (regex.error, RecursionError, OverflowError, MemoryError, ValueError, KeyError, IndexError) as error:
            raise _invalid("stop_regex", f"valid regular expressions ({error})", source) from None
        if matches_nothing:
            raise _invalid("stop_regex", "patterns that do not match the empty string", source)

    def feed(self, delta: str) -> StopHit | None:
        """Append text and return the leftmost match, if there is one."""
        self._text += delta
        start = self.begun - self._offset
        try:
            match = self._compiled.search(self._text, start, timeout=self._timeout_s)
            if match is None:
                # Only without a full match: a partial one further left would hide it.
                begun = self._compiled.search(self._text, start, partial=True, timeout=self._timeout_s)
        except TimeoutError:
            raise self._too_slow() from None
        if match is not None:
            first, last = match.span()
            return StopHit(self._offset + first, self._offset + last, self._source, is_regex=True)
        self.begun = self._offset + (begun.start() if begun is not None else len(self._text))
        self._forget()
        return None

    def _forget(self) -> None:
        # Twice the context, so that the cost of cutting is spread over as many characters.
        spare = self.begun - self._offset - CONTEXT_CHARS
        if spare > CONTEXT_CHARS:
            self._text = self._text[spare:]
            self._offset += spare

    def _too_slow(self) -> RequestError:
        return _invalid("stop_regex", f"matched within {self._timeout_s * 1000:g} ms", self._source)


def _check_strings(stop: tuple[str, ...]) -> None:
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise _invalid("stop", f"strings of 1 to {MAX_STOP_CHARS} characters", text[:64])
    together = sum(map(len, stop))
    if together > MAX_STOP_CHARS_TOGETHER:
        raise _invalid("stop", f"at most {MAX_STOP_CHARS_TOGETHER} characters together", together)


def _invalid(field: str, limit: str, value: object) -> RequestError:
    return RequestError(
        "invalid_request", f"{field} must be {limit}, got {value!r}", field=field, limit=limit, value=repr(value)
    )
