"""JSON schemas with the `jsonschema` package as the judge: whatever a model says, what is finished is valid.

A model of random weights says everything that the masks let through, so it looks where a trained one never would.
BOUGH_SCHEMAS=N takes N schemas rather than thirty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from grammar_engine import GrammarEngine
from schemas import Schemas
from tiny_checkpoints import tiny_checkpoint

import bough as bo
from bough.runtime.protocol import Failed, Generated, Grammar, SamplingParams, Text

NUM_SCHEMAS = int(os.environ.get("BOUGH_SCHEMAS", "30"))
EACH = 4


def judged(schema: dict[str, Any], text: str) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    validator.validate(json.loads(text))


@pytest.mark.parametrize("on_limit", ["truncate", "close"])
def test_all_that_is_finished_is_valid(on_limit: Any) -> None:
    engine = GrammarEngine(pages=4096, context_len=4000)
    schemas = Schemas(7 if on_limit == "truncate" else 8)
    num_whole = 0
    for index in range(NUM_SCHEMAS):
        schema = schemas.next()
        jsonschema.Draft202012Validator.check_schema(schema)
        grammar = Grammar(kind="json_schema", source=json.dumps(schema), on_limit=on_limit)
        ops = [engine.ask(f"{index} {i}", grammar, max_tokens=60 + 100 * i) for i in range(EACH)]
        engine.run()
        for op in ops:
            reply = engine.replies.pop(op)[-1]
            if isinstance(reply, Failed):  # the budget is too small to close at all
                assert (on_limit, reply.details.get("field")) == ("close", "max_tokens"), (reply.message, schema)
                continue
            assert isinstance(reply, Generated)
            if reply.is_whole:
                num_whole += 1
                judged(schema, reply.text)
            else:
                assert reply.finish_reason == "length"
    assert num_whole >= NUM_SCHEMAS * (EACH if on_limit == "close" else 1) * 0.7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_that_a_runtime_with_random_weights_finishes_is_valid(
    random_weights: bo.Runtime, temperature: float
) -> None:
    """The same through a real process, model, sampler and masks; with and without jump-forward the same texts."""
    stream = Schemas(11)
    small = [schema for schema in (stream.next() for _ in range(30)) if len(json.dumps(schema)) < 200][:4]
    for index, schema in enumerate(small):
        texts = []
        for jump in (True, False):
            grammar = Grammar(kind="json_schema", source=json.dumps(schema), on_limit="close", jump_forward=jump)
            branch = random_weights.open()
            random_weights.extend(branch, [Text(f"{index} ")])
            params = SamplingParams(max_tokens=120, temperature=temperature, seed=index)
            done = random_weights.generate(branch, params, grammar=grammar).result(60)
            random_weights.release([branch])
            texts.append(done.text)
            assert done.is_whole, done
            judged(schema, done.text)
        assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def random_weights() -> Iterator[bo.Runtime]:
    with bo.Runtime(tiny_checkpoint("qwen2"), exact=True) as runtime:
        yield runtime
