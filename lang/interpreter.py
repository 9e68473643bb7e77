"""Turns what a program appends into primitives of its backend.

Appending never waits. Text and roles are collected and sent in one message right before something needs them: a gen, a
select, a fork, or a read. An interpreter owns one branch of its backend and gives it back when it is dropped; it has
no thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from bough.backend import Backend, Branch, Delta, OnDelta
from bough.calls import Call, DecidedCall, GenCall, SelectCall, error_of
from bough.choices import ChoicesSamplingMethod
from bough.errors import BoughError, Cancelled, InvalidRequest, Timeout
from bough.expressions import Gen, Piece, RoleBegin, RoleEnd, Select, SeparateReasoning, ThoughtBegin, ThoughtEnd
from bough.lease import Lease
from bough.pieces import Item, Mark
from bough.runtime import protocol
from bough.sampling import Sampling
from bough.seeds import Path, Seeds, seeds_of_run
from bough.strands import Point, Strand, Trunk, all_items, items_after
from bough.streaming import Feed
from bough.waiting import wait

if TYPE_CHECKING:
    from bough.thinking import Thought


class Interpreter:
    """One growing text: what was appended, and the branch that carries it out."""

    __slots__ = (
        "_ancestors",
        "_base",
        "_closed",
        "_has_children",
        "_inherited",
        "_kept",
        "_last_extend",
        "_num_children",
        "_num_gens",
        "_path",
        "_sent",
        "_thought",
        "_undecided",
        "backend",
        "deadline",
        "feed",
        "first",
        "lease",
        "lock",
        "num_forks",
        "role",
        "sampling",
        "seeds",
        "strand",
        "trunk",
    )

    def __init__(
        self, backend: Backend, sampling: Sampling, feed: Feed | None = None, *, seeds: Seeds | None = None
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.feed = feed
        self.lease = Lease(backend, None)
        self.lock = threading.RLock()
        self.trunk: Trunk | None = None
        self.strand = self.first = Strand()
        self._base: Point | None = None  # where it was forked off
        self.role: str | None = None
        self._sent = 0  # [0, sent) of the strand is with the backend   [sent, ...) waits for something to need it
        self._last_extend: Future[protocol.Extended] | None = None
        self._inherited: tuple[Future[Any], ...] = ()  # the `lengths` where the strand begins
        self._ancestors: list[tuple[Branch, Sequence[Future[Any]]]] = []  # left behind by gens with n > 1
        self._undecided: DecidedCall | None = None  # not sent yet, it waits for its scores
        self._thought: Thought | None = None  # to be forgotten when its message has ended
        self._closed: BoughError | None = None
        self.seeds = seeds or seeds_of_run(sampling.params.seed, backend)
        self._path: Path = ()  # the place in the program, with the two counts
        self._num_gens = self._num_children = 0
        self.num_forks = 0
        self._has_children = False  # whether the branch held now was forked
        self._kept: list[Lease] = []  # branches left behind at a checkpoint, of which there are forks
        self.deadline = None if sampling.timeout_s is None else monotonic() + sampling.timeout_s

    # ------------------------------------------------------------------------------------------ append

    def append(self, pieces: Sequence[Piece]) -> list[Call]:
        """Append pieces; return the calls among them. Raises InvalidRequest before anything is appended."""
        self._await_decision()
        self._forget()
        with self.lock:
            self._check_open()
            self._check(pieces)
            calls = [call for piece in pieces if (call := self._append(piece)) is not None]
            if self._thought is not None and self.role is None:
                self._thought.is_due = True
            return calls

    def _check(self, pieces: Sequence[Piece]) -> None:
        """Follow roles and parameters through the pieces, so that a refused expression leaves no trace."""
        role = self.role
        for piece in pieces:
            if isinstance(piece, RoleBegin):
                if role is not None:
                    raise InvalidRequest(
                        f"a message of role {piece.role!r} cannot begin inside the open {role} message"
                    )
                role = piece.role
            elif isinstance(piece, RoleEnd):
                if role is None:
                    raise InvalidRequest(f"{piece.role or 'role'}_end without a message to end")
                if piece.role not in (None, role):
                    raise InvalidRequest(f"{piece.role}_end cannot end the open {role} message")
                role = None
            elif isinstance(piece, Gen) and piece.overrides:
                self.sampling.params_with(piece.overrides)

    def _append(self, piece: Piece) -> Call | None:
        if isinstance(piece, str):
            if piece:
                self.strand.items.append(piece)
            return None
        if isinstance(piece, Gen):
            return self._generate(piece)
        if isinstance(piece, Select):
            return self._select(piece)
        if isinstance(piece, (ThoughtBegin, ThoughtEnd)):
            self._bound_thought(isinstance(piece, ThoughtBegin))
            return None
        if isinstance(piece, SeparateReasoning):  # about variables, which are the state's
            return None
        self.role = piece.role if isinstance(piece, RoleBegin) else None
        self.strand.items.append(Mark(self.role))
        if self._thought is not None and self.role is None:
            self._thought.is_due = True
        return None

    def _generate(self, gen: Gen) -> Call:
        self.flush()
        params = self._params(gen)
        n = gen.n or self.sampling.n
        chunks: list[Delta] | None = None if self.feed is None else []
        branches = [self._branch()] if n == 1 else self.backend.fork(self._branch(), n)
        replies = []
        grammar = None if gen.constraint is None else gen.constraint.wire
        for index, branch in enumerate(branches):
            if index and params.seed is not None:
                params = msgspec.structs.replace(params, seed=(params.seed + 1) % protocol.MAX_ID)
            on_delta = None if chunks is None or index else self._collector(chunks)
            timeout_s = self._time_left(gen.timeout_s)
            replies.append(
                self.backend.generate(
                    branch,
                    params,
                    name=gen.name,
                    on_delta=on_delta,
                    timeout_s=timeout_s,
                    grammar=grammar,
                    heal=gen.heal,
                )
            )
        if n > 1:
            self._continue_on_first(branches, replies)
        return self._called(GenCall(gen, replies, chunks))

    def _params(self, gen: Gen) -> protocol.SamplingParams:
        """Return the gen's parameters; without a seed of its own it has one by its place in the program.

        Otherwise all branches of a fork would draw the same text.
        """
        params = self.sampling.params_with(gen.overrides)
        if gen.constraint is not None:
            params = gen.constraint.params(params)
        seed = self._next_seed()
        return params if "seed" in gen.overrides else msgspec.structs.replace(params, seed=seed)

    def _next_seed(self) -> int:
        """Count a draw of this branch; return the seed of its place in the program."""
        self._num_gens += 1
        return self.seeds.of_draw(self._path, self._num_gens)

    def time_left(self) -> float | None:
        """Return how many seconds the run has left, None if it has no end. Raises Timeout if that has passed."""
        return self._time_left(None)

    def _time_left(self, timeout_s: float | None) -> float | None:
        """Return how long a call may take: its own timeout, within the run's. Raises Timeout if that has passed."""
        if self.deadline is None:
            return timeout_s
        left_s = self.deadline - monotonic()
        if left_s <= 0:
            assert self.sampling.timeout_s is not None, "a deadline comes of a timeout"
            limit_s = self.sampling.timeout_s
            raise Timeout(f"the run's timeout of {limit_s:g} s has passed", timeout_s=limit_s)
        return left_s if timeout_s is None else min(timeout_s, left_s)

    def _collector(self, chunks: list[Delta]) -> OnDelta:
        feed = self.feed
        assert feed is not None, "only a streaming run collects chunks"

        def collect(delta: Delta) -> None:
            chunks.append(delta)
            feed.notify()

        return collect

    def _continue_on_first(self, branches: Sequence[Branch], replies: Sequence[Future[Any]]) -> None:
        """Own the first of the new branches; the old one and the others are released when all are done.

        Not before, because a cancel has to name the old one: earlier operations may still run on it.
        """
        old = self.lease.take()
        assert old is not None, "it was forked just now"
        self.lease.branch = branches[0]
        self._path, self._num_children = (*self._path, self._num_children), 0
        self._ancestors = [(branch, left) for branch, left in self._ancestors if not _all_done(left)]
        self._ancestors.append((old, replies))
        backend, others, ended = self.backend, (old, *branches[1:]), count(1)

        def release(_: Future[Any]) -> None:
            if next(ended) == len(replies):
                backend.release(others)

        for reply in replies:
            reply.add_done_callback(release)

    def _select(self, select: Select) -> Call:
        self.flush()
        timeout_s = self._time_left(select.timeout_s)
        if not isinstance(select.method, str):
            return self._decide(select, select.method, timeout_s)
        reply = self.backend.select(
            self._branch(),
            select.choices,
            select.method,
            name=select.name,
            timeout_s=timeout_s,
            temperature=select.temperature,
            seed=self._next_seed() if select.temperature else None,
        )
        return self._called(SelectCall(select.name, select.choices, reply))

    def _decide(self, select: Select, method: ChoicesSamplingMethod, timeout_s: float | None) -> Call:
        """Score the choices for a method of the program; its decision is sent as text when something follows it."""
        scoring: protocol.ChoiceMethod = (
            "unconditional_likelihood_normalized"
            if method.requires_unconditional_logprobs
            else "token_length_normalized"
        )
        reply = self.backend.score(self._branch(), select.choices, scoring, name=select.name, timeout_s=timeout_s)
        call = DecidedCall(select.name, select.choices, reply, method)
        self.strand.items.append(call)
        self._undecided = call
        self._notify_when_done(reply)
        return call

    def _called(self, call: Call) -> Call:
        self.strand.items.append(call)
        self._sent = len(self.strand.items)
        self._notify_when_done(call.futures()[0])
        return call

    def _notify_when_done(self, reply: Future[Any]) -> None:
        feed = self.feed
        if feed is not None:
            reply.add_done_callback(lambda _: feed.notify())

    def _branch(self) -> Branch:
        """Return the branch that carries this text out, opened if there was nothing yet."""
        if self.lease.branch is None:
            self.lease.branch = self.backend.open()
        return self.lease.branch

    def flush(self) -> None:
        """Send the text and roles that were collected, neighbouring text as one."""
        self._await_decision()
        self._forget()
        with self.lock:
            items = self.strand.items
            if self._sent == len(items) or self._closed is not None:
                return
            parts, marks = _parts_of(items[self._sent :])
            if len(parts) > protocol.MAX_PARTS:
                raise InvalidRequest(f"at most {protocol.MAX_PARTS} roles and texts between two gens, got {len(parts)}")
            reply = self.backend.extend(self._branch(), parts)
            for index, mark in enumerate(marks):
                mark.sent(reply, index)
            self._last_extend = reply
            self._sent = len(items)
            self._undecided = None
        self._notify_when_done(reply)

    def tell_tools(self, definitions: str) -> None:
        """Have the chat template tell of tools, from the first message on."""
        with self.lock:
            self._check_open()
            self.flush()
            self._last_extend = self.backend.extend(self._branch(), [protocol.Tools(definitions)])

    def _await_decision(self) -> None:
        """Wait for a choice that the program takes itself, before the lock is taken: a cancel must get through."""
        undecided = self._undecided
        if undecided is not None:
            wait(undecided.reply)

    def _bound_thought(self, is_begin: bool) -> None:
        """Begin a thought that is to be forgotten, or end it."""
        if not is_begin:
            assert self._thought is not None, "made in one expression"
            self._thought.end(self)
            return
        self.flush()
        if self._thought is None:
            from bough.thinking import Thought

            self._thought = Thought(self)
        else:
            self._thought.begin(self)

    def _forget(self) -> None:
        """Forget the thoughts of a message that has ended; what was written after them has to be known for that."""
        thought = self._thought
        if thought is None or not thought.is_due or self._closed is not None:
            return
        for future in thought.futures(self.strand.items):
            wait(future)
        with self.lock:
            if self._thought is thought:  # another thread may have been here
                self._thought = None
                thought.forget(self)

    def check_no_thought(self, what: str) -> None:
        """Raise InvalidRequest inside a message whose thoughts are still to be forgotten."""
        if self._thought is not None:
            raise InvalidRequest(f"{what} inside a message would keep its thought, which think(keep=False) forgets")

    # ------------------------------------------------------------------------------------------ read

    def items(self) -> Iterator[Item]:
        """Yield the pieces from the root of the tree on."""
        return all_items(self.trunk, self.strand)

    def lengths(self) -> tuple[Future[Any], ...]:
        """Return what was answered last: the greatest `length` in it is the text's, as far as it was sent."""
        found = self._inherited if self._last_extend is None else (*self._inherited, self._last_extend)
        own = (item for item in reversed(self.strand.items) if isinstance(item, (GenCall, SelectCall)))
        last = next((call for call in own if not (isinstance(call, GenCall) and call.is_moved)), None)
        return found if last is None else (*found, last.futures()[0])

    def own_items(self) -> list[Item]:
        """Return the pieces that were appended since this was forked off."""
        if self._base is None:
            return list(self.items())
        own = items_after(self.trunk, self.strand, self._base)
        assert own is not None, "nothing goes back to before its own fork"
        return own

    def flush_if_free(self) -> None:
        """Flush, unless that had to wait; what is wrong with the text is raised where it is read."""
        if self._undecided is None and self._thought is None:
            with contextlib.suppress(BoughError):
                self.flush()

    def wait(self) -> None:
        """Wait until the gens and selects of this branch are done, well or not."""
        for item in self.own_items():
            if isinstance(item, (GenCall, SelectCall)):
                for future in item.futures():
                    wait(future)

    def error(self) -> BoughError | None:
        """Wait until everything appended so far is done; return the first failure."""
        try:
            self.flush()
        except BoughError as error:
            return error
        first: BoughError | None = None
        for item in self.items():
            if isinstance(item, (GenCall, SelectCall)):
                for future in item.futures():
                    failure = error_of(future)
                    first = first or failure
        if self._last_extend is not None:
            failure = error_of(self._last_extend)
            first = first or failure
        return first

    # ------------------------------------------------------------------------------------------ branch

    def fork(self, size: int) -> list[Interpreter]:
        """Return interpreters that share everything appended so far."""
        with self.lock:
            self._check_open()
            self.flush()
            self.check_no_thought("a fork")
            trunk = Trunk(self.trunk, self.strand, len(self.strand.items))
            children = [Interpreter(self.backend, self.sampling, seeds=self.seeds) for _ in range(size)]
            branches = self.backend.fork(self._branch(), size)
            inherited = self.lengths()
            for number, (child, branch) in enumerate(zip(children, branches, strict=True), self._num_children):
                child.lease.branch = branch
                child.trunk = trunk
                child.role = self.role
                child._path = (*self._path, number)
                child._base = (trunk.strand, trunk.length)
                child._inherited = inherited
                child.deadline = self.deadline
            self._num_children += size
            self.num_forks += 1
            self._has_children = True
            self.strand.forks.append((trunk.length, [child.strand for child in children]))
            return children

    def cancel(self, *, discard: bool = False) -> None:
        """End what runs on this branch and on its forks, and take no more. discard: also free the KV only they have."""
        with self.lock:
            if self._closed is not None:
                return
            self._closed = Cancelled("this branch was cancelled")
            running = [branch for branch, replies in self._ancestors if not _all_done(replies)]
            oldest = running[0] if running else self.lease.branch
            kept = [lease.branch for lease in self._kept[:1]]
            for branch in dict.fromkeys((*kept, oldest)):  # all the others descend from these
                if branch is not None:
                    self.backend.cancel(branch, discard=discard)

    def give_up(self) -> Branch | None:
        """Cancel, free the KV that only this branch has, and hand the branch to whoever releases it."""
        self.cancel(discard=True)
        with self.lock:
            return self.lease.take()

    def close(self, reason: BoughError) -> Branch | None:
        """Take no more, and hand the branch to whoever releases it; what was appended can still be read."""
        with self.lock:
            pending = self.strand.items[self._sent :]
            if pending and any(isinstance(item, Mark) for item in pending):
                try:
                    self.flush()  # only the backend knows how it renders them
                except BoughError as error:  # told to who reads the text, not to who closes
                    reason = error
            if self._closed is None:
                self._closed = reason
            return self.lease.take()

    @property
    def closed(self) -> bool:
        """Whether nothing can be appended any more: cancelled or joined."""
        return self._closed is not None

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.again()


def _all_done(futures: Sequence[Future[Any]]) -> bool:
    return all(future.done() for future in futures)


def _parts_of(items: Sequence[Item]) -> tuple[list[protocol.Part], list[Mark]]:
    """Return what to send for collected pieces, and the marks among them in the order of their rendered text."""
    parts: list[protocol.Part] = []
    marks: list[Mark] = []
    text: list[str] = []
    for item in items:
        if not isinstance(item, Mark):  # a gen or select is sent when it is appended, and as its text when once more
            if isinstance(item, str) or item.futures()[0].exception() is None:  # else the branch is poisoned already
                text.append(item if isinstance(item, str) else item.text())
            continue
        if text:
            parts.append(protocol.Text("".join(text)))
            text = []
        parts.append(protocol.RoleEnd() if item.role is None else protocol.RoleBegin(item.role))
        marks.append(item)
    if text:
        parts.append(protocol.Text("".join(text)))
    return parts, marks
