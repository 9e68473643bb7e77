"""Grammars on the engine: what is generated matches, whatever else happens; forced tokens cost no steps."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fakes import allowed_ids
from grammar_engine import TOKENIZER, VOCABULARY, GrammarEngine

from bough.runtime.batch import RowResult
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.protocol import (
    Cancel,
    Extend,
    Extended,
    Failed,
    Fork,
    Generated,
    Grammar,
    GrammarKind,
    RequestError,
    RoleBegin,
    Rollback,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kinds": {"type": "array", "items": {"enum": ["oak", "elm"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kinds"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"


def of(kind: GrammarKind, source: Any, **options: Any) -> Grammar:
    return Grammar(kind=kind, source=source if isinstance(source, str) else json.dumps(source), **options)


GRAMMARS = {
    "schema": of("json_schema", SCHEMA),
    "regex": of("regex", f"The date is {DATE}, exactly\\."),
    "choices": of("choices", [" yes", " no", ' "both"\n']),
    "lark": of("lark", 'start: "[" item ("; " item)* "]"\nitem: /[a-z]{1,4}/ | start'),
}


def test_what_is_generated_matches_its_grammar() -> None:
    engine = GrammarEngine()
    for index in range(20):
        date = engine.answer(f"{index} When?", GRAMMARS["regex"])
        assert re.fullmatch(GRAMMARS["regex"].source, date.text)
        assert (date.finish_reason, date.is_whole, date.matched_stop) == ("stop", True, None)
        assert engine.answer(f"{index} So?", GRAMMARS["choices"]).text in (" yes", " no", ' "both"\n')
        value = json.loads(engine.answer(f"{index} Who?", GRAMMARS["schema"], max_tokens=200).text)
        assert list(value) == ["name", "age", "kinds"]
        assert 0 <= value["age"] <= 120


@pytest.mark.parametrize("name", GRAMMARS)
def test_jumping_over_forced_tokens_changes_the_steps_and_nothing_else(name: str) -> None:
    texts: list[list[str]] = []
    steps = []
    for jump in (True, False):
        engine = GrammarEngine()
        grammar = Grammar(kind=GRAMMARS[name].kind, source=GRAMMARS[name].source, jump_forward=jump)
        replies = [engine.answer(f"prompt {index}", grammar, temperature=0.0) for index in range(8)]
        texts.append([reply.text for reply in replies])
        steps.append(engine.scheduler.counters.steps)
        usages = [reply.usage for reply in replies]
    assert texts[0] == texts[1]
    forced = sum(usage.forced_tokens for usage in usages)
    assert steps[0] <= steps[1] - forced + len(usages)
    assert steps[0] < steps[1] or not forced


def test_a_wholly_forced_text_takes_no_step_and_streams_all_the_same() -> None:
    engine = GrammarEngine()
    op = engine.ask("Say it:", of("choices", [" I will."]), stream=True, logprobs=1)
    engine.run()
    reply = engine.last(op, Generated)
    assert (reply.text, reply.finish_reason, engine.deltas[op]) == (" I will.", "stop", " I will.")
    assert reply.usage.forced_tokens == reply.usage.completion_tokens == len(engine.buffers[op])
    assert [entry.logprob for entry in reply.logprobs or []] == [0.0] * len(engine.buffers[op])
    assert engine.scheduler.counters.steps == 0


def test_preempted_and_chunked_generations_say_what_undisturbed_ones_say() -> None:
    def texts(**options: Any) -> list[tuple[str, dict[str, str | list[str]]]]:
        engine = GrammarEngine(**options)
        ops = [engine.ask(f"{index} of some, with a longer prompt", GRAMMARS["schema"]) for index in range(6)]
        engine.run()
        assert (engine.scheduler.counters.preemptions > 0) == ("pages" in options)
        return [(engine.last(op, Generated).text, engine.last(op, Generated).captures) for op in ops]

    undisturbed = texts()
    assert texts(pages=30, usual_len=1.0) == undisturbed
    assert texts(token_budget=3) == undisturbed


def test_captures_fill_a_template_with_one_generation() -> None:
    template = (
        'start: "Name: " name "; ages:" age{2} "."\nname[capture]: /[A-Z][a-z]{1,5}/\nage[capture="ages"]: /[0-9]/'
    )
    reply = GrammarEngine().answer("x", of("lark", template))
    found = re.fullmatch(r"Name: ([A-Z][a-z]{1,5}); ages:([0-9])([0-9])\.", reply.text)
    assert found is not None
    assert reply.captures == {"name": found.group(1), "ages": [found.group(2), found.group(3)]}


def test_the_end_is_drawn_only_where_the_text_is_whole() -> None:
    engine = GrammarEngine()
    seen = {engine.answer(f"{i}", of("regex", "ab(cd)?"), ignore_eos=bool(i % 2)).text for i in range(40)}
    assert seen == {"ab", "abcd"}
    long = [engine.answer(f"{i}", of("regex", "(ab)*"), min_tokens=3) for i in range(20)]
    assert all(reply.usage.completion_tokens >= 3 for reply in long)
    assert all(engine.answer(f"{i}", of("regex", "a"), min_tokens=9).text == "a" for i in range(3)), "the grammar wins"


def test_a_stop_string_or_a_budget_that_cuts_the_text_marks_it_as_not_whole() -> None:
    engine = GrammarEngine()
    cut = engine.answer("x", GRAMMARS["regex"], stop=(" is",))
    assert (cut.text, cut.finish_reason, cut.is_whole) == ("The date", "stop", False)
    short = engine.answer("x", GRAMMARS["regex"], max_tokens=3)
    assert (short.finish_reason, short.is_whole, short.usage.completion_tokens) == ("length", False, 3)
    whole = engine.answer("x", of("regex", "[a-z. ]+"), stop=(".",), max_tokens=40)
    assert whole.is_whole, "a stop after which the grammar could also end"


@pytest.mark.parametrize("max_tokens", range(24, 44, 2))
def test_a_text_is_closed_before_the_budget_ends_if_asked(max_tokens: int) -> None:
    engine = GrammarEngine()
    schema = {"type": "array", "minItems": 2, "items": SCHEMA}
    for index in range(3):
        op = engine.ask(f"{index}", of("json_schema", schema, on_limit="close"), max_tokens=max_tokens)
        engine.run()
        reply = engine.replies[op][-1]
        if isinstance(reply, Failed):
            assert reply.details["field"] == "max_tokens"
            assert int(reply.details["limit"] or 0) > max_tokens
            continue
        assert isinstance(reply, Generated)
        assert reply.usage.completion_tokens <= max_tokens
        assert reply.is_whole
        json.loads(reply.text)


def test_the_shortest_budget_that_is_named_is_enough() -> None:
    engine = GrammarEngine()
    grammar = of("json_schema", SCHEMA, on_limit="close")
    op = engine.ask("x", grammar, max_tokens=2)
    needed = int(engine.last(op, Failed).details["limit"] or 0)
    assert json.loads(engine.answer("x", grammar, max_tokens=needed).text)
    free = engine.answer("x", of("regex", "[a-z]+[.]", on_limit="close"), max_tokens=12)
    assert free.text.endswith(".")
    assert free.is_whole


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "", "1 to 262144 characters"),
        ("regex", "a" * 262_145, "got '262145 characters'"),
        ("lark", "start: a\na: b", 'unknown name: "b"'),
        ("choices", "[]", "array of non-empty strings"),
        ("choices", "no", "JSON"),
        ("json_schema", "{", "JSON"),
        ("json_schema", "false", "something satisfies"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"properties": {"a": {"not": {}}}}', "not supported: not"),
        ("json_schema", '{"uniqueItems": true}', "not supported: uniqueItems"),
        ("json_schema", '{"if": {}, "then": {}}', "not supported: if, then"),
        ("json_schema", '{"items": [{"type": "string"}]}', "'items' at # is not supported"),
        ("json_schema", '{"$ref": "http://example.org/x"}', "example.org"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "nested at most"),
        ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000, "JSON|nested"),
    ],
)
def test_a_grammar_that_is_none_is_refused_by_name(kind: GrammarKind, source: str, message: str) -> None:
    engine = GrammarEngine()
    other = engine.branch("fine")
    refused = engine.last(engine.ask("x", Grammar(kind=kind, source=source)), Failed)
    assert refused.kind == "invalid_request"
    assert re.search(message, refused.message), refused.message
    assert refused.details["field"] == "grammar"
    engine.generate(other, of("choices", ["a"]))
    engine.run()


def test_a_matcher_that_gives_up_costs_its_own_operation_only() -> None:
    engine = GrammarEngine()
    optional = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    bad = engine.ask("x", of("json_schema", optional))
    good = engine.ask("y", GRAMMARS["schema"])
    engine.run()
    assert "too complex" in engine.last(bad, Failed).message or "cannot go on" in engine.last(bad, Failed).message
    assert json.loads(engine.last(good, Generated).text)


# ----------------------------------------------------------------------------------------- compiling beside the loop


def deferred() -> tuple[GrammarEngine, GrammarCompiler, GrammarKey]:
    compiler = GrammarCompiler(VOCABULARY, is_deferred=True)
    return GrammarEngine(compiler=compiler), compiler, GrammarKey("regex", DATE, "")


def test_steps_go_on_while_a_grammar_is_compiled() -> None:
    engine, compiler, key = deferred()
    waiting = engine.ask("When?", of("regex", DATE), timeout_s=100.0)
    later = engine.generate(engine.branch("other"), max_tokens=9, ignore_eos=True)
    engine.run()
    assert len(engine.last(later, Generated).text)
    assert waiting not in engine.replies
    assert engine.engine.num_unfinished == engine.engine.num_compiling == 1
    compiler.complete(key)
    engine.run()
    assert re.fullmatch(DATE, engine.last(waiting, Generated).text)
    again = engine.answer("When again?", of("regex", DATE))
    assert re.fullmatch(DATE, again.text), "kept: nothing had to be completed"
    assert compiler.num_compiled == 1


def test_who_waits_for_a_grammar_can_be_cancelled_time_out_and_fail() -> None:
    engine, compiler, key = deferred()
    first, second, third = (engine.ask(f"{i}", of("regex", DATE), timeout_s=t) for i, t in enumerate((5.0, None, None)))
    engine.clock.now = 6.0
    engine.run()
    assert engine.last(first, Failed).kind == "timeout"
    engine.send(Cancel, target=second)
    assert engine.last(second, Failed).kind == "cancelled"
    compiler.complete(key, RequestError("invalid_request", "regex is too complex: test", field="grammar"))
    engine.run()
    assert engine.last(third, Failed).message == "regex is too complex: test"
    assert engine.engine.num_unfinished == 0
    assert engine.last(engine.ask("again", of("regex", DATE)), Failed).message == "regex is too complex: test"
    engine.engine.close(engine.session)


def test_a_fork_behind_a_grammar_waits_with_it() -> None:
    engine, compiler, key = deferred()
    branch = engine.branch("When?")
    engine.generate(branch, of("regex", DATE))
    engine.send(Fork, branch=branch, children=[7, 8])
    ops = [engine.generate(child, of("regex", DATE)) for child in (7, 8)]
    engine.run()
    compiler.complete(key)
    engine.run()
    texts = [engine.last(op, Generated).text for op in ops]
    assert all(re.fullmatch(DATE, text) for text in texts)
    assert engine.text(7) == engine.text(branch) + texts[0]


# ----------------------------------------------------------------------------------------- token healing


def test_a_constant_that_ends_inside_a_token_is_continued_as_if_it_did_not() -> None:
    """The fake model draws any token; healed, the first is one that holds the constant's last word and may go on."""
    engine = GrammarEngine()
    whole = TOKENIZER.encode(" the", at_start=False)
    assert len(whole) == 1
    texts = set()
    for index in range(60):
        healed = engine.branch(f"{index} at th")
        before = engine.ids(healed) + TOKENIZER.encode(engine.session.branches[healed].tail.pending, at_start=False)
        reply_to = engine.generate(healed, heal=True, max_tokens=1, ignore_eos=True)
        engine.run()
        reply = engine.last(reply_to, Generated)
        ids = engine.buffers[reply_to]
        assert engine.text(healed) == f"{index} at th" + reply.text
        assert engine.ids(healed) == before[: len(before) - reply.replaced] + ids
        if reply.replaced:
            assert TOKENIZER.decode(ids, at_start=False).startswith(" th")
            texts.add(TOKENIZER.decode(ids[:1], at_start=False))
    assert len(texts) > 1, "other tokens than the constant's own are reached"


def test_naive_continuation_cannot_draw_the_token_that_healing_draws() -> None:
    """With a model that always says " the": after " t" the naive way can only add to what is there already."""
    the = TOKENIZER.encode(" the", at_start=False)[0]

    class SaysThe:
        def execute(self, batch: Any) -> Any:
            def token(request: Any) -> int:
                return the if request.constraint is None or the in allowed_ids(request, TOKENIZER.vocab_size) else 0

            return [RowResult(token(row.sample) if row.sample else None) for row in batch.rows]

    texts = []
    for heal in (False, True):
        engine = GrammarEngine(runner=SaysThe())
        branch = engine.branch("Here is t")
        engine.generate(branch, heal=heal, max_tokens=1)
        engine.run()
        texts.append(engine.text(branch))
    assert texts == ["Here is t the", "Here is the"]


def test_healing_leaves_roles_given_tokens_and_drawn_tokens_alone() -> None:
    engine = GrammarEngine()
    roles = engine.branch(RoleBegin("user"))
    for branch in (roles, engine.branch("at th")):
        first = engine.generate(branch, heal=branch != roles, max_tokens=3, ignore_eos=True)
        again = engine.generate(branch, heal=True, max_tokens=3, ignore_eos=True)
        engine.run()
        assert engine.last(again, Generated).replaced == 0
        assert (engine.last(first, Generated).replaced > 0) == (branch != roles)


def test_a_rollback_brings_back_what_healing_replaced() -> None:
    engine = GrammarEngine()
    branch = engine.branch("Once upon a t")
    length = engine.last(engine.send(Extend, branch=branch, parts=[], commit=True), Extended).length
    before = engine.ids(branch)
    texts = []
    for _ in range(3):
        op = engine.generate(branch, heal=True, seed=4, max_tokens=5, ignore_eos=True)
        engine.run()
        assert engine.last(op, Generated).replaced
        texts.append(engine.text(branch))
        engine.send(Rollback, branch=branch, length=length)
        assert engine.ids(branch) == before
    assert len(set(texts)) == 1, "and it is healed again"


def test_a_stop_inside_the_first_healed_token_leaves_the_branch_as_it_was() -> None:
    engine = GrammarEngine()
    branch = engine.branch("at th")
    stops = tuple("abcdefghijklmnopqrstuvwxyz ")
    op = engine.generate(branch, heal=True, stop=stops, max_tokens=1, ignore_eos=True)
    engine.run()
    reply = engine.last(op, Generated)
    assert engine.text(branch) == "at th" + reply.text


def test_a_grammar_continues_a_constant_across_the_seam() -> None:
    engine = GrammarEngine()
    for index in range(20):
        branch = engine.branch(f"{index} t")
        op = engine.generate(branch, of("regex", "(he|o) [a-z]{1,3}"), heal=True)
        engine.run()
        reply = engine.last(op, Generated)
        assert re.fullmatch("(he|o) [a-z]{1,3}", reply.text), reply.text
        assert engine.text(branch) == f"{index} t" + reply.text
        assert reply.is_whole
