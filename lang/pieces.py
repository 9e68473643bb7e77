"""What a state's text is made of, and what its variables hold until they are read.

A state appends to its own strand only. A fork makes new strands that refer to the parent's up to the point of the
fork, so that forking copies no text: the pieces of a branch are those of its trunk, then its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from bough.backend import Delta, Generation
from bough.choices import ChoicesDecision, ChoicesSamplingMethod, mean
from bough.errors import BoughError, Cancelled, ProgramError, of
from bough.expressions import Gen
from bough.runtime.protocol import Extended, Selected, TokenLogprob, Usage
from bough.waiting import wait

if TYPE_CHECKING:
    pass

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


class Mark:
    """Where a message begins (with its role) or ends (None); knows its text once the backend has rendered it."""

    __slots__ = ("index", "reply", "role")

    def __init__(self, role: str | None) -> None:
        self.role = role
        self.reply: Future[Extended] | None = None
        self.index = 0

    def sent(self, reply: Future[Extended], index: int) -> None:
        """Remember which reply will hold the rendered text, and where in it."""
        self.reply, self.index = reply, index

    def text(self) -> str:
        """Wait for what the chat template writes here."""
        if self.reply is None:  # readers send what is pending first, unless there is no branch to send it to
            raise Cancelled("this branch was closed before its last messages were sent, nobody has rendered them")
        rendered = result_of(self.reply).rendered
        return rendered[self.index] if self.index < len(rendered) else ""


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


class Derived:
    """A variable computed from the text of a call when it is read."""

    __slots__ = ("_call", "_make")

    def __init__(self, call: Call, make: Callable[[str], str]) -> None:
        self._call = call
        self._make = make

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return self._call.futures()

    def value(self) -> Any:
        """Wait for the call, and compute; a list for n > 1."""
        value = self._call.value()
        return [self._make(text) for text in value] if isinstance(value, list) else self._make(value)

    def meta(self) -> Any:
        """Return the call's meta information."""
        return self._call.meta()


class Captured:
    """A variable that a capture in a gen's grammar names."""

    __slots__ = ("_call", "_name")

    def __init__(self, call: GenCall, name: str) -> None:
        self._call = call
        self._name = name

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return self._call.futures()

    def value(self) -> Any:
        """Wait for the gen, and return what was captured."""
        return self._call.captured(self._name)

    def meta(self) -> Any:
        """Return the gen's meta information."""
        return self._call.meta()


class Gathered:
    """A variable that a join collected: one value per branch, None where a branch did not assign it."""

    __slots__ = ("cells",)

    def __init__(self, cells: Sequence[object]) -> None:
        self.cells = cells

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return [future for cell in self.cells if isinstance(cell, LAZY) for future in cell.futures()]

    def value(self) -> Sequence[Any]:
        """Return the list. Raises the failure of the first branch that failed."""
        return [read(cell) for cell in self.cells]

    def meta(self) -> list[Any]:
        """Return each branch's meta information, None where there is none."""
        return [
            cell.meta() if isinstance(cell, (GenCall, SelectCall, Derived, Captured, Gathered)) else None
            for cell in self.cells
        ]


class Span:
    """A variable that names a stretch of a state's own text."""

    __slots__ = ("pieces",)

    def __init__(self, pieces: Sequence[Item]) -> None:
        self.pieces = pieces

    def futures(self) -> Sequence[Future[Any]]:
        """Return what has to be done before this can be read."""
        return [future for item in self.pieces for future in futures_of(item)]

    def value(self) -> str:
        """Wait for the text."""
        return text_of(self.pieces)


Call: TypeAlias = GenCall | SelectCall
Item: TypeAlias = str | Mark | GenCall | SelectCall
LAZY = (GenCall, SelectCall, Derived, Captured, Gathered, Span)


def variables_of(call: Call) -> Iterator[tuple[str, GenCall | SelectCall | Captured]]:
    """Yield the variables that a call assigns: its own name, and the captures of its grammar."""
    if call.name is not None:
        yield call.name, call
    if isinstance(call, GenCall) and call.constraint is not None:
        for name in call.constraint.names or ():
            yield name, Captured(call, name)


def read(value: object) -> Any:
    """Return a variable's value, waiting for it if need be."""
    return value.value() if isinstance(value, LAZY) else value


def written(value: object) -> str:
    """Return a variable's value as text: of a gen what the model wrote, waiting for it if need be."""
    if isinstance(value, GenCall) and len(value.replies) == 1:
        return value.text()
    return str(read(value))


def text_of(items: Sequence[Item]) -> str:
    """Return the text of pieces, waiting for those that are not known yet."""
    return "".join([item if isinstance(item, str) else item.text() for item in items])


def futures_of(item: Item) -> Sequence[Future[Any]]:
    """Return what has to be done before the piece's text is known."""
    if isinstance(item, str):
        return ()
    if isinstance(item, Mark):
        return () if item.reply is None else (item.reply,)
    return item.futures()


Point: TypeAlias = "tuple[Strand, int]"
"""A place in a text: after so many pieces of a strand."""


class Cut:
    """How much of a text was given up: what tells its length before and after."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: Sequence[Future[Any]], after: Sequence[Future[Any]] | int) -> None:
        self._before = before
        self._after = after

    def num_tokens(self) -> int:
        """Return how many tokens that were, as far as is known by now."""
        after = self._after if isinstance(self._after, int) else _longest(self._after)
        return max(0, _longest(self._before) - after)


def known_length(replies: Sequence[Future[Any]]) -> int | None:
    """Return how long a text is by the last of its replies; None if they are not there yet."""
    return _longest(replies) if all(reply.done() for reply in replies) else None


def _longest(replies: Sequence[Future[Any]]) -> int:
    done = [reply for reply in replies if reply.done() and not reply.cancelled() and reply.exception() is None]
    return max((reply.result().length for reply in done), default=0)


class Onward(list["Strand"]):
    """In place of the strands of a fork: the one in which a state goes on from here, how that came, and what it cut."""

    def __init__(self, strand: Strand, how: str, cut: Cut | None = None) -> None:
        super().__init__((strand,))
        self.how = how
        self.cut = cut


class Strand:
    """The pieces that one state appended, and the strands that were forked off it (for drawing the tree).

    name: what the branch was forked as. dropped: calls whose text was forgotten; they were paid for. cuts: how much
    text was forgotten, of which nothing is drawn.
    """

    __slots__ = ("cuts", "dropped", "forks", "items", "name")

    def __init__(self) -> None:
        self.name: str | None = None
        self.items: list[Item] = []
        self.dropped: tuple[GenCall | SelectCall, ...] = ()
        self.cuts: tuple[Cut, ...] = ()
        self.forks: list[tuple[int, list[Strand]]] = []


class Trunk:
    """What a forked state inherits: the first `length` pieces of its parent's strand, and the parent's own trunk.

    Strands do not refer back, so that a dropped state is freed at once, without the cycle collector.
    """

    __slots__ = ("length", "parent", "strand")

    def __init__(self, parent: Trunk | None, strand: Strand, length: int) -> None:
        self.parent = parent
        self.strand = strand
        self.length = length


def all_items(trunk: Trunk | None, strand: Strand) -> Iterator[Item]:
    """Yield the pieces from the root of the tree to the end of `strand`."""
    trunks: list[Trunk] = []
    while trunk is not None:
        trunks.append(trunk)
        trunk = trunk.parent
    for part in reversed(trunks):
        yield from part.strand.items[: part.length]
    yield from list(strand.items)


def items_after(trunk: Trunk | None, strand: Strand, point: Point) -> list[Item] | None:
    """Return the pieces from a point to the end of `strand`; None if the point does not lie on the way there."""
    begin, skip = point
    later: list[list[Item]] = []
    items = strand.items[:]
    while strand is not begin:
        later.append(items)
        if trunk is None:
            return None
        strand, items, trunk = trunk.strand, trunk.strand.items[: trunk.length], trunk.parent
    if skip > len(items):
        return None
    later.append(items[skip:])
    return [item for part in reversed(later) for item in part]


def messages_of(items: Iterator[Item]) -> list[dict[str, str]]:
    """Return the closed messages among the pieces; their content is what was appended inside, exactly."""
    messages: list[dict[str, str]] = []
    role: str | None = None
    inside: list[Item] = []
    for item in items:
        if not isinstance(item, Mark):
            inside.append(item)
            continue
        if item.role is None and role is not None:
            messages.append({"role": role, "content": text_of(inside)})
        role, inside = item.role, []
    return messages


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
