"""The engine beside what it must do: every request goes to both, every reply and every page is compared.

    Model      the language model: a pure function from token ids to the next
    KVRunner   a `FakeRunner` whose slots also hold a stamp of the whole prefix they stand for
    Oracle     a plain interpreter of the protocol: a branch is a list of ids; no pages, no scheduler, no steps
    World      an engine on a small pool, several sessions, the oracle, and `check`

The oracle knows what each reply must hold. Only when work ends, and whether it runs out of pages, is the engine's to
say; the oracle then checks that it could be so.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fakes import FREED, FakeClock, FakeRunner, allowed_ids, logprob

from bough.runtime.batch import Batch, RowResult, SampleRequest
from bough.runtime.cache.prefix_cache import Lease, PrefixCache
from bough.runtime.cache.radix_tree import Node
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.matching import GrammarConstraint
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.inflight import InFlight
from bough.runtime.lifecycle import PageState, Progress, Status
from bough.runtime.models.folder import resolve_model
from bough.runtime.operation import Operation
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    Buffer,
    Cancel,
    Cancelled,
    Credit,
    Delta,
    Extend,
    Extended,
    Failed,
    Flush,
    Fork,
    Generate,
    Generated,
    Grammar,
    Ok,
    Open,
    Part,
    Release,
    Reply,
    Request,
    RoleBegin,
    RoleEnd,
    Rollback,
    SamplingParams,
    Score,
    Select,
    Selected,
    Stat,
    Stats,
    Text,
    Tokens,
    decode_tokens,
    delta_tokens,
)
from bough.runtime.protocol.scoring import best, distribution, score_choices
from bough.runtime.scheduler import Scheduler
from bough.runtime.sequence import Sequence as Running
from bough.runtime.session import Session
from bough.runtime.speculation import Speculator
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tail import TextTail
from bough.runtime.text.tokenizer import load_tokenizer
from bough.runtime.work import Generation

TOKENIZER = load_tokenizer(resolve_model("pocket"))
PROMPTER = Prompter(TOKENIZER, load_chat_template(resolve_model("pocket")), "pocket")
EOS = TOKENIZER.eos_ids[0]
# What the model says: whole characters only, some tokens of several, and the end of the sequence.
PALETTE = (*(TOKENIZER.encode(text)[0] for text in ("a", "b", " a", " the", "ab")), EOS)
TEXTS = {token: "" if token == EOS else TOKENIZER.decode([token]) for token in PALETTE}
VOCABULARY = Vocabulary(TOKENIZER, TOKENIZER.vocab_size)
GRAMMARS = GrammarCompiler(VOCABULARY)
TENANTS = ("red", "blue", "red")  # the namespaces of the sessions 0, 1 and 2, unless a test wants others


def stamp(before: int, token: int) -> int:
    """The stamp of a prefix, from that of all but its last token; 0 is that of nothing."""
    return hash((before, token)) | 1


def stamps(ids: Sequence[int], start: int = 0) -> list[int]:
    """The stamps of all prefixes of `ids`, after a prefix of the stamp `start`."""
    found: list[int] = []
    for token in ids:
        start = stamp(start, token)
        found.append(start)
    return found


def draw(ids: Sequence[int], forbidden: Sequence[int] = (), allowed: Sequence[int] | None = None) -> int:
    """The model: the next token, a pure function of all tokens before it, and of what a grammar allows."""
    first = hash(tuple(ids)) % len(PALETTE)
    if allowed is not None:
        spoken = [t for t in (*PALETTE[first:], *PALETTE[:first]) if t in allowed]
        return spoken[0] if spoken else allowed[first % len(allowed)]
    return next(t for t in (*PALETTE[first:], *PALETTE[:first]) if t not in forbidden)


def text_of(drawn: Sequence[int]) -> str:
    """What drawn tokens add to the text."""
    return "".join(TEXTS[token] if token in TEXTS else TOKENIZER.decode([token]) for token in drawn)


class KVRunner(FakeRunner):
    """Adds to each slot a stamp of the prefix that it was computed after, and draws from the palette."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size, vocab_size=TOKENIZER.vocab_size)
        self.num_copies = 0
        self.stamps = np.zeros((num_pages, page_size), dtype=np.int64)

    def execute(self, batch: Batch) -> list[RowResult]:
        assert batch.rows, "an empty step"
        written = [slot for row in batch.rows for slot in self._written(row)]
        assert len(set(written)) == len(written), "two rows write one slot"
        self.num_copies += len(batch.copies)
        for copy in batch.copies:
            self.stamps[copy.target, : copy.num_slots] = self.stamps[copy.source, : copy.num_slots]
            self.stamps[copy.target, copy.num_slots :] = 0
        flat = self.stamps.reshape(-1)
        for row in batch.rows:
            for path, token in zip(self.paths(row), row.token_ids.tolist(), strict=True):
                before = int(flat[path[-2]]) if len(path) > 1 else 0
                assert before or len(path) == 1, "a token goes on after a slot that nobody wrote"
                flat[path[-1]] = stamp(before, token)
        results = super().execute(batch)
        self.batches.clear()
        return results

    def draw(self, ids: list[int], request: SampleRequest) -> int:
        allowed = None if request.constraint is None else allowed_ids(request, self.vocab_size)
        return draw(ids, request.forbidden, allowed)

    def erase(self, pages: Sequence[int]) -> None:
        """Make what was freed unreadable."""
        self.kv[pages] = FREED
        self.stamps[pages] = 0


# --------------------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Spoken:
    """A generation to its end: all drawn ids, how many the branch keeps, text that goes back to its tail."""

    drawn: tuple[int, ...]
    kept: int
    leftover: str
    text: str
    reason: str
    matched: str | int | None = None


def speak(ids: Sequence[int], params: SamplingParams, context_len: int, grammar: Grammar | None = None) -> Spoken:
    """What a generation after `ids` must give."""
    drawn: list[int] = []
    held = None if grammar is None else _held(grammar, params, context_len - len(ids))
    coming = [] if held is None else held.begin()
    while True:
        for token in coming:
            spoken = _spoken(ids, drawn, token, params, context_len, has_grammar=held is not None)
            if spoken is not None:
                return spoken
        if held is not None and held.is_ended:
            return Spoken(tuple(drawn), len(drawn), "", text_of(drawn), "stop")
        forbidden = (*TOKENIZER.eos_ids, *params.stop_token_ids) if len(drawn) < params.min_tokens else ()
        if held is None:
            coming = [draw([*ids, *drawn], forbidden)]
        else:
            coming = held.advance(draw([*ids, *drawn], (), _allowed(held, forbidden)))


def _held(grammar: Grammar, params: SamplingParams, room: int) -> GrammarConstraint:
    matcher = GRAMMARS.find(GrammarKey(grammar.kind, grammar.source, ""))
    assert matcher is not None
    budget = min(params.max_tokens, room)
    return GrammarConstraint(grammar, matcher, VOCABULARY, budget, ignore_eos=params.ignore_eos)


def _allowed(held: GrammarConstraint, forbidden: tuple[int, ...]) -> list[int]:
    words = np.zeros(VOCABULARY.num_words, dtype=np.uint32)
    held.fill(words, forbidden)
    allowed: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return allowed


def _spoken(
    ids: Sequence[int], drawn: list[int], token: int, params: SamplingParams, context_len: int, *, has_grammar: bool
) -> Spoken | None:
    """Append a token to `drawn`; return what was said, if that ends it."""
    eos = () if params.ignore_eos and not has_grammar else (EOS,)
    text = text_of(drawn)
    drawn.append(token)
    if token in (*eos, *params.stop_token_ids):
        return Spoken(tuple(drawn), len(drawn) - 1, "", text, "stop", token)
    after = text_of(drawn)
    for end in range(1, len(after) + 1):
        hits = [stop for stop in params.stop if after[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            kept_text = after[: end - len(stop)]
            kept = max(k for k in range(len(drawn) + 1) if len(text_of(drawn[:k])) <= len(kept_text))
            leftover = kept_text[len(text_of(drawn[:kept])) :]
            return Spoken(tuple(drawn), kept, leftover, kept_text, "stop", stop)
    if len(drawn) >= params.max_tokens:
        return Spoken(tuple(drawn), len(drawn), "", after, "length")
    if len(ids) + len(drawn) >= context_len:
        return Spoken(tuple(drawn), len(drawn), "", after, "context")
    return None


class Refused(Exception):
    """What a request may not ask; `kind` is the protocol's."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass(eq=False)
class Op:
    """An operation as the oracle sees it."""

    id: int
    slot: int
    request: Request
    buffers: Sequence[Buffer] = ()
    deadline: float | None = None
    branch: Leaf | None = None
    is_ended: bool = False
    context: tuple[int, ...] = ()
    choices: list[list[int]] = field(default_factory=list)
    skip: int = 0
    credit: int = 0
    streamed: str = ""


@dataclass(eq=False)
class Leaf:
    """A branch as the oracle sees it."""

    id: int
    ids: list[int] = field(default_factory=list)
    tail: TextTail = field(default_factory=PROMPTER.tail)
    roles: tuple[tuple[str, ...], bool] = ((), False)
    marks: list[tuple[int, tuple[tuple[str, ...], bool]]] = field(default_factory=list)
    is_born: bool = True
    poison: int | None = None
    current: Op | None = None
    pending: deque[Op] = field(default_factory=deque)
    parent: Leaf | None = None
    children: dict[int, Leaf] = field(default_factory=dict)

    def below(self) -> list[Leaf]:
        found = [self]
        for leaf in found:
            found.extend(leaf.children.values())
        return found


class Oracle:
    """Carries requests out on lists; `expected` holds the replies that must have come by now."""

    def __init__(
        self, config: RuntimeConfig, *, num_pages: int, page_size: int, context_len: int, num_sessions: int
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.page_size = page_size
        self.context_len = context_len
        self.leaves: list[dict[int, Leaf]] = [{} for _ in range(num_sessions)]
        self.ops: list[dict[int, Op]] = [{} for _ in range(num_sessions)]
        self.expected: list[tuple[int, int, type[Any], dict[str, Any]]] = []
        self.timed: dict[Op, None] = {}
        self.ready: deque[Leaf] = deque()  # branches whose queues may move; the first one's does
        self.num_queued = 0

    # requests

    def handle(self, slot: int, request: Request, buffers: Sequence[Buffer], now: float) -> None:
        if isinstance(request, Credit):
            target = self.ops[slot].get(request.target)
            if target is not None and not target.is_ended and target.branch and target.branch.current is target:
                target.credit = min(target.credit + request.tokens, self.config.credit)
            return
        if request.op in self.ops[slot]:
            self._expect(slot, request.op, Failed, kind="protocol")
            return
        timeout_s = getattr(request, "timeout_s", None)
        op = Op(request.op, slot, request, buffers, None if timeout_s is None else now + timeout_s)
        self.ops[slot][op.id] = op
        try:
            self._dispatch(op, request)
        except Refused as refused:
            self._end(op, Failed, kind=refused.kind)

    def _dispatch(self, op: Op, request: Request) -> None:
        leaves = self.leaves[op.slot]
        match request:
            case Open(branch=branch):
                self._admit()
                self._announce(op.slot, [branch], None)
                self._end(op, Ok)
            case Extend() | Generate() | Select() | Score() | Rollback():
                if not isinstance(request, Rollback):
                    self._admit()
                self._enqueue(op, self._leaf(op.slot, request.branch))
            case Fork(branch=branch, children=children):
                self._admit()
                parent = self._leaf(op.slot, branch)
                if not children:
                    raise Refused("invalid_request")
                self._announce(op.slot, children, parent)
                self._enqueue(op, parent)
            case Release(branches=branches):
                for branch in branches:
                    if branch in leaves:
                        self._enqueue(Op(op.id, op.slot, Release(op=op.id, branches=[branch])), leaves[branch])
                self._end(op, Ok)
            case Cancel(target=target, branch=branch):
                if (target is None) == (branch is None):
                    raise Refused("invalid_request")
                found = self.ops[op.slot].get(-1 if target is None else target)
                doomed = [found] if found is not None and found.branch is not None else []
                if branch is not None and branch in leaves:
                    doomed = [d for leaf in leaves[branch].below() for d in self._unfinished(leaf)]
                self._end(op, Cancelled, count=self._cancel(doomed, "cancelled"))
            case Stat():
                self._end(op, Stats)
            case Flush():
                self._end(op, Ok)
            case _:
                raise AssertionError(request)

    def _admit(self) -> None:
        if self.num_queued >= self.config.max_waiting:
            raise Refused("overloaded")

    def _leaf(self, slot: int, branch: int) -> Leaf:
        if branch not in self.leaves[slot]:
            raise Refused("invalid_request")
        return self.leaves[slot][branch]

    def _announce(self, slot: int, ids: list[int], parent: Leaf | None) -> None:
        is_full = sum(map(len, self.leaves)) + len(ids) > self.config.max_branches
        if any(i in self.leaves[slot] for i in ids) or len(set(ids)) < len(ids):
            raise Refused("overloaded" if is_full and parent is not None else "invalid_request")
        if is_full:
            raise Refused("overloaded")
        for i in ids:
            self.leaves[slot][i] = leaf = Leaf(i, is_born=parent is None, parent=parent)
            if parent is not None:
                parent.children[i] = leaf

    def _enqueue(self, op: Op, leaf: Leaf) -> None:
        op.branch = leaf
        if op.deadline is not None:
            self.timed[op] = None
        leaf.pending.append(op)
        self.num_queued += 1
        self._pump(leaf)

    # what is queued

    def _pump(self, start: Leaf) -> None:
        self.ready.append(start)
        if len(self.ready) > 1:
            return  # whoever put the first one in goes on
        while self.ready:
            leaf = self.ready[0]
            while leaf.is_born and leaf.current is None and leaf.pending:
                op = leaf.pending.popleft()
                if op.is_ended:  # its failure, told when it was cancelled, takes effect in its turn
                    leaf.poison = op.id if leaf.poison is None else leaf.poison
                    continue
                self.num_queued -= 1
                self._carry_out(op, leaf)
            self.ready.popleft()

    def _carry_out(self, op: Op, leaf: Leaf) -> None:
        request = op.request
        if isinstance(request, Fork):
            for child in self._unborn(leaf, request):
                child.ids, child.tail = leaf.ids[:], leaf.tail.copy()
                child.roles, child.marks, child.poison = leaf.roles, leaf.marks[:], leaf.poison
                child.is_born = True
                self.ready.append(child)
        if leaf.poison is not None and not isinstance(request, Release | Rollback):
            self._end(op, Failed, kind="dependency_failed", cause=leaf.poison)
            return
        try:
            self._execute(op, leaf, request)
        except Refused as refused:
            self._fail(op, refused.kind)

    def _unborn(self, leaf: Leaf, request: Fork) -> list[Leaf]:
        return [c for i in request.children if (c := leaf.children.get(i)) is not None and not c.is_born]

    def _execute(self, op: Op, leaf: Leaf, request: Request) -> None:
        match request:
            case Extend(parts=parts, commit=commit):
                rendered = [text for part in parts if (text := self._append(leaf, part, op.buffers)) is not None]
                leaf.ids += leaf.tail.flush() if commit else leaf.tail.take_stable()
                self._fits(len(leaf.ids))
                self._end(op, Extended, length=len(leaf.ids), rendered=rendered)
            case Fork():
                self._end(op, Ok)
            case Rollback(length=length):
                if not 0 <= length <= len(leaf.ids):
                    raise Refused("invalid_request")
                del leaf.ids[length:]
                leaf.tail = PROMPTER.tail(at_start=length == 0)
                leaf.marks = [mark for mark in leaf.marks if mark[0] <= length]
                leaf.roles = leaf.marks[-1][1] if leaf.marks else ((), False)
                leaf.poison = None
                self._end(op, Extended, length=length)
            case Generate(params=params):
                if params.max_tokens < 1 or params.min_tokens > params.max_tokens:
                    raise Refused("invalid_request")
                leaf.ids += leaf.tail.flush()
                if not leaf.ids:
                    raise Refused("invalid_request")
                self._fits(len(leaf.ids) + 1)
                op.context, op.credit = tuple(leaf.ids), self.config.credit
                self._start(op, leaf, len(leaf.ids))
            case Select(choices=choices) | Score(choices=choices):
                if not choices or "" in choices or len(set(choices)) < len(choices):
                    raise Refused("invalid_request")
                leaf.ids += leaf.tail.take_stable()
                op.choices, op.skip = PROMPTER.continuations(leaf.tail, choices)
                if not leaf.ids and not op.skip:
                    raise Refused("invalid_request")
                longest = len(leaf.ids) + max(map(len, op.choices))
                self._fits(longest)
                op.context = tuple(leaf.ids)
                self._start(op, leaf, longest - 1)
            case Release():
                self._forget(op.slot, leaf)
            case _:
                raise AssertionError(request)

    def _append(self, leaf: Leaf, part: Part, buffers: Sequence[Buffer]) -> str | None:
        names, is_open = leaf.roles
        match part:
            case Text(text):
                PROMPTER.append_text(leaf.ids, leaf.tail, text)  # type: ignore[arg-type]
                return None
            case Tokens(buffer):
                ids = decode_tokens(buffers, buffer)
                if any(not 0 <= i < TOKENIZER.vocab_size for i in ids):
                    raise Refused("invalid_request")
                leaf.ids += leaf.tail.flush() + ids
                leaf.tail.follow_tokens()
                return None
            case RoleBegin(role):
                if is_open:
                    raise Refused("invalid_request")
                text, leaf_roles = PROMPTER.begin(names, role), ((*names, role), True)
            case RoleEnd():
                if not is_open:
                    raise Refused("invalid_request")
                text, leaf_roles = PROMPTER.end(names), (names, False)
        leaf.tail.append(text, special=True)
        leaf.ids += leaf.tail.take_stable()
        leaf.roles = leaf_roles
        leaf.marks.append((len(leaf.ids), leaf_roles))
        return text

    def _fits(self, length: int) -> None:
        if length > self.context_len:
            raise Refused("context_overflow")

    def _start(self, op: Op, leaf: Leaf, length: int) -> None:
        leaf.current = op
        if -(-length // self.page_size) > self.num_pages:
            raise Refused("resource_exhausted")

    def _forget(self, slot: int, leaf: Leaf) -> None:
        del self.leaves[slot][leaf.id]
        left, leaf.pending = leaf.pending, deque()
        for op in left:
            if op.is_ended:
                continue
            self.num_queued -= 1
            if isinstance(op.request, Fork):
                self._bear_poisoned(op, op.request)
            if not isinstance(op.request, Release):
                self._end(op, Failed, kind="invalid_request")
        for child in leaf.children.values():
            child.parent = leaf.parent
        if leaf.parent is not None:
            del leaf.parent.children[leaf.id]
            leaf.parent.children.update(leaf.children)

    # ends

    def _expect(self, slot: int, op: int, reply: type[Any], /, **fields: Any) -> None:
        self.expected.append((slot, op, reply, fields))

    def _end(self, op: Op, reply: type[Any], /, **fields: Any) -> None:
        assert not op.is_ended
        op.is_ended = True
        self.timed.pop(op, None)
        self._expect(op.slot, op.id, reply, **fields)

    def _fail(self, op: Op, kind: str) -> None:
        self._end(op, Failed, kind=kind)
        leaf = op.branch
        if leaf is None:
            return
        if leaf.current is not op and op in leaf.pending:
            return  # poisons in its turn
        leaf.poison = op.id if leaf.poison is None else leaf.poison
        if leaf.current is op:
            leaf.current = None
            self._pump(leaf)

    def _unfinished(self, leaf: Leaf) -> list[Op]:
        waiting = [op for op in leaf.pending if not isinstance(op.request, Release) and not op.is_ended]
        return [*([leaf.current] if leaf.current is not None else []), *waiting]

    def _cancel(self, doomed: Sequence[Op], kind: str) -> int:
        count = 0
        for op in doomed:
            if op.is_ended:
                continue
            count += 1
            assert op.branch is not None
            if op.branch.current is not op:
                self.num_queued -= 1
            if isinstance(op.request, Fork):
                self._bear_poisoned(op, op.request)
            self._fail(op, kind)
        return count

    def _bear_poisoned(self, op: Op, request: Fork) -> None:
        assert op.branch is not None
        for child in self._unborn(op.branch, request):
            child.is_born, child.poison = True, op.id
            self._pump(child)

    def expire(self, now: float) -> None:
        """The deadlines that are over."""
        for op in [op for op in self.timed if op.deadline is not None and op.deadline <= now]:
            self._cancel([op], "timeout")

    def close(self, slot: int) -> None:
        """A client is gone: whatever it waited for ends, somehow."""
        for leaf in self.leaves[slot].values():
            self.num_queued -= sum(not op.is_ended for op in leaf.pending)
        for op in self.ops[slot].values():
            if not op.is_ended:
                self._end(op, object)
        self.leaves[slot] = {}

    # what the engine tells

    def complete(self, slot: int, reply: Reply, ids: list[int], free_pages: int) -> bool:
        """Take the end of work that runs; False if no work of this id runs."""
        op = self.ops[slot].get(getattr(reply, "op", -1))
        if op is None or op.branch is None or op.is_ended or op.branch.current is not op:
            return False
        leaf = op.branch
        if isinstance(reply, Failed):
            self._exhausted(op, reply, free_pages)
            self._fail(op, reply.kind)
            self.expected.pop(next(i for i, e in enumerate(self.expected) if e[:2] == (slot, op.id)))
            return True
        if isinstance(op.request, Generate):
            assert isinstance(reply, Generated), reply
            spoken = self._spoken(op)
            leaf.ids += spoken.drawn[: spoken.kept]
            leaf.tail.follow_tokens()
            leaf.tail.append(spoken.leftover)
            got = (reply.text, reply.finish_reason, reply.matched_stop, ids, reply.length)
            kept = list(spoken.drawn[: spoken.kept])
            wanted = (spoken.text, spoken.reason, spoken.matched, kept, len(leaf.ids))
            assert got == wanted, f"{got} should be {wanted}"
            assert reply.usage.prompt_tokens == len(op.context)
            assert reply.usage.completion_tokens == len(spoken.drawn)
            assert not op.request.stream or op.streamed == reply.text, "deltas and text differ"
            grammar = op.request.grammar
            assert reply.is_whole == (grammar is None or re.fullmatch(grammar.source, reply.text) is not None)
        else:
            assert isinstance(op.request, Select | Score)
            assert isinstance(reply, Selected), reply
            given = [_scores(op.context, choice, op.skip) for choice in op.choices]
            alone = None
            if op.request.method == "unconditional_likelihood_normalized":
                alone = [[0.0, *_scores((), c[op.skip :], 1)] for c in op.choices]
            if op.request.method == "pmi":
                alone = [_scores((PROMPTER.neutral_id(),), c[op.skip :], 0) for c in op.choices]
            assert [[t.logprob for t in row] for row in reply.logprobs] == given
            assert reply.unconditional == alone
            num_bytes = [len(choice.encode()) for choice in op.request.choices]
            assert reply.scores == score_choices(op.request.method, given, alone, num_bytes)
            assert reply.distribution == distribution(given, getattr(op.request, "temperature", 0.0) or 1.0)
            if not getattr(op.request, "temperature", 0.0):
                assert reply.index == best(reply.scores)
            inner = {tuple(ids[op.skip : end]) for ids in op.choices for end in range(op.skip + 1, len(ids))}
            bases = (
                (len(op.context) + op.skip,)
                if alone is None
                else (len(op.context) + op.skip, op.request.method == "pmi")
            )
            assert reply.usage.prompt_tokens == sum(bases) + len(bases) * len(inner), "each node once"
            if isinstance(op.request, Select):
                leaf.ids += op.choices[reply.index]
                leaf.tail = PROMPTER.tail(at_start=False)
            assert reply.length == len(leaf.ids)
        usage = reply.usage
        assert usage.prompt_tokens == usage.cached_tokens + usage.computed_tokens
        assert usage.computed_tokens > 0, "logits come from the last token, so it is computed"
        op.is_ended = True
        self.timed.pop(op, None)
        leaf.current = None
        self._pump(leaf)
        return True

    def _exhausted(self, op: Op, reply: Failed, free_pages: int) -> None:
        """Whether work may fail now: only if its tokens need more pages than the pool has, all others preempted."""
        assert reply.kind == "resource_exhausted", reply
        count = reply.details["num_tokens"]
        assert isinstance(count, int)
        assert -(-count // self.page_size) > free_pages, f"{count} tokens would fit {free_pages} pages: {reply}"
        if isinstance(op.request, Generate):
            spoken = self._spoken(op)
            drawn = spoken.drawn[: count - len(op.context)]
            assert reply.details["partial_text"] == text_of(drawn)

    def _spoken(self, op: Op) -> Spoken:
        assert isinstance(op.request, Generate)
        return speak(op.context, op.request.params, self.context_len, op.request.grammar)

    def delta(self, slot: int, reply: Delta) -> None:
        op = self.ops[slot][reply.op]
        assert not op.is_ended, "a delta after the end"
        assert op.credit > 0, "streamed without credit"
        op.credit -= len(delta_tokens(reply))
        op.streamed += reply.text
        assert isinstance(op.request, Generate)
        assert self._spoken(op).text.startswith(op.streamed)

    def partial(self, slot: int, reply: Failed) -> None:
        """A cancelled generation gives back the beginning of what it would have said, with all that was sent."""
        op = self.ops[slot][reply.op if reply.op is not None else -1]
        partial = reply.details.get("partial_text")
        if partial is None or not isinstance(op.request, Generate):
            return
        assert isinstance(partial, str)
        assert partial.startswith(op.streamed), "text that was sent is lost"
        assert text_of(self._spoken(op).drawn).startswith(partial)


def _scores(context: Sequence[int], ids: list[int], skip: int) -> list[float]:
    return [logprob([*context, *ids[:j]], ids[j]) for j in range(skip, len(ids))]


# --------------------------------------------------------------------------------------------- both


class World:
    """An engine and the oracle, side by side. `seen` counts what happened, so that a test can tell that it did."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        context_len: int = 500,
        tenants: Sequence[str] = TENANTS,
        seen: Counter[str] | None = None,
        overlap: bool = False,
        **config: Any,
    ) -> None:
        self.config = RuntimeConfig(**config)
        self.clock = FakeClock()
        self.runner = KVRunner(num_pages, page_size)
        self.cache = PrefixCache(num_pages, page_size, enabled=self.config.radix_cache)
        self.scheduler = Scheduler(
            self.cache,
            token_budget=self.config.token_budget,
            max_running=self.config.max_running,
            policy=self.config.schedule_policy,
            speculator=Speculator(context_len) if self.config.speculate else None,
            clock=self.clock,
        )
        credit = self.config.credit
        composer = Composer(
            PROMPTER, vocab_size=TOKENIZER.vocab_size, context_len=context_len, seed=1, credit=credit, grammars=GRAMMARS
        )
        launcher = self.runner if overlap else None
        in_flight = InFlight(self.scheduler, self.runner, launcher=launcher, credit=credit, clock=self.clock)
        self.engine = Engine(self.config, self.scheduler, in_flight, composer, epoch=1, clock=self.clock)
        self.oracle = Oracle(
            self.config,
            num_pages=num_pages,
            page_size=page_size,
            context_len=context_len,
            num_sessions=len(tenants),
        )
        self.tenants = tenants
        self.seen = Counter() if seen is None else seen
        self.sessions = [self._session(slot) for slot in range(len(tenants))]
        self.replies: list[dict[int, list[Reply]]] = [{} for _ in tenants]
        self.stolen: list[Lease] = []
        self.is_sound = True  # False from the first comparison that failed
        self.num_checks = 0
        self._op = 0

    def _session(self, slot: int) -> Session:
        return Session(b"%d" % slot, self.tenants[slot], f"client {slot}", 0.0)

    # requests

    def send(
        self, slot: int, kind: Any, *, buffers: Sequence[Buffer] = (), op: int | None = None, **fields: Any
    ) -> int:
        """Send a request to both and compare; return its operation id."""
        if op is None:
            self._op += 1
            op = self._op
        request = kind(**({} if kind is Credit else {"op": op}), **fields)
        if kind is Cancel:
            self._note_cancel(slot, request)
        self.oracle.handle(slot, request, buffers, self.clock.now)
        self.engine.handle(self.sessions[slot], request, buffers)
        self.seen[kind.__name__.lower()] += 1
        self.collect()
        return op

    def branch(self, slot: int, branch: int, *parts: Part) -> int:
        self.send(slot, Open, branch=branch)
        return self.send(slot, Extend, branch=branch, parts=list(parts))

    def generate(
        self,
        slot: int,
        branch: int,
        *,
        stream: bool = False,
        timeout_s: float | None = None,
        regex: str | None = None,
        **p: Any,
    ) -> int:
        params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True, **p})
        grammar = None if regex is None else Grammar(kind="regex", source=regex)
        fields: dict[str, Any] = {"stream": stream, "timeout_s": timeout_s, "grammar": grammar}
        return self.send(slot, Generate, branch=branch, params=params, **fields)

    def step(self) -> bool:
        """One step of the engine, with the deadlines before it."""
        before = self.scheduler.counters.preemptions, self.cache.num_evictions, self.runner.num_copies
        drafts = self.scheduler.counters.accepted_tokens, self.scheduler.counters.drafted_tokens
        rows = [(s, s.lease, s.lease.row.view().tolist()) for s in self.scheduler.running if s.lease is not None]
        ahead = self.runner.num_ahead
        self.oracle.expire(self.clock.now)
        did_run = self.engine.step()
        self.seen["step"] += did_run
        self.seen["launched ahead"] += self.runner.num_ahead - ahead
        self.seen["preemption"] += self.scheduler.counters.preemptions - before[0]
        self.seen["draft that came true"] += self.scheduler.counters.accepted_tokens - drafts[0]
        self.seen["draft that did not"] += (
            self.scheduler.counters.drafted_tokens - drafts[1] > self.scheduler.counters.accepted_tokens - drafts[0]
        )
        self.seen["eviction"] += self.cache.num_evictions - before[1]
        self.seen["copy on write"] += self.runner.num_copies - before[2]
        self.seen["twin"] += any(
            s.lease is lease and row != lease.row.view()[: len(row)].tolist() for s, lease, row in rows
        )
        tries = [s for s, _, _ in rows if s.trie is not None]
        self.seen["trie in less room than it has nodes"] += any(s.room < len(s.trie or ()) for s in tries)
        self.collect()
        return did_run

    def close(self, slot: int) -> None:
        """The client of this slot dies, and another takes its place."""
        self.oracle.close(slot)
        self.engine.close(self.sessions[slot])
        self.collect()
        assert not self.sessions[slot].branches
        assert not self.sessions[slot].operations
        assert all(op.is_ended for op in self.oracle.ops[slot].values())
        self.oracle.ops[slot] = {}
        self.sessions[slot] = self._session(slot)
        self.seen["death"] += 1

    def preempt(self, pick: int) -> tuple[int, int] | None:
        """Preempt a running sequence out of the blue; return its session and operation."""
        if not self.scheduler.running:
            return None
        sequence = self.scheduler.running[pick % len(self.scheduler.running)]
        self.seen[f"forced preemption: {_phase(sequence)}"] += 1
        self.scheduler.preempt(sequence)
        return next(
            (slot, operation.id)
            for slot, session in enumerate(self.sessions)
            for operation in session.operations.values()
            if operation.work is not None and sequence in operation.work.sequences
        )

    def steal(self, pages: int) -> None:
        """Make the pool smaller by up to so many pages, as far as they can be had."""
        count = min(pages, self.cache.allocator.num_free + self.cache.tree.num_cached_pages())
        tokens = np.zeros(count * self.cache.page_size, dtype=np.int32)
        lease = self.cache.acquire("thief", tokens, limit=0, headroom=0) if count else None
        if lease is not None:
            self.stolen.append(lease)
            self.seen["shrink"] += 1

    def give_back(self) -> None:
        while self.stolen:
            self.cache.release(self.stolen.pop())

    @property
    def pages_left(self) -> int:
        return self.cache.num_pages - sum(len(lease.row) for lease in self.stolen)

    # replies

    def collect(self) -> None:
        """Compare all replies since the last time with the oracle's."""
        self.is_sound = False
        for slot, session in enumerate(self.sessions):
            for message in session.take_outbox():
                for reply in message.replies:
                    self._take(slot, reply, message.buffers)
        assert not self.oracle.expected, f"replies that did not come: {self.oracle.expected}"
        self.is_sound = True

    def _take(self, slot: int, reply: Reply, buffers: list[Buffer]) -> None:
        op = getattr(reply, "op", None)
        assert isinstance(op, int)
        self.replies[slot].setdefault(op, []).append(reply)
        if isinstance(reply, Delta):
            self.seen["delta"] += 1
            self.oracle.delta(slot, reply)
            return
        ids = decode_tokens(buffers, reply.buffer) if isinstance(reply, Generated) else []
        for index, (at, of, kind, fields) in enumerate(self.oracle.expected):
            if (at, of) == (slot, op) and isinstance(reply, kind):
                got = {name: getattr(reply, name) for name in fields}
                assert got == fields, f"{reply} should have {fields}"
                del self.oracle.expected[index]
                break
        else:
            assert self.oracle.complete(slot, reply, ids, self.pages_left), f"unexpected {reply}"
            if isinstance(reply, Generated | Selected):
                self.seen["hit"] += reply.usage.cached_tokens > 0
                self.seen["forced by a grammar"] += isinstance(reply, Generated) and reply.usage.forced_tokens > 0
                self.seen[f"finished by {getattr(reply, 'finish_reason', 'choice')}"] += 1
        if isinstance(reply, Failed):
            self.seen[f"failed: {reply.kind}"] += 1
            self.oracle.partial(slot, reply)

    def last(self, slot: int, op: int) -> Reply:
        """The terminal reply of an operation."""
        return self.replies[slot][op][-1]

    # states

    def state_of(self, slot: int, op: int) -> str:
        """In which state an operation is, in words."""
        operation = self.sessions[slot].operations.get(op)
        if operation is None or operation.branch is None:
            return "ended"
        return _state(operation)

    def _note_cancel(self, slot: int, request: Cancel) -> None:
        branches = self.sessions[slot].branches
        found = [self.sessions[slot].operations.get(request.target)] if request.target is not None else []
        if request.branch is not None and request.branch in branches:
            found = [o for b in branches[request.branch].descendants() for o in (b.current, *b.pending)]
        for operation in found:
            if operation is not None and operation.branch is not None:
                self.seen[f"cancel: {_state(operation)}"] += 1

    # checks

    def check(self) -> None:
        """Everything that must hold between any two calls."""
        self.is_sound = False
        self.num_checks += 1
        self._check_scheduler()
        self._check_branches()
        self._check_kv()
        allocator = self.cache.allocator
        unheld = np.flatnonzero(allocator.holders() == 0).tolist()
        self.runner.erase([page for page in unheld if allocator.state(page) is PageState.FREE])
        self.is_sound = True

    def _check_scheduler(self) -> None:
        if not self.stolen:
            self.scheduler.check_invariants()
        running = self.scheduler.running
        assert len(running) <= self.config.max_running
        assert [s.arrival for s in running] == sorted(s.arrival for s in running), "not oldest first"
        self.cache.check_invariants([*(s.lease for s in running if s.lease is not None), *self.stolen])
        counters = self.scheduler.counters
        assert counters.prompt_tokens == counters.cached_tokens + counters.computed_tokens
        assert counters.rebuilds == 0, "an invariant broke and was healed: see the log"

    def _check_branches(self) -> None:
        oracle = self.oracle
        assert self.engine.stats()["num_queued"] == oracle.num_queued
        assert self.engine.stats()["num_branches"] == sum(map(len, oracle.leaves))
        wanted = min((op.deadline for op in oracle.timed if op.deadline is not None), default=None)
        deadline = self.engine.next_deadline()
        assert wanted is None or (deadline is not None and deadline <= wanted), "a deadline is forgotten"
        for session, leaves, ops in zip(self.sessions, oracle.leaves, oracle.ops, strict=True):
            assert session.branches.keys() == leaves.keys()
            assert session.operations.keys() == {op.id for op in ops.values() if not op.is_ended}
            # To look at a branch parts it from its brood: mostly look only at what the engine itself has touched.
            looked_at = set(leaves) if self.num_checks % 4 == 0 else {b.id for b in session.branches.touched()}
            for branch_id, leaf in leaves.items():
                if branch_id not in looked_at:
                    continue
                branch = session.branches[branch_id]
                assert branch.is_born == leaf.is_born
                assert (branch.current.id if branch.current else None) == (leaf.current.id if leaf.current else None)
                assert (branch.poison.op if branch.poison else None) == leaf.poison
                if leaf.is_born:
                    assert branch.log.array().tolist() == leaf.ids
                    assert branch.tail.pending == leaf.tail.pending
                    assert (branch.roles.names, branch.roles.is_open) == leaf.roles

    def _check_kv(self) -> None:
        """Each slot that a row or the tree says is computed holds its own prefix; no page serves two tenants."""
        size = self.cache.page_size
        tenant_of: dict[int, object] = {}
        for tenant, root in self.cache.tree._roots.items():
            for node, before in _walk(root):
                self._check_slots(node.pages.tolist(), node.start, node.tokens.tolist(), before)
                for page in node.pages.tolist():
                    assert tenant_of.setdefault(page, tenant) == tenant, "two tenants share a page"
        writable: set[int] = set()
        uncopied = {copy.target for step in self.runner.pending for copy in step.batch.copies}
        for sequence in self.scheduler.running:
            assert sequence.lease is not None
            assert sequence.num_publishable >= sequence.lease.published or not self.config.radix_cache
            row = sequence.lease.row.view().tolist()
            for page in row:
                assert tenant_of.setdefault(page, sequence.namespace) == sequence.namespace, "two tenants share a page"
            known = next((i * size for i, page in enumerate(row) if page in uncopied), sequence.num_publishable)
            self._check_slots(row, 0, sequence.tokens.view(0, min(known, sequence.num_publishable)).tolist(), 0)
            top = sequence.lease.node
            while top.parent is not None:
                top = top.parent
            assert self.cache.tree._roots.get(sequence.namespace) is top, "a lease in another tenant's tree"
            writable.update(row[sequence.num_publishable // size :])
        rows = [s.lease.row.view().tolist() for s in self.scheduler.running if s.lease is not None]
        named = Counter(page for row in rows for page in row)
        assert all(named[page] == 1 for page in writable), "a row could write a page that another row reads"

    def _check_slots(self, pages: list[int], start: int, tokens: list[int], before: int) -> None:
        size = self.cache.page_size
        first = start // size
        index = [divmod(p, size) for p in range(start, start + len(tokens))]
        where = ([pages[page - first] for page, _ in index], [slot for _, slot in index])
        assert self.runner.kv[where].tolist() == tokens, "KV of other tokens"
        assert self.runner.stamps[where].tolist() == stamps(tokens, before), "KV of another prefix"

    # the end

    def drain(self, limit: int = 5000) -> int:
        """Let everything end, readers reading; return how many steps it took."""
        self.give_back()
        for steps in range(limit):
            if not self.engine.num_unfinished:
                return steps
            for slot, session in enumerate(self.sessions):
                for operation in list(session.operations.values()):
                    if isinstance(operation.work, Generation) and operation.work.credit <= 0:
                        self.send(slot, Credit, target=operation.id, tokens=4)
            self.step()
        raise AssertionError(f"{self.engine.num_unfinished} operations are left after {limit} steps")

    def finish(self) -> None:
        """Drain, release everything, and look that nothing is left."""
        self.drain()
        self.check()
        for slot, session in enumerate(self.sessions):
            assert not session.operations
            self.send(slot, Release, branches=list(session.branches))
            assert not session.branches
        assert not self.scheduler.running
        assert not self.scheduler.num_waiting
        assert not self.scheduler.has_work
        while self.engine.has_work:  # steps in flight, all of whose rows have ended
            self.step()
        self.step()
        assert self.engine.next_deadline() is None, "what has ended still has a deadline"
        self.check()
        self.cache.flush()
        assert self.cache.allocator.num_free == self.cache.num_pages
        assert self.cache.tree.num_nodes == 0
        for slot, ops in enumerate(self.oracle.ops):
            assert all(op.is_ended for op in ops.values())
            for op in ops:
                terminal = [r for r in self.replies[slot].get(op, ()) if not isinstance(r, Delta)]
                repeated = sum(isinstance(r, Failed) and r.kind == "protocol" for r in terminal)
                assert len(terminal) - repeated == 1, terminal


def _state(operation: Operation) -> str:
    branch = operation.branch
    assert branch is not None
    if operation.progress is Progress.ENDED:
        return "ended"
    if operation.progress is Progress.QUEUED:
        return "queued" if branch.is_born else "unborn"
    assert operation.work is not None
    live = [s for s in operation.work.sequences if s.status is not Status.FINISHED]
    return _phase(live[0]) if live else "ended"


def _phase(sequence: Running) -> str:
    if sequence.status is Status.WAITING:
        kind = "preempted" if sequence.num_preemptions else "waiting"
    elif sequence.is_prefilling:
        kind = "prefill"
    else:
        kind = "decode"
    return f"paused {kind}" if sequence.is_paused else kind


def _walk(root: Node) -> Iterator[tuple[Node, int]]:
    """Every node below a root, with the stamp of what comes before it."""
    stack = [(child, 0) for child in root.children.values()]
    while stack:
        node, before = stack.pop()
        yield node, before
        end = stamps(node.tokens.tolist(), before)[-1]
        stack.extend((child, end) for child in node.children.values())
