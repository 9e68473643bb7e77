"""Programs: how arguments, defaults and backends reach the body, and what comes back."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import bough as bo
from bough.runtime.protocol import SamplingParams


class Params(bo.ScriptedBackend):
    """A script that remembers the sampling parameters of each gen."""

    def __init__(self) -> None:
        super().__init__(lambda text, params: "ok")
        self.params: list[SamplingParams] = []
        self.timeouts: list[float | None] = []

    def generate(self, branch: int, params: SamplingParams, **rest: Any) -> Any:
        self.params.append(params)
        self.timeouts.append(rest["timeout_s"])
        return super().generate(branch, params, **rest)


@bo.function
def ask(state: bo.State, question: str, suffix: str = "?") -> str:
    """Ask one thing."""
    state += bo.user(question + suffix) + bo.assistant(bo.gen("answer"))
    return question.upper()


def test_a_program_runs_with_its_first_parameter_under_any_name() -> None:
    backend = Params()
    for state in (
        ask.run("why", backend=backend),
        ask("why", backend=backend),
        ask.run(question="why", backend=backend),
    ):
        assert state["answer"] == "ok"
        assert state.ret_value == "WHY"
        assert state.messages()[0]["content"] == "why?"
    assert ask.__doc__ == "Ask one thing."
    assert repr(ask).startswith("<program ask(state")


def test_function_may_be_called_or_bare() -> None:
    @bo.function()
    def called(s: bo.State) -> None:
        s += "x"

    assert called.run(backend=Params()).text() == "x"


def test_bind_gives_arguments_early_and_later_ones_win() -> None:
    bound = ask.bind(question="why", suffix="!")
    assert bound.run(backend=Params()).messages()[0]["content"] == "why!"
    assert bound.run(suffix="...", backend=Params()).messages()[0]["content"] == "why..."
    assert ask.run("what", backend=Params()).messages()[0]["content"] == "what?"
    with pytest.raises(TypeError, match="has no parameter 'topic'"):
        ask.bind(topic="x")


def test_a_run_gives_defaults_to_every_gen_that_does_not_say_otherwise() -> None:
    backend = Params()

    @bo.function
    def two(s: bo.State) -> None:
        s += bo.gen("a") + bo.gen("b", temperature=0.5, stop="x", max_tokens=3, timeout=2)

    two.run(backend=backend, temperature=0, stop=["\n"], max_new_tokens=7, top_logprobs_num=2, timeout=9)
    first, second = backend.params
    assert backend.params == [
        SamplingParams(seed=first.seed, temperature=0.0, stop=("\n",), max_tokens=7, logprobs=2),
        SamplingParams(seed=second.seed, temperature=0.5, stop=("x",), max_tokens=3, logprobs=2),
    ]
    assert backend.timeouts[0] == pytest.approx(9.0, abs=5)  # what is left of the run's
    assert backend.timeouts[1] == 2.0
    two.run(backend=backend)
    assert backend.params[2] == SamplingParams(seed=backend.params[2].seed)
    state = two.run(backend=backend, n=2)
    assert state["a"] == ["ok", "ok"]


def test_a_gen_is_compared_with_the_runs_own_limits() -> None:
    @bo.function
    def long(s: bo.State) -> None:
        s += "a" + bo.gen("a", min_tokens=200)

    assert long.run(backend=Params(), max_tokens=300)["a"] == "ok"
    with pytest.raises(bo.InvalidRequest, match=r"min_tokens must be at most max_tokens \(128\), got 200"):
        long.run(backend=Params())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 1, "max_new_tokens": 2}, "another name"),
        ({"n": 0}, "n must"),
    ],
)
def test_bad_defaults_are_refused_before_the_body_runs(given: dict[str, Any], words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        ask.run("why", backend=Params(), **given)


def test_a_runs_seed_gives_each_gen_its_own_and_the_same_again() -> None:
    @bo.function
    def tree(s: bo.State) -> None:
        s += bo.gen() + bo.gen()
        for forks in (s.fork(2), s.fork(2)):
            forks += bo.gen()
            inner = forks[0].fork(1)
            inner += bo.gen() + bo.gen(seed=9) + bo.gen(n=2)

    def seeds(seed: int | None) -> list[int | None]:
        backend = Params()
        tree.run(seed=seed, backend=backend)
        return [params.seed for params in backend.params]

    assert seeds(1) == seeds(1)
    assert [one == other for one, other in zip(seeds(1), seeds(2), strict=True)].count(True) == 2  # seed=9, twice
    assert len(set(seeds(1))) == len(seeds(1)) - 1
    assert None not in seeds(None)
    assert len({*seeds(None), *seeds(None)}) == 2 * len(seeds(None)) - 3, "each run draws its own; seed=9 is given"


def test_a_run_without_a_seed_tells_the_one_that_it_drew() -> None:
    @bo.function
    def inside(s: bo.State) -> None:
        s += bo.gen()

    @bo.function
    def outside(s: bo.State) -> None:
        s += bo.gen()
        s["seeds"] = [s.fork(1)[0].seed, inside.run().seed, inside.run().seed, inside.run(seed=4).seed]
        with pytest.raises(ZeroDivisionError):
            failing.run()

    @bo.function
    def failing(s: bo.State) -> None:
        raise ZeroDivisionError

    first, second = Params(), Params()
    once = outside.run(backend=first)
    again = outside.run(backend=second, seed=once.seed)
    assert first.params == second.params
    assert once["seeds"] == again["seeds"]
    own, *nested = once["seeds"]
    assert own == once.seed == again.seed
    assert len({own, *nested}) == 4, "a run inside a run has a seed of its own, from the outer one"
    assert nested[2] == 4
    assert outside.run(backend=first).seed != once.seed
    assert inside.run(backend=first).seed not in nested, "the outer run has ended"


def test_a_programs_own_parameter_wins_over_a_sampling_name() -> None:
    backend = Params()

    @bo.function
    def several(s: bo.State, n: int, temperature: str = "warm") -> None:
        s += f"{n} {temperature}" + bo.gen("x")

    assert several.run(n=3, temperature="hot", top_p=0.5, backend=backend).text() == "3 hotok"
    assert backend.params == [SamplingParams(top_p=0.5, seed=backend.params[0].seed)]


def test_a_program_with_any_keywords_still_gets_sampling_defaults_apart() -> None:
    backend = Params()

    @bo.function
    def free(s: bo.State, **given: Any) -> None:
        s += str(sorted(given)) + bo.gen("x")

    assert free.run(a=1, top_k=3, backend=backend).text() == "['a']ok"
    assert backend.params[0].top_k == 3


def test_wrong_arguments_are_pythons_own_error() -> None:
    for stream in (False, True):
        with pytest.raises(TypeError, match="question"):
            ask.run(backend=Params(), stream=stream)
        with pytest.raises(TypeError, match="temprature"):
            ask.run("why", temprature=1, backend=Params(), stream=stream)


def test_what_cannot_be_a_program_is_refused_at_the_decorator() -> None:
    with pytest.raises(bo.InvalidRequest, match="first parameter is its state"):
        bo.function(lambda: None)
    with pytest.raises(bo.InvalidRequest, match="first parameter is its state"):
        bo.function(lambda *, s: None)
    with pytest.raises(bo.InvalidRequest, match="'backend' is taken by run"):
        bo.function(lambda s, backend: None)

    def generates(s: bo.State) -> Iterator[str]:
        yield "x"

    async def generates_later(s: bo.State) -> AsyncIterator[str]:
        yield "x"

    for function in (generates, generates_later):
        with pytest.raises(bo.InvalidRequest, match="a program returns, it cannot yield"):
            bo.function(function)


def test_an_exception_of_the_body_is_the_callers() -> None:
    @bo.function
    def broken(s: bo.State) -> None:
        s += "a"
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        broken.run(backend=Params())


def test_without_a_backend_the_error_says_what_to_do() -> None:
    with pytest.raises(bo.InvalidRequest, match="set_default_backend"):
        ask.run("why")
    with pytest.raises(bo.InvalidRequest, match="backend must be a Runtime"):
        ask.run("why", backend="http://localhost")  # type: ignore[arg-type]
    with pytest.raises(bo.InvalidRequest, match="backend must be a Runtime"):
        bo.set_default_backend(3)  # type: ignore[arg-type]


@pytest.fixture
def default() -> Any:
    backend = Params()
    bo.set_default_backend(backend)
    yield backend
    bo.set_default_backend(None)


def test_the_default_backend_of_the_main_thread_holds_in_threads_too(default: Params) -> None:
    states: list[bo.State] = []
    thread = threading.Thread(target=lambda: states.append(ask.run("why")))
    thread.start()
    thread.join()
    assert states[0]["answer"] == "ok"
    assert len(default.params) == 1
    bo.flush_cache()
    assert bo.get_server_info()["model"] == "script"
    assert bo.get_server_info(Params())["model"] == "script"


def test_a_threads_own_default_is_only_that_threads(default: Params) -> None:
    other = Params()

    def work() -> None:
        bo.set_default_backend(other)
        ask.run("why")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ask.run("why")
    assert (len(other.params), len(default.params)) == (1, 1)


def test_tasks_do_not_overwrite_each_others_default(default: Params) -> None:
    import asyncio

    async def task(backend: Params) -> None:
        bo.set_default_backend(backend)
        await asyncio.sleep(0)
        assert await ask.run("why").aget("answer") == "ok"

    async def main(backends: list[Params]) -> None:
        await asyncio.gather(*map(task, backends))

    backends = [Params(), Params()]
    asyncio.run(main(backends))
    assert [len(b.params) for b in [*backends, default]] == [1, 1, 0]


def test_a_program_run_inside_a_program_uses_its_backend(default: Params) -> None:
    given = Params()

    @bo.function
    def outer(s: bo.State) -> None:
        s += ask("inner").text()

    assert "inner?" in outer.run(backend=given).text()
    assert (len(given.params), len(default.params)) == (1, 0)


@bo.function
def sent(s: bo.State, x: int, y: int = 0) -> int:
    return x + y


def test_a_program_goes_to_another_process_by_its_name_with_what_was_bound() -> None:
    assert pickle.loads(pickle.dumps(sent)) is sent
    assert copy.deepcopy(sent) is sent
    again = pickle.loads(pickle.dumps(sent.bind(x=1).bind(y=2)))
    assert again.run(backend=bo.ScriptedBackend()).ret_value == 3
