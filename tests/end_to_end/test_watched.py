"""Watched runs on the real runtime: events, journals, replays, budgets and usage say what the model did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import bough as bo


@pytest.fixture(scope="module")
def runtime() -> Iterator[bo.Runtime]:
    with bo.Runtime(seed=12) as running:
        yield running


@bo.function
def tree(s: bo.State) -> None:
    s += bo.user("Tell me about trees.") + bo.assistant(bo.gen("plan", max_tokens=12, ignore_eos=True))
    forks = s.fork(3)
    forks += "\n" + bo.gen("draft", max_tokens=8, ignore_eos=True, return_logprob=True)
    forks.join()
    s += "\nBest: " + bo.select("best", ["oak", "elm"])


def test_a_run_is_recorded_repeated_and_played_back(runtime: bo.Runtime, tmp_path: Path) -> None:
    state = tree.run(backend=runtime, seed=8, journal=tmp_path / "j", temperature=1.5)
    text, drafts = state.text(), state["draft"]
    assert len(set(drafts)) == 3, "each branch draws with a seed of its own"
    runtime.flush_cache()
    others = [tree.run(backend=runtime, temperature=1.5) for _ in range(3)]
    again = bo.replay(tmp_path / "j", backend=runtime)
    assert (again.text(), again["draft"]) == (text, drafts), "cold, and beside strangers"
    played = tree.run(backend=bo.ReplayBackend(tmp_path / "j"), temperature=1.5)
    assert (played.text(), played.usage) == (text, state.usage)
    assert played.get_meta_info("draft") == state.get_meta_info("draft")
    assert all(other.error() is None for other in others)


def test_another_runtime_that_says_something_else_is_named_by_its_first_token(
    runtime: bo.Runtime, tmp_path: Path
) -> None:
    @bo.function
    def hot(s: bo.State, temperature_of: float) -> None:
        s += "Trees are " + bo.gen("x", max_tokens=20, temperature=1.5, ignore_eos=True)

    state = hot.run(1.0, backend=runtime, journal=tmp_path / "j")
    state.sync()
    ids = state.get_meta_info("x")["token_ids"]
    journal = bo.Journal(tmp_path / "j")
    op = next(op for op in journal.runs[0].ops if op.kind == "gen")
    raw = bytearray(op.result["token_ids"])
    raw[4 * 5] ^= 1
    op.result["token_ids"] = bytes(raw)
    with pytest.raises(bo.ReplayMismatch) as caught:
        bo.replay(journal, hot, backend=runtime)
    details = caught.value.details
    assert (details["path"], details["index"], details["position"], details["got"]) == ((), 0, 5, ids[5])


def test_events_of_a_stream_hold_every_token(runtime: bo.Runtime) -> None:
    state = tree.run(backend=runtime, stream=True)
    events = list(state.events())
    assert [event.seq for event in events] == list(range(len(events)))
    for end in (event for event in events if event.kind == "end"):
        mine = [e for e in events if e.kind == "delta" and (e.branch, e.index) == (end.branch, end.index)]
        assert "".join(event.text for event in mine) == end.text
        ids = [token for event in mine for token in event.token_ids]
        assert ids == list(end.token_ids)[: len(ids)], "only ids whose text is not whole yet may be missing"
        if end.variable == "draft":
            assert [logprob.token_id for event in mine for logprob in event.logprobs or ()] == ids
    assert sum(event.kind == "end" for event in events) == 4
    assert "".join(state.text_iter()) == state.text()


def test_a_budget_stops_branches_that_decode_and_usage_tells_what_they_cost(runtime: bo.Runtime) -> None:
    branches: list[bo.State] = []

    @bo.function
    def wide(s: bo.State) -> None:
        s += "Trees: "
        branches.extend(s.fork(4))
        for branch in branches:
            branch += bo.gen("x", max_tokens=2000, ignore_eos=True)

    state = wide.run(backend=runtime, budget=bo.Budget(max_generated=40))
    errors = [branch.error() for branch in branches]
    assert {type(error) for error in errors} == {bo.BudgetExceeded}
    usage = state.usage
    assert usage.num_failed == 4
    assert 40 <= usage.generated_tokens < 4 * 2000, "over by what four branches drew before the cancel arrived"
    assert usage.cancelled_tokens == usage.computed_tokens + usage.generated_tokens
    later = wide.run(backend=runtime, budget=bo.Budget(max_seconds=0.05))
    assert any(isinstance(branch.error(), bo.BudgetExceeded) for branch in branches[4:])
    assert later.usage.num_pending == 0
