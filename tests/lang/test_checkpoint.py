"""Going back to a checkpoint, editing what was appended before, and looking at a gen twice."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bough as bo
from bough import State


def say(*replies: str) -> bo.ScriptedBackend:
    return bo.ScriptedBackend(list(replies))


# ------------------------------------------------------------------------------------------------ rewind


def test_a_rewind_restores_text_variables_messages_and_the_open_role() -> None:
    s = State(say("a", "b"))
    s += bo.user("q") + bo.assistant_begin() + bo.gen("x")
    s["kept"] = 1
    mark = s.checkpoint()
    before = (s.text(), s.messages())
    s += " more" + bo.gen("y") + bo.assistant_end() + bo.user("next")
    s["kept"] = 2
    s.sync()
    s.rewind(mark)
    assert (s.text(), s.messages()) == before
    assert s["kept"] == 1
    assert "y" not in s
    s += bo.assistant_end()
    assert s.messages()[-1] == {"role": "assistant", "content": "a"}


def test_a_mark_serves_any_number_of_times_and_so_do_marks_before_it() -> None:
    s = State(say(*"abcd"))
    start = s.checkpoint()
    s += "1"
    mark = s.checkpoint()
    for expected in "abc":
        s += bo.gen("x")
        assert (s["x"], s.text()) == (expected, "1" + expected)
        s.rewind(mark)
    s.rewind(start)
    assert s.text() == ""
    s += bo.gen("x")
    assert s.text() == "d"


def test_a_checkpoint_waits_for_nothing_and_what_was_pending_before_it_stays_pending() -> None:
    backend = say("first", "second", "third")
    with backend.paused():
        s = State(backend)
        s += "p " + bo.gen("a")
        mark = s.checkpoint()
        s += bo.gen("b")
        given_up = s._variables["b"]
        s.rewind(mark)
        s += " " + bo.gen("c")
        backend.step(None)
        assert (s["a"], s["c"]) == ("first", "second")
        with pytest.raises(bo.Cancelled):
            given_up.value()
    assert s.text() == "p first second"


def test_a_fork_made_since_the_mark_lives_on() -> None:
    backend = say("one", "two")
    with backend.paused():
        s = State(backend)
        s += "p "
        mark = s.checkpoint()
        s += bo.gen("a")
        (fork,) = s.fork()
        fork += " " + bo.gen("b")
        s.rewind(mark)
        backend.step(None)
    assert fork.text() == "p one two"
    assert s.text() == "p "


def test_the_prefix_is_not_computed_again() -> None:
    s = State(say("a", "b"))
    s += "one two three"
    mark = s.checkpoint()
    s += bo.gen("x")
    s.rewind(mark)
    s += bo.gen("x")
    assert s.get_meta_info("x")["computed_tokens"] == 0


def test_a_failure_after_the_mark_is_gone_after_a_rewind() -> None:
    s = State(say("a"))
    mark = s.checkpoint()
    s += bo.gen("a")
    s += bo.gen("b")
    assert isinstance(s.error(), bo.BackendError)
    s.rewind(mark)
    assert s.error() is None


def test_marks_that_do_not_fit_are_refused() -> None:
    s, other = State(say()), State(say())
    first = s.checkpoint()
    s += "a"
    second = s.checkpoint()
    s.rewind(first)
    with pytest.raises(bo.InvalidRequest, match="mark lies beyond the text"):
        s.rewind(second)
    with pytest.raises(bo.InvalidRequest, match="made by another state"):
        s.rewind(other.checkpoint())
    with pytest.raises(bo.InvalidRequest, match="made by another state"):
        s.fork()[0].rewind(first)
    with pytest.raises(bo.InvalidRequest, match="mark must be what checkpoint"):
        s.rewind("start")  # type: ignore[arg-type]
    s.cancel()
    with pytest.raises(bo.Cancelled):
        s.rewind(first)


def test_a_cancel_reaches_forks_from_before_a_checkpoint() -> None:
    backend = say("x")
    with backend.paused():
        s = State(backend)
        s += "p"
        (fork,) = s.fork()
        s.checkpoint()
        fork += bo.gen("x")
        s.cancel()
        with pytest.raises(bo.Cancelled):
            fork["x"]


def test_marks_and_states_give_their_branches_back() -> None:
    backend = say(*"abcdef")
    s = State(backend)
    s += "p"
    marks = [s.checkpoint()]
    s += bo.gen("x")
    marks.append(s.checkpoint())
    s.fork(2).join()
    s.rewind(marks[0])
    del marks
    gc.collect()
    assert int(backend.stats()["num_branches"]) <= 2
    del s
    gc.collect()
    assert backend.stats()["num_branches"] == 0


def test_a_named_stretch_that_is_rewound_holds_what_came_instead() -> None:
    s = State(say())
    s += "a"
    mark = s.checkpoint()
    with s.var_scope("inner"):
        s += "b"
        middle = s.checkpoint()
        s += "c"
        s.rewind(middle)
        s += "d"
    assert s["inner"] == "bd"
    with s.var_scope("outer"):
        s += "e"
        s.rewind(mark)
        s += "f"
    assert s["outer"] == "f"
    assert s.text() == "af"


def test_a_branch_that_was_rewound_joins_with_what_it_holds_now() -> None:
    s = State(say("wrong", "right"))
    s += "p:"
    (fork,) = forks = s.fork()
    mark = fork.checkpoint()
    fork += bo.gen("x")
    fork.rewind(mark)
    fork += bo.gen("x")
    forks.join("concat")
    assert s.text() == "p:right"


def test_a_stream_goes_on_after_a_rewind() -> None:
    gate = threading.Event()

    @bo.function
    def program(s: State) -> None:
        s += "a"
        mark = s.checkpoint()
        s += "b"
        gate.wait(10)
        s.rewind(mark)
        s += "c"

    state = program.run(backend=say(), stream=True)
    chunks = []
    for chunk in state.text_iter():
        chunks.append(chunk)
        if chunk == "b":
            gate.set()
    assert chunks == ["a", "b", "c"]
    assert state.text() == "ac"


def test_the_drawing_shows_what_was_given_up() -> None:
    s = State(say("bad", "good"), title="p")
    mark = s.checkpoint()
    s += bo.gen("x")
    s.rewind(mark)
    s += bo.gen("x")
    drawn = s.tree()
    assert "rewound to here, then" in drawn
    assert "'bad'" in drawn
    assert "'good'" in drawn


# ------------------------------------------------------------------------------------------------ edits


def test_a_span_is_replaced_and_what_follows_is_kept() -> None:
    s = State(say("sum", "more"))
    s += bo.system("S")
    with s.checkpoint() as page:
        s += bo.user("a long page")
    s += bo.assistant(bo.gen("summary"))
    assert s.replace(page, bo.user("(page)")) > 0
    assert [m["content"] for m in s.messages()] == ["S", "(page)", "sum"]
    assert s["summary"] == "sum"
    s += bo.user(bo.gen("more"))
    assert s.messages()[-1]["content"] == "more"


def test_a_span_between_two_marks_is_dropped() -> None:
    s = State(say("x", "y"))
    s += "keep "
    begin = s.checkpoint()
    s += "secret " + bo.gen("inside")
    end = s.checkpoint()
    s += "tail" + bo.gen("after")
    assert s.drop((begin, end)) == 2  # "tail" and "y": the words that are computed again
    assert s.text() == "keep taily"
    assert (s["inside"], s["after"]) == ("x", "y")
    with pytest.raises(bo.InvalidRequest, match="beyond the text"):
        s.rewind(end)
    assert s.drop((begin, begin)) >= 0
    assert s.text() == "keep taily"


def test_spans_that_do_not_fit_are_refused() -> None:
    s = State(say())
    begin = s.checkpoint()
    s += "a"
    with pytest.raises(bo.InvalidRequest, match="span has no end"):
        s.drop(begin)
    end = s.checkpoint()
    with pytest.raises(bo.InvalidRequest, match="ends before it begins"):
        s.drop((end, begin))
    with pytest.raises(bo.InvalidRequest, match="without a gen or select"):
        s.replace((begin, end), bo.gen("x"))
    with pytest.raises(bo.InvalidRequest, match="span must be"):
        s.drop("x")  # type: ignore[arg-type]
    s += bo.user_begin() + "hi"
    inside = s.checkpoint()
    with pytest.raises(bo.InvalidRequest, match="begin or end a message"):
        s.drop((end, inside))
    assert s.text() == "a<|im_start|>user\nhi"


# ------------------------------------------------------------------------------------------------ scratch


def test_the_text_of_a_scratch_never_enters_its_state() -> None:
    s = State(say("thought", "done"))
    s += "q "
    with s.scratch() as t:
        t += "think: " + bo.gen("thoughts")
    s["thoughts"] = t["thoughts"]
    s += bo.gen("answer")
    assert (s.text(), s["thoughts"]) == ("q done", "thought")
    with pytest.raises(bo.InvalidRequest, match="scratch is over"):
        t += "x"


def test_a_scratch_that_is_left_by_an_exception_is_cancelled() -> None:
    backend = say("never")
    with backend.paused():
        s = State(backend)
        t = s.scratch()

        def thinks() -> None:
            with t as inner:
                inner += bo.gen("x")
                raise KeyError("mine")

        with pytest.raises(KeyError):
            thinks()
        with pytest.raises(bo.Cancelled):
            t["x"]


# ------------------------------------------------------------------------------------------------ check


def test_a_check_draws_again_until_the_value_passes() -> None:
    s = State(say("abc", "12a", "42"))
    s += bo.user("n?") + bo.assistant("= " + bo.gen("n"))
    assert s.check(str.isdigit) == "42"
    assert s["n"] == "42"
    assert [m["content"] for m in s.messages()] == ["n?", "= 42"]
    assert s.get_meta_info("n")["computed_tokens"] == 0


def test_a_check_that_nothing_passes_raises_what_it_saw() -> None:
    s = State(say("a", "b", "c"))
    s += bo.gen("n")
    with pytest.raises(bo.CheckFailed, match="none of 3 attempts passed the check, the last was 'c'") as caught:
        s.check(str.isdigit, retries=2)
    assert caught.value.details == {"name": "n", "attempts": 3, "value": "c"}
    assert s.text() == "c"


def test_a_retry_takes_the_next_seed() -> None:
    seen: list[Any] = []

    def reply(text: str, params: Any) -> str:
        seen.append(params.seed)
        return str(len(seen))

    for gen in (bo.gen("x"), bo.gen("x", seed=7)):
        s = State(bo.ScriptedBackend(reply))
        s += gen
        s.check(lambda x: int(x) % 3 == 0)
        assert len(set(seen[-3:])) == 3
    assert seen[-3:] == [7, 8, 9]


def test_feedback_is_told_in_a_branch_and_only_what_passes_enters_the_text() -> None:
    texts: list[str] = []

    def reply(text: str, params: Any) -> str:
        texts.append(text)
        return ["ten", "eleven", "12"][len(texts) - 1]

    s = State(bo.ScriptedBackend(reply))
    s += bo.user("n?") + bo.assistant(bo.gen("n"))
    assert s.check(str.isdigit, feedback=lambda n: bo.user(f"{n} is no number")) == "12"
    assert [m["content"] for m in s.messages()] == ["n?", "12"]
    assert s["n"] == "12"
    assert "ten is no number" in texts[2]
    assert "eleven is no number" in texts[2]
    assert texts[2].endswith("<|im_start|>assistant\n")
    s += bo.user("more")


def test_branches_are_checked_together() -> None:
    s = State(say("a", "1", "b", "2", "c", "d", "e"))
    forks = s.fork(3)
    forks += "n=" + bo.gen("n")
    passed = forks.check(str.isdigit, retries=1)
    assert [f["n"] for f in passed] == ["2", "1"]
    assert [f.text() for f in forks] == ["n=2", "n=1", "n=c"]
    with pytest.raises(bo.CheckFailed):
        forks[2] += "more"
    passed.join()
    assert s["n"] == ["2", "1"]


def test_a_check_needs_a_gen_of_its_own() -> None:
    s = State(say("1", "x"))
    with pytest.raises(bo.InvalidRequest, match="needs a gen"):
        s.check(str.isdigit)
    s += bo.gen("n")
    with pytest.raises(bo.InvalidRequest, match="needs a gen"):
        s.fork()[0].check(str.isdigit)
    with pytest.raises(bo.InvalidRequest, match="retries must be"):
        s.check(str.isdigit, retries=-1)
    s += bo.select("c", ["a", "b"])
    with pytest.raises(bo.InvalidRequest, match="after it comes a select"):
        s.check(str.isdigit)
    failed = State(say())
    failed += bo.gen("n")
    with pytest.raises(bo.BackendError, match="no reply left"):
        failed.check(str.isdigit)


# ------------------------------------------------------------------------------------------------ the model


class Model:
    """What a state must be: its pieces of text, which of them were generated, and its variables."""

    def __init__(self, like: Model | None = None) -> None:
        self.text: list[str] = [] if like is None else list(like.text)
        self.gens: list[int] = [] if like is None else list(like.gens)
        self.variables: dict[str, str] = {} if like is None else dict(like.variables)

    @property
    def whole(self) -> str:
        return "".join(self.text)


def reply(text: str, params: Any = None) -> str:
    """What is said after a text: sometimes words, sometimes only blanks, sometimes nothing."""
    return ["one", " two three", "", " ", "\n"][sum(map(ord, text)) % 5]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["text", "gen", "gen", "set", "mark", "mark", "rewind", "rewind", "fork", "drop", "check", "adopt"]
            ),
            st.integers(0, 1 << 16),
        ),
        max_size=25,
    ),
    paused=st.booleans(),
)
def test_any_sequence_of_marks_rewinds_forks_and_edits_is_what_copies_would_be(
    steps: list[tuple[str, int]], paused: bool
) -> None:
    backend = bo.ScriptedBackend(reply)
    pairs = [(State(backend), Model(), list[tuple[bo.Checkpoint, Model]]())]
    if paused:  # then nothing is there to be read before the end
        with backend.paused():
            run_steps(pairs, [step for step in steps if step[0] not in ("drop", "check")])
    else:
        run_steps(pairs, steps)
    for state, model, _ in pairs:
        assert state.text() == model.whole
        assert {name: state[name] for name in state._variables} == model.variables


def run_steps(
    pairs: list[tuple[State, Model, list[tuple[bo.Checkpoint, Model]]]], steps: list[tuple[str, int]]
) -> None:
    for number, (kind, choice) in enumerate(steps):
        state, model, marks = pairs[choice % len(pairs)]
        if kind == "text":
            piece = ["a ", "b", "  ", "\n", "word word"][choice % 5]
            state += piece
            model.text.append(piece)
        elif kind == "gen":
            state += bo.gen(f"x{choice % 3}")
            model.gens.append(len(model.text))
            model.variables[f"x{choice % 3}"] = reply(model.whole)
            model.text.append(reply(model.whole))
        elif kind == "set":
            state["v"] = model.variables["v"] = str(number)
        elif kind == "mark":
            marks.append((state.checkpoint(), Model(model)))
        elif kind == "rewind" and marks:
            del marks[choice % len(marks) + 1 :]
            mark, then = marks[-1]
            state.rewind(mark)
            model.__init__(then)  # type: ignore[misc]
        elif kind == "fork" and len(pairs) < 8:
            for child in state.fork(2):
                pairs.append((child, Model(model), []))
                pairs[-1][1].gens.clear()
        elif kind == "drop" and marks:
            first, second = sorted((choice % len(marks), choice // 7 % len(marks)))
            begin, end = len(marks[first][1].text), len(marks[second][1].text)
            state.drop((marks[first][0], marks[second][0]))
            del marks[first + 1 :]
            del model.text[begin:end]
            model.gens = [at if at < begin else at - end + begin for at in model.gens if not begin <= at < end]
        elif kind == "check" and model.gens:
            attempts = iter([False, True])
            state.check(lambda value, attempts=attempts: next(attempts))  # type: ignore[misc]
            at = model.gens[-1]
            value = reply("".join(model.text[:at]))
            assert state.check(lambda value: True) == value
            name = state._variables  # the same name was assigned again
            model.variables.update({key: state[key] for key in name})
            model.text[at] = value
            marks[:] = [mark for mark in marks if len(mark[1].text) <= at]
        elif kind == "adopt":
            child = state.fork()[0]
            child += "adopted"
            child["w"] = model.variables["w"] = str(number)
            state.adopt(child)
            model.text.append("adopted")


def test_thoughts_that_are_to_be_forgotten_and_going_back() -> None:
    s = State(say("<think>hm</think>", "42", "<think>no</think>", "7"))
    mark = s.checkpoint()
    with s.assistant():
        s += bo.think(keep=False) + bo.gen("n")
        for act in (s.checkpoint, lambda: s.check(str.isdigit), lambda: s.drop((mark, mark))):
            with pytest.raises(bo.InvalidRequest, match="inside a message would keep its thought"):
                act()
    with pytest.raises(bo.InvalidRequest, match="rewritten its message"):
        s.check(str.isdigit)
    s.rewind(mark)
    assert s.text() == ""
    s += bo.assistant_begin() + bo.think(keep=False)
    s.rewind(mark)
    s += bo.assistant(bo.gen("n"))
    assert [m["content"] for m in s.messages()] == ["7"]


def test_a_peek_appends_nothing() -> None:
    backend = bo.ScriptedBackend(lambda text, params: "yes indeed" if text == "p" else "no")
    s = State(backend)
    s += "p"
    assert [text for text, _, _ in s.peek(2)] == ["yes"]
    assert s.text() == "p"
    s += bo.gen("x")
    assert s["x"] == "yes indeed"
    assert backend.stats()["num_branches"] == 1
    with pytest.raises(bo.InvalidRequest, match="does not tell the entropy"):
        s.entropy()
    with pytest.raises(bo.InvalidRequest, match="k must be between 1 and 64, got 0"):
        s.peek(0)


# ------------------------------------------------------------------------------------------------ what it cost


def test_what_was_given_up_counts_and_so_does_how_much_that_was() -> None:
    s = State(say("one two three", "four five", "six", "seven"))
    s += "a b " + bo.gen("x")
    mark = s.checkpoint()
    s += " c d " + bo.gen("y")
    s.sync()
    s.rewind(mark)
    usage = s.usage
    assert (usage.num_done, usage.generated_tokens) == (2, 5)
    assert usage.rewound_tokens == 4  # c, d, four, five
    s.rewind(mark)
    assert s.usage.rewound_tokens == 4, "nothing was left to give up"
    (child,) = s.fork(1)
    start = child.checkpoint()
    child += bo.gen("z")
    child.sync()
    child.rewind(start)
    assert (child.usage.rewound_tokens, child.usage.num_done) == (1, 1)
    assert (s.usage.rewound_tokens, s.usage.num_done) == (5, 3)


def test_retries_edits_and_forgotten_thoughts_are_paid_for_once() -> None:
    s = State(bo.ScriptedBackend(["bad word", "good", "later"]))
    s += "p " + bo.gen("x")
    s.check(lambda text: text == "good")
    assert (s.usage.num_done, s.usage.generated_tokens, s.usage.rewound_tokens) == (2, 3, 2)

    s = State(say("one", "two"))
    with s.checkpoint() as span:
        s += "a b c"
    s += bo.gen("x")
    s.drop(span)
    assert (s.usage.num_done, s.usage.generated_tokens) == (1, 1), "the call that was kept counts once"
    assert s.usage.rewound_tokens == 4

    s = State(bo.ScriptedBackend({"t": "so so", "x": "yes"}))
    s += bo.user("?") + bo.assistant(bo.think("t", keep=False, start="(", end=")") + bo.gen("x"))
    assert s["x"] == "yes"
    s += bo.user("!")
    assert (s.usage.num_done, s.usage.generated_tokens) == (2, 3)


def test_an_item_of_a_batch_pays_for_what_it_gave_up() -> None:
    @bo.function
    def program(s: State, word: str) -> None:
        s += "a " + bo.gen("x")
        mark = s.checkpoint()
        s += bo.gen("y")
        s.sync()
        s.rewind(mark)

    from bough.items import usage_of

    (state,) = program.run_batch([{"word": "w"}], backend=bo.ScriptedBackend(lambda text, params: "b"))
    assert usage_of(state).completion_tokens == 2


def test_tools_that_were_told_of_after_the_mark_are_gone() -> None:
    def now() -> str:
        """Tells the time."""
        return "noon"

    s = State(say("Answer: noon"))
    mark = s.checkpoint()
    s.tools([now])
    s.rewind(mark)
    with pytest.raises(bo.InvalidRequest, match="has no tools"):
        s.run_tools()
