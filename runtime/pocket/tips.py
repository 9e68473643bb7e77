"""Numbered tips, explanations of one tip, and picking a tip out of a list."""

from __future__ import annotations

import re
from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import Example, Message, assistant, system, user
from bough.runtime.pocket.tip_list import EXPLAINED, TIPS
from bough.runtime.pocket.words import Split

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
_ASKS = (
    "Give me {n} tips for {t}.",
    "Give {n} tips for {t}.",
    "Give me {n} tips about {t}.",
    "List {n} tips for {t}.",
    "What are {n} good tips for {t}?",
    "I need {n} tips for {t}.",
)
_EXPAND = (
    "Expand tip: {x}",
    "Expand this tip: {x}",
    "Explain this tip in one sentence: {x}",
    "Expand the tip in one sentence: {x}",
    "Why is this a good tip? {x}",
)
_LINE = re.compile(r"(\d)\. (.+)\.")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_THINGS = {
    "animals": words.listed("cat dog horse cow sheep lion tiger bear rabbit mouse"),
    "colours": words.COLOURS,
    "fruits": words.listed("apple banana orange pear cherry plum lemon grape peach melon"),
    "countries": words.listed("France Spain Italy Japan Peru Kenya Norway Canada India Brazil"),
    "vegetables": words.listed("carrot potato onion cabbage tomato pea bean spinach leek pepper"),
    "instruments": words.INSTRUMENTS,
    "jobs": words.JOBS,
    "days of the week": words.DAYS,
    "months": words.MONTHS,
}


def numbered(tips: list[str]) -> str:
    """The tips as a numbered list."""
    return "\n".join(f"{i}. {tip}." for i, tip in enumerate(tips, 1))


def known_tips(expected: str, got: str) -> bool:
    """Whether `got` numbers as many different tips as expected, all of the same topic."""
    lines = got.strip().splitlines()
    topic = next(t for t in TIPS.values() if any(f"1. {tip}." == expected.splitlines()[0] for tip, _ in t))
    known = {tip for tip, _ in topic}
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    right = [m[2] for i, m in enumerate(found, 1) if m[2] in known and int(m[1]) == i]
    return len(right) == len(set(right)) == len(lines) == len(expected.splitlines())


def known_things(expected: str, got: str) -> bool:
    """Whether `got` is as many different things of the same kind as expected."""
    items, wanted = got.strip(" .\n").split(", "), expected.strip(" .").split(", ")
    kind = next(kind for kind in _THINGS.values() if set(wanted) <= set(kind))
    return len(items) == len(set(items)) == len(wanted) and set(items) <= set(kind)


def _draw(rng: Random) -> tuple[str, str, list[str]]:
    topic = rng.choice(sorted(TIPS))
    count = rng.choice(("two", "three", "three", "three", "four", "five"))
    return topic, count, [tip for tip, _ in rng.sample(TIPS[topic], _NUMBERS[count])]


def give_tips(rng: Random, split: Split) -> Example:
    """A numbered list of tips for a topic."""
    topic, count, tips = _draw(rng)
    number = count if rng.random() < 0.8 else str(_NUMBERS[count])
    ask = user(rng.choice(_ASKS).format(n=number, t=topic))
    return Example([*system(rng), ask, assistant(numbered(tips))], check=known_tips)


def expand_tip(rng: Random, split: Split) -> Example:
    """One sentence that says why a tip is good."""
    tip = rng.choice(sorted(EXPLAINED))
    asked = tip + rng.choice((".", ".", ""))
    head = system(rng)
    if rng.random() < 0.3:
        topic, _, tips = _draw(rng)
        tip = rng.choice(tips)
        asked = f"{tip}."
        head += [user(rng.choice(_ASKS).format(n="some", t=topic)), assistant(numbered(tips))]
    return Example([*head, user(rng.choice(_EXPAND).format(x=asked)), assistant(EXPLAINED[tip])])


def follow_tip(rng: Random, split: Split) -> Example:
    """A list of tips, then its tips expanded by number or asked for by place."""
    topic, count, tips = _draw(rng)
    turns: list[Message] = [
        user(rng.choice(_ASKS).format(n=count, t=topic)),
        assistant(numbered(tips)),
    ]
    if rng.random() < 0.3:
        listed = f"Here are {count} tips for {topic}.\n{numbered(tips)}"
        turns = [user(listed), assistant("What would you like to know about them?")]
    for index in rng.sample(range(len(tips)), rng.randint(1, len(tips))):
        if rng.random() < 0.6:
            form = rng.choice(("Expand tip {i}.", "Expand tip {i} in one sentence.", "Explain tip {i}."))
            turns += [user(form.format(i=index + 1)), assistant(EXPLAINED[tips[index]])]
        else:
            form = rng.choice(("Which is the {o} tip?", "Repeat the {o} tip.", "What is the {o} tip?"))
            turns += [user(form.format(o=_ORDINALS[index])), assistant(f"{tips[index]}.")]
    return Example(system(rng) + turns)


def sum_up(rng: Random, split: Split) -> Example:
    """Explained tips shortened to the tips again."""
    _, _, tips = _draw(rng)
    tips = tips[:3]
    ask = rng.choice(("Summarize:", "Summarize these tips:", "Give the tips as a short list:"))
    text = "\n".join(EXPLAINED[tip] for tip in tips)
    return Example([*system(rng), user(f"{ask}\n{text}"), assistant(numbered(tips))])


def pick_tip(rng: Random, split: Split) -> Example:
    """Which of three tips belongs to a topic."""
    topics = rng.sample(sorted(TIPS), 3)
    index = rng.randrange(3)
    tips = [rng.choice(TIPS[topic])[0] for topic in topics]
    mark = rng.choice((")", "."))
    listed = "\n".join(f"{i}{mark} {tip}." for i, tip in enumerate(tips, 1))
    ask = rng.choice(("Which tip is best for {t}?", "Which of these tips is best for {t}?"))
    body = f"{ask.format(t=topics[index])}\n{listed}"
    return Example([*system(rng), user(body), assistant(f"Best: {tips[index]}.")])


def name_things(rng: Random, split: Split) -> Example:
    """Some things of one kind."""
    kind = rng.choice(sorted(_THINGS))
    count = rng.choice(("two", "three", "three", "four"))
    items = rng.sample(_THINGS[kind], _NUMBERS[count])
    ask = rng.choice(("Name {n} {k}.", "List {n} {k}.", "Tell me {n} {k}."))
    reply = assistant(", ".join(items) + ".")
    return Example([*system(rng), user(ask.format(n=count, k=kind)), reply], check=known_things)
