"""Record and replay: a journal repeats every plan off-line, and a failing one shrinks to what matters."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from fakes import FakeClock, FakeRunner

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.drafts import DraftCosts
from bough.runtime.engine import Engine
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.inflight import InFlight
from bough.runtime.journal import Journal, RecordingExecutor, read_events
from bough.runtime.models.folder import resolve_model
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    Cancel,
    Extend,
    Fork,
    Generate,
    Grammar,
    Open,
    Release,
    Request,
    RequestError,
    SamplingParams,
    Select,
    Text,
    decode_request,
    encode_request,
)
from bough.runtime.replay import Diverged, breaks_an_invariant, replay, shrink
from bough.runtime.scheduler import Scheduler
from bough.runtime.session import Session
from bough.runtime.speculation import Speculator
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tokenizer import load_tokenizer

CONFIG = RuntimeConfig(token_budget=12, max_running=3)
COSTS = DraftCosts(row=0.2, draft=0.03, look=0.004)
PAGES, PAGE_SIZE, CONTEXT_LEN, SEED = 24, 4, 200, 5


def record(path: Path, requests: Sequence[Request], *, clock_step: float = 0.0, speculate: bool = False) -> list[str]:
    """Run `requests` on a journalled engine with a fake model, some steps between them; return the texts."""
    tokenizer, clock = load_tokenizer(resolve_model("pocket")), FakeClock()
    grammars = GrammarCompiler(Vocabulary(tokenizer, tokenizer.vocab_size), is_deferred=True)
    cache = PrefixCache(PAGES, PAGE_SIZE)
    speculator = Speculator(CONTEXT_LEN, costs=COSTS) if speculate else None
    scheduler = Scheduler(cache, token_budget=12, max_running=3, clock=clock, speculator=speculator)
    composer = Composer(
        Prompter(tokenizer, load_chat_template(resolve_model("pocket")), "pocket"),
        vocab_size=tokenizer.vocab_size,
        context_len=CONTEXT_LEN,
        seed=SEED,
        credit=CONFIG.credit,
        grammars=grammars,
    )
    runner = FakeRunner(PAGES, PAGE_SIZE, vocab_size=tokenizer.vocab_size)
    session = Session(b"me", "local", "test", 0.0)
    with Journal(path) as journal:
        facts = {"model": "pocket", "version": "0", "seed": SEED, "epoch": 1, "page_size": PAGE_SIZE}
        sizes = {"num_pages": PAGES, "vocab_size": tokenizer.vocab_size, "context_len": CONTEXT_LEN}
        costs = {"draft_costs": dataclasses.asdict(COSTS)}
        journal.start(dataclasses.replace(CONFIG, speculate=speculate), **facts, **sizes, **costs)
        journal.hello(0.0, b"me", "local", "test")
        in_flight = InFlight(scheduler, RecordingExecutor(runner, journal), credit=CONFIG.credit, clock=clock)
        on_compiled = journal.compiled
        engine = Engine(CONFIG, scheduler, in_flight, composer, epoch=1, clock=clock, on_compiled=on_compiled)

        def turn() -> None:
            if engine.next_deadline() is not None:
                journal.tick(clock.now)
            engine.step(clock.now)
            clock.now += clock_step

        for request in requests:
            frames = [bytes(frame) for frame in encode_request(request)]
            journal.request(clock.now, b"me", frames)
            engine.handle(session, *decode_request(frames), clock.now)
            turn()
        for request in requests:
            grammar = request.grammar if isinstance(request, Generate) else None
            if grammar is not None:  # compiled at some later time, one of them not
                error = RequestError("invalid_request", "too complex") if grammar.kind == "regex" else None
                grammars.complete(GrammarKey(grammar.kind, grammar.source, ""), error)
                turn()
        while engine.has_work:
            turn()
    replies = [reply for message in session.take_outbox() for reply in message.replies]
    return [getattr(reply, "text", "") for reply in replies]


def program(timeout_s: float | None = None) -> list[Request]:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return [
        Open(op=1, branch=1),
        Extend(op=2, branch=1, parts=[Text("A prompt that three branches share, long enough to be chunked.")]),
        Fork(op=3, branch=1, children=[2, 3, 4]),
        *[Generate(op=10 + b, branch=b, params=params, timeout_s=timeout_s) for b in (1, 2, 3, 4)],
        Select(op=20, branch=2, choices=[" yes", " no, not at all"]),
        Cancel(op=21, target=13),
        Release(op=22, branches=[4]),
        Generate(op=23, branch=2, params=params),
    ]


def test_a_replay_plans_every_step_as_it_was(tmp_path: Path) -> None:
    record(tmp_path / "log", program())
    steps = sum(event[0] == "step" for event in read_events(tmp_path / "log"))
    assert steps > 10
    assert replay(tmp_path / "log") == steps


def test_a_replay_drafts_what_was_drafted(tmp_path: Path) -> None:
    texts = [
        record(tmp_path / str(speculate), [*program(), *again()], speculate=speculate) for speculate in (False, True)
    ]
    assert texts[0][-1] == texts[1][-1] == texts[0][texts[0].index(texts[0][-1])]
    steps = [[event for event in read_events(tmp_path / name) if event[0] == "step"] for name in ("False", "True")]
    assert sum(len(result) > 4 for _, _, results in steps[1] for result in results) > 1, "no draft came true"
    assert len(steps[1]) < len(steps[0])
    assert replay(tmp_path / "True") == len(steps[1])


def again() -> list[Request]:
    """The same prompt and the same generation once more, for the tree to know."""
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    twice = [(50, 51, 52), (60, 61, 62)]
    return [
        request
        for opened, extended, generated in twice
        for request in (
            Open(op=opened, branch=opened),
            Extend(op=extended, branch=opened, parts=[Text("A prompt that is said twice.")]),
            Generate(op=generated, branch=opened, params=params),
        )
    ]


def test_a_replay_compiles_grammars_when_they_were_compiled(tmp_path: Path) -> None:
    base = program()
    params = SamplingParams(max_tokens=30)
    source = '{"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}'
    grammars = [Grammar(kind="json_schema", source=source), Grammar(kind="regex", source="(ab)+c")]
    asked = [Generate(op=30 + b, branch=b, params=params, grammar=g) for b, g in zip((1, 3), grammars, strict=True)]
    texts = record(tmp_path / "log", [*base, *asked])
    assert any(text.startswith('{"a": ') for text in texts)
    kinds = [event[0] for event in read_events(tmp_path / "log")]
    assert kinds.count("compiled") == 2
    assert replay(tmp_path / "log") == kinds.count("step")


def test_a_replay_repeats_deadlines_too(tmp_path: Path) -> None:
    record(tmp_path / "log", program(timeout_s=7.0), clock_step=1.0)
    assert any(event[0] == "tick" for event in read_events(tmp_path / "log"))
    replay(tmp_path / "log")


def test_a_journal_is_private_is_never_overwritten_and_plain_msgpack(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, program())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RequestError, match="cannot be made"):
        Journal(path)
    with path.open("rb") as file:
        kinds = {event[0] for event in msgpack.Unpacker(file)}
    assert kinds == {"start", "hello", "request", "step"}


def test_a_journal_cut_short_by_a_kill_replays_up_to_its_last_whole_event(tmp_path: Path) -> None:
    record(tmp_path / "log", program())
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) * 2 // 3])
    assert 0 < replay(tmp_path / "cut") < replay(tmp_path / "log")


def tampered(path: Path, change: Any) -> Path:
    events = list(read_events(path))
    change(events)
    path.with_suffix(".bad").write_bytes(b"".join(map(msgpack.packb, events)))
    return path.with_suffix(".bad")


def test_a_replay_names_the_first_step_that_differs(tmp_path: Path) -> None:
    record(tmp_path / "log", program())

    def swap(events: list[list[Any]]) -> None:
        third = [event for event in events if event[0] == "step"][2]
        third[1] = bytes(16)

    with pytest.raises(Diverged, match="step 3"):
        replay(tampered(tmp_path / "log", swap))


def test_a_missing_request_is_noticed(tmp_path: Path) -> None:
    record(tmp_path / "log", program())

    def drop(events: list[list[Any]]) -> None:
        del events[4]

    with pytest.raises(Diverged):
        replay(tampered(tmp_path / "log", drop))


def test_a_failing_journal_shrinks_to_the_requests_that_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is planted that breaks an invariant when a generation is cancelled; three requests and a step show it."""
    record(tmp_path / "log", program())
    start, *events = read_events(tmp_path / "log")
    assert not breaks_an_invariant(start[1], events)
    monkeypatch.setattr(Scheduler, "finish", _leaky_finish)
    assert breaks_an_invariant(start[1], events)
    small = shrink(events, lambda fewer: breaks_an_invariant(start[1], fewer))
    assert breaks_an_invariant(start[1], small)
    assert len(small) < len(events) / 3


def _leaky_finish(self: Scheduler, sequence: Any) -> None:
    if sequence in self.running:
        self.running.remove(sequence)  # and its lease is forgotten
    self._waiting.pop(sequence, None)
    sequence.status = type(sequence.status).FINISHED


def test_scores_and_log_probabilities_survive_the_journal_to_the_bit(tmp_path: Path) -> None:
    value = np.nextafter(-1.0, 0.0)
    assert msgpack.unpackb(msgpack.packb([value.item()])) == [value]
