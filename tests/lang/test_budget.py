"""Budgets stop a run where they say, typed, whatever it does; and what it cost can be read."""

from __future__ import annotations

import pytest

import bough as bo

WORDS = " ".join(f"w{i}" for i in range(50))


def script() -> bo.ScriptedBackend:
    return bo.ScriptedBackend(lambda text, params: WORDS)


@bo.function
def chain(s: bo.State, n: int = 5) -> None:
    s += "start here "
    for i in range(n):
        s += bo.gen(f"x{i}", max_tokens=10) + "\n"


def test_generated_tokens_are_bounded_to_the_token() -> None:
    backend = script()
    state = chain.run(backend=backend, budget=bo.Budget(max_generated=25))
    assert [len(state[f"x{i}"].split()) for i in range(2)] == [10, 10]
    with pytest.raises(bo.BudgetExceeded, match="max_generated, 25 of 25 tokens") as caught:
        state["x2"]
    assert len(str(caught.value.details["partial_text"]).split()) == 5
    assert {name: caught.value.details[name] for name in ("field", "limit", "value")} == {
        "field": "max_generated", "limit": 25, "value": 25,
    }  # fmt: skip
    for name in ("x3", "x4"):
        with pytest.raises(bo.BudgetExceeded):
            state[name]
    assert backend.stats()["generated_tokens"] == 25, "nothing was sent any more"
    assert isinstance(state.error(), bo.BudgetExceeded)


def test_computed_tokens_count_and_cached_ones_do_not() -> None:
    state = chain.run(2, backend=script(), budget=bo.Budget(max_tokens=22))
    assert state.error() is None, "2 of the prompt and 20 generated: the second prompt is cached"
    with pytest.raises(bo.BudgetExceeded, match="max_tokens"):
        chain.run(3, backend=script(), budget=bo.Budget(max_tokens=22))["x2"]


def test_branches_share_the_budget_and_the_runs_inside() -> None:
    @bo.function
    def wide(s: bo.State) -> None:
        forks = s.fork(4)
        forks += bo.gen("x", max_tokens=10)
        s["inner"] = [type(chain.run(1).error()).__name__ for _ in range(2)]
        forks.join()

    state = wide.run(backend=script(), budget=bo.Budget(max_generated=45))
    assert [len(text.split()) for text in state["x"]] == [10] * 4
    assert state["inner"] == ["BudgetExceeded", "BudgetExceeded"]


def test_what_is_in_flight_when_the_budget_ends_is_cancelled() -> None:
    backend = script()
    forks: list[bo.State] = []

    @bo.function
    def wide(s: bo.State) -> None:
        forks.extend(s.fork(3))
        for fork in forks:
            fork += bo.gen("x", max_tokens=10)

    with backend.paused():
        wide.run(backend=backend, budget=bo.Budget(max_generated=5))
    errors = [fork.error() for fork in forks]
    assert [type(error) for error in errors] == [bo.BudgetExceeded] * 3
    assert isinstance(errors[0], bo.BudgetExceeded)
    assert len(str(errors[0].details["partial_text"]).split()) == 5


def test_time_is_bounded_too() -> None:
    state = chain.run(backend=script(), budget=bo.Budget(max_seconds=1e-9))
    with pytest.raises(bo.BudgetExceeded, match="max_seconds"):
        state["x0"]


def test_a_timeout_after_the_budgets_end_is_the_budgets() -> None:
    def late(text: str, params: object) -> str:
        raise bo.Timeout("the deadline passed", partial_text="half", completion_tokens=3)

    @bo.function
    def slow(s: bo.State) -> None:
        s += bo.gen("x")

    assert type(slow.run(backend=bo.ScriptedBackend(late), budget=bo.Budget(max_seconds=60)).error()) is bo.Timeout


@pytest.mark.parametrize(
    "given", [{"max_tokens": 0}, {"max_generated": 1.5}, {"max_generated": True}, {"max_seconds": -1}]
)
def test_limits_that_cannot_be_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(bo.InvalidRequest, match=f"{next(iter(given))} must be"):
        bo.Budget(**given)  # type: ignore[arg-type]
    with pytest.raises(bo.InvalidRequest, match=r"budget must be a bough\.Budget, got 5"):
        chain.run(backend=script(), budget=5)


# ------------------------------------------------------------------------------------------------ usage


def test_usage_adds_up_over_branches_and_tells_a_branchs_own() -> None:
    @bo.function
    def tree(s: bo.State) -> None:
        s += "one two three " + bo.gen("a", max_tokens=4)
        forks = s.fork(3)
        forks += " more" + bo.gen("b", max_tokens=5)
        forks.join()
        s["branch"] = forks[1].usage
        s += bo.select("c", ["x", "y"])

    state = tree.run(backend=script())
    state.sync()
    usage, branch = state.usage, state["branch"]
    assert (usage.num_done, usage.num_failed, usage.num_pending) == (5, 0, 0)
    assert (usage.generated_tokens, usage.cancelled_tokens) == (4 + 3 * 5, 0)
    assert usage.prompt_tokens == usage.cached_tokens + usage.computed_tokens
    assert (branch.num_done, branch.generated_tokens, branch.cached_tokens) == (1, 5, 7)
    meta = state.get_meta_info("b")[1]
    assert branch.prompt_tokens == meta["prompt_tokens"]


def test_usage_waits_for_nothing_and_counts_what_failed_once() -> None:
    def cancelled(text: str, params: object) -> str:
        raise bo.Cancelled("stopped", prompt_tokens=7, cached_tokens=3, computed_tokens=4, completion_tokens=5)

    backend = bo.ScriptedBackend(cancelled)
    with backend.paused():
        s = bo.State(backend)
        s += bo.gen("x") + bo.gen("y")
        assert s.usage.num_pending == 2
    usage = s.usage
    assert (usage.num_failed, usage.num_pending) == (2, 0), "y depends on x"
    assert (usage.prompt_tokens, usage.generated_tokens, usage.cancelled_tokens) == (7, 5, 9)


def test_usage_tells_what_of_it_a_grammar_forced() -> None:
    def cancelled(text: str, params: object) -> str:
        raise bo.Cancelled("stopped", completion_tokens=5, forced_tokens=3)

    s = bo.State(bo.ScriptedBackend(cancelled))
    s += bo.gen("x")
    s.sync()
    assert (s.usage.generated_tokens, s.usage.forced_tokens) == (5, 3)


def test_usage_adds_up_what_was_drafted_and_what_of_it_came_true() -> None:
    def cancelled(text: str, params: object) -> str:
        raise bo.Cancelled("stopped", completion_tokens=5, drafted_tokens=4, accepted_tokens=3)

    s = bo.State(bo.ScriptedBackend(cancelled))
    forks = s.fork(2)
    forks += bo.gen("x")
    for f in forks:
        f.sync()
    assert (s.usage.drafted_tokens, s.usage.accepted_tokens) == (8, 6)
    assert (forks[0].usage.drafted_tokens, forks[0].usage.accepted_tokens) == (4, 3)
