"""Programs written for SGLang's language, on the bundled model: tests/lang has the same shapes on a script."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from processes import within

import bough as sgl

FACTS = "Mara lives in Oslo. Mara works as a teacher. Tom lives in Lima. Tom has a cat."
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 64}


@sgl.function
def chat(s, facts, *questions):  # type: ignore[no-untyped-def]
    s += sgl.system("You are a helpful assistant. " + facts)
    for number, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer_{number}", max_tokens=32))


@sgl.function
def tips(s, topic):  # type: ignore[no-untyped-def]
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(f"Give me three tips for {topic}.")
    s += sgl.assistant(sgl.gen("tips", max_tokens=80))
    forks = s.fork(3)
    for i in range(3):
        forks[i] += sgl.user(f"Explain tip {i + 1}.")
        forks[i] += sgl.assistant(sgl.gen("detail", max_tokens=40))
    forks.join()


@sgl.function
def react(s, question, price):  # type: ignore[no-untyped-def]
    s += sgl.system("Tools: calculator(expression), lookup(key). Use Thought, Action and Answer.")
    s += sgl.user(question)
    for _ in range(4):
        s += sgl.assistant(sgl.gen("turn"))
        if "Answer:" in s["turn"]:
            return s["turn"].rpartition("Answer: ")[2]
        name, argument = re.findall(r"(\w+)\[(.*)\]", s["turn"])[-1]
        sums = [int(number) for number in re.findall(r"\d+", argument)]
        s += sgl.user(f"Observation: {price if name == 'lookup' else sum(sums)}")
    return None


@sgl.function
def classify(s, review, method):  # type: ignore[no-untyped-def]
    s += "Review: The film was wonderful.\nSentiment: positive\n\nReview: What a boring book!\nSentiment: negative\n\n"
    s += f"Review: {review}\nSentiment:"
    s += sgl.select("label", choices=[" positive", " negative"], choices_method=method)
    s += "\n"


class Likeliest(sgl.ChoicesSamplingMethod):
    """The default rule, written by a user."""

    def __call__(self, *, choices: Any, normalized_prompt_logprobs: Any, **_: Any) -> sgl.ChoicesDecision:
        means = list(normalized_prompt_logprobs)
        return sgl.ChoicesDecision(choices[means.index(max(means))], {"means": means})


def test_a_chat_over_a_runtime_that_is_running_already(pocket: sgl.Runtime) -> None:
    with sgl.RuntimeEndpoint(pocket.address) as endpoint:
        state = chat.run(FACTS, "Where does Mara live?", "What pet does Tom have?", backend=endpoint, temperature=0)
        assert "Oslo" in state["answer_0"]
        assert "cat" in state["answer_1"]
    assert pocket.endpoint.welcome.model == "pocket"


def test_tips_and_their_details_on_branches(pocket: sgl.Runtime) -> None:
    state = within(60, lambda: tips.run("staying healthy", backend=pocket, **GREEDY))
    lines = [line.partition(". ")[2].rstrip(".") for line in state["tips"].splitlines()]
    assert len(lines) == len(state["detail"]) == 3
    assert sum(line.lower() in detail.lower() for line, detail in zip(lines, state["detail"], strict=True)) >= 2
    metas = state.get_meta_info("detail")
    assert all(meta["cached_tokens"] > meta["computed_tokens"] for meta in metas)


def test_react_with_a_look_up_and_a_sum(pocket: sgl.Runtime) -> None:
    state = within(60, lambda: react.run("What is the price of the lamp plus 12?", 36, backend=pocket, **GREEDY))
    assert state.ret_value == "48"


@pytest.mark.parametrize("review", ["I loved the meal, it was excellent.", "The hotel is terrible."])
def test_a_method_of_the_program_decides_on_exact_scores(pocket: sgl.Runtime, review: str) -> None:
    mine = classify.run(review, Likeliest(), backend=pocket)
    named = classify.run(review, sgl.token_length_normalized, backend=pocket)
    assert mine["label"] == named["label"]
    assert mine.text() == named.text()
    assert mine.get_meta_info("label")["means"] == pytest.approx(named.get_meta_info("label")["scores"], abs=1e-3)


def test_a_stream_in_an_event_loop(pocket: sgl.Runtime) -> None:
    async def follow() -> str:
        state = chat.run(FACTS, "Where does Mara live?", stream=True, temperature=0, backend=pocket)
        return "".join([chunk async for chunk in state.text_async_iter(var_name="answer_0")])

    assert "Oslo" in asyncio.run(follow())
