"""The parts of constrained generation alone: trials of hostile grammars, masks on logits, prefixes, ways to the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from grammar_engine import TOKENIZER, VOCABULARY, GrammarEngine
from processes import wait_until

from bough import lark_source
from bough.grammars import rx, until
from bough.runtime.batch import SampleRequest
from bough.runtime.grammar import closing
from bough.runtime.grammar.closing import closing_path
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.healing import PrefixConstraint
from bough.runtime.grammar.limits import Limits
from bough.runtime.grammar.masks import Masks
from bough.runtime.grammar.matching import GrammarConstraint
from bough.runtime.grammar.source import JSON_STYLE, literals_of
from bough.runtime.grammar.vetting import Vetter
from bough.runtime.protocol import Failed, Generated, Grammar, RequestError, SamplingParams
from bough.runtime.sampler import sample

DEEP = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(3000)) + '\nr3000: "b"'
NONE = np.zeros(0, dtype=np.int32)
Held: TypeAlias = GrammarConstraint | PrefixConstraint


def constraint(source: str, compiler: GrammarCompiler | None = None) -> GrammarConstraint:
    grammar = Grammar(kind="regex", source=source)
    matcher = (compiler or GrammarCompiler(VOCABULARY)).find(GrammarKey("regex", source, ""))
    assert matcher is not None
    return GrammarConstraint(grammar, matcher, VOCABULARY, 100, ignore_eos=False)


def request(held: Held | None, **params: float) -> SampleRequest:
    return SampleRequest(SamplingParams(**params), 3, 9, NONE, NONE, (), held)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- trials


@pytest.fixture(scope="module")
def vetter() -> Iterator[Vetter]:
    vetter = Vetter(Limits(compile_s=1.0, memory_bytes=256 << 20), VOCABULARY)
    yield vetter
    vetter.close()


def test_a_grammar_that_overflows_the_stack_ends_its_trial_and_nothing_else(vetter: Vetter) -> None:
    compiler = GrammarCompiler(VOCABULARY, Limits(), vetter.vet)
    engine = GrammarEngine(compiler=compiler)
    bomb = engine.ask("x", Grammar(kind="lark", source=DEEP))
    other = engine.generate(engine.branch("other"), max_tokens=50, ignore_eos=True)
    good = engine.ask("y", Grammar(kind="regex", source="[0-9]{3}"))
    engine.run()
    assert engine.last(other, Generated).usage.completion_tokens == 50, "steps go on while grammars are tried out"

    def is_compiled() -> bool:
        engine.engine.take_compiled()
        return engine.engine.num_compiling == 0

    wait_until(is_compiled, 30, "verdicts")
    engine.run()
    failed = engine.last(bomb, Failed)
    assert (failed.kind, failed.details["reason"]) == ("invalid_request", "too_complex")
    assert re.fullmatch("[0-9]{3}", engine.last(good, Generated).text)
    compiler.close()


def test_trials_say_what_is_wrong_and_end_when_their_time_is_over(vetter: Vetter) -> None:
    lark = '{"grammars": [{"lark_grammar": "start: /%s/"}]}'
    assert vetter.vet(lark % "[a-z]+") == ""
    assert "unclosed group" in vetter.vet(lark % "(a")
    hurried = Vetter(Limits(compile_s=1e-6), VOCABULARY)
    try:
        assert "takes longer" in hurried.vet(lark % "[a-z]+")
    finally:
        hurried.close()
    assert hurried.vet(lark % "a").startswith("!"), "its process is gone: said, not waited for"


def test_too_many_grammars_at_once_are_refused() -> None:
    compiler = GrammarCompiler(VOCABULARY, Limits(max_pending=2), is_deferred=True)
    for source in "ab":
        assert compiler.find(GrammarKey("regex", source, "")) is None
    with pytest.raises(RequestError, match="the limit is 2") as raised:
        compiler.find(GrammarKey("regex", "c", ""))
    assert raised.value.kind == "overloaded"


def test_the_cache_of_grammars_is_bounded_and_keeps_what_is_used() -> None:
    compiler = GrammarCompiler(VOCABULARY, most=3)
    for source in "abcadae":
        compiler.find(GrammarKey("regex", source, ""))
    assert compiler.num_compiled == 5
    compiler.find(GrammarKey("regex", "a", ""))
    assert compiler.num_compiled == 5
    compiler.find(GrammarKey("regex", "b", ""))
    assert compiler.num_compiled == 6


# ----------------------------------------------------------------------------------------- masks


def test_masked_logits_are_minus_infinity_exactly_where_the_constraint_says_so() -> None:
    held: list[Held | None] = [
        constraint("[0-9]+x"),
        PrefixConstraint(VOCABULARY, TOKENIZER.encode(" t")[-1:]),
        None,
        constraint("yes|no"),
    ]
    requests = [request(one) for one in held]
    size = TOKENIZER.vocab_size
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(4, size)).astype(np.float32))
    masks = Masks()
    for _ in range(2):  # filled, then from the cache
        result = logits.clone()
        masks.apply(result, requests)
        for row, one in enumerate(held):
            words = np.full(VOCABULARY.num_words, 0xFFFFFFFF, dtype=np.uint32)
            if one is not None:
                one.fill(words)
            allowed = torch.from_numpy(np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(bool))
            assert torch.equal(result[row][allowed], logits[row][allowed])
            assert bool((result[row][~allowed] == -torch.inf).all())
    assert not bool((result[0] == -torch.inf).all())


def test_a_draw_under_a_mask_is_the_distribution_restricted_and_scaled() -> None:
    """4,000 draws of ten digits whose logits are known; every other token is far likelier and never drawn."""
    digits = [TOKENIZER.encode(d, at_start=False)[0] for d in "0123456789"]
    logits = torch.full((1, TOKENIZER.vocab_size), 50.0)
    logits[0, digits] = torch.arange(10, dtype=torch.float32) / 4
    count = 4000
    compiler = GrammarCompiler(VOCABULARY)
    rows = [
        SampleRequest(SamplingParams(), seed, 5, NONE, NONE, (), constraint("[0-9]", compiler)) for seed in range(count)
    ]
    drawn = [draw.token for draw in sample(logits.repeat(count, 1), rows, Masks())]
    expected = torch.softmax(logits[0, digits], 0).numpy()
    found = np.array([drawn.count(digit) for digit in digits]) / count
    assert set(drawn) <= set(digits)
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / count)


def test_a_matcher_that_gave_up_does_not_make_the_step_fail() -> None:
    held = constraint("ab")
    assert not held.matcher.consume_token(TOKENIZER.encode("z", at_start=False)[0])
    draw = sample(torch.zeros(1, TOKENIZER.vocab_size), [request(held, temperature=0.0)], Masks())[0]
    with pytest.raises(RequestError, match="cannot go on"):
        held.advance(draw.token)


# ----------------------------------------------------------------------------------------- prefixes


def test_prefix_masks_are_those_of_a_plain_search() -> None:
    for prefix in (b" t", b"th", b" ", b"zzzz", b"\xc3"):
        words = VOCABULARY.beginning_with(prefix, 5)
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        tokens = [t for t in range(TOKENIZER.vocab_size) if t not in VOCABULARY.special_ids]
        assert bits == sorted({5, *(t for t in tokens if TOKENIZER.token_bytes(t).startswith(prefix))})
        assert VOCABULARY.begins_longer(prefix) == any(
            TOKENIZER.token_bytes(t).startswith(prefix) and len(TOKENIZER.token_bytes(t)) > len(prefix) for t in tokens
        )


def test_only_tokens_that_a_longer_one_begins_with_are_taken_off() -> None:
    ids = TOKENIZER.encode("Once upon a t")
    assert VOCABULARY.back_off(ids, len(ids)) >= 1
    assert VOCABULARY.back_off(ids, 0) == 0
    assert VOCABULARY.back_off(ids[:1], 1) == 0, "something has to come before what is drawn"
    assert VOCABULARY.back_off([*ids, TOKENIZER.eos_ids[0]], 4) == 0, "a control token is no text"


@pytest.mark.parametrize(
    ("kind", "source", "whole"),
    [
        ("regex", "[a-z]{10}x", "[a-z]{10}x"),
        ("regex", "a{3}b*c(d|e){4}", "a{3}b*c(d|e){4}"),
        ("regex", r"[A-Z][a-z]+( [A-Z][a-z]+)*\.", r"[A-Z][a-z]+( [A-Z][a-z]+)*\."),
        ("lark", 'start: e\ne: "(" e ")" | N | e "+" e\nN: /[0-9]{3}/', "[0-9]{3}"),
        ("json_schema", '{"type": "string", "format": "email"}', '".+@.+"'),
        ("json_schema", '{"type": "string", "pattern": "^a.*z$"}', '"a.*z"'),
        ("choices", '["abc", "x"]', "abc|x"),
        ("lark", (until("</think>") + "</think>").to_lark(), "(?s:.*)</think>"),
        ("lark", ("A: " + until("</a>") + "</a>" + rx("[0-9]") + "END").to_lark(), "A: (?s:.*)</a>[0-9]END"),
    ],
)
def test_the_way_to_the_end_ends_in_a_whole_text(kind: str, source: str, whole: str) -> None:
    matcher = GrammarCompiler(VOCABULARY).find(GrammarKey(kind, source, ""))
    assert matcher is not None
    path = closing_path(matcher, VOCABULARY, literals_of(Grammar(kind=kind, source=source)))  # type: ignore[arg-type]
    assert path is not None
    assert len(path) <= 40
    assert re.fullmatch(whole, TOKENIZER.decode(path, at_start=False))


def test_a_way_that_is_known_is_gone_on_with_instead_of_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    items = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    names = [f"f{i}" for i in range(20)]
    schema = {"type": "object", "properties": dict.fromkeys(names, items), "required": names}
    compiler, key = GrammarCompiler(VOCABULARY), GrammarKey("json_schema", json.dumps(schema), "")
    matcher = compiler.find(key)
    assert matcher is not None
    searches: list[object] = []
    choice = closing._choice

    def counted(*given: Any) -> Any:
        searches.append(given)
        return choice(*given)

    monkeypatch.setattr(closing, "_choice", counted)
    way = compiler.way_to_end(key)
    assert way is not None
    num_first = len(searches)
    assert num_first > 20
    assert compiler.way_to_end(key) == way
    ahead = matcher.deep_copy()
    ahead.consume_tokens(TOKENIZER.encode('{"f0": {"a": "something', at_start=False))
    found = closing_path(ahead, VOCABULARY, (), way)
    assert found is not None
    assert len(searches) == num_first, "neither was searched for"
    assert ahead.try_consume_tokens(found) == len(found)
    assert ahead.is_accepting()


def test_a_way_is_searched_for_only_to_where_it_meets_the_known_one() -> None:
    source = (
        '{"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}'
    )
    matcher = GrammarCompiler(VOCABULARY).find(GrammarKey("json_schema", source, ""))
    assert matcher is not None
    ahead = matcher.deep_copy()
    ahead.consume_tokens(TOKENIZER.encode("[", at_start=False))
    known = closing_path(ahead, VOCABULARY)
    assert known == TOKENIZER.encode("]", at_start=False)
    ahead.consume_tokens(TOKENIZER.encode('{"a', at_start=False))  # what was drawn leads away from it
    found = closing_path(ahead, VOCABULARY, (), known)
    assert found is not None
    assert re.fullmatch(r'": ?"[^"]*"}]', TOKENIZER.decode(found, at_start=False))


def test_a_budget_that_ends_within_free_text_closes_it_by_its_literal() -> None:
    source = (until("</think>") + "</think>").to_lark()
    engine = GrammarEngine()
    grammar = Grammar(kind="lark", source=source, on_limit="close")
    replies = [engine.answer(f"{i}", grammar, max_tokens=12 + i) for i in range(4)]
    assert all(reply.is_whole and reply.text.endswith("</think>") for reply in replies)
    assert all(reply.usage.completion_tokens <= 12 + i for i, reply in enumerate(replies))


STRUCTURE = frozenset(b'",:[]{} 0123456789a')


def test_a_text_is_closed_in_time_however_much_longer_a_few_tokens_make_the_way() -> None:
    """Behind a value the way to the end is one token; behind the next key's first quote it is six."""
    schema = {
        "type": "object",
        "additionalProperties": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    }
    compiler = GrammarCompiler(VOCABULARY)
    source = json.dumps(schema)
    grammar = Grammar(kind="json_schema", source=source, on_limit="close")
    matcher = compiler.find(GrammarKey("json_schema", source, ""))
    assert matcher is not None
    pieces = [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)]
    structural = np.array([bool(piece) and set(piece) <= STRUCTURE for piece in pieces])
    random = np.random.default_rng(0)
    num_closed = 0
    for budget in [*range(10, 70)] * 3:
        held = GrammarConstraint(grammar, matcher, VOCABULARY, budget, ignore_eos=True)
        ids = held.begin()
        while not held.is_ended and len(ids) < budget:
            words = np.zeros(-(-TOKENIZER.vocab_size // 32), dtype=np.uint32)
            held.fill(words)
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: TOKENIZER.vocab_size].astype(bool)
            ids += held.advance(int(random.choice(np.flatnonzero(allowed & structural))))
        json.loads(TOKENIZER.decode(ids))
        assert len(ids) <= budget
        num_closed += held.is_closed
    assert num_closed > 20


def test_json_is_written_alike_by_both_ways_to_a_grammar() -> None:
    assert JSON_STYLE == lark_source.JSON_STYLE


def test_no_schema_lets_half_of_a_surrogate_pair_be_written() -> None:
    matcher = GrammarCompiler(VOCABULARY).find(GrammarKey("json_schema", '{"type": "string"}', ""))
    assert matcher is not None
    for text, fits in (('"\\ud800"', False), ('"\\n\\\\k\u00fc"', True)):
        ids = TOKENIZER.encode(text, at_start=False)
        assert (matcher.deep_copy().try_consume_tokens(ids) == len(ids)) is fits
