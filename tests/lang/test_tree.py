"""The drawing of a run."""

from __future__ import annotations

import bough as bo


@bo.function
def program(s: bo.State) -> None:
    s += bo.system("Be brief.") + "loose " + "text"
    forks = s.fork(2)
    forks += lambda i: bo.user(f"q{i}") + bo.assistant("so " + bo.gen("x", n=i + 1))
    forks[1].fork(1)[0].__iadd__("deep")
    forks.join()
    s += bo.select("best", ["left", "right"]) + " end"


def test_the_tree_shows_branches_calls_and_costs() -> None:
    state = program.run(backend=bo.ScriptedBackend(["one two", "three", "four"]))
    assert state.tree() == (
        "program\n"
        "├─ system: 'Be brief.'\n"
        "├─ 'loose text'\n"
        "├─ fork 2\n"
        "│  ├─ [0]\n"
        "│  │  ├─ user: 'q0'\n"
        "│  │  ├─ assistant: 'so '\n"
        "│  │  └─ gen x  cached 0 · computed 11 · generated 2 · stop  'one two'\n"
        "│  └─ [1]\n"
        "│     ├─ user: 'q1'\n"
        "│     ├─ assistant: 'so '\n"
        "│     ├─ gen x[0]  cached 6 · computed 5 · generated 1 · stop  'three'\n"
        "│     ├─ gen x[1]  cached 11 · computed 0 · generated 1 · stop  'four'\n"
        "│     └─ fork 1\n"
        "│        └─ [0]\n"
        "│           └─ 'deep'\n"
        "├─ select best  cached 6 · computed 0 · generated 0 · p 1.00  'left'\n"
        "└─ ' end'\n"
        "total: cached 23 · computed 16 · generated 4"
    )


def test_the_tree_shows_what_failed() -> None:
    def reply(text: str, params: object) -> str:
        raise bo.Overloaded("busy")

    @bo.function
    def fails(s: bo.State) -> None:
        s += "x" * 100 + bo.gen("x")

    lines = fails.run(backend=bo.ScriptedBackend(reply)).tree().splitlines()
    assert lines[1] == "├─ " + ("'" + "x" * 46) + "…"
    assert lines[2] == "└─ gen x  failed: Overloaded: busy"


def test_a_branch_that_has_a_name_is_drawn_with_it() -> None:
    state = bo.State(bo.ScriptedBackend(["yes", "no"]))
    forks = state.fork(names=["plan", "critic of\nthe plan"])
    forks += bo.gen("x")
    state.fork(1)
    lines = [line for line in state.tree().splitlines() if line.endswith("]")]
    assert lines == ["│  ├─ [plan]", "│  └─ [critic of the plan]", "   └─ [0]"]
