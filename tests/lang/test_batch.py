"""Batches: order, isolation, bounds."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import bough as bo


@bo.function
def square(s: bo.State, number: int, offset: int = 0) -> int:
    if number == 13:
        raise LookupError("unlucky")
    s += f"{number} squared is " + bo.gen("square")
    return int(s["square"]) + offset


def squares(text: str, params: object) -> str:
    number = int(text.split()[0])
    if number == 7:
        raise bo.ResourceExhausted("no room")
    return str(number * number)


@pytest.mark.parametrize("threads", ["auto", 1, 4])
def test_results_come_in_order_and_a_failure_costs_only_its_item(threads: Any) -> None:
    states = square.run_batch(
        [{"number": i} for i in range(20)], num_threads=threads, backend=bo.ScriptedBackend(squares)
    )
    assert len(states) == 20
    for i, state in enumerate(states):
        if i == 13:
            assert isinstance(state.error(), LookupError)
            with pytest.raises(bo.ProgramError, match="the program raised LookupError: unlucky") as caught:
                state["square"]
            assert isinstance(caught.value.__cause__, LookupError)
        elif i == 7:
            assert isinstance(state.error(), bo.ResourceExhausted)
            with pytest.raises(bo.ResourceExhausted):
                state["square"]
            with pytest.raises(bo.ProgramError):
                _ = state.ret_value
        else:
            assert state.error() is None
            assert (state["square"], state.ret_value) == (str(i * i), i * i)


def test_items_may_be_tuples_and_a_batch_may_be_empty() -> None:
    backend = bo.ScriptedBackend(squares)
    states = square.run_batch([(2,), (3, 100)], backend=backend, temperature=0)
    assert [state.ret_value for state in states] == [4, 109]
    assert square.run_batch([], backend=backend) == []
    assert [s.ret_value for s in square.bind(offset=1).run_batch([(2,)], backend=backend)] == [5]


@pytest.mark.parametrize("item", [{"nummer": 1}, (1, 2, 3), (), 5, "text"])
def test_an_item_that_does_not_fit_is_refused_before_anything_runs(item: Any) -> None:
    backend = bo.ScriptedBackend(squares)
    with pytest.raises(bo.InvalidRequest, match=r"item 1 of (a|the) batch"):
        square.run_batch([{"number": 1}, item], backend=backend)
    assert backend.stats()["num_calls"] == 0


def test_a_batch_has_a_sensible_number_of_threads_and_known_defaults() -> None:
    for wrong in (0, -1, "many", 1.5, True):
        with pytest.raises(bo.InvalidRequest, match="num_threads must be"):
            square.run_batch([(1,)], num_threads=wrong, backend=bo.ScriptedBackend(squares))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'offset'"):
        square.run_batch([(1,)], offset=3, backend=bo.ScriptedBackend(squares))


def test_a_batch_uses_the_callers_default_backend_in_its_threads() -> None:
    backends: list[Any] = []

    def work() -> None:
        bo.set_default_backend(bo.ScriptedBackend(squares))
        backends.extend(state["square"] for state in square.run_batch([(i,) for i in range(5)]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert backends == ["0", "1", "4", "9", "16"]


def test_forks_in_a_batch_make_no_threads() -> None:
    before = threading.active_count()
    most: list[int] = []

    @bo.function
    def wide(s: bo.State) -> None:
        forks = s.fork(8)
        forks += bo.gen("x")
        forks.join()
        most.append(threading.active_count())

    states = wide.run_batch([{}] * 50, num_threads=4, backend=bo.ScriptedBackend(lambda text, params: "ok"))
    assert all(state["x"] == ["ok"] * 8 for state in states)
    assert max(most) <= before + 4


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    square.run_batch([(1,), (2,)], backend=bo.ScriptedBackend(squares), progress_bar=True)
    assert "2/2" in capsys.readouterr().err


def test_what_is_no_batch_and_no_file_is_refused_by_name() -> None:
    program, backend = bo.function(lambda s: None), bo.ScriptedBackend()
    with pytest.raises(bo.InvalidRequest, match="a batch must be a list of items, got None"):
        program.run_batch(None, backend=backend)  # type: ignore[call-overload]
    with pytest.raises(bo.InvalidRequest, match="resume must be the path of a file, got 3"):
        program.run_batch([{}], resume=3, backend=backend)  # type: ignore[call-overload]
