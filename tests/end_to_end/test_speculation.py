"""Two real runtimes, with and without drafts: a program that repeats itself gives the same bits.

How often they draft follows costs measured at their start, which a busy machine changes: that drafts save steps is
shown where costs are given (tests/runtime/test_scheduler.py, tests/golden/test_exactness_gate.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from processes import within

import bough as bo

PEOPLE = ("Ann, 31, lives in Rome and works as a baker.", "Bob, 58, lives in Oslo and works as a nurse.")


@bo.function
def records(s: bo.State, temperature: float) -> None:
    s += "Records follow, one for each person."
    forks = s.fork(4)
    for index, f in enumerate(forks):
        f += bo.user("Extract name, age, city, job as JSON.\n" + PEOPLE[index % 2])
        f += bo.assistant(
            bo.gen("record", max_tokens=60, temperature=temperature, return_logprob=True, top_logprobs_num=2)
        )
        f += bo.user("Repeat: " + PEOPLE[index % 2] + " " + PEOPLE[0])
        f += bo.assistant(bo.gen("copy", max_tokens=60, temperature=temperature, stop="works"))
        f += bo.user("Say a number.") + bo.assistant(bo.gen("number", regex="[0-9]{1,3} (and|or) [0-9]{1,3}"))
        f += " once more: " + bo.gen("streamed", max_tokens=40, min_tokens=9, frequency_penalty=0.2, ignore_eos=True)
    for f in forks:
        f.sync()
    s["all"] = [[(name, f[name], meta(f, name)) for name in ("record", "copy", "number", "streamed")] for f in forks]


def meta(f: bo.State, name: str) -> list[Any]:
    found = f.get_meta_info(name)
    names = ("token_ids", "output_token_logprobs", "output_top_logprobs", "finish_reason", "completion_tokens")
    return [found.get(key) for key in names]


def run(runtime: bo.Runtime, temperature: float) -> tuple[Any, bo.RunUsage]:
    state = records.run(temperature=temperature, seed=8, backend=runtime)
    return state["all"], state.usage


def test_a_program_that_repeats_itself_says_the_same_from_drafts() -> None:
    said: dict[bool, list[Any]] = {}
    usages: dict[bool, list[bo.RunUsage]] = {}
    stats: dict[bool, dict[str, Any]] = {}
    for speculate in (False, True):
        with bo.Runtime(seed=3, speculate=speculate, exact=True) as runtime:
            runs = [within(60, partial(run, runtime, temperature)) for temperature in (0.0, 0.9, 0.0)]
            said[speculate], usages[speculate] = [all_said for all_said, _ in runs], [usage for _, usage in runs]
            stats[speculate] = dict(runtime.stats())
    assert said[True] == said[False]
    assert said[True][2] == said[True][0]
    assert stats[False]["drafted_tokens"] == 0
    assert stats[True]["accepted_tokens"] > 0, "each first draft of the third run is what the first run said"
    assert stats[True]["generated_tokens"] == stats[False]["generated_tokens"]
    for name in ("drafted_tokens", "accepted_tokens"):
        for speculate in (False, True):
            assert sum(getattr(usage, name) for usage in usages[speculate]) == stats[speculate][name]
