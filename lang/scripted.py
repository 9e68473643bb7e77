"""`ScriptedBackend`: a backend without a model, for tests, documentation and measuring the language alone.

It keeps every rule of `Backend`. Words stand in for tokens: a token is a run of non-blank characters with the blanks
before it, `max_tokens` counts words, and what an earlier call on the same tree of branches has read counts as cached.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from typing import Final, TypeVar

from bough.backend import Branch, Delta, Generation, OnDelta
from bough.errors import BoughError, Cancelled, ContextOverflow, InvalidRequest, of
from bough.runtime import protocol
from bough.runtime.protocol import (
    ChoiceMethod,
    Extended,
    Part,
    SamplingParams,
    Selected,
    TokenLogprob,
    Usage,
)
from bough.runtime.protocol.scoring import score_choices
from bough.script import Choose, Replies, Script, check_reply, cut, only_text, words_of
from bough.scripted_branch import ScriptedBranch

T = TypeVar("T")
_NOBODY: Final = -1  # in place of the branch that a cancel would have to name


class ScriptedBackend:
    """Answers from a script.

    replies: a list, used up in the order of the calls; a dict from variable names to a reply or a list of them; or a
    callable of the text so far and the SamplingParams. A reply is a text or such a callable; an exception that it
    raises fails the call. `select` takes the dict's choice for the variable, else `choose(text, choices)`, else the
    first choice.

    While `paused()`, calls wait in order; `step()` carries out some, and leaving the block the rest.
    """

    def __init__(
        self,
        replies: Replies = (),
        *,
        choose: Choose | None = None,
        context_len: int | None = None,
        chunk_words: int = 1,
    ) -> None:
        self._script = Script(replies, choose)
        self._context_len = context_len
        self._chunk_words = chunk_words
        self._lock = threading.RLock()
        self._ids = count(1)
        self._branches: dict[Branch, ScriptedBranch] = {}
        self._waiting: deque[tuple[Branch, Callable[[], None], Callable[[BoughError], None]]] | None = None
        self._totals = dict.fromkeys(("prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens"), 0)
        self._num_calls = 0

    # ------------------------------------------------------------------------------------------ branches

    def open(self) -> Branch:
        """Start an empty branch."""
        branch = next(self._ids)
        self._branches[branch] = ScriptedBranch(None)
        return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        parent = self._branches.get(branch)
        children = {next(self._ids): ScriptedBranch(parent) for _ in range(count)}
        self._branches.update(children)

        def inherit() -> None:
            for child in children.values():
                if parent is None:
                    child.is_orphan = True
                    child.error = InvalidRequest(f"branch {branch} is not open", branch=branch)
                else:
                    child.inherit()

        self._do(_NOBODY, inherit, _no_failure)  # a cancelled parent's children exist, and fail
        return list(children)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches once what was asked before has been carried out."""
        waiting = self._waiting
        if waiting is not None and branches:
            waiting.append((_NOBODY, lambda: self._forget(branches), _no_failure))
        else:
            self._forget(branches)

    def _forget(self, branches: Sequence[Branch]) -> None:
        for branch in branches:
            self._branches.pop(branch, None)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every waiting call of the branch and of its descendants."""
        ended: Future[int] = Future()
        with self._lock:
            family = set(self._family(branch))
            waiting = list(self._waiting or ())
            if self._waiting is not None:
                self._waiting = deque(entry for entry in waiting if entry[0] not in family)
            for member in family:
                self._branches[member].error = Cancelled("the branch was cancelled")
        failing = [fail for owner, _, fail in waiting if owner in family]
        for fail in failing:
            fail(Cancelled("the operation was cancelled with its branch"))
        ended.set_result(len(failing))
        return ended

    def _family(self, branch: Branch) -> Iterator[Branch]:
        root = self._branches.get(branch)
        inside = set() if root is None else {id(root)}
        for number, other in sorted(self._branches.items()):  # parents have lower numbers than their children
            if id(other) in inside or (other.origin is not None and id(other.origin) in inside):
                inside.add(id(other))
                yield number

    # ------------------------------------------------------------------------------------------ operations

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles, written in the manner of ChatML."""

        def work(target: ScriptedBranch) -> Extended:
            rendered: list[str] = []
            for part in parts:
                if isinstance(part, protocol.Text):
                    target.append(part.text)
                elif isinstance(part, protocol.Tokens):
                    raise InvalidRequest("a ScriptedBackend has no tokens")
                elif isinstance(part, protocol.Tools):
                    target.append(f"<tools>{part.definitions}</tools>\n")
                else:
                    rendered.append(_render(target, part))
            self._check_length(target)
            target.is_committed = commit
            return Extended(0, target.length, rendered)

        return self._submit(branch, work)

    def generate(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        name: str | None = None,
        on_delta: OnDelta | None = None,
        timeout_s: float | None = None,
        grammar: protocol.Grammar | None = None,
        heal: bool = True,
    ) -> Future[Generation]:
        """Append the next reply of the script, cut at stop strings and after `max_tokens` words.

        A grammar of one choice needs no reply; one that the grammar excludes is an error of the script.
        What `max_tokens` cuts is not closed.
        """

        def work(target: ScriptedBranch) -> Generation:
            said = only_text(grammar)
            if said is None:
                said = self._script.reply(name, target.whole, params)
            acceptor = None if grammar is None else check_reply(said, grammar)
            text, reason, stop = cut(said, params)
            words = text.split() if params.logprobs is None and on_delta is None else words_of(text)
            ids = [zlib.crc32(word.encode()) & 0x7FFF for word in words]
            logprobs = None
            if params.logprobs is not None:
                logprobs = [TokenLogprob(0.0, i, w, [(0.0, i, w)]) for i, w in zip(ids, words, strict=True)]
            if on_delta is not None:
                for start in range(0, len(words), self._chunk_words):
                    part = slice(start, start + self._chunk_words)
                    on_delta(Delta("".join(words[part]), ids[part], None if logprobs is None else logprobs[part]))
            usage, before = self._used(target, len(words)), target.length
            target.append(text, is_drawn=True)
            target.compute()
            is_whole = acceptor is None or acceptor.accepts(text.encode())
            return Generation(text, ids, reason, stop, target.length, usage, logprobs, is_whole, start=before)

        return self._submit(branch, work)

    def select(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Future[Selected]:
        """Append the choice of the script."""

        def work(target: ScriptedBranch) -> Selected:
            selected = self._selected(name, target, choices, method)
            target.append(choices[selected.index])
            target.compute()
            return selected

        return self._submit(branch, work)

    def score(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
    ) -> Future[Selected]:
        """Return what `select` would choose, and append nothing."""
        return self._submit(branch, lambda target: self._selected(name, target, choices, method))

    def rollback(self, branch: Branch, length: int) -> Future[Extended]:
        """Cut the branch back to its first `length` words."""

        def work(target: ScriptedBranch) -> Extended:
            if not 0 <= length <= target.length:
                raise InvalidRequest(f"length must be between 0 and {target.length}, got {length}", field="length")
            target.cut(length)
            return Extended(0, length)

        return self._submit(branch, work, heals=True)

    # ------------------------------------------------------------------------------------------ counters

    def stats(self) -> dict[str, int | float | str]:
        """Return what was cached, computed and generated, in words."""
        return {**self._totals, "num_branches": len(self._branches), "num_calls": self._num_calls}

    def flush_cache(self) -> None:
        """Count everything as not computed."""
        with self._lock:
            for branch in self._branches.values():
                branch.read = 0

    def server_info(self) -> dict[str, object]:
        """Return that this is a script."""
        return {"model": "script", "architecture": "script", "context_len": self._context_len}

    # ------------------------------------------------------------------------------------------ waiting

    @contextmanager
    def paused(self) -> Iterator[ScriptedBackend]:
        """Let calls wait, as on a real runtime, until `step` or the end of the block."""
        self._waiting = deque()
        try:
            yield self
        finally:
            self.step(None)
            self._waiting = None

    def step(self, number: int | None = 1) -> None:
        """Carry out some of the waiting calls, in order; None means all."""
        while self._waiting and number != 0:
            self._waiting.popleft()[1]()
            number = None if number is None else number - 1

    def _do(self, branch: Branch, work: Callable[[], None], fail: Callable[[BoughError], None]) -> None:
        if self._waiting is not None:
            self._waiting.append((branch, work, fail))
        else:
            work()

    def _submit(self, branch: Branch, work: Callable[[ScriptedBranch], T], *, heals: bool = False) -> Future[T]:
        """Carry out an operation now, or later if paused; a failure poisons the branch, until something heals it."""
        future: Future[T] = Future()

        def run() -> None:
            with self._lock:
                target = self._branches.get(branch)
                if target is None:
                    return future.set_exception(InvalidRequest(f"branch {branch} is not open", branch=branch))
                if target.error is not None and (target.is_orphan or not heals):
                    return future.set_exception(target.error.for_dependant())
                self._num_calls += 1
                try:
                    result = work(target)
                except Exception as error:  # a script may fail on purpose
                    target.error = of(error)
                    return future.set_exception(target.error)
            return future.set_result(result)

        self._do(branch, run, future.set_exception)
        return future

    # ------------------------------------------------------------------------------------------ results

    def _selected(
        self, name: str | None, target: ScriptedBranch, choices: Sequence[str], method: ChoiceMethod
    ) -> Selected:
        index = self._script.choice(name, target.whole, choices)
        sure = [1.0 if i == index else 0.0 for i in range(len(choices))]
        tokens = [[TokenLogprob(score - 1.0, 0, text)] for score, text in zip(sure, choices, strict=True)]
        alone = [[0.0] for _ in choices] if method in ("unconditional_likelihood_normalized", "pmi") else None
        given = [[score - 1.0] for score in sure]
        scores = score_choices(method, given, alone, [len(choice.encode()) for choice in choices])
        return Selected(0, index, scores, sure, tokens, target.length, self._used(target, 0), alone)

    def _used(self, target: ScriptedBranch, generated: int) -> Usage:
        prompt, cached = target.length, target.cached()
        totals = self._totals
        totals["prompt_tokens"] += prompt
        totals["cached_tokens"] += cached
        totals["computed_tokens"] += prompt - cached
        totals["generated_tokens"] += generated
        return Usage(
            prompt_tokens=prompt, cached_tokens=cached, computed_tokens=prompt - cached, completion_tokens=generated
        )

    def _check_length(self, target: ScriptedBranch) -> None:
        if self._context_len is not None and target.length > self._context_len:
            raise ContextOverflow(
                f"the text has {target.length} tokens, the context holds {self._context_len}",
                length=target.length,
                context_len=self._context_len,
            )


def _no_failure(error: BoughError) -> None:
    """Take the failure of what cannot fail."""


def _render(target: ScriptedBranch, part: Part) -> str:
    if isinstance(part, protocol.RoleBegin):
        target.role = part.role
        text = f"<|im_start|>{part.role}\n"
    else:
        target.role = None
        text = "<|im_end|>\n"
    target.append(text)
    return text
