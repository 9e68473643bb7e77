"""Whole programs on a real runtime: roles, streams, stops, samples, batches, trees of branches."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until, within
from transformers import AutoTokenizer
from unhealed import Unhealed

import bough as bo
from bough.runtime import pocket as pocket_package

WEIGHTS = Path(str(pocket_package.__file__)).parent / "weights"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@bo.function
def answer(s: bo.State, question: str, fail: bool = False) -> str:
    s += bo.system("You are a careful assistant.")
    s += bo.user(question)
    if fail:
        raise RuntimeError(f"no answer to {question}")
    s += bo.assistant(bo.gen("answer"))
    return str(s["answer"])


@bo.function
def continued(s: bo.State, prompt: str, **options: Any) -> None:
    s += prompt
    s += bo.gen("new", **options)


# ------------------------------------------------------------------------------------------------ roles


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_the_text_is_the_models_own_rendering_of_the_messages(pocket: bo.Runtime, tokenizer: Any) -> None:
    @bo.function
    def conversation(s: bo.State) -> None:
        s += bo.system("You are a careful assistant.")
        s += bo.user("What is 3 + 4?") + bo.assistant("The answer is " + bo.gen("first"))
        with s.user():
            s += "And "
            s += "5 + 6?"
        s += bo.assistant_begin() + bo.gen("second") + bo.assistant_end()
        s += bo.role("tool", "42") + bo.user("So?")

    state = conversation.run(backend=pocket, **GREEDY)
    messages = within(30, state.messages)
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "user")
    ]
    assert messages[2]["content"] == "The answer is " + state["first"]
    assert messages[3]["content"] == "And 5 + 6?"
    assert state.text() == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_prompt_has_as_many_tokens_as_transformers_gives_it(pocket: bo.Runtime, tokenizer: Any) -> None:
    state = answer.run("What is 17 + 25?", backend=pocket, **GREEDY)
    messages = within(30, state.messages)[:2]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert state.get_meta_info("answer")["prompt_tokens"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_control_tokens_in_a_programs_text_are_plain_text(pocket: bo.Runtime, tokenizer: Any) -> None:
    state = continued.run("<|im_end|>", backend=pocket, max_tokens=1, temperature=0)
    assert within(30, lambda: state.get_meta_info("new"))["prompt_tokens"] > 1
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            lambda s: s.__iadd__(bo.user(bo.assistant("x"))),
            "a message of role 'assistant' cannot begin inside the open user",
        ),
        (lambda s: s.__iadd__(bo.user_end()), "without a message to end"),
        (lambda s: s.__iadd__(bo.select("x", [])), "choices must hold 1 to"),
        (lambda s: s.__iadd__(bo.select("x", ["a", "a"])), r"choices\[1\] repeats choices\[0\]"),
        (lambda s: s.fork(0), "must be a whole number from 1 to 4096, got 0"),
        (lambda s: s.__iadd__(bo.gen("x", max_tokens=0)), "max_tokens must be at least 1, got 0"),
    ],
    ids=["nested role", "end without begin", "no choices", "repeated choices", "fork of none", "no tokens"],
)
def test_mistakes_are_raised_at_once(pocket: bo.Runtime, body: Any, words: str) -> None:
    with pytest.raises(bo.InvalidRequest, match=words):
        bo.function(body).run(backend=pocket)


def test_an_unknown_role_is_refused_in_the_templates_words_where_it_is_read(pocket: bo.Runtime) -> None:
    @bo.function
    def program(s: bo.State) -> None:
        s += bo.role("narrator", "Once") + bo.gen("x")

    state = program.run(backend=pocket)
    with pytest.raises(bo.InvalidRequest, match="unknown role: narrator"):
        within(10, lambda: state["x"])


def test_of_a_name_used_twice_the_last_one_wins(pocket: bo.Runtime) -> None:
    @bo.function
    def twice(s: bo.State) -> None:
        s += "One two three " + bo.gen("x", max_tokens=1) + " four five " + bo.gen("x", max_tokens=3, ignore_eos=True)

    state = twice.run(backend=pocket)
    assert within(20, lambda: state.get_meta_info("x"))["completion_tokens"] == 3


# ------------------------------------------------------------------------------------------------ streams


def test_the_pieces_of_a_stream_are_whole_characters_and_add_up_to_the_value(pocket: bo.Runtime) -> None:
    # At this temperature the model emits bytes of all kinds of characters, in and out of order.
    hot: dict[str, Any] = {"seed": 2, "max_tokens": 200, "temperature": 8.0, "ignore_eos": True}
    state = continued.run("\u4f60\u597d \U0001f600 ", backend=pocket, stream=True, **hot)
    pieces = within(60, lambda: list(state.text_iter("new")))
    assert len(pieces) > 20
    assert "".join(pieces) == state["new"]
    # Bytes that are no character stay replacement characters, exactly where the whole text has them; the last piece
    # may hold what never became a character.
    assert "".join(pieces).count("\ufffd") == state["new"].count("\ufffd")
    assert all(piece for piece in pieces)


def test_a_stream_of_text_follows_the_body_while_it_runs(pocket: bo.Runtime) -> None:
    state = answer.run("What is 17 + 25?", backend=pocket, stream=True, **GREEDY)
    pieces = within(30, lambda: list(state.text_iter()))
    assert len(pieces) > 3
    assert "".join(pieces) == state.text()

    async def read() -> str:
        return "".join([piece async for piece in state.text_async_iter("answer")])

    assert within(10, lambda: asyncio.run(read())) == state["answer"] == state.ret_value


def test_streamed_and_unstreamed_text_are_the_same(pocket: bo.Runtime) -> None:
    plain = answer.run("Tell me of trees.", backend=pocket, seed=11, max_tokens=24)
    streamed = answer.run("Tell me of trees.", backend=pocket, seed=11, max_tokens=24, stream=True)
    assert within(30, lambda: "".join(streamed.text_iter("answer"))) == within(30, lambda: plain["answer"])


def test_a_reader_that_is_slow_loses_nothing_and_stops_nobody(pocket: bo.Runtime) -> None:
    state = continued.run("One two", backend=pocket, stream=True, max_tokens=60, ignore_eos=True)
    slow = state.text_iter("new")
    first = within(20, lambda: next(slow))
    assert within(30, lambda: "".join(state.text_iter("new"))) == state["new"]
    assert first + within(10, lambda: "".join(slow)) == state["new"]


# ------------------------------------------------------------------------------------------------ stops and samples


def test_a_stop_string_ends_the_text_and_is_not_in_it(pocket: bo.Runtime) -> None:
    whole = continued.run("One two three four", backend=pocket, max_tokens=40, temperature=0, ignore_eos=True)
    text = within(30, lambda: whole["new"])
    stop = text[len(text) // 2 :][:3]
    cut = continued.run("One two three four", backend=pocket, max_tokens=40, temperature=0, ignore_eos=True, stop=stop)
    meta = within(30, lambda: cut.get_meta_info("new"))
    assert cut["new"] == text[: text.index(stop)]
    assert (meta["finish_reason"], meta["matched_stop"]) == ("stop", stop)
    assert meta["completion_tokens"] <= 40


def test_text_after_a_stop_goes_on_from_the_cut(pocket: bo.Runtime) -> None:
    plain = Unhealed(pocket)  # as a cold prompt with the same text is continued
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 64}

    @bo.function
    def resumed(s: bo.State) -> None:
        s += bo.user("What is 17 + 25?")
        s += bo.assistant(bo.gen("a", stop="nswer") + " and then " + bo.gen("b", max_tokens=8))

    @bo.function
    def cold(s: bo.State, text: str) -> None:
        s += bo.user("What is 17 + 25?") + bo.assistant(text + " and then " + bo.gen("b", max_tokens=8))

    state = resumed.run(backend=plain, **options)
    said = within(30, lambda: state["a"])
    assert said.endswith("The a")  # inside the token " answer"
    again = cold.run(said, backend=plain, **options)
    assert within(30, lambda: again["b"]) == state["b"]
    assert again.get_meta_info("b")["prompt_tokens"] == state.get_meta_info("b")["prompt_tokens"]


def test_stop_regex_stop_ids_and_min_tokens_are_kept(pocket: bo.Runtime) -> None:
    hot: dict[str, Any] = {"backend": pocket, "seed": 4, "ignore_eos": True, "max_tokens": 60}
    free = within(30, lambda: continued.run("Numbers: 1 2 3", **hot).get_meta_info("new"))
    third = free["token_ids"][2]
    first_at = free["token_ids"].index(third)
    stopped = within(30, lambda: continued.run("Numbers: 1 2 3", stop_token_ids=[third], **hot).get_meta_info("new"))
    assert stopped["token_ids"] == free["token_ids"][:first_at]
    assert stopped["matched_stop"] == third
    later = continued.run("Numbers: 1 2 3", stop_token_ids=[third], min_tokens=20, **hot)
    assert within(30, lambda: later.get_meta_info("new"))["completion_tokens"] >= 20
    by_regex = continued.run("Numbers: 1 2 3", stop_regex=[r"[a-z]"], **hot)
    assert not any("a" <= char <= "z" for char in within(30, lambda: by_regex["new"]))


def test_three_samples_are_three_values_and_the_text_goes_on_with_the_first(pocket: bo.Runtime) -> None:
    state = continued.run("One two", backend=pocket, seed=6, n=3, max_tokens=16, temperature=2.0, ignore_eos=True)
    values = within(30, lambda: state["new"])
    assert len(values) == 3
    assert len(set(values)) == 3
    assert state.text() == "One two" + values[0]
    assert [meta["completion_tokens"] for meta in state.get_meta_info("new")] == [16, 16, 16]


def test_logprobs_come_with_alternatives_likelier_first(pocket: bo.Runtime) -> None:
    state = continued.run(
        "One two", backend=pocket, max_tokens=5, temperature=0, return_logprob=True, top_logprobs_num=3, ignore_eos=True
    )
    meta = within(30, lambda: state.get_meta_info("new"))
    assert [token_id for _, token_id, _ in meta["output_token_logprobs"]] == meta["token_ids"]
    for (logprob, token_id, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert len(top) == 3
        assert [value for value, _, _ in top] == sorted((value for value, _, _ in top), reverse=True)
        assert (logprob, token_id) == (top[0][0], top[0][1]), "greedy takes the likeliest"
        assert logprob <= 0


# ------------------------------------------------------------------------------------------------ batches and branches


def test_a_batch_gives_every_result_but_the_one_that_failed(pocket: bo.Runtime) -> None:
    items = [{"question": f"What is {index} + 2?", "fail": index == 13} for index in range(20)]
    states = within(60, lambda: answer.run_batch(items, backend=pocket, **GREEDY))
    assert [state.error() is None for state in states] == [index != 13 for index in range(20)]
    assert isinstance(states[13].error(), RuntimeError)
    with pytest.raises(bo.ProgramError, match="no answer to What is 13"):
        _ = states[13]["answer"]
    alone = answer.run("What is 7 + 2?", backend=pocket, **GREEDY)
    assert within(30, lambda: alone["answer"]) == states[7]["answer"] == states[7].ret_value


@pytest.mark.parametrize("cuts", [(3, 11), (1, 2, 3, 25), tuple(range(1, 40))], ids=["two", "four", "every character"])
def test_tokens_do_not_depend_on_how_a_program_splits_its_constants(pocket: bo.Runtime, cuts: tuple[int, ...]) -> None:
    text = "The quick brown fox's 1234 tree-houses: na\u00efve \u4f60\u597d, isn't it?"

    @bo.function
    def split(s: bo.State) -> None:
        for start, stop in itertools.pairwise((0, *cuts, len(text))):
            s += text[start:stop]
        s += bo.gen("new")

    pocket.flush_cache()
    whole = continued.run(text, backend=pocket, ignore_eos=True, **GREEDY)
    first = within(30, lambda: whole.get_meta_info("new"))
    second = within(30, lambda: split.run(backend=pocket, ignore_eos=True, **GREEDY).get_meta_info("new"))
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["cached_tokens"] == first["prompt_tokens"] - 1
    assert second["token_ids"] == first["token_ids"]


def test_a_fork_thinks_on_its_own_and_a_join_brings_it_home(pocket: bo.Runtime) -> None:
    @bo.function
    def drafts(s: bo.State) -> None:
        s += bo.user("What is 17 + 25?")
        forks = s.fork(3)
        for index, fork in enumerate(forks):
            fork += bo.assistant(f"Draft {index}: " + bo.gen("draft"))
        forks.join()
        s += bo.assistant("Best: " + bo.select("best", choices=["one", "two", "three"]))

    state = drafts.run(backend=pocket, seed=8, max_tokens=24, temperature=1.5, ignore_eos=True)
    assert len(set(within(30, lambda: state["draft"]))) == 3
    assert state["best"] in ("one", "two", "three")
    assert "Draft" not in state.text()
    metas = state.get_meta_info("draft")
    assert sum(meta["computed_tokens"] for meta in metas) < sum(meta["prompt_tokens"] for meta in metas)
    drawn = state.tree()
    assert "draft" in drawn
    assert "cached" in drawn


def test_a_cancelled_branch_stops_and_leaves_its_siblings_alone(pocket: bo.Runtime) -> None:
    @bo.function
    def race(s: bo.State) -> None:
        s += "Once upon a time"
        forks = s.fork(2)
        forks[0] += bo.gen("long", max_tokens=3000, ignore_eos=True)
        forks[1] += bo.gen("short", max_tokens=4, ignore_eos=True)
        s["won"] = forks[1]["short"]
        forks[0].cancel()
        s["lost"] = forks[0].error()

    state = within(30, lambda: race.run(backend=pocket))
    assert state["won"]
    assert isinstance(state["lost"], bo.Cancelled)
    wait_until(lambda: pocket.stats()["num_running"] == 0, 10, "the cancelled branch stops")


def test_a_deadline_ends_a_generation_with_what_it_had(pocket: bo.Runtime) -> None:
    for timeout in (0.4, 0.8, 1.6):  # a machine that is very busy may draw nothing in the first
        state = continued.run("Once upon a time", backend=pocket, max_tokens=3500, ignore_eos=True, timeout=timeout)
        with pytest.raises(bo.Timeout, match=r"not finished after \d\.") as caught:
            within(10, lambda: state["new"])  # noqa: B023
        if caught.value.details["partial_text"]:
            break
    assert caught.value.details["partial_text"]


def test_programs_of_many_threads_share_one_runtime(pocket: bo.Runtime) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        found[number] = str(answer.run(f"What is {number} + 3?", backend=pocket, **GREEDY)["answer"])

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 16
    again = answer.run("What is 5 + 3?", backend=pocket, **GREEDY)
    assert within(30, lambda: again["answer"]) == found[5]


def test_the_bundled_model_answers_sensibly(pocket: bo.Runtime) -> None:
    @bo.function
    def chat(s: bo.State) -> None:
        s += bo.user("What is 17 + 25?")
        s += bo.assistant(bo.gen("answer", max_tokens=64, temperature=0))

    state = chat.run(backend=pocket)
    assert "42" in within(30, lambda: state["answer"])
    assert state.get_meta_info("answer")["finish_reason"] == "stop"
