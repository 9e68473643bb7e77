"""`think`: a span of reasoning with a budget of its own, which later context need not keep.

    state    user ──┬── <think> ... </think> answer ── end        while the message is written
                    └── answer ── end                             after it, with keep=False

A thought that is to be forgotten leaves a fork of the branch where it began; when its message has ended, the state goes
on there, with what was written after the thought appended again. Nothing before the thought is computed again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from bough.calls import GenCall, SelectCall
from bough.constraint import Constraint
from bough.errors import InvalidRequest
from bough.expressions import Concat, Gen, Piece, ThoughtBegin, ThoughtEnd, gen
from bough.lease import Lease
from bough.pieces import Item, futures_of
from bough.runtime import protocol
from bough.strands import Cut, known_length

if TYPE_CHECKING:
    from bough.interpreter import Interpreter

START: Final = "<think>"
END: Final = "</think>"
_TAG: Final = re.compile(r"\s*(<[^<>\s]+>|\[[A-Z/_]+\]|◁[^◁▷\s]+▷)\s*")


def think(
    name: str | None = None,
    max_tokens: int = 256,
    keep: bool = True,
    start: str = START,
    end: str = END,
    **options: Any,
) -> Concat:
    """Let the model reason between `start` and `end`, and call what it writes there `name`.

    ::

        s += bo.user("What is 17 + 25?")
        s += bo.assistant(bo.think("thought", max_tokens=200, keep=False) + bo.gen("answer", type=int))

    max_tokens: its own budget; when it ends, the thought is closed with `end`, and what follows goes on from there
    (`s.get_meta_info(name)["finish_reason"]` is "length" then). keep=False: once the message has ended (outside of
    messages: the appended expression), the thought is no longer in the state's text and context; the variable stays.
    What is appended next waits for the answer then, because the answer is appended again.
    start, end: tags that a model has tokens for, which it is made to write itself; `start=""` where its chat template
    has opened the thought. Or any texts, as `start="Thoughts: ", end="\\n"`, for any model. options: as for `gen`.

    Raises InvalidRequest naming what is wrong. While it streams, `s.text_iter(name)` has the thought alone.
    """
    if not isinstance(start, str) or not isinstance(end, str) or not end:
        raise InvalidRequest(f"start and end must be texts, and end not empty, got {start!r} and {end!r}", field="end")
    if not isinstance(keep, bool):
        raise InvalidRequest(f"keep must be True or False, got {keep!r}", field="keep")
    for field in ("n", "choices", "stop"):
        if options.get(field) is not None:
            raise InvalidRequest(f"{field} cannot go with think", field=field)
    thought = gen(name, max_tokens=max_tokens, stop=end, **options)
    inside = (*_written(start), *thought.pieces(), *_written(end))
    return Concat(inside if keep else (ThoughtBegin(), *inside, ThoughtEnd()))


def _written(text: str) -> tuple[Piece, ...]:
    """Return a delimiter as pieces: a tag is left to the model to spell, which may have one token for it.

    Text that a program appends never becomes such a token, so that nobody's data can.
    """
    if _TAG.fullmatch(text) is None:
        return (text,) if text else ()
    wire = protocol.Grammar(kind="choices", source=json.dumps([text]), jump_forward=False)
    overrides = {"max_tokens": 4 * len(text), "temperature": 0.0}
    return (Gen(None, overrides, 1, None, Constraint(wire, on_limit="return")),)


class Thought:
    """Thoughts of one message that are to be forgotten: which pieces they are, and the branch without them."""

    __slots__ = ("_before", "_begin", "_cuts", "_forgotten", "_lease", "is_due")

    def __init__(self, interpreter: Interpreter) -> None:
        """Keep the branch as it is, and let the interpreter go on with a fork of it."""
        running = [f for item in interpreter.strand.items for f in futures_of(item) if not f.done()]
        old = interpreter._branch()
        (interpreter.lease.branch,) = interpreter.backend.fork(old, 1)
        if running:  # a cancel has to name the old branch: earlier operations may still run on it
            interpreter._ancestors.append((old, running))
        self._lease: Lease = Lease(interpreter.backend, old)
        self._forgotten: list[range] = []
        self._cuts: list[Cut] = []
        self._before: Sequence[Future[Any]] = ()
        self.is_due = False
        self.begin(interpreter)

    def begin(self, interpreter: Interpreter) -> None:
        """Count what is appended from now on as a thought; what was before it has been sent."""
        self._begin = len(interpreter.strand.items)
        self._before = interpreter.lengths()

    def end(self, interpreter: Interpreter) -> None:
        """Count no more."""
        interpreter.flush()
        self._forgotten.append(range(self._begin, len(interpreter.strand.items)))
        self._cuts.append(Cut(interpreter.lengths(), self._before))

    def futures(self, items: Sequence[Item]) -> list[Future[Any]]:
        """Return what has to be done before the thoughts can be forgotten."""
        return [future for item in items[self._forgotten[0].start :] for future in futures_of(item)]

    def forget(self, interpreter: Interpreter) -> None:
        """Go on with the branch without the thoughts; what came after them is to be sent again, as text."""
        items = interpreter.strand.items
        if any(future.exception() is not None for future in self.futures(items)):
            return  # the branch is poisoned, and every read says why
        for index in (index for span in self._forgotten for index in span):
            item = items[index]
            if isinstance(item, (GenCall, SelectCall)):
                interpreter.strand.dropped += (item,)
            items[index] = ""  # not taken out: readers of the stream count pieces
        for item in items[self._forgotten[0].start :]:
            if isinstance(item, GenCall):
                item.is_rewritten = True
        interpreter.strand.cuts += tuple(self._cuts)
        backend, old, new = interpreter.backend, interpreter.lease.branch, self._lease.take()
        went_back = getattr(backend, "went_back", None)
        if went_back is not None:
            went_back(old, new, known_length(self._before))
        interpreter.lease.release()
        interpreter.lease.branch = new
        interpreter._sent = self._forgotten[0].start
