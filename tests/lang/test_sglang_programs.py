"""Programs written for SGLang's language run with `import bough as sgl` and no other change.

Each has the shape of a kind of program that is written in it: what they append, how they branch, what they read. The
script checks what the model was shown; the end-to-end tests run some of them on the bundled model.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

import bough as sgl
from bough.runtime.protocol import SamplingParams


def answers(*pairs: tuple[str, str]) -> sgl.ScriptedBackend:
    """Return a backend that gives the first answer whose question is in what the prompt ends with."""

    def say(text: str, params: SamplingParams) -> str:
        asked = text[-400:]
        found = [(asked.rfind(question), answer) for question, answer in pairs if question in asked]
        assert found, f"nobody expected {asked!r}"
        return max(found)[1]

    return sgl.ScriptedBackend(say)


# ------------------------------------------------------------------------------------------------ few-shot QA

SHOTS = [("How many legs have two cats?", "Two times four is eight. The answer is 8."), ("1 + 1?", "The answer is 2.")]


@sgl.function
def few_shot_qa(s, question):  # type: ignore[no-untyped-def]
    for shot, answer in SHOTS:
        s += "Question: " + shot + "\nAnswer: " + answer + "\n\n"
    s += "Question: " + question + "\n"
    s += "Answer:" + sgl.gen("answer", stop=["Question", "\n\n"], max_tokens=64)


def test_few_shot_questions_in_a_batch() -> None:
    backend = answers(("birds", " Two. The answer is 4.\n\nQuestion: more"), ("spiders", " The answer is 24."))
    states = few_shot_qa.run_batch(
        [{"question": "Legs of two birds?"}, {"question": "Legs of three spiders?"}],
        temperature=0,
        backend=backend,
        num_threads=2,
        progress_bar=False,
    )
    assert [re.findall(r"\d+", state["answer"])[-1] for state in states] == ["4", "24"]
    assert states[0].text().startswith("Question: How many legs have two cats?\nAnswer: Two times four")
    assert states[0].get_meta_info("answer")["finish_reason"] == "stop"


# ------------------------------------------------------------------------------------------------ multi-turn chat


@sgl.function
def multi_turn_question(s, question_1, question_2):  # type: ignore[no-untyped-def]
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(question_1)
    s += sgl.assistant(sgl.gen("answer_1", max_tokens=256))
    s += sgl.user(question_2)
    s += sgl.assistant_begin() + sgl.gen("answer_2", max_tokens=256) + sgl.assistant_end()


def test_a_chat_of_two_turns_on_the_default_backend() -> None:
    sgl.set_default_backend(answers(("capital", "Paris."), ("sights", "A tower.")))
    try:
        state = multi_turn_question.run(question_1="The capital of France?", question_2="Its sights?")
        assert state["answer_1"] == "Paris."
        roles = [message["role"] for message in state.messages()]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert state.messages()[-1] == {"role": "assistant", "content": "A tower."}
        assert multi_turn_question("The capital of France?", "Its sights?")["answer_2"] == "A tower."
    finally:
        sgl.set_default_backend(None)


# ------------------------------------------------------------------------------------------------ expert answers


@sgl.function
def expert_answer(s, question):  # type: ignore[no-untyped-def]
    s += "Question: " + question + "\n"
    s += "A good person to answer it is" + sgl.gen("expert", temperature=0, stop=[".", "\n"])
    s += ".\n" + s["expert"] + " says:" + sgl.gen("answer", max_tokens=64, temperature=0.7)


def test_an_expert_is_named_and_then_answers() -> None:
    backend = answers(("says:", " Drink water."), ("A good person", " a doctor. Or a nurse"))
    state = expert_answer.run("What helps against headache?", backend=backend)
    assert state["expert"] == " a doctor"
    assert state.text().endswith("A good person to answer it is a doctor.\n a doctor says: Drink water.")


# ------------------------------------------------------------------------------------------------ tip suggestion


@sgl.function
def expand_tip(s, topic, tip):  # type: ignore[no-untyped-def]
    s += "Expand a tip on " + topic + " into a paragraph.\nTip: " + tip + "\nParagraph:"
    s += sgl.gen("paragraph", max_tokens=64, stop=["\n\n"])


@sgl.function
def suggest_tips(s, topic):  # type: ignore[no-untyped-def]
    s += "You suggest useful tips.\n\n"
    s += "1." + sgl.gen("tip_1", stop=["\n", ":", "."]) + "\n"
    s += "2." + sgl.gen("tip_2", stop=["\n", ":", "."]) + "\n"
    details = [expand_tip(topic=topic, tip=s[name]) for name in ("tip_1", "tip_2")]
    forks = s.fork(2)
    for number, f in enumerate(forks):
        f += f"Why tip {number + 1}? " + sgl.gen("reason", stop=".")
    s += "Tip 1:" + details[0]["paragraph"] + "\nTip 2:" + details[1]["paragraph"] + "\n"
    s += "Reasons: " + "; ".join(f["reason"] for f in forks) + "\nIn summary" + sgl.gen("summary")


def test_tips_are_expanded_by_programs_that_a_program_calls_and_by_branches() -> None:
    backend = answers(
        ("1.", " Sleep. More"), ("\n2.", " Walk\nmore"),
        ("Tip:  Sleep\n", " Sleep well."), ("Tip:  Walk\n", " Walk far."),
        ("Why tip 1?", "rest"), ("Why tip 2?", "air."), ("In summary", ", rest and air."),
    )  # fmt: skip
    text = suggest_tips.run("health", backend=backend).text()
    assert text == (
        "You suggest useful tips.\n\n1. Sleep\n2. Walk\nTip 1: Sleep well.\nTip 2: Walk far.\n"
        "Reasons: rest; air\nIn summary, rest and air."
    )


# ------------------------------------------------------------------------------------------------ tree of thought

TEMPERATURE = 0.3


def propose_plan(s: sgl.State, question: str, width: int) -> sgl.Group:
    s += sgl.user("Propose a plan for: " + question)
    forks = s.fork(width)
    forks += sgl.assistant(sgl.gen("plan", max_tokens=256, temperature=TEMPERATURE))
    return forks


def execute_plan(s: sgl.State, width: int) -> sgl.Group:
    s += sgl.user("Execute it.")
    forks = s.fork(width)
    forks += sgl.assistant(sgl.gen("answer", max_tokens=256, temperature=TEMPERATURE))
    return forks


@sgl.function
def tree_search(s, question, width):  # type: ignore[no-untyped-def]
    leaves = []
    for plan in propose_plan(s, question, width):
        for answer in execute_plan(plan, width):
            reflect = answer.fork(1)[0]
            reflect += sgl.user("Score it from 0 to 9.") + sgl.assistant(sgl.gen("score", max_tokens=4))
            leaves.append((int(reflect["score"]), answer["answer"], answer))
    s["leaves"] = [answer for _, answer, _ in leaves]
    return max(leaves, key=lambda leaf: leaf[0])[1]


def test_a_tree_of_plans_and_answers_is_searched() -> None:
    numbers = iter(range(100))

    def say(text: str, params: SamplingParams) -> str:
        if text.endswith("assistant\n") and "Score it" in text:
            return text.rpartition("answer ")[2][0]
        return f"{'answer' if 'Execute' in text else 'plan'} {next(numbers)}"

    state = tree_search.run("2 + 2", width=2, temperature=0, backend=sgl.ScriptedBackend(say))
    assert state["leaves"] == ["answer 2", "answer 3", "answer 4", "answer 5"]
    assert state.ret_value == "answer 5"


# ------------------------------------------------------------------------------------------------ skeleton of thought


@sgl.function
def skeleton_of_thought(s, question):  # type: ignore[no-untyped-def]
    s += sgl.user("Give the skeleton of an answer, three points of three words each: " + question)
    s += sgl.assistant("1." + sgl.gen("skeleton", max_tokens=96))
    points = re.findall(r"(\d+)\. *(.+)", "1." + s["skeleton"])
    forks = s.fork(len(points))
    forks += lambda i: sgl.user(f"Expand point {points[i][0]}, and nothing else: {points[i][1]}")
    forks += sgl.assistant(sgl.gen("expansion", max_tokens=64))
    forks.join()
    s += "\n".join(s["expansion"])


def test_points_of_a_skeleton_are_expanded_in_parallel() -> None:
    backend = answers(
        ("skeleton of an answer", " Eat well\n2. Sleep more\n3. Move often"), ("Eat well", "Greens."),
        ("Expand point 2", "Eight hours."), ("Expand point 3", "Walk."),
    )  # fmt: skip
    state = skeleton_of_thought.run("How do I stay healthy?", backend=backend)
    assert state["expansion"] == ["Greens.", "Eight hours.", "Walk."]
    assert state.text().endswith("Greens.\nEight hours.\nWalk.")


# ------------------------------------------------------------------------------------------------ LLM judge

DIMENSIONS = ("Clarity", "Originality", "Evidence")


@sgl.function
def multi_dimensional_judge(s, article):  # type: ignore[no-untyped-def]
    s += sgl.system("You evaluate articles.")
    s += sgl.user("The article: " + article)
    s += sgl.assistant("I have read it.")
    forks = s.fork(len(DIMENSIONS))
    for i in range(len(DIMENSIONS)):
        forks[i] += sgl.user(f"Judge its {DIMENSIONS[i]}. End with a letter.")
        forks[i] += sgl.assistant("Judgment: " + sgl.gen("judgment", max_tokens=64, stop="END"))
    forks.join("gather_variable")
    s += sgl.user("The judgments: " + " ".join(s["judgment"]) + " Give a grade.")
    s += sgl.assistant("Grade " + sgl.select("grade", choices=["A", "B", "C"]))


def test_a_judge_looks_at_several_sides_and_grades() -> None:
    said = ["Clear. A", "Dull. C", "Some. B"]
    backend = sgl.ScriptedBackend({"judgment": [f"{text}END and more" for text in said], "grade": "B"})
    state = multi_dimensional_judge.run("Trees are tall.", backend=backend)
    assert state["judgment"] == said
    assert state.messages()[-2]["content"] == "The judgments: Clear. A Dull. C Some. B Give a grade."
    assert state["grade"] == "B"


# ------------------------------------------------------------------------------------------------ ReAct


@sgl.function
def react(s, question, pages):  # type: ignore[no-untyped-def]
    s += "Answer with interleaved Thought, Action and Observation.\nQuestion: " + question + "\n"
    for i in range(1, 4):
        s += f"Thought {i}:" + sgl.gen(name=f"thought_{i}", stop=["\n", "Action"]) + "\n"
        s += f"Action {i}: " + sgl.select(name=f"kind_{i}", choices=["Search[", "Finish["])
        s += sgl.gen(name=f"argument_{i}", stop="]") + "]\n"
        if s[f"kind_{i}"] == "Finish[":
            return s[f"argument_{i}"]
        s += f"Observation {i}: " + pages.get(s[f"argument_{i}"], "nothing found") + "\n"
    return None


def test_thought_action_observation_until_it_finishes() -> None:
    backend = sgl.ScriptedBackend(
        {
            "thought_1": " I search for Mara.\nAction", "kind_1": "Search[", "argument_1": "Mara]",
            "thought_2": " I know.", "kind_2": "Finish[", "argument_2": "Oslo]",
        }
    )  # fmt: skip
    state = react.run("Where does Mara live?", {"Mara": "Mara lives in Oslo."}, backend=backend)
    assert state.ret_value == "Oslo"
    assert "Action 1: Search[Mara]\nObservation 1: Mara lives in Oslo.\nThought 2: I know.\n" in state.text()


# ------------------------------------------------------------------------------------------------ MMLU, HellaSwag


@sgl.function
def few_shot_mmlu(s, examples, question):  # type: ignore[no-untyped-def]
    s += examples + question + sgl.gen("answer", choices=[" A", " B", " C", " D"])


@sgl.function
def few_shot_hellaswag(s, examples, question, choices):  # type: ignore[no-untyped-def]
    s += examples + question
    s += sgl.select("answer", choices=choices, choices_method=sgl.unconditional_likelihood_normalized)


def test_multiple_choice_by_select_in_batches_of_bound_programs() -> None:
    backend = sgl.ScriptedBackend(choose=lambda text, choices: " C" if "capital" in text else choices[-1])
    bound = few_shot_mmlu.bind(examples="Sum? A. 1 B. 2\nAnswer: B\n\n")
    states = bound.run_batch([{"question": "The capital?\nAnswer:"}, {"question": "A sea?\nAnswer:"}], backend=backend)
    assert [state["answer"].strip() for state in states] == ["C", "D"]
    items = [{"examples": "", "question": "She took the", "choices": [" sofa and left", " bus"]}]
    (state,) = few_shot_hellaswag.run_batch(items, temperature=0, backend=backend, num_threads=4)
    meta = state.get_meta_info("answer")
    assert state["answer"] == " bus"
    assert len(meta["normalized_prompt_logprobs"]) == len(meta["input_token_logprobs"]) == 2


# ------------------------------------------------------------------------------------------------ generative agents


@sgl.function
def poignancy(s, name, event):  # type: ignore[no-untyped-def]
    s += f"How poignant is this for {name}, from 1 to 9?\nEvent: {event}\nRate:"
    s += sgl.gen(name="rate", max_tokens=3, stop=["\n"])


@sgl.function
def relationship(s, one, other, statements):  # type: ignore[no-untyped-def]
    s += "Statements:\n"
    with s.var_scope("statements"):
        for statement in statements:
            s += "- " + statement + "\n"
    s += f"What do {one} and {other} feel? " + sgl.gen("feeling", max_tokens=32)


def test_agents_ask_many_small_things() -> None:
    backend = answers(("Event: sleeps", " 1\n"), ("Event: marries", " 9"), ("feel?", "They are friends."))
    rates = poignancy.run_batch([("Mara", "sleeps"), ("Tom", "marries")], temperature=0, backend=backend)
    assert [int(state["rate"]) for state in rates] == [1, 9]
    state = relationship.run("Mara", "Tom", ["They met.", "They talked."], backend=backend)
    assert state["statements"] == "- They met.\n- They talked.\n"
    assert state["feeling"] == "They are friends."


# ------------------------------------------------------------------------------------------------ parallel sampling


@sgl.function
def parallel_sample(s, question, n):  # type: ignore[no-untyped-def]
    s += "Question: 1 + 2 = ?\nReasoning: I add. Answer: 3\n\nQuestion: " + question + "\nReasoning:"
    forks = s.fork(n)
    forks += sgl.gen("reasoning", stop="Answer", temperature=0.8) + "Answer:" + sgl.gen("answer", stop="\n")
    forks.join()


def test_several_samples_of_one_question() -> None:
    backend = sgl.ScriptedBackend({"reasoning": ["a", "b", "c"], "answer": [" 12\n", " 13", " 12"]})
    state = parallel_sample.run(question="5 + 7 = ?", n=3, backend=backend)
    assert (state["reasoning"], state["answer"]) == (["a", "b", "c"], [" 12", " 13", " 12"])


# ------------------------------------------------------------------------------------------------ parts of programs


@sgl.function
def all_forms(s, question):  # type: ignore[no-untyped-def]
    with s.system():
        s += "Be brief."
    with s.user():
        s += question
    with s.assistant():
        s += sgl.gen("first", max_tokens=8)
    s.user("And?")
    s.assistant(sgl.gen("second", max_tokens=8))
    s.set_var("count", 2)
    with s.copy() as other:
        other += sgl.user("Aside?") + sgl.assistant(sgl.gen("aside"))
    assert "first" in s
    assert s.get_var("first") == s["first"]
    return s["count"]


def test_every_form_of_a_message() -> None:
    state = all_forms.run("Why?", backend=sgl.ScriptedBackend(["Because.", "Also.", "Well."]))
    state.sync()
    assert state.error() is None
    assert state.ret_value == 2
    assert state["aside"] == ["Well."]
    assert [message["content"] for message in state.messages()] == ["Be brief.", "Why?", "Because.", "And?", "Also."]


@sgl.function
def multi_document_qa(s, docs, question):  # type: ignore[no-untyped-def]
    s += "Read.\n"
    forks = s.fork(len(docs))
    forks += lambda i: f"[{i}] {docs[i]}\n"
    forks.join("concate_and_append")
    s += "Question: " + question + sgl.gen("answer")


def test_documents_are_read_on_branches_and_appended_in_order() -> None:
    backend = sgl.ScriptedBackend(["yes"])
    state = multi_document_qa.run(["first", "second"], "Both?", backend=backend)
    assert state.text() == "Read.\n[0] first\n[1] second\nQuestion: Both?yes"


# ------------------------------------------------------------------------------------------------ streaming


def test_streams_of_the_text_and_of_a_variable() -> None:
    def backend() -> sgl.ScriptedBackend:
        return sgl.ScriptedBackend(["Paris is it.", "The tower."])

    state = multi_turn_question.run("q1", "q2", stream=True, backend=backend())
    chunks = list(state.text_iter("answer_1"))
    assert len(chunks) > 1
    assert "".join(chunks) == "Paris is it."
    assert "".join(state.text_iter()) == state.text()
    assert "".join(state.text_iter(var_name="answer_2")) == "The tower."


def test_streams_in_an_event_loop() -> None:
    async def follow() -> tuple[list[str], str]:
        backend = sgl.ScriptedBackend(["Paris is it.", "The tower."])
        state = multi_turn_question.run("q1", "q2", stream=True, backend=backend)
        chunks = [chunk async for chunk in state.text_async_iter(var_name="answer_2")]
        return chunks, "".join([chunk async for chunk in state.text_async_iter()])

    chunks, text = asyncio.run(follow())
    assert "".join(chunks) == "The tower."
    assert text.endswith("The tower.<|im_end|>\n")


# ------------------------------------------------------------------------------------------------ reasoning, info


@sgl.function
def think_first(s, question):  # type: ignore[no-untyped-def]
    s += sgl.user(question)
    s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer", max_tokens=512), model_type="qwen3"))


def test_reasoning_models_and_server_information() -> None:
    backend = sgl.ScriptedBackend(["<think>\n6 times 7.\n</think>\n\n42"])
    state = think_first.run("What is it?", backend=backend)
    assert (state["answer_reasoning_content"], state["answer"]) == ("6 times 7.", "42")
    assert sgl.get_server_info(backend)["model"] == "script"
    sgl.flush_cache(backend)
    meta: dict[str, Any] = state.get_meta_info("answer")
    assert meta["prompt_tokens"] == meta["cached_tokens"] + meta["computed_tokens"] > 0


@pytest.mark.parametrize("program", [few_shot_qa, tree_search, react])
def test_programs_say_what_they_are(program: sgl.Program) -> None:
    assert repr(program).startswith(f"<program {program.__name__}(s, question")
