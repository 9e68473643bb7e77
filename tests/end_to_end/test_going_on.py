"""Programs that go on: past a limit, while others search, after their runtime was killed, and from a journal."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
from processes import within

import bough as bo

ENDLESS: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.9}


@bo.function
def counted(s: bo.State, on_limit: Literal["return", "raise", "continue"]) -> None:
    s += bo.user("What is 17 + 25?") + bo.assistant(bo.gen("x", max_tokens=4, temperature=0, on_limit=on_limit))


def test_a_text_that_meets_its_limit_is_read_or_refused_or_goes_on(pocket: bo.Runtime) -> None:
    cut = counted.run("return", backend=pocket)
    assert cut.get_meta_info("x")["finish_reason"] == "length"
    assert cut.get_meta_info("x")["completion_tokens"] == 4
    with pytest.raises(bo.Truncated) as refused:
        counted.run("raise", backend=pocket)["x"]
    assert refused.value.details["text"] == cut["x"]
    whole = counted.run("continue", backend=pocket)
    assert whole.get_meta_info("x")["finish_reason"] == "stop"
    assert whole["x"].startswith(cut["x"])
    assert len(whole["x"]) > len(cut["x"])


@bo.function
def searched(s: bo.State) -> str:
    s += "The old house on the hill was"
    gen = bo.gen("x", return_logprob=True, **ENDLESS)
    beams = s.beam(2, gen, depth=2, branching=2)
    s.adopt(beams[0])
    return s.text()


def test_searches_of_plain_programs_run_beside_each_other_on_one_loop(pocket: bo.Runtime) -> None:
    async def both() -> list[bo.State]:
        return await asyncio.gather(*(searched.arun(backend=pocket, seed=seed) for seed in (1, 2)))

    on_loop = within(60, lambda: [state.ret_value for state in asyncio.run(both())])
    alone = within(60, lambda: [searched.run(backend=pocket, seed=seed).ret_value for seed in (1, 2)])
    assert on_loop == alone


@bo.function
def back_and_on(s: bo.State, pid: int) -> None:
    s += "Once upon a time"
    mark = s.checkpoint()
    s += bo.gen("lost", **ENDLESS)
    s["lost"]
    if pid:
        os.kill(pid, signal.SIGKILL)
    s.rewind(mark)
    s += " there was" + bo.gen("kept", **ENDLESS)
    forks = s.fork(2)
    forks += bo.gen("end", **ENDLESS)
    forks.join()


def test_a_mark_survives_the_runtime_it_was_made_in() -> None:
    with bo.Runtime(restart=True) as runtime:
        undisturbed = within(60, lambda: back_and_on.run(0, backend=runtime, seed=5))
        disturbed = within(90, lambda: back_and_on.run(runtime.pid, backend=runtime, seed=5))
        assert within(60, disturbed.text) == undisturbed.text()
        assert disturbed["end"] == undisturbed["end"]


@bo.function
async def awaited(s: bo.State) -> str:
    s += "Once upon a time" + bo.gen("x", **ENDLESS)
    (other,) = s.fork()
    other += bo.gen("y", **ENDLESS)
    return str(await s.get("x")) + str(await other.get("y"))


def test_a_journal_of_an_async_program_repeats_with_and_without_its_runtime(pocket: bo.Runtime, tmp_path: Path) -> None:
    journal = tmp_path / "run.journal"
    first = within(60, lambda: awaited.run(backend=pocket, journal=journal))
    again = within(60, lambda: bo.replay(journal, awaited, backend=pocket))
    played = within(60, lambda: awaited.run(backend=bo.ReplayBackend(journal)))
    assert first.ret_value == again.ret_value == played.ret_value
