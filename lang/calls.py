"""What a `gen` or a `select` became when it was appended: the futures of its replies, and how they are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from bough.backend import Delta, Generation
from bough.choices import ChoicesDecision, ChoicesSamplingMethod
from bough.errors import BoughError, ProgramError, of
from bough.expressions import Gen
from bough.runtime.protocol import Extended, Selected, TokenLogprob, Usage
from bough.runtime.protocol.scoring import mean
from bough.waiting import wait

T = TypeVar("T")


def result_of(future: Future[T]) -> T:
    """Wait for a future; raise its failure as an error of its own for this read."""
    wait(future)
    failure = future.exception()
    if failure is None:
        return future.result()
    raise of(failure).again()


def error_of(future: Future[Any]) -> BoughError | None:
    """Wait for a future; return its failure."""
    wait(future)
    failure = future.exception()
    return None if failure is None else of(failure).again()


class GenCall:
    """A `gen` in flight or done: n futures of which the text continues with the first."""

    __slots__ = ("_moved", "chunks", "constraint", "gen", "is_rewritten", "name", "replies")

    def __init__(self, gen: Gen, replies: Sequence[Future[Generation]], chunks: list[Delta] | None) -> None:
        self.gen = gen
        self.name = gen.name
        self.constraint = gen.constraint
        self._moved: Future[Extended] | None = None
        self.is_rewritten = False  # is text of its message by now, whose tokens do not end where it begins
        self.replies = replies
        self.chunks = chunks
        """The text so far while it streams; None where it does not."""

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return self.replies

    def text(self) -> str:
        """Wait for the text that was appended."""
        return result_of(self.replies[0]).text

    def moved(self, reply: Future[Extended]) -> GenCall:
        """Return the same call as it stands in a text that was edited: right after what `reply` is about."""
        call = GenCall(self.gen, self.replies, self.chunks)
        call._moved = reply
        return call

    @property
    def is_moved(self) -> bool:
        """Whether it stands elsewhere than where it was drawn."""
        return self._moved is not None

    def start(self) -> int:
        """Wait for how many tokens were before it."""
        return result_of(self.replies[0]).start if self._moved is None else result_of(self._moved).length

    def value(self) -> Any:
        """Wait for the variable's value: the text, or what its type makes of it; for n > 1 the list of them.

        Raises Truncated if a constrained text was cut short.
        """
        values = [self._value(result_of(reply)) for reply in self.replies]
        return values[0] if len(values) == 1 else values

    def _value(self, done: Generation) -> Any:
        return done.text if self.constraint is None else self.constraint.value(done)

    def captured(self, name: str) -> Any:
        """Wait for what a capture of the gen's grammar holds; for n > 1 the list of them."""
        assert self.constraint is not None, "only a grammar captures"
        found = [self.constraint.captures(result_of(reply)).get(name) for reply in self.replies]
        return found[0] if len(found) == 1 else found

    def meta(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Wait for what the call cost and why it ended; for n > 1 a list."""
        if len(self.replies) == 1:
            return _generation_meta(result_of(self.replies[0]))
        return [_generation_meta(result_of(reply)) for reply in self.replies]


class SelectCall:
    """A `select` in flight or done."""

    __slots__ = ("choices", "name", "reply")

    def __init__(self, name: str | None, choices: Sequence[str], reply: Future[Selected]) -> None:
        self.name = name
        self.choices = choices
        self.reply = reply

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return (self.reply,)

    def index(self) -> int:
        """Wait for the choice's index."""
        return result_of(self.reply).index

    def text(self) -> str:
        """Wait for the choice, which is also the text that was appended."""
        return self.choices[self.index()]

    def value(self) -> str:
        """Wait for the choice."""
        return self.text()

    def meta(self) -> dict[str, Any]:
        """Wait for the scores of all choices and what the call cost."""
        selected = result_of(self.reply)
        rows = [triples_of(tokens) for tokens in selected.logprobs]
        return {
            **_usage(selected.usage),
            "index": selected.index,
            "choice": self.choices[selected.index],
            "scores": selected.scores,
            "distribution": selected.distribution,
            "choice_token_logprobs": rows,
            "unconditional_token_logprobs": selected.unconditional,
            # SGLang's words for the same
            "normalized_prompt_logprobs": [mean([logprob for logprob, _, _ in row]) for row in rows],
            "input_token_logprobs": rows,
        }


class DecidedCall(SelectCall):
    """A `select` whose choice a method of the program takes, once the backend has scored the choices.

    Its text is not on the branch when it is made: it is sent with what is appended next.
    """

    __slots__ = ("_decision", "_lock", "_method")

    def __init__(
        self, name: str | None, choices: Sequence[str], reply: Future[Selected], method: ChoicesSamplingMethod
    ) -> None:
        super().__init__(name, choices, reply)
        self._method = method
        self._lock = threading.Lock()
        self._decision: ChoicesDecision | BoughError | None = None

    def index(self) -> int:
        """Wait for the choice's index. Raises ProgramError if the method raised, or chose what was not offered."""
        return self.choices.index(self._decided().decision)

    def meta(self) -> dict[str, Any]:
        """Wait for the scores, and add what the method said."""
        decided = self._decided()
        meta = {**super().meta(), "index": self.index(), "choice": decided.decision}
        return {**meta, **(decided.meta_info or {})}

    def _decided(self) -> ChoicesDecision:
        selected = result_of(self.reply)
        with self._lock:  # two readers: the method is asked once
            if self._decision is None:
                self._decision = self._decide(selected)
        if isinstance(self._decision, BoughError):
            raise self._decision.again()
        return self._decision

    def _decide(self, selected: Selected) -> ChoicesDecision | BoughError:
        rows = [triples_of(tokens) for tokens in selected.logprobs]
        alone = selected.unconditional
        try:
            decision = self._method(
                choices=list(self.choices),
                normalized_prompt_logprobs=[mean([logprob for logprob, _, _ in row]) for row in rows],
                input_token_logprobs=rows,
                output_token_logprobs=[[] for _ in rows],
                unconditional_token_logprobs=None if alone is None else _with_logprobs(rows, alone),
            )
        except Exception as raised:
            error = ProgramError(f"the choices_method raised {type(raised).__name__}: {raised}")
            error.__cause__ = raised
            return error
        if decision.decision not in self.choices:
            return ProgramError(f"the choices_method chose {decision.decision!r}, not one of {list(self.choices)}")
        return decision


Call: TypeAlias = GenCall | SelectCall


def _generation_meta(done: Generation) -> dict[str, Any]:
    meta: dict[str, Any] = {
        **_usage(done.usage),
        "finish_reason": done.finish_reason,
        "matched_stop": done.matched_stop,
        "token_ids": list(done.token_ids),
    }
    if done.logprobs is not None:
        meta["output_token_logprobs"] = triples_of(done.logprobs)
        meta["output_top_logprobs"] = [token.top for token in done.logprobs]
    return meta


def _usage(usage: Usage) -> dict[str, Any]:
    return {field: getattr(usage, field) for field in usage.__struct_fields__}


def triples_of(tokens: Sequence[TokenLogprob]) -> list[tuple[float, int, str]]:
    """Return log-probability, token id and text of each token, as SGLang gives them."""
    return [(token.logprob, token.token_id, token.text) for token in tokens]


def _with_logprobs(
    rows: Sequence[Sequence[tuple[float, int, str]]], logprobs: Sequence[Sequence[float]]
) -> list[list[tuple[float, int, str]]]:
    return [
        [(logprob, token_id, text) for logprob, (_, token_id, text) in zip(alone, row, strict=True)]
        for alone, row in zip(logprobs, rows, strict=True)
    ]
