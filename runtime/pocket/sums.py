"""Sums by tens and ones, short word problems, checking, comparing and choosing."""

from __future__ import annotations

from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import BRIEF, Example, assistant, system, user
from bough.runtime.pocket.words import Split

ASK = (
    "What is {s}?",
    "Compute {s}.",
    "Calculate {s}.",
    "{s} = ?",
    "How much is {s}?",
    "Please add up {s}.",
    "What is {s}? Think step by step.",
    "{s}",
)


def result(a: int, sign: str, b: int) -> int:
    """The value of `a sign b`."""
    return a + b if sign == "+" else a - b


def steps(a: int, sign: str, b: int) -> str:
    """The working: tens, then ones, so that every line needs only one small sum."""
    value = result(a, sign, b)
    if b < 10 and (a < 10 or sign == "-"):
        return f"{a} {sign} {b} = {value}."
    tens, ones = b - b % 10, b % 10
    if sign == "-":
        return f"{a} - {tens} = {a - tens}.\n{a - tens} - {ones} = {value}."
    high = a - a % 10
    low = a % 10 + ones
    first = f"{high} + {tens} = {high + tens}.\n{a % 10} + {ones} = {low}."
    return f"{first}\n{high + tens} + {low} = {value}."


def draw(rng: Random, split: Split) -> tuple[int, str, int]:
    """A sum or a difference on the right side of the split."""
    sign = rng.choice("+-")
    a, b = words.pair(rng, split, sign)
    return a, sign, b


def _near(rng: Random, value: int) -> int:
    """A wrong result that looks like the right one."""
    while True:
        wrong = value + rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))
        if wrong >= 0:
            return wrong


def arithmetic(rng: Random, split: Split) -> Example:
    """A bare sum or difference with its working."""
    a, sign, b = draw(rng, split)
    ask = rng.choice(ASK[:5] if sign == "-" else ASK).format(s=f"{a} {sign} {b}")
    answer = f"{steps(a, sign, b)}\nThe answer is {result(a, sign, b)}."
    return Example([*system(rng), user(ask), assistant(answer)])


def quick(rng: Random, split: Split) -> Example:
    """The result at once, when the system message asks for brief answers."""
    a, sign, b = draw(rng, split)
    ask = rng.choice(ASK[:5]).format(s=f"{a} {sign} {b}")
    head = {"role": "system", "content": BRIEF}
    return Example([head, user(ask), assistant(f"The answer is {result(a, sign, b)}.")])


_GAINS = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
    "{n} has {a} {t}. {m} gives {n} {b} {t}. How many {t} does {n} have?",
    "There are {a} {t} in one box and {b} {t} in another box. How many {t} are there?",
    "{n} finds {a} {t} and {m} finds {b} {t}. How many {t} do they find together?",
)
_LOSSES = (
    "{n} has {a} {t} and sells {b}. How many {t} are left?",
    "{n} has {a} {t}. {n} gives {b} {t} to {m}. How many {t} does {n} have now?",
    "There are {a} {t} in a box. {n} takes {b} of them. How many {t} are in the box now?",
    "{n} had {a} {t} and lost {b}. How many {t} does {n} still have?",
)
_COUNTED = words.listed(
    "apples books pens coins eggs stamps cards balls cups shells stones keys hats toys lemons tickets"
)


def word_problem(rng: Random, split: Split) -> Example:
    """The same sums told as a short story."""
    a, sign, b = draw(rng, split)
    first, second = words.distinct_people(rng, split, 2)
    form = rng.choice(_GAINS if sign == "+" else _LOSSES)
    story = form.format(a=a, b=b, n=first, m=second, t=rng.choice(_COUNTED))
    answer = f"{a} {sign} {b}:\n{steps(a, sign, b)}\nThe answer is {result(a, sign, b)}."
    return Example([*system(rng), user(story), assistant(answer)])


def verify(rng: Random, split: Split) -> Example:
    """Whether a stated result is right, worked out before it is judged."""
    a, sign, b = draw(rng, split)
    value = result(a, sign, b)
    right = rng.random() < 0.5
    said = value if right else _near(rng, value)
    claim = f"{a} {sign} {b} = {said}"
    ask = rng.choice(("Is {c} right?", "Check: {c}", "Is it true that {c}?", "Is this correct? {c}"))
    verdict = "Yes, it is right." if right else f"No, it is {value}."
    return Example(
        [*system(rng), user(ask.format(c=claim)), assistant(f"{steps(a, sign, b)}\nThe claim is {said}.\n{verdict}")]
    )


def rate(rng: Random, split: Split) -> Example:
    """A score for an answer: 5 when it is right, 1 when it is wrong."""
    a, sign, b = draw(rng, split)
    value = result(a, sign, b)
    right = rng.random() < 0.5
    said = value if right else _near(rng, value)
    ask = f"Rate this answer from 1 to 5.\nQuestion: What is {a} {sign} {b}?\nAnswer: {said}"
    return Example(
        [*system(rng), user(ask), assistant(f"{steps(a, sign, b)}\nThe claim is {said}.\nRating: {5 if right else 1}")]
    )


def compare(rng: Random, split: Split) -> Example:
    """The larger or the smaller of two numbers."""
    a, b = words.pair(rng, split, "+")
    if a == b:
        b += 1
    which = rng.choice(("larger", "smaller"))
    best = max(a, b) if which == "larger" else min(a, b)
    ask = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?"))
    return Example([*system(rng), user(ask.format(w=which, a=a, b=b)), assistant(f"{best} is {which}.")])


def choose(rng: Random, split: Split) -> Example:
    """The best of three numbered answers to a sum."""
    a, sign, b = draw(rng, split)
    value = result(a, sign, b)
    options = {value}
    while len(options) < 3:
        options.add(_near(rng, value))
    order = sorted(options)
    rng.shuffle(order)
    mark = rng.choice((")", "."))
    listed = "\n".join(f"{i}{mark} {option}" for i, option in enumerate(order, 1))
    ask = rng.choice(("Which of these answers is best?", "Which answer is best?", "Choose the best answer."))
    question = f"Question: What is {a} {sign} {b}?\n{ask}\n{listed}"
    answer = f"{steps(a, sign, b)}\nBest: {value}"
    return Example([*system(rng), user(question), assistant(answer)])
