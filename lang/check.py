"""`check`: look at what was generated, and draw it again where it is not good enough.

A retry cuts the branch back to before the gen, of which nothing is computed again, and draws with the next seed. With
feedback the failed attempt stays in a branch of its own, which says what was wrong with it and tries again there; when
an attempt passes, it takes the place of the first, so that the state never holds what failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bough.calls import GenCall
from bough.errors import BoughError, CheckFailed, InvalidRequest
from bough.expressions import Expression, Gen, RoleBegin, RoleEnd
from bough.pieces import Item, Mark
from bough.runtime.protocol import MAX_ID
from bough.strands import Cut, Onward, Strand, Trunk, all_items, items_after
from bough.variables import variables_of

if TYPE_CHECKING:
    from bough.state import State

Predicate: TypeAlias = Callable[[Any], bool]
"""Takes the gen's value (its text, or the list of texts of a gen with n > 1); says whether it is good enough."""
Feedback: TypeAlias = Callable[[Any], "str | Expression"]
"""Takes the value that failed; returns what to tell the model before it tries again."""

_SHOWN: Final = 80


class Trial:
    """The last gen of a state, and its attempts so far."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._trunk, self._strand, self._index = _last_gen(state)
        call = self._strand.items[self._index]
        assert isinstance(call, GenCall), "that is what was looked for"
        self._first = self._last = call
        self._role = _role_at(state, self._trunk, self._strand, self._index)
        self._after = _text_after(state, self._strand, self._index)
        self._talk: State | None = None  # where attempts are told what was wrong with the one before
        self.num_attempts = 1

    def value(self) -> Any:
        """Wait for the last attempt's value. Raises what went wrong with it."""
        return self._last.value()

    def retry(self, value: Any, feedback: Feedback | None) -> None:
        """Issue the next attempt; does not wait for it."""
        self.num_attempts += 1
        gen = _with_next_seed(self._first.gen, self.num_attempts - 1)
        if feedback is None:
            self._back()
            self._last = _appended(self._state, gen)
            for item in self._after:
                self._state += item
            return
        if self._talk is None:
            (self._talk,) = self._state.fork(1)
        talk = self._talk
        talk += feedback(value)
        if talk._interpreter.role is None and self._role is not None:
            talk += RoleBegin(self._role)
        if talk._interpreter.role != self._role:
            raise InvalidRequest("feedback must close the messages that it opens", field="feedback")
        self._last = _appended(talk, gen)
        for item in self._after:
            talk += item

    def accept(self) -> None:
        """Take the last attempt as the gen's result."""
        if self._last is not self._first and self._talk is not None:
            from bough.checkpoint import append_again

            self._back()
            interpreter = self._state._interpreter
            with interpreter.lock:
                append_again(interpreter, [self._last])
            for name, value in variables_of(self._last):
                self._state._assign(name, value)
            for item in self._after:
                self._state += item
        self.end()

    def end(self) -> None:
        """Give up what only the attempts needed."""
        if self._talk is not None:
            branch = self._talk._interpreter.close(InvalidRequest("this attempt is over"))
            if branch is not None:
                self._talk._interpreter.backend.release((branch,))

    def failure(self, value: Any) -> CheckFailed:
        """Return the error of a gen of which no attempt passed."""
        shown = value if len(str(value)) <= _SHOWN else f"{str(value)[:_SHOWN]}…"
        name = self._first.name or "(unnamed)"
        return CheckFailed(
            f"gen {name}: none of {self.num_attempts} attempts passed the check, the last was {shown!r}",
            name=self._first.name,
            attempts=self.num_attempts,
            value=value,
        )

    def _back(self) -> None:
        """Cut the state back to right before the gen."""
        length = self._first.start()
        interpreter, strand = self._state._interpreter, Strand()
        with interpreter.lock:
            interpreter._check_open()
            cut = Cut(interpreter.lengths(), length)
            interpreter._last_extend = interpreter.backend.rollback(interpreter._branch(), length)
            self._strand.forks.append((self._index, Onward(strand, "rewound to here, then", cut)))
            interpreter.trunk = Trunk(self._trunk, self._strand, self._index)
            interpreter.strand = strand
            interpreter.role = self._role
            interpreter._sent = 0


def check(state: State, predicate: Predicate, retries: int, feedback: Feedback | None) -> Any:
    """Check the last gen of a state; return the value that passed. Raises CheckFailed."""
    trial = Trial(state)
    passed, failed = _run([trial], predicate, retries, feedback, raises=True)
    if failed:
        raise failed[0][1]
    return passed[0].value()


def check_all(states: Sequence[State], predicate: Predicate, retries: int, feedback: Feedback | None) -> list[State]:
    """Check the last gen of each state; return those that passed. The others are closed, and raise what went wrong."""
    trials = [Trial(state) for state in states]
    passed, failed = _run(trials, predicate, retries, feedback, raises=False)
    for trial, error in failed:
        interpreter = trial._state._interpreter
        branch = interpreter.close(error)
        if branch is not None:
            interpreter.backend.release((branch,))
    return [trial._state for trial in trials if trial in passed]


def _run(
    trials: Sequence[Trial], predicate: Predicate, retries: int, feedback: Feedback | None, *, raises: bool
) -> tuple[list[Trial], list[tuple[Trial, BoughError]]]:
    """Draw until each passed or has no try left. Every retry is issued before the next result is waited for."""
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise InvalidRequest(f"retries must be a whole number of at least 0, got {retries!r}", field="retries")
    passed: list[Trial] = []
    failed: list[tuple[Trial, BoughError]] = []
    running = list(trials)
    while running:
        again: list[Trial] = []
        for trial in running:
            try:
                value = trial.value()
            except BoughError as error:
                trial.end()
                if raises:
                    raise
                failed.append((trial, error))
                continue
            if predicate(value):
                trial.accept()
                passed.append(trial)
            elif trial.num_attempts <= retries:
                trial.retry(value, feedback)
                again.append(trial)
            else:
                trial.end()
                failed.append((trial, trial.failure(value)))
        running = again
    return passed, failed


def _last_gen(state: State) -> tuple[Trunk | None, Strand, int]:
    """Return where the last gen of a state's own text is. Raises InvalidRequest if there is none."""
    interpreter = state._interpreter
    interpreter._check_open()
    interpreter.flush()
    interpreter.check_no_thought("a check")
    base = interpreter._base
    trunk, strand, length = interpreter.trunk, interpreter.strand, len(interpreter.strand.items)
    while True:
        first = base[1] if base is not None and base[0] is strand else 0
        for index in range(length - 1, first - 1, -1):
            item = strand.items[index]
            if isinstance(item, GenCall):
                if item.is_rewritten:
                    raise InvalidRequest("a gen cannot be checked once think(keep=False) has rewritten its message")
                return trunk, strand, index
            if not isinstance(item, (str, Mark)):
                raise InvalidRequest("check looks at the last gen; after it comes a select, whose choice stands")
        if trunk is None or (base is not None and base[0] is strand):
            raise InvalidRequest("check needs a gen in this state, after its fork; there is none")
        strand, length, trunk = trunk.strand, trunk.length, trunk.parent


def _role_at(state: State, trunk: Trunk | None, strand: Strand, index: int) -> str | None:
    role: str | None = None
    for item in all_items(Trunk(trunk, strand, index), Strand()):
        if isinstance(item, Mark):
            role = item.role
    return role


def _text_after(state: State, strand: Strand, index: int) -> list[Expression | str]:
    interpreter = state._interpreter
    after: list[Item] | None = items_after(interpreter.trunk, interpreter.strand, (strand, index + 1))
    assert after is not None, "the gen was found on the way there"
    texts: list[Expression | str] = []
    for item in after:
        if isinstance(item, Mark):
            texts.append(RoleEnd() if item.role is None else RoleBegin(item.role))
        else:
            assert isinstance(item, str), "nothing was generated after the last gen"
            texts.append(item)
    return texts


def _with_next_seed(gen: Gen, number: int) -> Gen:
    """A gen without a seed of its own gets another for every draw anyway."""
    seed = gen.overrides.get("seed")
    return gen if seed is None else replace(gen, overrides={**gen.overrides, "seed": (seed + number) % MAX_ID})


def _appended(state: State, gen: Gen) -> GenCall:
    state += gen
    call = state._interpreter.strand.items[-1]
    assert isinstance(call, GenCall), "it was appended just now"
    return call
