"""The thought, action, observation, answer loop with a calculator and a look-up."""

from __future__ import annotations

from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import Example, Message, assistant, system, tool, user
from bough.runtime.pocket.sums import draw, result
from bough.runtime.pocket.words import Split

_CALCULATOR = (
    "calculator(expression)",
    "calculator(expression): computes a number",
    "calculator[expression]",
)
_LOOKUP = ("lookup(key)", "lookup(key): finds a fact", "lookup[key]")
_HOW = (
    "Write a thought and then an action or an answer.",
    "Write Thought and Action, or Thought and Answer.",
    "Use Thought, Action and Answer.",
    "Think, then act with a tool or answer.",
)
_KEYS = (
    (
        "capital of {n}",
        ("What is the capital of {n}?", "Which city is the capital of {n}?"),
        "place",
    ),
    ("age of {n}", ("How old is {n}?", "What is the age of {n}?"), "number"),
    (
        "price of the {t}",
        ("What is the price of the {t}?", "How much does the {t} cost?"),
        "number",
    ),
    ("city of {n}", ("Where does {n} live?", "In which city does {n} live?"), "place"),
    ("job of {n}", ("What is the job of {n}?", "What does {n} work as?"), "job"),
    ("code of {n}", ("What is the code of {n}?",), "number"),
    ("friend of {n}", ("Who is the friend of {n}?",), "place"),
)


def _head(rng: Random) -> list[Message]:
    """The description of the tools, worded in many ways."""
    tools = [rng.choice(_CALCULATOR), rng.choice(_LOOKUP)]
    if rng.random() < 0.3:
        tools.reverse()
    intro = rng.choice(("You can use these tools:", "Tools:", "You have two tools:", "You can use tools."))
    if rng.random() < 0.5:
        text = f"{intro} {', '.join(tools)}. {rng.choice(_HOW)}"
    else:
        text = "\n".join([intro, *tools, rng.choice(_HOW)])
    return system(rng, text, none=0.6)


def _act(thought: str, action: str) -> Message:
    return assistant(f"Thought: {thought}\nAction: {action}")


def _answer(value: str) -> Message:
    known = "I know the answer." if value != "I do not know" else "The tool does not know."
    return assistant(f"Thought: {known}\nAnswer: {value}")


def _seen(role: str, value: str) -> Message:
    """What the tool returned, as a turn of the tool or of the user."""
    return tool(value) if role == "tool" else user(f"Observation: {value}")


def _key(rng: Random, split: Split, kind: str | None = None) -> tuple[str, str, str]:
    """A key to look up, a question for it, and what the tool will say."""
    form, questions, value_kind = rng.choice([row for row in _KEYS if kind in (None, row[2])])
    name = words.person(rng, split)
    thing = rng.choice(words.THINGS)
    value = {
        "place": words.made_up(rng, split).capitalize(),
        "number": str(rng.randint(2, 999)),
        "job": rng.choice(words.JOBS),
    }[value_kind]
    return form.format(n=name, t=thing), rng.choice(questions).format(n=name, t=thing), value


def _calculate(rng: Random, split: Split, role: str) -> list[Message]:
    if rng.random() < 0.75:
        a, sign, b = draw(rng, split)
        value = result(a, sign, b)
    else:
        a, sign, b = rng.randint(2, 999), "*", rng.randint(2, 99)
        value = a * b
    expression = f"{a} {sign} {b}"
    ask = rng.choice(("What is {e}?", "Compute {e}.", "Calculate {e}.", "How much is {e}?", "{e} = ?"))
    return [
        user(ask.format(e=expression)),
        _act(f"I need to compute {expression}.", f"calculator[{expression}]"),
        _seen(role, str(value)),
        _answer(str(value)),
    ]


def _look(rng: Random, split: Split, role: str) -> list[Message]:
    key, question, value = _key(rng, split)
    if rng.random() < 0.12:
        value, said = "I do not know", rng.choice(("not found", "nothing found", "unknown"))
    else:
        said = value
    return [
        user(question),
        _act(f"I need the {key}.", f"lookup[{key}]"),
        _seen(role, said),
        _answer(value),
    ]


def _look_then_calculate(rng: Random, split: Split, role: str) -> list[Message]:
    key, _, _ = _key(rng, split, "number")
    a, sign, b = draw(rng, split)
    value = str(result(a, sign, b))
    word = "plus" if sign == "+" else "minus"
    question = rng.choice(("What is the {k} {w} {b}?", "How much is the {k} {w} {b}?"))
    return [
        user(question.format(k=key, w=word, b=b)),
        _act(f"I need the {key}.", f"lookup[{key}]"),
        _seen(role, str(a)),
        _act(f"I need to compute {a} {sign} {b}.", f"calculator[{a} {sign} {b}]"),
        _seen(role, value),
        _answer(value),
    ]


def tool_loop(rng: Random, split: Split) -> Example:
    """One or two tool calls and the answer; sometimes a second question after it."""
    role = "tool" if rng.random() < 0.75 else "user"
    kinds = (_calculate, _look, _look_then_calculate)
    turns = rng.choice(kinds)(rng, split, role)
    if split == "train" and rng.random() < 0.2:
        turns += rng.choice(kinds)(rng, split, role)
    graded = sum(turn["role"] == "assistant" for turn in turns)
    return Example(_head(rng) + turns, graded=graded)
