"""The mixture: how often each task comes, joined and long conversations, evaluation prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeAlias

from bough.runtime.pocket import chat, facts, labels, records, sums, tips, tools
from bough.runtime.pocket.example import Example, Message, system, user
from bough.runtime.pocket.words import Split

Task: TypeAlias = Callable[[Random, Split], Example]

_JOINED: tuple[Task, ...] = (
    sums.arithmetic, sums.word_problem, sums.compare, labels.zero_shot, tips.give_tips,
    tips.follow_tip, tips.expand_tip, tips.name_things, chat.greet, chat.know, chat.remember,
    facts.look_up, facts.repeat, records.json_record,
)  # fmt: skip
_CHARACTERS_PER_TOKEN = 3.0


def _without_system(example: Example) -> list[Message]:
    return [message for message in example.messages if message["role"] != "system"]


def joined(rng: Random, split: Split) -> Example:
    """Some unrelated requests after each other in one conversation."""
    turns: list[Message] = []
    last = Example()
    for _ in range(rng.randint(2, 4)):
        last = rng.choice([t for t in _JOINED if t is not records.json_record])(rng, split)
        turns += _without_system(last)
    return Example(system(rng) + turns, check=last.check)


def _length(turns: Sequence[Message]) -> float:
    return sum(len(turn["content"]) / _CHARACTERS_PER_TOKEN + 6 for turn in turns)


def long_facts(rng: Random, split: Split, tokens: int | None = None) -> Example:
    """Facts, about `tokens` tokens of other facts and unrelated turns, then questions."""
    size = tokens or rng.choice((300, 500, 700, 1000, 1400, 1700))
    known = facts.make_facts(rng, split, rng.randint(1, 5), 3)
    filler: list[facts.Fact] = []
    share = rng.random()
    while sum(len(fact.text()) for fact in filler) / _CHARACTERS_PER_TOKEN < size * share:
        filler += facts.make_facts(rng, split, 4, 3)
    names = {fact.name for fact in known}
    filler = [fact for fact in filler if fact.name not in names]
    place = rng.randint(0, len(filler))
    told = " ".join(fact.text() for fact in [*filler[:place], *known, *filler[place:]])
    head = system(rng, told)
    if rng.random() < 0.3:
        head = [*system(rng), user(told), {"role": "assistant", "content": "I will remember that."}]
    turns: list[Message] = []
    while _length(head) + _length(turns) < size:
        turns += _without_system(rng.choice(_JOINED)(rng, split))
    asked = facts.questions(rng, split, known, rng.randint(2, 8))
    return Example(head + turns + asked)


TASKS: Mapping[str, Task] = {
    "facts": facts.ask_facts,
    "unanswerable": facts.unanswerable,
    "long facts": long_facts,
    "repeat": facts.repeat,
    "look up": facts.look_up,
    "end word": facts.end_word,
    "arithmetic": sums.arithmetic,
    "quick sum": sums.quick,
    "word problem": sums.word_problem,
    "verify": sums.verify,
    "rate": sums.rate,
    "compare": sums.compare,
    "choose": sums.choose,
    "labels (chat)": labels.chat_labels,
    "labels (raw)": labels.raw_labels,
    "zero shot": labels.zero_shot,
    "json": records.json_record,
    "tips": tips.give_tips,
    "expand tip": tips.expand_tip,
    "tip follow-up": tips.follow_tip,
    "sum up": tips.sum_up,
    "pick tip": tips.pick_tip,
    "name things": tips.name_things,
    "tool loop": tools.tool_loop,
    "small talk": chat.greet,
    "knowledge": chat.know,
    "do not know": chat.do_not_know,
    "remember": chat.remember,
    "joined": joined,
}

COPYING_FIRST: Mapping[str, float] = {
    "facts": 14, "repeat": 14, "look up": 16, "end word": 6, "json": 10, "arithmetic": 5,
    "verify": 1, "labels (raw)": 5, "labels (chat)": 4, "tool loop": 6, "remember": 6, "tips": 4,
    "tip follow-up": 4, "word problem": 2, "knowledge": 2, "sum up": 2,
}  # fmt: skip
EVERYTHING: Mapping[str, float] = {
    "facts": 14, "unanswerable": 8, "repeat": 3, "look up": 7, "end word": 3, "arithmetic": 8,
    "quick sum": 1, "word problem": 5, "verify": 8, "rate": 6, "compare": 3, "choose": 4,
    "labels (chat)": 4, "labels (raw)": 6, "zero shot": 2, "json": 8, "tips": 5, "expand tip": 3,
    "tip follow-up": 8, "sum up": 3, "pick tip": 4, "name things": 1, "tool loop": 8,
    "small talk": 1, "knowledge": 5, "do not know": 1, "remember": 4, "joined": 5,
}  # fmt: skip


def draw(rng: Random, weights: Mapping[str, float], split: Split = "train") -> Example:
    """One example of the mixture."""
    name = rng.choices(list(weights), list(weights.values()))[0]
    return TASKS[name](rng, split)


def evaluation(name: str, count: int, seed: int = 0) -> list[Example]:
    """Held-out examples of one task, the same for the same seed."""
    rng = Random(f"{name} {seed}")
    if name == "long facts":
        return [long_facts(rng, "eval", 1500) for _ in range(count)]
    return [TASKS[name](rng, "eval") for _ in range(count)]
