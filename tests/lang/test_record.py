"""The records of branches against a model of a runtime: what is made again is what was."""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from bough.errors import BoughError, ContextOverflow
from bough.ledger import Ledger
from bough.record import Record
from bough.runtime import protocol
from bough.runtime.protocol import (
    Extend,
    Extended,
    Fork,
    Generate,
    Generated,
    Open,
    Release,
    Rollback,
    SamplingParams,
    Score,
    Select,
    Selected,
    Text,
    Tokens,
    Usage,
)

METHOD: protocol.ChoiceMethod = "token_length_normalized"


class Model:
    """A runtime whose tokens are characters and whose texts follow from prompt and seed; refuses what it may refuse."""

    def __init__(self) -> None:
        self.branches: dict[int, str] = {}
        self.parents: dict[int, int | None] = {}
        self.healed: dict[int, list[tuple[int, str]]] = {}  # where tokens gave way to others, and which
        self.sent: list[Any] = []

    def send(self, request: Any, buffers: Sequence[protocol.Buffer] = ()) -> tuple[Any, list[protocol.Buffer]]:
        self.sent.append(request)
        branch = getattr(request, "branch", 0)
        assert isinstance(request, (Open, Release)) or branch in self.branches, f"{request} on what is not open"
        match request:
            case Open():
                assert branch not in self.branches
                self.branches[branch], self.parents[branch], self.healed[branch] = "", None, []
            case Fork():
                for child in request.children:
                    assert child not in self.branches
                    self.branches[child], self.parents[child] = self.branches[branch], branch
                    self.healed[child] = self.healed[branch][:]
            case Release():
                for branch in request.branches:
                    self._forget(branch)
            case Extend():
                for part in request.parts:
                    if isinstance(part, Tokens):
                        self._take_back(branch, part.replaces)
                        self.branches[branch] += "".join(map(chr, protocol.decode_tokens(buffers, part.buffer)))
                    else:
                        assert isinstance(part, Text)
                        self.branches[branch] += part.text
                return Extended(request.op, len(self.branches[branch])), []
            case Generate():
                assert request.params.seed is not None
                key = f"{self.branches[branch]} {request.params.seed}"
                text = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
                healed = self._take_back(branch, int(text, 16) % 2)  # drawn again, as another token
                self.branches[branch] += healed.swapcase() + text
                length = len(self.branches[branch])
                # the end of the text was cut out of a token
                ids = protocol.encode_tokens([ord(c) for c in healed.swapcase() + text[:6]])
                reply = Generated(
                    request.op, text, 0, "stop", length - 2, Usage(), leftover=text[6:], replaced=len(healed)
                )
                return reply, [ids]
            case Select() | Score():
                index = len(self.branches[branch]) % len(request.choices)
                if isinstance(request, Select):
                    self.branches[branch] += request.choices[index]
                return Selected(request.op, index, [], [], [], len(self.branches[branch]), Usage()), []
            case Rollback():
                self._rollback(branch, request.length)
                return Extended(request.op, request.length), []
        return None, []

    def _take_back(self, branch: int, count: int) -> str:
        text = self.branches[branch]
        count = min(count, len(text))
        if count:
            self.branches[branch] = text[:-count]
            self.healed[branch].append((len(text) - count, text[-count:]))
        return text[len(text) - count :]

    def _rollback(self, branch: int, length: int) -> None:
        while self.healed[branch]:
            kept, taken = self.healed[branch][-1]
            if length > kept + len(taken):
                break
            self.branches[branch] = self.branches[branch][:kept] + taken
            self.healed[branch].pop()
        self.branches[branch] = self.branches[branch][:length]

    def _forget(self, branch: int) -> None:
        del self.branches[branch]
        above = self.parents.pop(branch)
        for child, parent in self.parents.items():
            if parent == branch:
                self.parents[child] = above


class Driver:
    """Sends requests to a model and to a ledger; replies are taken in when told to, the model may be lost at any time.

    Beside it runs a model that is never lost.
    """

    def __init__(self) -> None:
        self.ops = count(1)
        self.ids = count(1)
        self.ledger: Ledger[int] = Ledger(7)
        self.model = Model()
        self.undisturbed = Model()
        self.replies: dict[int, tuple[Any, list[protocol.Buffer]]] = {}
        self.expected: dict[int, Any] = {}
        self.got: dict[int, Any] = {}
        self.records: dict[int, Record[int]] = {}

    def send(self, request: Any, buffers: Sequence[protocol.Buffer] = ()) -> Any:
        request = self.ledger.pinned(request)
        op = request.op
        self.expected[op] = self.undisturbed.send(request, buffers)[0]
        self.replies[op] = self.model.send(request, buffers)
        record = self.ledger.take(request, buffers, op)
        if record is not None:
            self.records[op] = record
        return request

    def open(self) -> int:
        return int(self.send(Open(next(self.ops), next(self.ids))).branch)

    def fork(self, branch: int, size: int) -> list[int]:
        children = [next(self.ids) for _ in range(size)]
        self.send(Fork(next(self.ops), branch, children))
        return children

    def text(self, branch: int, text: str) -> None:
        self.send(Extend(next(self.ops), branch, [Text(text)]))

    def generate(self, branch: int) -> None:
        self.send(Generate(next(self.ops), branch, SamplingParams()))

    def end(self, op: int) -> None:
        reply, buffers = self.replies[op]
        self.got[op] = reply
        self.ledger.end(self.records[op], reply, buffers)

    def end_all(self) -> None:
        for record in list(self.ledger.unfinished):
            assert record.waiting is not None
            self.end(record.waiting)

    def ready(self) -> list[int]:
        """The operations that may end now: nothing that they depend on is unfinished."""
        ready = []
        for record in self.ledger.unfinished:
            above = record.parent
            while above is not None and above.waiting is None:
                above = above.parent
            if above is None and record.waiting is not None:
                ready.append(record.waiting)
        return ready

    def lose(self) -> list[Any]:
        """Begin with a new model; return what was sent to it."""
        self.model = Model()
        messages, told = self.ledger.rebuilt(self.ops)
        assert told == []
        for request, buffers, waiting in messages:
            reply = self.model.send(request, buffers)
            if waiting is not None:
                self.replies[waiting] = reply
        return self.model.sent

    def check(self) -> None:
        assert self.model.branches == self.undisturbed.branches
        for op, reply in self.got.items():
            expected = self.expected[op]
            for name in ("text", "index", "length", "leftover"):
                assert getattr(reply, name, None) == getattr(expected, name, None)


def names(sent: Sequence[Any]) -> list[str]:
    return [type(request).__name__ for request in sent]


def test_a_trunk_is_sent_once_and_forked_where_the_branches_part() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "trunk ")
    driver.generate(root)
    children = driver.fork(root, 3)
    for child in children:
        driver.text(child, f"child {child} ")
        driver.generate(child)
    driver.text(root, "further")
    driver.end_all()
    sent = driver.lose()
    assert names(sent) == ["Open", "Extend", "Extend", "Fork"] + ["Extend"] * 7
    assert isinstance(sent[2].parts[0], Tokens)
    assert sent[3].branch == root
    assert sorted(sent[3].children) == children
    driver.check()


def test_what_is_unfinished_is_sent_again_with_the_seed_that_it_had() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "trunk ")
    children = driver.fork(root, 2)
    for child in children:
        driver.generate(child)
    before = [request for request in driver.model.sent if isinstance(request, Generate)]
    assert before[0].params.seed != before[1].params.seed
    after = [request for request in driver.lose() if isinstance(request, Generate)]
    assert [(r.branch, r.params) for r in after] == [(r.branch, r.params) for r in before]
    driver.end_all()
    driver.check()


def test_a_released_branch_is_not_made_again_and_frees_what_only_it_held() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "trunk ")
    left, right = driver.fork(root, 2)
    driver.text(left, "left")
    driver.text(right, "right")
    driver.end_all()
    driver.send(Release(next(driver.ops), [left]))
    assert "left" not in str(driver.lose())
    driver.send(Release(next(driver.ops), [root, right]))
    assert len(driver.ledger) == 0
    assert driver.lose() == []


def test_memory_is_that_of_the_live_branches() -> None:
    ledger: Ledger[int] = Ledger(1)
    ops = count(1)
    ledger.take(Open(next(ops), 1), (), None)
    gc.collect()
    before = len([o for o in gc.get_objects() if type(o) is Record])
    for child in range(2, 200):
        ledger.take(Fork(next(ops), 1, [child]), (), None)
        record = ledger.take(Extend(next(ops), child, [Text("x")]), (), 1)
        assert record is not None
        ledger.take(Release(next(ops), [child]), (), None)
        ledger.end(record, Extended(1, 1), ())
        scored = ledger.take(Score(next(ops), 1, ["a"]), (), 1)
        assert scored is not None
        ledger.end(scored, Selected(1, 0, [], [], [], 1, Usage()), ())
        del record, scored
        assert len(ledger) == 1
    gc.collect()
    assert len([o for o in gc.get_objects() if type(o) is Record]) <= before + 1


def test_a_released_branch_whose_work_is_unfinished_is_made_again_and_released_again() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "trunk ")
    (child,) = driver.fork(root, 1)
    driver.generate(child)
    driver.send(Release(next(driver.ops), [root, child]))
    sent = driver.lose()
    assert names(sent)[-2:] == ["Generate", "Release"]
    assert driver.model.branches == {}
    driver.end_all()
    assert len(driver.ledger) == 0
    driver.check()


def test_siblings_are_siblings_again_though_their_parent_is_gone() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "trunk ")
    (middle,) = driver.fork(root, 1)
    driver.text(middle, "middle ")
    children = driver.fork(middle, 2)
    driver.end_all()
    driver.send(Release(next(driver.ops), [middle]))
    driver.lose()
    assert driver.model.parents == {root: None, **dict.fromkeys(children, root)}
    driver.check()


def test_going_back_keeps_only_what_is_needed() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "0123456789")
    driver.end_all()
    for _ in range(20):
        driver.generate(root)
        driver.text(root, "tail")
        driver.send(Rollback(next(driver.ops), root, 8))
        driver.end_all()
    assert names(driver.lose()) == ["Open", "Extend", "Rollback"]
    driver.check()


def test_what_failed_stays_failed_until_it_is_rolled_back() -> None:
    driver = Driver()
    root = driver.open()
    driver.text(root, "good ")
    driver.end_all()
    driver.text(root, "too much")
    driver.generate(root)
    bad, dependant = list(driver.ledger.unfinished)
    error = ContextOverflow("too long")
    driver.ledger.fail(bad, error)
    driver.model = Model()
    messages, told = driver.ledger.rebuilt(driver.ops)
    assert names([request for request, _, _ in messages]) == ["Open", "Extend"]
    assert [waiting for waiting, _ in told] == [max(driver.records)]
    assert isinstance(told[0][1], ContextOverflow)
    assert told[0][1].__cause__ is error
    assert dependant not in driver.ledger.unfinished
    again = Extend(next(driver.ops), root, [Text("more")])
    assert _message(driver.ledger.poison_of(again)) == "too long"
    driver.ledger.take(Fork(next(driver.ops), root, [50]), (), None)
    assert _message(driver.ledger.poison_of(Generate(1, 50, SamplingParams()))) == "too long"
    back = Rollback(next(driver.ops), root, 3)
    assert driver.ledger.poison_of(back) is None
    driver.ledger.take(back, (), 1)
    assert driver.ledger.poison_of(again) is None


def _message(error: BoughError | None) -> str | None:
    return None if error is None else error.message


def test_seeds_are_those_that_the_runtime_itself_would_draw() -> None:
    """As `Composer._derive_seed` has it; so `restart=True` changes no text."""
    ledger: Ledger[int] = Ledger(7)
    ledger.take(Open(1, 1), (), None)
    ledger.take(Fork(2, 1, [2, 3]), (), None)
    pinned = ledger.pinned(Generate(3, 3, SamplingParams()))
    expected = hashlib.blake2b(b"7,1,1,1", digest_size=8).digest()
    assert pinned.params.seed == int.from_bytes(expected, "little") & protocol.MAX_ID
    own = Generate(4, 3, SamplingParams(seed=5))
    assert ledger.pinned(own) is own


@pytest.mark.parametrize("seed", range(120))
def test_any_program_lost_at_any_time_ends_as_if_nothing_had_happened(seed: int) -> None:
    rng = random.Random(seed)
    with_rollback = bool(seed % 2)
    driver = Driver()
    live = [driver.open()]
    for _ in range(rng.randint(5, 60)):
        branch = rng.choice(live) if live else driver.open()
        if branch not in live:
            live.append(branch)
        kind = rng.choice(["text", "text", "generate", "select", "score", "fork", "fork", "release", "open", "end",
                           "end", "end", "lose", *["rollback"] * 2 * with_rollback])  # fmt: skip
        op = next(driver.ops)
        if kind == "text":
            driver.send(Extend(op, branch, [Text(rng.choice("abc") * 3)], commit=rng.random() < 0.5))
        elif kind == "generate":
            driver.generate(branch)
        elif kind in ("select", "score"):
            driver.send((Select if kind == "select" else Score)(op, branch, ["yes", "no", "so"], METHOD))
        elif kind == "fork":
            live += driver.fork(branch, rng.randint(1, 3))
        elif kind == "release":
            gone = rng.sample(live, rng.randint(1, len(live)))
            driver.send(Release(op, gone))
            live = [branch for branch in live if branch not in gone]
        elif kind == "open":
            live.append(driver.open())
        elif kind == "rollback":
            driver.send(Rollback(op, branch, rng.randint(0, len(driver.undisturbed.branches[branch]))))
        elif kind == "end" and driver.ready():
            driver.end(rng.choice(driver.ready()))
        elif kind == "lose":
            driver.lose()
            driver.check()
            assert driver.model.parents == driver.undisturbed.parents
    driver.lose()
    while driver.ready():
        driver.end(rng.choice(driver.ready()))
    driver.check()
    assert not driver.ledger.unfinished
    driver.lose()
    driver.check()
    assert len(driver.ledger) == len(live)
