"""What constrained decoding costs: masks and sampling as a share of a step, and masks against other libraries.

    python benchmarks/bench_grammar.py [--rows 32] [--step-ms 20] [--repeat 20]

Measures, with random logits: filling the masks of a batch (llguidance), applying them, drawing, all of it as a step
does, and drawing with top_p = 0.9; for the bundled tokenizer's vocabulary padded to 8,192 and to 131,072 tokens. The
rows stand at different places of one JSON schema. With the `bench` extra installed, the time of one mask by xgrammar
and by outlines-core on the same schema and vocabulary, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bough.runtime.batch import SampleRequest
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.masks import Masks
from bough.runtime.grammar.matching import GrammarConstraint
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.models.folder import resolve_model
from bough.runtime.protocol import Grammar, SamplingParams
from bough.runtime.sampler import sample
from bough.runtime.text.tokenizer import load_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "house": {"enum": ["Gryffindor", "Hufflepuff", "Ravenclaw", "Slytherin"]},
        "wand": {
            "type": "object",
            "properties": {"wood": {"type": "string"}, "length": {"type": "number"}},
            "required": ["wood", "length"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "house", "wand"],
    "additionalProperties": False,
}
NONE = np.zeros(0, dtype=np.int32)


def median_ms(act: Callable[[], object], repeat: int) -> float:
    """Return the median time of `act` in milliseconds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        act()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def requests(vocabulary: Vocabulary, rows: int) -> list[SampleRequest]:
    """Return sampling requests whose matchers stand at different places of the schema."""
    source = json.dumps(SCHEMA)
    matcher = GrammarCompiler(vocabulary).find(GrammarKey("json_schema", source, ""))
    assert matcher is not None
    text = '{"name": "Harry Potter", "age": 11, "house": "Gryffindor", "wand": {"wood": "holly", "length": 11.0}}'
    ids = vocabulary.tokenizer.encode(text, at_start=False)
    made = []
    for row in range(rows):
        held = GrammarConstraint(
            Grammar(kind="json_schema", source=source), matcher, vocabulary, 1000, ignore_eos=False
        )
        held.matcher.consume_tokens(ids[: row * len(ids) // rows])
        made.append(SampleRequest(SamplingParams(), row, 5, NONE, NONE, (), held))
    return made


def measured(vocab_size: int, rows: int, step_ms: float, repeat: int) -> dict[str, float]:
    """Return milliseconds per step at one size of vocabulary."""
    vocabulary = Vocabulary(load_tokenizer(resolve_model("pocket")), vocab_size)
    asked = requests(vocabulary, rows)
    logits = 4 * torch.randn(rows, vocab_size)  # some 30 tokens have nine tenths of the probability
    masks = Masks()
    masks.apply(logits.clone(), asked)
    plain = [SampleRequest(r.params, r.seed, r.position, NONE, NONE, ()) for r in asked]
    cut = [SampleRequest(SamplingParams(top_p=0.9), r.seed, r.position, NONE, NONE, ()) for r in asked]
    copy = median_ms(logits.clone, repeat)
    figures = {
        "fill": median_ms(lambda: masks.fill(asked, vocab_size), repeat),
        "fill + apply": median_ms(lambda: masks.apply(logits.clone(), asked), repeat) - copy,
        "draw": median_ms(lambda: sample(logits.clone(), plain, masks), repeat) - copy,
        "draw, top_p 0.9": median_ms(lambda: sample(logits.clone(), cut, masks), repeat) - copy,
        "mask + draw": median_ms(lambda: sample(logits.clone(), asked, masks), repeat) - copy,
    }
    figures["share of a step, %"] = 100 * figures["mask + draw"] / (step_ms + figures["mask + draw"])
    return figures


def others(vocab_size: int, repeat: int) -> dict[str, float]:
    """Return the time of one mask of other libraries, of those that are installed."""
    found: dict[str, float] = {}
    vocabulary = Vocabulary(load_tokenizer(resolve_model("pocket")), vocab_size)
    table = vocabulary.token_table()
    try:
        import xgrammar  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        pass
    else:
        info = xgrammar.TokenizerInfo(table, vocab_size=vocab_size, stop_token_ids=list(vocabulary.eos_ids))
        start = time.perf_counter()
        grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA))
        found["xgrammar compile"] = (time.perf_counter() - start) * 1e3
        matcher = xgrammar.GrammarMatcher(grammar)
        bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
        for token in vocabulary.tokenizer.encode('{"name": "Har', at_start=False):
            matcher.accept_token(token)
        found["xgrammar mask"] = median_ms(lambda: matcher.fill_next_token_bitmask(bitmask), repeat)
    try:
        import outlines_core  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        pass
    else:
        start = time.perf_counter()
        words: dict[bytes, list[int]] = {}
        for token, piece in enumerate(table):
            if piece and token not in vocabulary.special_ids:
                words.setdefault(piece, []).append(token)
        known = outlines_core.Vocabulary(vocabulary.eos_ids[0], words)
        pattern = outlines_core.json_schema.build_regex_from_schema(json.dumps(SCHEMA))
        guide = outlines_core.Guide(outlines_core.Index(pattern, known))
        found["outlines-core compile"] = (time.perf_counter() - start) * 1e3
        found["outlines-core mask"] = median_ms(guide.get_tokens, repeat)
    return found


def main() -> None:
    """Print a table per size of vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=20.0, help="the rest of a step, for the share")
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    for vocab_size in (8192, 131_072):
        print(f"{options.rows} rows, {vocab_size} tokens; milliseconds, medians of {options.repeat}")
        figures = measured(vocab_size, options.rows, options.step_ms, options.repeat)
        one = measured(vocab_size, 1, options.step_ms, options.repeat)["fill"]
        for name, value in {**figures, "one mask": one, **others(vocab_size, options.repeat)}.items():
            print(f"  {name:28} {value:8.3f}")


if __name__ == "__main__":
    main()
