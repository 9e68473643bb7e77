"""`think`: a span of reasoning with a budget of its own, which later context need not keep.

    state    user ──┬── <think> ... </think> answer ── end        while the message is written
                    └── answer ── end                             after it, with keep=False

The thought is a gen that ends with its closing text, in the model's own tokens. One that is to be forgotten leaves a
fork of the branch where it began; when its message has ended, the state goes on there, with what was written after the
thought appended again. Nothing before the thought is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from bough.errors import InvalidRequest
from bough.expressions import Expression, Gen, gen
from bough.pieces import Item, futures_of
from bough.runtime import protocol

if TYPE_CHECKING:
    from bough.interpreter import Interpreter, Lease

START: Final = "<think>"
END: Final = "</think>"


def think(
    name: str | None = None,
    max_tokens: int = 256,
    keep: bool = True,
    start: str = START,
    end: str = END,
    **options: Any,
) -> Expression:
    """Let the model reason between `start` and `end`, and call what it writes there `name`.

    ::

        s += bo.user("What is 17 + 25?")
        s += bo.assistant(bo.think("thought", max_tokens=200, keep=False) + bo.gen("answer", type=int))

    max_tokens: its own budget, delimiters included; when it ends, the thought is closed with `end`. keep=False: once
    the message has ended (outside of messages: the appended expression), the thought is no longer in the state's text
    and context; the variable stays. What follows waits for the answer then, because that is appended again.
    start, end: as the model writes them; `start=""` where its chat template has opened the thought. Any model can be
    made to write plain ones, as `start="Thoughts: ", end="\\n"`. options: what `gen` takes for sampling.

    Raises InvalidRequest naming what is wrong. While it streams, `s.text_iter(name)` has the thought alone.
    """
    from bough.constraint import Constraint
    from bough.grammars import lit, until
    from bough.typed import Shape

    if not isinstance(start, str) or not isinstance(end, str) or not end:
        raise InvalidRequest(f"start and end must be texts, and end not empty, got {start!r} and {end!r}", field="end")
    if not isinstance(keep, bool):
        raise InvalidRequest(f"keep must be True or False, got {keep!r}", field="keep")
    for field in ("n", "choices", "regex", "json_schema", "grammar", "type", "dtype", "on_limit", "stop"):
        if options.get(field) is not None:
            raise InvalidRequest(f"{field} cannot go with think", field=field)
    thought = gen(name, max_tokens=max_tokens, **options)
    assert isinstance(thought, Gen), "it has no choices"
    grammar = lit(start) + until(end) + end
    # No jump-forward: the model may have tokens of its own for the delimiters, which text that is given does not.
    wire = protocol.Grammar(kind="lark", source=grammar.to_lark(), on_limit="close", jump_forward=False)
    span = Delimited(start, end)
    shape = Shape(str, grammar, span.inside, wire)
    constraint = Constraint(wire, shape=shape, span=span, is_whole_or_error=False)
    return Gen(thought.name, thought.overrides, None, thought.timeout_s, constraint, is_kept=keep)


class Delimited:
    """Text between two delimiters."""

    __slots__ = ("end", "start")

    def __init__(self, start: str, end: str) -> None:
        self.start = start
        self.end = end

    def inside(self, text: str) -> str:
        """Return what is between the delimiters, of which the end may not be there yet."""
        return text.removeprefix(self.start).partition(self.end)[0]

    def stream(self, chunks: Iterator[str | None]) -> Iterator[str | None]:
        """Yield what is between the delimiters as it comes; what may begin the end is held back."""
        text, told = "", 0
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            text += chunk
            sure = len(self.inside(self._without_open_end(text)))
            if len(text) > len(self.start) and sure > told:
                told, before = sure, told
                yield self.inside(text)[before:sure]
        rest = self.inside(text)[told:]
        if rest:
            yield rest

    def _without_open_end(self, text: str) -> str:
        for length in range(min(len(self.end) - 1, len(text)), 0, -1):
            if self.end.startswith(text[-length:]):
                return text[:-length]
        return text


class Thought:
    """Thoughts of one message that are to be forgotten: which pieces they are, and the branch without them."""

    __slots__ = ("_indices", "_lease", "is_due")

    def __init__(self, interpreter: Interpreter) -> None:
        """Keep the branch as it is, and let the interpreter go on with a fork of it."""
        from bough.interpreter import Lease

        running = [f for item in interpreter.strand.items for f in futures_of(item) if not f.done()]
        old = interpreter._branch()
        (interpreter.lease.branch,) = interpreter.backend.fork(old, 1)
        if running:  # a cancel has to name the old branch: earlier operations may still run on it
            interpreter._ancestors.append((old, running))
        self._lease: Lease = Lease(interpreter.backend, old)
        self._indices: list[int] = []
        self.is_due = False
        self.add(interpreter)

    def add(self, interpreter: Interpreter) -> None:
        """Count the piece that is appended next as a thought."""
        self._indices.append(len(interpreter.strand.items))

    def futures(self, items: Sequence[Item]) -> list[Future[Any]]:
        """Return what has to be done before the thoughts can be forgotten."""
        return [future for item in items[self._indices[0] :] for future in futures_of(item)]

    def forget(self, interpreter: Interpreter) -> None:
        """Go on with the branch without the thoughts; what came after them is to be sent again, as text."""
        items = interpreter.strand.items
        if any(future.exception() is not None for future in self.futures(items)):
            return  # the branch is poisoned, and every read says why
        for index in self._indices:
            items[index] = ""  # not taken out: readers of the stream count pieces
        interpreter.lease.release()
        interpreter.lease.branch = self._lease.take()
        interpreter._sent = self._indices[0]
