"""`GrammarCompiler`: grammars become matchers beside the loop, are kept by content, and may cost only so much.

    asked -> vetted in a process of its own (time, memory, depth) -> compiled in a thread -> kept
                        |                                               |
                        +------------------ refused --------------------+   also kept, for a while

A grammar is compiled once where it may crash or never end, and only then here: compiling recurses natively, and no
thread can be stopped. Both leave the interpreter free (llguidance gives up the lock), so decoding goes on.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import llguidance

from bough.runtime.grammar.closing import closing_path
from bough.runtime.grammar.limits import Limits, for_llguidance
from bough.runtime.grammar.source import literals_of, llguidance_text, too_complex, translated
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.protocol import Grammar, RequestError

log = logging.getLogger(__name__)

_STACK_BYTES = 64 << 20

Vet = Callable[[str], str]
"""Tries a grammar out elsewhere; returns "" or what is wrong with it."""


@dataclass(frozen=True, slots=True)
class GrammarKey:
    """What a compiled grammar depends on: `before` is literal text that comes first (token healing)."""

    kind: str
    source: str
    before: str


class GrammarCompiler:
    """Matchers by content. One caller; threads of its own do the work.

    vet: None compiles at once in the caller's thread; is_deferred: when told to, by `complete` (for tests and replays).
    most: matchers kept.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        limits: Limits | None = None,
        vet: Vet | None = None,
        *,
        most: int = 256,
        is_deferred: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self._limits = limits or Limits()
        self._vet = vet
        self._is_deferred = is_deferred
        self._most = most
        self._known: OrderedDict[GrammarKey, llguidance.LLMatcher | RequestError] = OrderedDict()
        self._ways: dict[GrammarKey, list[int] | None] = {}
        self._pending: set[GrammarKey] = set()
        self._finished: deque[tuple[GrammarKey, llguidance.LLMatcher | RequestError]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self.num_compiled = 0

    def find(self, key: GrammarKey) -> llguidance.LLMatcher | None:
        """Return the matcher of a grammar, not to be changed, or None while it is compiled.

        Raises RequestError("invalid_request") for a grammar that cannot be compiled within the limits.
        """
        found = self._known.get(key)
        if found is None and key not in self._pending:
            found = self._begin(key)
        if found is None:
            return None
        self._known.move_to_end(key)
        if isinstance(found, RequestError):
            raise RequestError(found.kind, found.message, **found.details)
        return found

    def way_to_end(self, key: GrammarKey) -> list[int] | None:
        """Return tokens after which a grammar that `find` knows is whole, None if none are found; searched for once."""
        if key not in self._ways:
            matcher = self.find(key)
            assert matcher is not None, "it was found before"
            grammar = Grammar(kind=key.kind, source=key.source)  # type: ignore[arg-type]
            self._ways[key] = closing_path(matcher, self.vocabulary, literals_of(grammar))
        return self._ways[key]

    def take_finished(self) -> list[GrammarKey]:
        """Return the grammars that were compiled, or refused, since the last call; `find` knows them now."""
        keys = []
        while self._finished:
            key, result = self._finished.popleft()
            self._pending.discard(key)
            self._keep(key, result)
            keys.append(key)
        return keys

    def error_of(self, key: GrammarKey) -> RequestError | None:
        """Return why a grammar was refused, None for one that was not."""
        found = self._known.get(key)
        return found if isinstance(found, RequestError) else None

    def complete(self, key: GrammarKey, error: RequestError | None = None) -> None:
        """Compile a grammar that was deferred, or refuse it with `error`."""
        self._finished.append((key, self._compiled(key) if error is None else error))

    def close(self) -> None:
        """Start nothing more."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, key: GrammarKey) -> llguidance.LLMatcher | RequestError | None:
        if self._vet is None and not self._is_deferred:
            result = self._compiled(key)
            self._keep(key, result)
            return result
        if len(self._pending) >= self._limits.max_pending:
            raise RequestError(
                "overloaded",
                f"{len(self._pending)} grammars are being compiled, the limit is {self._limits.max_pending}: try later",
                limit=self._limits.max_pending,
                retry_after_s=1.0,
            )
        self._pending.add(key)
        if self._is_deferred:
            return None
        self._executor().submit(self._work, key)
        return None

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            before = threading.stack_size(_STACK_BYTES)
            self._threads = ThreadPoolExecutor(self._limits.num_threads, thread_name_prefix="grammar")
            self._threads.submit(int).result()  # threads are started here, with the larger stack
            threading.stack_size(before)
        return self._threads

    def _work(self, key: GrammarKey) -> None:
        try:
            result = self._compiled(key)
        except Exception as error:  # a bug of ours costs the operations that wait, not the thread
            log.exception("a grammar could not be compiled")
            result = RequestError("internal", f"{type(error).__name__}: {error}")
        self._finished.append((key, result))

    def _compiled(self, key: GrammarKey) -> llguidance.LLMatcher | RequestError:
        self.num_compiled += 1
        try:
            text = llguidance_text(Grammar(kind=key.kind, source=key.source), key.before)  # type: ignore[arg-type]
        except RequestError as error:
            return error
        if self._vet is not None:
            complaint = self._vet(text)
            if complaint:
                return too_complex(key.kind, complaint) if complaint[0] == "!" else translated(key.kind, complaint)
        matcher = llguidance.LLMatcher(
            self.vocabulary.for_grammars, text, log_level=0, limits=for_llguidance(self._limits)
        )
        if matcher.is_error():
            return translated(key.kind, matcher.get_error())
        return matcher

    def _keep(self, key: GrammarKey, result: llguidance.LLMatcher | RequestError) -> None:
        self._known[key] = result
        self._known.move_to_end(key)
        if len(self._known) > self._most:
            dropped, _ = self._known.popitem(last=False)
            self._ways.pop(dropped, None)
