"""Going back: `s.checkpoint()`, `s.rewind(mark)`, and edits of what was appended before.

A checkpoint leaves the branch that the state held where it is, and the state goes on with a fork of it::

    s.checkpoint()   text ──┬── the state goes on          the mark holds the branch of `text`
    s.rewind(mark)   text ──┬── (given up, cancelled)
                            └── the state goes on

So nothing is waited for, copied or computed again, pending gens before the mark go on, and a cancel of what came after
it reaches nothing that came before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias

from bough.calls import GenCall, result_of
from bough.errors import InvalidRequest
from bough.expressions import Expression, Gen, Piece, RoleBegin, RoleEnd, Select, SeparateReasoning, pieces_of
from bough.interpreter import Interpreter
from bough.lease import Lease
from bough.pieces import Item, Mark, futures_of
from bough.runtime import protocol
from bough.strands import Cut, Onward, Point, Strand, Trunk, items_after, known_length

if TYPE_CHECKING:
    from bough.state import State


class Checkpoint:
    """A point of a state's text that it can go back to; made by `s.checkpoint()`.

    As `with s.checkpoint() as span:` it is also the stretch of text appended inside, for `drop` and `replace`.
    """

    __slots__ = (
        "_ancestors",
        "_assigned",
        "_end",
        "_last_extend",
        "_lease",
        "_lengths",
        "_num_forks",
        "_point",
        "_role",
        "_state",
        "_toolbox",
        "_trunk",
        "_variables",
    )

    def __init__(self, state: State) -> None:
        interpreter = state._interpreter
        interpreter._await_decision()
        with interpreter.lock:
            interpreter._check_open()
            interpreter.flush()
            interpreter.check_no_thought("a checkpoint")
            strand = interpreter.strand
            running = _unfinished(strand.items)
            old = interpreter._branch()
            (new,) = interpreter.backend.fork(old, 1)
            interpreter.lease.take()
            interpreter.lease.branch = new
            self._lease = Lease(interpreter.backend, old)
            if interpreter._has_children:  # a cancel of the state has to reach them
                interpreter._kept.append(self._lease)
                interpreter._has_children = False
            if running:
                interpreter._ancestors.append((old, running))
            self._ancestors = tuple(interpreter._ancestors)
            self._trunk = interpreter.trunk
            self._point: Point = strand, len(strand.items)
            self._role = interpreter.role
            self._last_extend = interpreter._last_extend
            self._num_forks = interpreter.num_forks
            self._lengths = interpreter.lengths()
        self._state = weakref.ref(state)
        self._toolbox = state._toolbox
        self._variables = state._variables.copy()
        self._assigned = state._assigned.copy()
        self._end: Point | None = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        state = self._state()
        if state is not None:
            strand = state._interpreter.strand
            self._end = strand, len(strand.items)


CheckpointSpan: TypeAlias = "Checkpoint | tuple[Checkpoint, Checkpoint]"
"""A stretch of text: what was appended in a `with s.checkpoint() as span:`, or between two checkpoints."""


def _unfinished(items: Sequence[Item]) -> list[Future[Any]]:
    """Return what still runs; operations of a branch end in their order, so what is before one that is done is done."""
    running: list[Future[Any]] = []
    for item in reversed(items):
        futures = futures_of(item)
        left = [future for future in futures if not future.done()]
        if futures and not left and not isinstance(item, Mark):
            break
        running += left
    return running


def rewind(state: State, mark: Checkpoint) -> None:
    """Take a state back to where a checkpoint was made."""
    interpreter = state._interpreter
    with interpreter.lock:
        _check(state, mark)
        _go_back(interpreter, mark)
    state._toolbox = mark._toolbox
    state._variables = mark._variables.copy()
    state._assigned = mark._assigned.copy()
    if state._feed is not None:
        state._feed.notify()


def _check(state: State, mark: Checkpoint) -> list[Item]:
    """Return what was appended since a checkpoint. Raises InvalidRequest if the state cannot go back to it."""
    if not isinstance(mark, Checkpoint):
        raise InvalidRequest(f"mark must be what checkpoint() returned, got {mark!r}", field="mark")
    if mark._state() is not state:
        raise InvalidRequest("mark was made by another state's checkpoint()", field="mark")
    interpreter = state._interpreter
    interpreter._check_open()
    later = items_after(interpreter.trunk, interpreter.strand, mark._point)
    if later is None:
        raise InvalidRequest("mark lies beyond the text: the state was rewound to before it", field="mark")
    return later


def _go_back(interpreter: Interpreter, mark: Checkpoint) -> None:
    """Go on with a new fork of the checkpoint's branch, and give up what came after it."""
    assert mark._lease.branch is not None, "a checkpoint holds its branch"
    backend, strand = interpreter.backend, Strand()
    old = interpreter.lease.take()
    assert old is not None, "an open state that has a checkpoint holds a branch"
    go_back = getattr(backend, "go_back", None)
    if go_back is None:
        (new,) = backend.fork(mark._lease.branch, 1)
    else:  # a watched one, whose readers are told that this is no fork of the program's
        new = go_back(old, mark._lease.branch, known_length(mark._lengths))
    if interpreter.num_forks == mark._num_forks:  # else the forks need what they were forked off
        given_up = [branch for branch, left in interpreter._ancestors if (branch, left) not in mark._ancestors]
        for branch in (*given_up, old):
            backend.cancel(branch)
    backend.release((old,))
    interpreter.lease.branch = new
    begin, length = mark._point
    cut = Cut(interpreter.lengths(), mark._lengths)
    begin.forks.append((length, Onward(strand, "rewound to here, then", cut)))
    interpreter.trunk = Trunk(mark._trunk, begin, length)
    interpreter.strand = strand
    interpreter.role = mark._role
    interpreter._sent = 0
    interpreter._undecided = interpreter._thought = None
    interpreter._last_extend = mark._last_extend
    interpreter._inherited = mark._lengths
    interpreter._ancestors = list(mark._ancestors)
    interpreter._has_children = False


# ---------------------------------------------------------------------------------------------- edits


def edit(state: State, span: CheckpointSpan, new: str | Expression) -> int:
    """Put something else in the place of a span and keep what follows; return how many tokens follow it."""
    begin, until = _ends(span)
    pieces = _plain(new)
    interpreter = state._interpreter
    interpreter.flush()
    with interpreter.lock:
        interpreter.check_no_thought("an edit")
        inside, after = _parts(state, begin, until)
    for item in after:
        if not isinstance(item, (str, Mark)):
            result_of(futures_of(item)[0])  # the text that is kept has to be known
    with interpreter.lock:
        role = _role_after([*pieces], begin._role)
        if _role_after(inside, begin._role) != role:
            raise InvalidRequest("a span may not begin or end a message that its replacement does not", field="span")
        _go_back(interpreter, begin)
        start = interpreter.backend.extend(interpreter._branch(), [])
        interpreter.append(pieces)
        interpreter.flush()
        end = append_again(interpreter, after) if after else interpreter._last_extend if pieces else None
    if state._feed is not None:
        state._feed.notify()
    return 0 if end is None else max(0, result_of(end).length - result_of(start).length)


def _ends(span: CheckpointSpan) -> tuple[Checkpoint, Point]:
    if isinstance(span, tuple) and len(span) == 2 and all(isinstance(mark, Checkpoint) for mark in span):
        return span[0], span[1]._point
    if isinstance(span, Checkpoint):
        if span._end is None:
            raise InvalidRequest(
                "span has no end: make it with `with s.checkpoint() as span:`, or give two checkpoints", field="span"
            )
        return span, span._end
    raise InvalidRequest(f"span must be a checkpoint or two of them, got {span!r}", field="span")


def _parts(state: State, begin: Checkpoint, end: Point) -> tuple[list[Item], list[Item]]:
    """Return the pieces of a span and those after it."""
    interpreter = state._interpreter
    later = _check(state, begin)
    after = items_after(interpreter.trunk, interpreter.strand, end)
    if after is None:
        raise InvalidRequest("the span's end lies beyond the text: the state was rewound to before it", field="span")
    if len(after) > len(later):
        raise InvalidRequest("the span ends before it begins", field="span")
    return later[: len(later) - len(after)], after


def _plain(new: str | Expression) -> tuple[Piece, ...]:
    pieces = pieces_of(new)
    if any(isinstance(piece, (Gen, Select, SeparateReasoning)) for piece in pieces):
        raise InvalidRequest("a replacement is text and messages, without a gen or select", field="text")
    return pieces


def _role_after(items: Sequence[Item | Piece], role: str | None) -> str | None:
    for item in items:
        if isinstance(item, (Mark, RoleBegin)):
            role = item.role
        elif isinstance(item, RoleEnd):
            role = None
    return role


def append_again(interpreter: Interpreter, items: Sequence[Item]) -> Future[protocol.Extended]:
    """Append pieces that were computed once more, as what they are by now: text and roles. They keep their meaning."""
    parts: list[protocol.Part] = []
    marks: list[Mark] = []

    def send(*, commit: bool = False) -> Future[protocol.Extended]:
        reply = interpreter.backend.extend(interpreter._branch(), parts[:], commit=commit)
        for index, mark in enumerate(marks):
            mark.sent(reply, index)
        parts.clear()
        marks.clear()
        return reply

    for item in items:
        if isinstance(item, Mark):
            parts.append(protocol.RoleEnd() if item.role is None else protocol.RoleBegin(item.role))
            marks.append(Mark(item.role))
            interpreter.role = item.role
            interpreter.strand.items.append(marks[-1])
            continue
        # A gen begins where tokens end, here as where it was drawn, and can be drawn again from there.
        interpreter.strand.items.append(item.moved(send(commit=True)) if isinstance(item, GenCall) else item)
        text = item if isinstance(item, str) else item.text()
        if text:
            parts.append(protocol.Text(text))
    interpreter._last_extend = reply = send()
    interpreter._sent = len(interpreter.strand.items)
    return reply
