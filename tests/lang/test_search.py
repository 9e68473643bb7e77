"""Search over states: the frontier is one batch, the best survive, the pruned are given back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import bough as bo
from bough import State
from bough.search import TreeSearch


class Digits(bo.ScriptedBackend):
    """Says 1, 2, 3 ... in the order of the calls; knows how many gens were issued before the first was read."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        super().__init__(lambda text, params: str(next(numbers) % 10))


def total(state: State) -> float:
    return sum(int(digit) for digit in state.text() if digit.isdigit())


def test_the_best_of_n_is_what_the_state_goes_on_as() -> None:
    s = State(Digits())
    s += "p"
    chosen = s.best_of(4, bo.gen("x"), score=lambda b: -abs(int(b["x"]) - 3))
    assert (s["x"], s.text(), chosen["x"]) == ("3", "p3", "3")
    s.best_of(2, bo.gen("y"))
    assert s["y"] == "5"
    assert s.get_meta_info("y")["output_token_logprobs"]


def test_beams_keep_the_best_of_every_round() -> None:
    backend = Digits()
    s = State(backend)
    beams = s.beam(2, lambda b: b.__iadd__(bo.gen("x")), total, depth=3, branching=2)
    # 1 2 3 4 -> 4, 3; 45 46 37 38 -> 46 (10), 38 (11); then 389, 380, 461, 462
    assert [b.text() for b in beams] == ["389", "462"]
    with beams:
        s.adopt(beams[0])
    assert s.text() == "389"
    with pytest.raises(bo.BoughError):
        beams[1] += "more"
    s.sync()
    assert int(backend.stats()["num_branches"]) <= 4


def test_a_frontier_is_issued_before_any_of_it_is_read() -> None:
    backend = Digits()
    with backend.paused():
        s = State(backend)
        children = []

        def step(b: State) -> None:
            b += bo.gen("x")
            children.append(b)
            if len(children) == 4:  # the last of the frontier: only now anything is computed
                assert not any(b._variables["x"].replies[0].done() for b in children)
                backend.step(None)

        s.beam(2, step, total, depth=1, branching=2)
    assert len(children) == 4


def test_a_final_beam_grows_no_more() -> None:
    s = State(Digits())
    beams = s.beam(2, bo.gen("x"), total, depth=3, branching=1, is_final=lambda b: b["x"] == "2")
    assert sorted(b.text() for b in beams) == ["134", "2"]


def test_a_tree_search_finds_the_best_leaf() -> None:
    backend = Digits()
    s = State(backend)
    leaves = s.search(bo.gen("x"), total, rounds=3, branching=2, policy="best_first", max_depth=3)
    assert [b.text() for b in leaves] == ["246", "245", "23", "1"]
    s.adopt(leaves[0])
    leaves.cancel()
    assert s["x"] == "6"


def test_uct_tries_what_was_seldom_tried_and_backs_scores_up() -> None:
    s = State(Digits())
    tree = TreeSearch(s, bo.gen("x"), total, branching=2, exploration=100.0, max_depth=2)
    leaves = tree.run(3)
    assert tree.root.visits == 6
    assert tree.root.total == sum(total(node.state) for node in tree.root.walk() if node is not tree.root)
    assert [len(child.children) for child in tree.root.children] == [2, 2]  # neither was left out
    assert len(leaves) == 4


def test_pruned_leaves_are_given_back() -> None:
    backend = Digits()
    s = State(backend)
    leaves = s.search(bo.gen("x"), total, rounds=3, branching=3, parallel=2, max_leaves=2)
    assert len(leaves) == 2
    assert int(backend.stats()["num_branches"]) <= 4


def test_branches_that_fail_are_left_out_and_if_all_do_the_first_error_is_raised() -> None:
    def reply(text: str, params: Any) -> str:
        if text.endswith("x"):
            raise bo.ResourceExhausted("no room")
        return "ok"

    calls = itertools.count()
    s = State(bo.ScriptedBackend(reply))
    beams = s.beam(
        2, lambda b: b.__iadd__(("x" if next(calls) % 2 else "y") + bo.gen("v")), len_of, depth=1, branching=1
    )
    assert [b.text() for b in beams] == ["yok"]
    for search in (
        lambda: s.beam(2, "x" + bo.gen("v"), len_of, depth=1),
        lambda: s.search("x" + bo.gen("v"), len_of, rounds=1),
        lambda: s.best_of(2, "x" + bo.gen("v"), len_of),
    ):
        with pytest.raises(bo.ResourceExhausted):
            search()


def len_of(state: State) -> float:
    return float(len(state.text()))


def test_a_score_that_raises_leaves_nothing_behind() -> None:
    backend = Digits()
    s = State(backend)
    s += "p"
    s.sync()
    with pytest.raises(ZeroDivisionError):
        s.search(bo.gen("x"), lambda b: 1 / 0, rounds=2)
    with pytest.raises(ZeroDivisionError):
        s.beam(2, bo.gen("x"), lambda b: 1 / 0, depth=1)
    with pytest.raises(ZeroDivisionError):
        s.best_of(2, bo.gen("x"), lambda b: 1 / 0)
    assert backend.stats()["num_branches"] == 1
    with pytest.raises(bo.InvalidRequest, match="policy must be uct or best_first"):
        s.search(bo.gen("x"), rounds=1, policy="luck")  # type: ignore[arg-type]
    with pytest.raises(bo.InvalidRequest, match="width must be a whole number"):
        s.beam(0, bo.gen("x"), depth=1)
    with pytest.raises(bo.InvalidRequest, match="step must be"):
        s.best_of(2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("worth", [float("nan"), "x", None])
def test_a_score_that_is_no_number_is_refused(worth: Any) -> None:
    s = State(bo.ScriptedBackend(lambda *_: "a"))
    with pytest.raises(bo.InvalidRequest, match="a score must be a number, got"):
        s.best_of(2, bo.gen("x"), score=lambda _: worth)
    with pytest.raises(bo.InvalidRequest, match="a score must be a number, got"):
        s.beam(1, bo.gen("x"), score=lambda _: worth, depth=1)
    with pytest.raises(bo.InvalidRequest, match="a score must be a number, got"):
        s.search(bo.gen("x"), score=lambda _: worth, rounds=1)
