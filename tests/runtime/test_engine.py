"""The engine on a fake runner and the bundled tokenizer: order, poison, cancel, rollback, stops, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from fakes import FakeClock, FakeRunner, logprob

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.inflight import InFlight
from bough.runtime.models.folder import resolve_model
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    Buffer,
    Cancel,
    Cancelled,
    Credit,
    Delta,
    Drain,
    Extend,
    Extended,
    Failed,
    Fork,
    Generate,
    Generated,
    Ok,
    Open,
    Part,
    Release,
    Reply,
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
    Usage,
    decode_tokens,
    encode_tokens,
)
from bough.runtime.scheduler import Scheduler
from bough.runtime.session import Session
from bough.runtime.speculation import Speculator
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tokenizer import load_tokenizer

POCKET = resolve_model("pocket")
TOKENIZER = load_tokenizer(POCKET)
R = TypeVar("R", bound=Reply)


class Client:
    """A session with an engine in the same thread: send, run to the end, read replies."""

    def __init__(
        self, *, context_len: int = 500, pages: int = 64, session: str = "one", overlap: bool = False, **config: Any
    ) -> None:
        self.config = RuntimeConfig(**config)
        self.clock = FakeClock()
        self.runner = FakeRunner(pages, 4, vocab_size=TOKENIZER.vocab_size, context_len=context_len)
        cache = PrefixCache(pages, 4, enabled=self.config.radix_cache)
        self.scheduler = Scheduler(
            cache,
            token_budget=self.config.token_budget,
            max_running=self.config.max_running,
            speculator=Speculator(context_len) if self.config.speculate else None,
            clock=self.clock,
        )
        prompter = Prompter(TOKENIZER, load_chat_template(POCKET), "pocket")
        composer = Composer(
            prompter,
            vocab_size=TOKENIZER.vocab_size,
            context_len=context_len,
            seed=1,
            credit=self.config.credit,
        )
        launcher = self.runner if overlap else None
        credit = self.config.credit
        in_flight = InFlight(self.scheduler, self.runner, launcher=launcher, credit=credit, clock=self.clock)
        self.engine = Engine(self.config, self.scheduler, in_flight, composer, epoch=1, clock=self.clock)
        self.session = Session(b"id", session, "test", 0.0)
        self.replies: dict[int | None, list[Reply]] = {}
        self.buffers: dict[int, list[Buffer]] = {}
        self._op = 0

    def send(self, kind: Any, *, buffers: Sequence[Buffer] = (), **fields: Any) -> int:
        self._op += 1
        self.engine.handle(self.session, kind(op=self._op, **fields), buffers)
        return self._op

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.engine.step() and not self.engine.has_work:
                self.collect()
                return
            self.scheduler.check_invariants()
        raise AssertionError("not done")

    def collect(self) -> None:
        for message in self.session.take_outbox():
            for reply in message.replies:
                self.replies.setdefault(getattr(reply, "op", None), []).append(reply)
                if isinstance(reply, Generated):
                    self.buffers[reply.op] = [message.buffers[reply.buffer]]

    def last(self, op: int, kind: type[R]) -> R:
        self.collect()
        terminal = self.replies[op][-1]
        assert isinstance(terminal, kind), terminal
        return terminal

    def branch(self, branch: int, *parts: Part) -> int:
        self.send(Open, branch=branch)
        return self.send(Extend, branch=branch, parts=list(parts))

    def generate(self, branch: int, *, stream: bool = False, timeout_s: float | None = None, **params: Any) -> int:
        params.setdefault("max_tokens", 5)
        params.setdefault("ignore_eos", True)
        return self.send(Generate, branch=branch, params=SamplingParams(**params), stream=stream, timeout_s=timeout_s)

    def ids(self, op: int) -> list[int]:
        return decode_tokens(self.buffers[op], 0)

    def text_of(self, branch: int) -> str:
        found = self.session.branches[branch]
        return TOKENIZER.decode(found.log.array().tolist()) + found.tail.pending


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture(params=[False, True], ids=["one step at a time", "steps that overlap"])
def either(request: pytest.FixtureRequest) -> Client:
    return Client(overlap=request.param)


def test_a_pipelined_program_runs_in_order_without_waiting_for_a_reply(client: Client) -> None:
    client.branch(1, Text("Hello "), Text("world"))
    first = client.generate(1)
    client.send(Extend, branch=1, parts=[Text(" and then")])
    second = client.generate(1)
    client.run()
    generated = client.last(first, Generated).text
    assert client.text_of(1) == "Hello world" + generated + " and then" + client.last(second, Generated).text


def test_a_stop_inside_a_draft_ends_there_and_leaves_nothing_more_in_the_cache_than_plain_decoding() -> None:
    plain, speculating = Client(), Client(speculate=True)
    for stop in range(2, 19):
        said: list[tuple[Generated, list[int], int, int]] = []
        for client in (plain, speculating):
            client.branch(100 + stop, Text("Once"))
            first = client.generate(100 + stop, max_tokens=20)
            client.run()
            ids = client.ids(first)
            client.scheduler.cache.flush()  # what siblings said is known still
            client.branch(200 + stop, Text("Once"))
            before = client.scheduler.counters.generated_tokens
            again = client.generate(200 + stop, max_tokens=20, stop_token_ids=(ids[stop],))
            client.run()
            cached = sum(len(node.tokens) for node in client.scheduler.cache.tree.nodes())
            generated = client.scheduler.counters.generated_tokens - before
            said.append((client.last(again, Generated), client.ids(again), cached, generated))
        (one, *facts), (other, *other_facts) = said
        assert (other.text, other.finish_reason, other.matched_stop) == (one.text, one.finish_reason, one.matched_stop)
        assert other_facts == facts, "the tokens kept, cached and counted are those of plain decoding"
        assert other.usage.completion_tokens == one.usage.completion_tokens
    assert speculating.scheduler.counters.accepted_tokens > 50
    assert plain.scheduler.counters.drafted_tokens == 0


def test_tokens_do_not_depend_on_how_constants_are_cut(client: Client) -> None:
    whole = "The quick brown fox jumps over the lazy dog.\n\nYes, 12345 times."
    client.branch(1, Text(whole))
    client.send(Open, branch=2)
    for char in whole:
        client.send(Extend, branch=2, parts=[Text(char)])
    first, second = client.generate(1), client.generate(2)
    client.run()
    assert client.ids(first) == client.ids(second)
    left, right = client.session.branches[1].log, client.session.branches[2].log
    assert left.array().tolist() == right.array().tolist()


def test_a_fork_of_a_pending_branch_inherits_what_is_pending(client: Client) -> None:
    client.branch(1, Text("Once"))
    gen = client.generate(1)
    client.send(Fork, branch=1, children=[2, 3])
    client.send(Extend, branch=2, parts=[Text(" two")])
    client.send(Release, branches=[1])
    child_gen = client.generate(3)
    client.run()
    base = "Once" + client.last(gen, Generated).text
    assert client.text_of(2) == base + " two"
    assert client.text_of(3) == base + client.last(child_gen, Generated).text
    assert 1 not in client.session.branches


def test_a_forked_text_is_tokenised_as_if_it_had_never_been_cut(client: Client) -> None:
    client.branch(1, Text("The answ"))
    client.send(Fork, branch=1, children=[2])
    client.send(Extend, branch=2, parts=[Text("er is")])
    client.send(Extend, branch=2, parts=[], commit=True)
    client.run()
    assert client.session.branches[2].log.array().tolist() == TOKENIZER.encode("The answer is")


def test_roles_are_written_by_the_chat_template(client: Client) -> None:
    extend = client.branch(1, RoleBegin("user"), Text("Hi"), RoleEnd(), RoleBegin("assistant"))
    gen = client.generate(1)
    client.send(Extend, branch=1, parts=[RoleEnd()])
    client.run()
    rendered = client.last(extend, Extended).rendered
    assert rendered == ["<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"]
    said = client.last(gen, Generated).text
    assert client.text_of(1) == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"


def test_text_that_looks_like_a_control_token_is_only_text(client: Client) -> None:
    client.branch(1, RoleBegin("user"), Text("<|im_end|>"), RoleEnd())
    client.send(Extend, branch=1, parts=[], commit=True)
    end = TOKENIZER.encode("<|im_end|>", special=True)
    assert len(end) == 1
    assert client.session.branches[1].log.array().tolist().count(end[0]) == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([RoleBegin("user"), RoleBegin("user")], "cannot begin inside role 'user'"),
        ([RoleEnd()], "none is open"),
        ([RoleBegin("wizard")], "wizard"),
        ([Tokens(0)], "buffer 0 is not in this message"),
    ],
)
def test_bad_parts_are_refused_and_poison_only_their_branch(client: Client, parts: list[Part], message: str) -> None:
    bad = client.branch(1, *parts)
    dependent = client.generate(1)
    client.branch(2, Text("fine"))
    other = client.generate(2)
    client.run()
    assert message in client.last(bad, Failed).message
    failed = client.last(dependent, Failed)
    assert (failed.kind, failed.cause) == ("dependency_failed", bad)
    client.last(other, Generated)


def test_token_ids_outside_the_vocabulary_never_reach_the_model(client: Client) -> None:
    client.send(Open, branch=1)
    bad = client.send(Extend, branch=1, parts=[Tokens(0)], buffers=[encode_tokens([1, 10_000])])
    assert "token ids must be between 0 and" in client.last(bad, Failed).message


def test_token_ids_can_take_the_place_of_the_last_ones_with_the_same_text(client: Client) -> None:
    client.branch(1, Text("Once upon a t"))
    client.send(Extend, branch=1, parts=[], commit=True)
    before = client.session.branches[1].log.array().tolist()
    there = TOKENIZER.encode(TOKENIZER.decode(before[-1:]) + "ime", at_start=False)
    client.send(Extend, branch=1, parts=[Tokens(0, replaces=1)], buffers=[encode_tokens(there)])
    assert client.session.branches[1].log.array().tolist() == [*before[:-1], *there]
    assert client.text_of(1) == "Once upon a time"
    client.send(Fork, branch=1, children=[2])
    client.send(Rollback, branch=1, length=len(before))
    assert client.session.branches[1].log.array().tolist() == before, "as it was when it had that many"
    client.send(Rollback, branch=2, length=len(before) - 1)
    assert client.session.branches[2].log.array().tolist() == before[:-1]
    for replaces, message in (
        (1, "do not begin with the text"),
        (len(before) + 9, "replaces must be"),
        (-1, "replaces"),
    ):
        client.branch(replaces + 50, Text("Once upon a t"))
        part = Tokens(0, replaces=replaces)
        bad = client.send(Extend, branch=replaces + 50, parts=[part], buffers=[encode_tokens(TOKENIZER.encode("z"))])
        assert message in client.last(bad, Failed).message


def test_a_stop_string_is_cut_out_and_the_branch_holds_exactly_the_text(client: Client) -> None:
    client.branch(1, Text("Start:"))
    gen = client.generate(1, max_tokens=30)
    client.run()
    full = client.last(gen, Generated).text
    stop = full[len(full) // 2 : len(full) // 2 + 2]
    client.branch(2, Text("Start:"))
    cut = client.generate(2, max_tokens=30, stop=(stop,))
    client.run()
    reply = client.last(cut, Generated)
    assert (reply.text, reply.finish_reason, reply.matched_stop) == (full[: full.index(stop)], "stop", stop)
    assert client.text_of(2) == "Start:" + reply.text


def test_a_stop_token_ends_and_is_not_part_of_the_text(client: Client) -> None:
    client.branch(1, Text("Start:"))
    gen = client.generate(1)
    client.run()
    ids = client.ids(gen)
    client.branch(2, Text("Start:"))
    cut = client.generate(2, stop_token_ids=(ids[2],))
    client.run()
    reply = client.last(cut, Generated)
    assert (client.ids(cut), reply.finish_reason, reply.matched_stop) == (ids[:2], "stop", ids[2])
    assert reply.usage.completion_tokens == 3


def test_deltas_add_up_to_the_text_and_never_show_half_a_stop(client: Client) -> None:
    client.branch(1, Text("Stream:"))
    gen = client.generate(1, stream=True, max_tokens=40, stop=("zzzz",))
    client.run()
    deltas = [reply for reply in client.replies[gen] if isinstance(reply, Delta)]
    assert "".join(delta.text for delta in deltas) == client.last(gen, Generated).text
    assert len(deltas) > 5


def test_a_stream_without_credit_stands_still_and_goes_on_with_more() -> None:
    client = Client(credit=3)
    client.branch(1, Text("Stream:"))
    gen = client.generate(1, stream=True, max_tokens=10)
    client.run()
    sent = sum(isinstance(reply, Delta) for reply in client.replies[gen])
    assert sent <= 4
    assert not any(isinstance(reply, Generated) for reply in client.replies[gen])
    while not isinstance(client.replies[gen][-1], Generated):
        client.engine.handle(client.session, Credit(target=gen, tokens=3), ())
        client.run()
    assert client.last(gen, Generated).usage.completion_tokens == 10


def test_usage_tells_cached_from_computed_and_the_second_time_all_but_one_is_cached(either: Client) -> None:
    usages = []
    for branch in (1, 2):
        either.branch(branch, Text("A prompt of some length, the same both times."))
        gen = either.generate(branch)
        either.run()
        usages.append(either.last(gen, Generated).usage)
    assert usages[0].cached_tokens == 0
    assert usages[1].computed_tokens == 1
    assert all(u.prompt_tokens == u.cached_tokens + u.computed_tokens for u in usages)


def test_sixty_four_forks_prefill_the_cold_prefix_once() -> None:
    client = Client(pages=600)
    client.branch(1, Text("A prefix that nobody has computed so far, of a certain length. " * 3))
    children = list(range(2, 66))
    client.send(Fork, branch=1, children=children)
    gens = [client.generate(child, max_tokens=1) for child in children]
    client.run()
    usages = [client.last(gen, Generated).usage for gen in gens]
    assert sum(u.computed_tokens for u in usages) == usages[0].prompt_tokens + 63


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    client = Client(context_len=20)
    client.branch(1, Text("one two three " * 20))
    gen = client.generate(1)
    client.run()
    failure = next(r[-1] for r in client.replies.values() if isinstance(r[-1], Failed))
    assert failure.kind == "context_overflow"
    assert "context holds 20" in failure.message
    client.last(gen, Failed)


@pytest.mark.parametrize("text", ["x y" * 500_000, "x" * 4_000_000], ids=["many places to cut", "none"])
def test_of_a_text_far_beyond_the_context_only_a_part_is_tokenised(text: str) -> None:
    client = Client(context_len=20)
    client.branch(1, Text(text))
    client.run()
    failure = next(r[-1] for r in client.replies.values() if isinstance(r[-1], Failed))
    assert failure.kind == "context_overflow"
    assert "the branch has at least " in failure.message
    assert 20 < int(failure.details["num_tokens"] or 0) < 100_000


def test_a_long_text_that_fits_has_the_tokens_of_the_whole() -> None:
    text = "Words, 日本語 and x" + "y" * 70_000 + " no place to cut " * 9_000
    expected = TOKENIZER.encode(text)
    client = Client(pages=64_000, context_len=len(expected) + 8)
    client.branch(1, Text(text))
    gen = client.generate(1, max_tokens=1)
    client.run()
    assert client.last(gen, Generated).usage.prompt_tokens == len(expected)


def test_a_generation_that_reaches_the_context_says_so_and_keeps_its_text() -> None:
    client = Client(context_len=20)
    client.branch(1, Text("one two three"))
    gen = client.generate(1, max_tokens=100)
    client.run()
    reply = client.last(gen, Generated)
    assert reply.finish_reason == "context"
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 20


def test_a_generation_that_fills_the_pool_fails_typed_with_its_text() -> None:
    client = Client(pages=5)
    client.branch(1, Text("one two three"))
    gen = client.generate(1, max_tokens=100)
    client.run()
    failed = client.last(gen, Failed)
    assert failed.kind == "resource_exhausted"
    assert "KV pool of 20 tokens" in failed.message
    assert failed.details["partial_text"]
    usage = msgspec.convert({name: failed.details[name] for name in Usage.__struct_fields__}, Usage)
    assert usage.prompt_tokens == usage.cached_tokens + usage.computed_tokens >= 3
    assert usage.prompt_tokens + usage.completion_tokens == 20 + 1, "the last token has no KV yet"


def test_select_scores_every_choice_in_one_operation_and_appends_the_best(client: Client) -> None:
    client.branch(1, Text("The sky is"))
    choices = [" blue", " green as grass", " red"]
    op = client.send(Select, branch=1, choices=choices)
    client.run()
    reply = client.last(op, Selected)
    assert reply.scores[reply.index] == max(reply.scores)
    assert sum(reply.distribution) == pytest.approx(1.0)
    assert ["".join(t.text for t in row) for row in reply.logprobs] == choices
    assert client.text_of(1) == "The sky is" + choices[reply.index]


def test_two_thousand_choices_are_scored_in_a_pool_that_holds_a_fraction_of_them() -> None:
    client = Client(pages=64, token_budget=100)
    client.branch(1, Text("The answer is"))
    choices = [f" {a} and {b} or {c}" for a in range(20) for b in range(10) for c in range(10)]
    op = client.send(Select, branch=1, choices=choices)
    client.run()
    reply = client.last(op, Selected)
    ids = [[token.token_id for token in row] for row in reply.logprobs]
    nodes = {tuple(row[:end]) for row in ids for end in range(1, len(row))}
    assert len(nodes) > 64 * 4, "all at once would not fit"
    assert reply.usage.computed_tokens - len(nodes) == reply.usage.prompt_tokens - len(nodes)
    assert reply.usage.computed_tokens < len(nodes) + 10
    assert client.runner.num_computed == reply.usage.computed_tokens
    assert reply.index == max(range(2000), key=lambda i: (reply.scores[i], -i))
    assert sum(reply.distribution) == pytest.approx(1)
    for index in (0, 1, 999, 1999):
        context = client.session.branches[1].log.array()[: -len(ids[reply.index])].tolist()
        values = [token.logprob for token in reply.logprobs[index]]
        assert values == [logprob([*context, *ids[index][:j]], ids[index][j]) for j in range(len(ids[index]))]


def test_a_select_at_a_temperature_draws_from_its_distribution_with_the_branchs_seed() -> None:
    drawn = []
    for _ in range(2):
        client = Client(pages=512)
        client.branch(1, Text("The sky is"))
        client.send(Fork, branch=1, children=list(range(2, 302)))
        ops = [
            client.send(Select, branch=branch, choices=[" blue", " red", " a b"], temperature=0.5)
            for branch in range(2, 302)
        ]
        client.run()
        replies = [client.last(op, Selected) for op in ops]
        drawn.append([reply.index for reply in replies])
    assert drawn[0] == drawn[1], "the same program draws the same"
    sums = [sum(token.logprob for token in row) / 0.5 for row in replies[0].logprobs]
    weights = np.exp(np.array(sums) - max(sums))
    assert replies[0].distribution == pytest.approx((weights / weights.sum()).tolist())
    shares = np.bincount(drawn[0], minlength=3) / 300
    assert shares == pytest.approx(replies[0].distribution, abs=4 * (0.25 / 300) ** 0.5), "four standard deviations"


def test_a_temperature_out_of_range_is_refused(client: Client) -> None:
    client.branch(1, Text("The sky is"))
    op = client.send(Select, branch=1, choices=[" blue"], temperature=-0.5)
    failure = client.last(op, Failed)
    assert (failure.kind, failure.details["field"]) == ("invalid_request", "temperature")


def test_score_appends_nothing(client: Client) -> None:
    client.branch(1, Text("The sky is"))
    op = client.send(Score, branch=1, choices=[" blue", " red"], method="unconditional_likelihood_normalized")
    client.run()
    reply = client.last(op, Selected)
    assert reply.unconditional is not None
    assert client.text_of(1) == "The sky is"


def test_the_seam_before_a_choice_is_tokenised_as_one_text(client: Client) -> None:
    client.branch(1, Text("The answ"))
    op = client.send(Select, branch=1, choices=["er", "ering"])
    client.run()
    reply = client.last(op, Selected)
    client.send(Extend, branch=1, parts=[], commit=True)
    chosen = ["er", "ering"][reply.index]
    assert client.session.branches[1].log.array().tolist() == TOKENIZER.encode("The answ" + chosen)


@pytest.mark.parametrize(
    ("choices", "message"),
    [([], "between 1 and"), (["a", ""], "empty"), (["a", "a"], "distinct")],
)
def test_bad_choices_are_refused(client: Client, choices: list[str], message: str) -> None:
    client.branch(1, Text("x"))
    op = client.send(Select, branch=1, choices=choices)
    client.run()
    assert message in client.last(op, Failed).message


def test_a_branch_without_text_cannot_generate(client: Client) -> None:
    client.send(Open, branch=1)
    gen = client.generate(1)
    client.run()
    assert "at least one token" in client.last(gen, Failed).message


def test_rollback_cuts_tokens_roles_and_failures(client: Client) -> None:
    client.branch(1, RoleBegin("user"), Text("Hello"), RoleEnd())
    client.send(Extend, branch=1, parts=[RoleBegin("assistant")])
    mark = client.last(client.send(Extend, branch=1, parts=[], commit=True), Extended).length
    before = client.text_of(1)
    client.send(Extend, branch=1, parts=[Text("no"), RoleEnd(), RoleEnd()])
    back = client.send(Rollback, branch=1, length=mark)
    assert client.last(back, Extended).length == mark
    assert client.text_of(1) == before
    gen = client.generate(1)
    client.send(Extend, branch=1, parts=[RoleEnd()])
    client.run()
    client.last(gen, Generated)
    too_far = client.send(Rollback, branch=1, length=10_000)
    assert "length must be between 0 and" in client.last(too_far, Failed).message


@pytest.mark.parametrize("steps", range(5))
def test_cancel_at_any_step_ends_everything_below_a_branch_and_returns_all_pages(steps: int) -> None:
    client = Client(max_running=2, token_budget=4)
    client.branch(1, Text("Some text to start from"))
    gen = client.generate(1, max_tokens=6)
    client.send(Fork, branch=1, children=[2, 3])
    children = [client.generate(child) for child in (2, 3)]
    later = client.generate(1)
    for _ in range(steps):
        client.engine.step()
    cancel = client.send(Cancel, branch=1)
    client.run()
    assert client.last(cancel, Cancelled).count >= 1
    for op in (gen, later, *children):
        assert client.last(op, Failed).kind in ("cancelled", "dependency_failed")
    assert client.engine.num_unfinished == 0
    client.scheduler.cache.flush()
    assert client.scheduler.cache.allocator.num_free == 64


def test_cancelling_one_operation_leaves_strangers_alone(client: Client) -> None:
    client.branch(1, Text("a b c"))
    client.branch(2, Text("d e f"))
    doomed, other = client.generate(1, max_tokens=50), client.generate(2)
    client.engine.step()
    cancel = client.send(Cancel, target=doomed)
    client.run()
    assert client.last(cancel, Cancelled).count == 1
    assert client.last(doomed, Failed).details["partial_text"]
    client.last(other, Generated)
    assert client.last(client.send(Cancel, target=doomed), Cancelled).count == 0


def test_an_operation_past_its_deadline_fails_with_a_timeout(client: Client) -> None:
    client.branch(1, Text("a b c"))
    gen = client.generate(1, max_tokens=200, timeout_s=2.0)
    client.engine.step()
    client.clock.now = 2.5
    client.run()
    assert client.last(gen, Failed).kind == "timeout"
    assert client.engine.num_unfinished == 0


def test_every_operation_gets_exactly_one_terminal_reply(client: Client) -> None:
    client.branch(1, Text("text"))
    client.generate(1, stream=True)
    client.send(Fork, branch=1, children=[2])
    client.send(Fork, branch=1, children=[2])
    client.send(Release, branches=[1, 2, 99])
    client.generate(1)
    client.send(Stat)
    client.run()
    for op in range(1, client._op + 1):
        assert sum(not isinstance(reply, Delta) for reply in client.replies[op]) == 1, client.replies[op]


def test_a_repeated_operation_id_is_refused_not_repeated(client: Client) -> None:
    client.send(Open, branch=1)
    client.engine.handle(client.session, Open(op=1, branch=2), ())
    client.collect()
    assert [type(reply) for reply in client.replies[1]] == [Ok, Failed]
    assert 2 not in client.session.branches


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Open, {"branch": 1}),
        (Fork, {"branch": 1, "children": []}),
        (Fork, {"branch": 1, "children": [5, 5]}),
        (Fork, {"branch": 1, "children": [1]}),
        (Fork, {"branch": 9, "children": [5]}),
        (Generate, {"branch": 9, "params": SamplingParams()}),
        (Cancel, {}),
        (Open, {"branch": -1}),
        (Fork, {"branch": 1, "children": [-5]}),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_and_changes_nothing(
    client: Client, kind: Any, fields: dict[str, Any]
) -> None:
    client.branch(1, Text("x"))
    assert client.last(client.send(kind, **fields), Failed).kind in ("invalid_request", "protocol")
    assert list(client.session.branches) == [1]


def test_a_client_that_goes_takes_all_it_held_with_it(client: Client) -> None:
    client.branch(1, Text("a b c"))
    client.generate(1, max_tokens=50)
    client.send(Fork, branch=1, children=[2, 3])
    client.generate(2)
    client.engine.step()
    client.engine.close(client.session)
    assert not client.session.branches
    assert client.engine.num_unfinished == 0
    assert not client.engine.has_work
    client.scheduler.check_invariants()
    assert client.engine.stats()["num_branches"] == 0


def test_a_step_that_raises_fails_its_operations_and_the_loop_goes_on(
    either: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    either.branch(1, Text("a b c"))
    gen = either.generate(1)
    with monkeypatch.context() as patch:
        patch.setattr(either.runner, "execute", lambda batch: 1 / 0)
        either.engine.step()
    assert either.last(gen, Failed).kind == "internal"
    assert "a step failed" in caplog.text
    either.branch(2, Text("a b c"))
    again = either.generate(2)
    either.run()
    either.last(again, Generated)


def test_a_stop_pattern_that_takes_too_long_fails_its_operation_only(client: Client) -> None:
    client.branch(1, Text("a" * 50))
    bomb = client.generate(1, max_tokens=300, stop_regex=("(?:.|.|..)*\\x01",))
    client.branch(2, Text("b"))
    other = client.generate(2)
    client.run()
    assert "stop_regex" in client.last(bomb, Failed).message
    client.last(other, Generated)


def test_more_than_the_queue_holds_is_refused_with_a_hint_when_to_come_back() -> None:
    client = Client(max_waiting=3)
    client.branch(1, Text("a"))
    client.generate(1)
    ops = [client.generate(1) for _ in range(5)]
    refused = client.last(ops[-1], Failed)
    assert refused.kind == "overloaded"
    assert refused.details["retry_after_s"]
    client.run()
    client.last(ops[0], Generated)


def test_a_draining_runtime_finishes_what_runs_and_takes_nothing_new(client: Client) -> None:
    client.branch(1, Text("a b c"))
    gen = client.generate(1)
    drain = client.send(Drain)
    assert client.last(client.send(Open, branch=5), Failed).kind == "overloaded"
    client.run()
    client.last(gen, Generated)
    assert client.engine.num_unfinished == 0
    client.engine.end_drains()
    client.last(drain, Ok)


def test_two_sessions_of_different_tenants_share_nothing_in_the_cache(client: Client) -> None:
    client.branch(1, Text("a secret prompt that the other tenant guesses"))
    client.generate(1)
    client.run()
    client.session = Session(b"other", "two", "other", 0.0)
    client.branch(1, Text("a secret prompt that the other tenant guesses"))
    gen = client.generate(1)
    client.run()
    assert client.last(gen, Generated).usage.cached_tokens == 0


def test_the_same_program_draws_the_same_seeds_and_forks_draw_different_ones(client: Client) -> None:
    def seeds(one: Client) -> list[int]:
        one.branch(1, Text("x"))
        one.send(Fork, branch=1, children=[2, 3])
        for branch in (1, 2, 3, 1):
            one.generate(branch, max_tokens=1)
        one.run()
        return [row.sample.seed for batch in one.runner.batches for row in batch.rows if row.sample]

    first, second = seeds(client), seeds(Client())
    assert first == second
    assert len(set(first)) == 4


def test_stats_hold_every_name_that_programs_rely_on(client: Client) -> None:
    stats = client.last(client.send(Stat), Stats).values
    assert {
        "prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens", "total_pages", "free_pages",
        "cached_pages", "num_nodes", "num_branches", "num_running", "num_waiting", "steps", "evictions", "preemptions",
    } <= set(stats)  # fmt: skip


def test_a_fork_behind_the_release_of_its_parent_ends_with_all_that_waits_for_it(client: Client) -> None:
    client.branch(1, Text("x"))
    client.generate(1)
    client.send(Release, branches=[1])
    fork = client.send(Fork, branch=1, children=[2])
    waiting = client.send(Extend, branch=2, parts=[Text("y")])
    client.run()
    assert "was released before" in client.last(fork, Failed).message
    assert client.last(waiting, Failed).kind == "dependency_failed"
    assert client.engine.num_unfinished == 0


def test_an_operation_that_failed_before_its_deadline_leaves_no_deadline_behind(client: Client) -> None:
    client.branch(1, RoleEnd())
    client.generate(1, timeout_s=1.0)
    client.clock.now = 5.0
    client.engine.step()
    assert client.engine.next_deadline() is None


def test_a_fork_beyond_the_limit_of_branches_leaves_no_unborn_children() -> None:
    client = Client(max_branches=2)
    client.send(Open, branch=1)
    fork = client.send(Fork, branch=1, children=[2, 3])
    assert client.last(fork, Failed).kind == "overloaded"
    assert "branch 2 is not open" in client.last(client.send(Extend, branch=2, parts=[]), Failed).message


def test_what_was_sent_before_a_cancelled_operation_does_not_depend_on_it(client: Client) -> None:
    client.branch(1, Text("a b c"))
    first = client.generate(1)
    before = client.send(Extend, branch=1, parts=[Text(" and")])
    client.send(Fork, branch=1, children=[2])
    child = client.generate(2)
    doomed = client.generate(1)
    after = client.generate(1)
    client.send(Cancel, target=doomed)
    client.run()
    for op in (first, child):
        client.last(op, Generated)
    client.last(before, Extended)
    assert client.last(after, Failed).cause == doomed


def test_a_rollback_sent_before_a_cancelled_operation_does_not_heal_it(client: Client) -> None:
    client.branch(1, Text("a b c"))
    client.generate(1)
    client.send(Rollback, branch=1, length=1)
    doomed = client.send(Extend, branch=1, parts=[Text(" more")])
    dependent = client.generate(1)
    client.send(Cancel, target=doomed)
    client.run()
    assert client.last(dependent, Failed).cause == doomed


def corrupt_tree(client: Client) -> None:
    next(client.scheduler.cache.tree.nodes()).locks += 1


def corrupt_holders(client: Client) -> None:
    holders = client.scheduler.cache.allocator._holders
    holders[:] = [0] * len(holders)


def corrupt_free_list(client: Client) -> None:
    client.scheduler.cache.allocator._free.append(client.scheduler.cache.allocator._free[0])


@pytest.mark.parametrize("corrupt", [corrupt_tree, corrupt_holders, corrupt_free_list])
def test_broken_bookkeeping_is_counted_and_healed_and_no_answer_changes(
    corrupt: Callable[[Client], None], caplog: pytest.LogCaptureFixture
) -> None:
    def answers(one: Client) -> list[str]:
        return [one.last(gen, Generated).text for gen in gens]

    expected: list[str] = []
    for is_broken in (False, True):
        client = Client()
        client.branch(1, Text("Some text that is cached for later."))
        client.generate(1)
        client.run()
        client.branch(2, Text("Some text that is cached for later. And more of it."))
        client.branch(3, Text("Other text."))
        gens = [client.generate(2, max_tokens=12), client.generate(3, max_tokens=12)]
        for _ in range(4):
            client.engine.step()
        if is_broken:
            corrupt(client)
            client.engine.check()
            assert client.engine.stats()["rebuilds"] == 1
            assert "the cache is rebuilt" in caplog.text
        client.run()
        expected = expected or answers(client)
    assert answers(client) == expected


def test_a_plan_that_raises_heals_the_cache_instead_of_ending_the_loop(
    either: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    either.branch(1, Text("Some text."))
    gen = either.generate(1, max_tokens=12)
    either.engine.step()
    either.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(either.scheduler.cache.allocator, "begin_step", lambda: 1 / 0)
        either.engine.step()
    either.run()
    assert either.engine.stats()["rebuilds"] == 1
    assert either.last(gen, Generated).usage.completion_tokens == 12


def test_a_commit_that_raises_costs_the_operations_of_its_step_only(
    either: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    either.branch(1, Text("Some text."))
    gen = either.generate(1, max_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr(either.scheduler.cache, "publish", lambda *args: 1 / 0)
        either.engine.step()
    assert either.last(gen, Failed).kind == "internal"
    either.branch(2, Text("Some text."))
    other = either.generate(2)
    either.run()
    either.last(other, Generated)


def test_a_select_that_is_preempted_between_chunks_of_a_choice_scores_each_token_once() -> None:
    scores = []
    for is_disturbed in (False, True):
        client = Client(token_budget=3, max_running=1)
        client.branch(1, Text("The sky is"))
        op = client.send(Select, branch=1, choices=[" a long choice of many tokens", " blue"])
        client.engine.step()
        client.engine.step()
        client.engine.step()
        if is_disturbed:
            client.scheduler.preempt(client.scheduler.running[0])
            client.scheduler.cache.flush()
        client.run()
        scores.append(client.last(op, Selected).logprobs)
    assert scores[0] == scores[1]


def test_a_plan_that_raises_every_time_ends_its_operations_rather_than_retry_for_ever(
    either: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    either.branch(1, Text("Some text."))
    gen = either.generate(1, max_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr(either.scheduler, "_admit", lambda *args: 1 / 0)
        either.engine.step()
        either.engine.step()
    assert either.last(gen, Failed).kind == "internal"
    assert either.engine.num_unfinished == 0
    either.branch(2, Text("Some text."))
    other = either.generate(2)
    either.run()
    either.last(other, Generated)
