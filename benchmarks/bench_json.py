"""JSON objects under a schema: forward passes and time per object, with and without jump-forward.

    python benchmarks/bench_json.py [--model pocket] [--objects 8] [--together 4]

The workload is that of the SGLang paper's JSON decoding: an object of some fields filled from a text. "Plain" decodes
the forced tokens too, one by one. The texts are compared, greedy and sampled, in exact mode: a draw depends on the
row's logits, its seed and its position alone, and a forced token takes its position in both ways; without exact mode a
token that was prefilled may differ from the same one decoded in the last bits, and so may a draw between near equals.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import bough as bo
from bough.runtime.protocol import Grammar, SamplingParams, Text

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "house": {"enum": ["Gryffindor", "Hufflepuff", "Ravenclaw", "Slytherin"]},
        "blood status": {"enum": ["Pure-blood", "Half-blood", "Muggle-born"]},
        "occupation": {"enum": ["student", "teacher", "auror", "ministry of magic", "other"]},
        "wand": {
            "type": "object",
            "properties": {
                "wood": {"type": "string", "maxLength": 12},
                "core": {"enum": ["phoenix feather", "dragon heartstring", "unicorn hair"]},
                "length": {"type": "integer", "minimum": 7, "maximum": 18},
            },
            "required": ["wood", "core", "length"],
            "additionalProperties": False,
        },
        "alive": {"enum": ["Alive", "Deceased"]},
        "patronus": {"type": "string", "maxLength": 12},
    },
    "required": ["name", "house", "blood status", "occupation", "wand", "alive", "patronus"],
    "additionalProperties": False,
}


def run(
    runtime: bo.Runtime, objects: int, together: int, jump: bool, temperature: float = 0.0
) -> tuple[list[str], int, float, int, int]:
    """Return the texts, the steps, the seconds, and the tokens and forced tokens of all objects."""
    grammar = Grammar(kind="json_schema", source=json.dumps(SCHEMA), jump_forward=jump)
    params = SamplingParams(max_tokens=400, temperature=temperature, seed=1)
    runtime.flush_cache()
    before, start = int(runtime.stats()["steps"]), time.perf_counter()
    done = []
    for first in range(0, objects, together):
        branches = [runtime.open() for _ in range(first, min(first + together, objects))]
        for index, branch in enumerate(branches, first):
            runtime.extend(branch, [Text(f"Character {index} of the book, as JSON:\n")])
        futures = [runtime.generate(branch, params, grammar=grammar) for branch in branches]
        done += [future.result(300) for future in futures]
        runtime.release(branches)
    seconds, steps = time.perf_counter() - start, int(runtime.stats()["steps"]) - before
    for one in done:
        json.loads(one.text)
    tokens = sum(one.usage.completion_tokens for one in done)
    return [one.text for one in done], steps, seconds, tokens, sum(one.usage.forced_tokens for one in done)


def main() -> None:
    """Print passes and time of both ways, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--together", type=int, default=4, help="objects generated at the same time")
    options = parser.parse_args()
    with bo.Runtime(options.model, exact=True) as runtime:
        run(runtime, 1, 1, True)
        jumped = run(runtime, options.objects, options.together, True)
        plain = run(runtime, options.objects, options.together, False)
        sampled = [run(runtime, options.objects, options.together, jump, 1.0)[0] for jump in (True, False)]
    assert jumped[0] == plain[0], "the texts differ"
    assert sampled[0] == sampled[1], "the sampled texts differ"
    for name, (_, steps, seconds, tokens, forced) in (("jump-forward", jumped), ("plain", plain)):
        each = steps / options.objects * options.together
        print(f"{name:13} {each:7.1f} passes per object, {seconds:6.2f} s, {tokens} tokens, {forced} of them forced")
    print(
        f"passes x {jumped[1] / plain[1]:.2f}, time x {jumped[2] / plain[2]:.2f}; identical texts, greedy and sampled"
    )


if __name__ == "__main__":
    main()
