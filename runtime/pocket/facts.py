"""Answers that the conversation itself holds: teachers of copying, facts and questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import BRIEF, Example, Message, assistant, system, user
from bough.runtime.pocket.words import Split

UNKNOWN = "I do not know."


@dataclass(frozen=True)
class Relation:
    """One thing to say of somebody: the statement, questions by name and by pronoun, the value."""

    statements: Sequence[str]
    questions: Sequence[str]
    follow_ups: Sequence[str]
    value: Callable[[Random, Split], str]


def _of(values: Sequence[str]) -> Callable[[Random, Split], str]:
    return lambda rng, split: rng.choice(values)


RELATIONS = (
    Relation(
        ("{n} lives in {v}.",),
        ("Where does {n} live?", "In which city does {n} live?", "What city does {n} live in?"),
        ("Where does {p} live?", "And where does {p} live?"),
        words.place,
    ),
    Relation(
        ("{n} was born in {v}.",),
        ("Where was {n} born?", "In which city was {n} born?"),
        ("Where was {p} born?", "And where was {p} born?"),
        words.place,
    ),
    Relation(
        ("{n} works as a {v}.",),
        ("What is the job of {n}?", "What does {n} work as?", "What is {n}'s job?"),
        ("What does {p} work as?", "And what is the job?"),
        _of([job for job in words.JOBS if job[0] not in "aeiou"]),
    ),
    Relation(
        ("{n} is {v} years old.",),
        ("How old is {n}?", "What is the age of {n}?"),
        ("How old is {p}?", "And how old is {p}?"),
        lambda rng, split: str(rng.randint(5, 95)),
    ),
    Relation(
        ("{n} has a {v}.",),
        ("What pet does {n} have?", "Which animal does {n} have?"),
        ("What pet does {p} have?", "And which animal does {p} have?"),
        _of(words.PETS),
    ),
    Relation(
        ("{n} likes {v}.",),
        ("What does {n} like?", "Which food does {n} like?"),
        ("What does {p} like?", "And what does {p} like?"),
        _of(words.FOODS),
    ),
    Relation(
        ("{n} plays the {v}.",),
        ("What does {n} play?", "Which instrument does {n} play?"),
        ("What does {p} play?", "And which instrument does {p} play?"),
        _of(words.INSTRUMENTS),
    ),
    Relation(
        ("The favourite colour of {n} is {v}.",),
        ("What is the favourite colour of {n}?", "Which colour does {n} like most?"),
        ("What is the favourite colour?", "And which colour does {p} like most?"),
        _of(words.COLOURS),
    ),
    Relation(
        ("The code of {n} is {v}.",),
        ("What is the code of {n}?", "Which code does {n} have?"),
        ("What is the code?", "And which code does {p} have?"),
        lambda rng, split: str(rng.randint(100, 9999)),
    ),
    Relation(
        ("The friend of {n} is {v}.",),
        ("Who is the friend of {n}?", "What is the name of {n}'s friend?"),
        ("Who is the friend?", "And who is the friend of {p}?"),
        words.person,
    ),
)


@dataclass(frozen=True)
class Fact:
    """A relation with its subject and value filled in."""

    relation: Relation
    name: str
    value: str

    def text(self) -> str:
        """The fact as a sentence, which is also the long form of the answer."""
        return self.relation.statements[0].format(n=self.name, v=self.value)

    def question(self, rng: Random) -> str:
        """A question that names the subject."""
        return rng.choice(self.relation.questions).format(n=self.name)

    def follow_up(self, rng: Random, pronoun: str) -> str:
        """A question that leaves the subject to the turns before."""
        asked = "him" if pronoun == "he" else "her"
        text = rng.choice(self.relation.follow_ups)
        return text.format(p=asked if "of {p}" in text else pronoun)

    def answer(self, brief: bool) -> str:
        """The sentence, or only the value."""
        return f"{self.value[:1].upper()}{self.value[1:]}." if brief else self.text()


def make_facts(rng: Random, split: Split, people: int, each: int) -> list[Fact]:
    """Facts about some people in shuffled order, no relation twice for one person."""
    facts = [
        Fact(relation, name, relation.value(rng, split))
        for name in words.distinct_people(rng, split, people)
        for relation in rng.sample(RELATIONS, rng.randint(1, each))
    ]
    if rng.random() < 0.5:
        rng.shuffle(facts)
    return facts


def _unknown(rng: Random, split: Split, facts: list[Fact]) -> Fact:
    """What the facts do not say: about a stranger, or a missing relation of somebody known."""
    known = {(fact.relation, fact.name) for fact in facts}
    names = [fact.name for fact in facts]
    while True:
        name = rng.choice(names) if rng.random() < 0.6 else words.person(rng, split)
        relation = rng.choice(RELATIONS)
        if (relation, name) not in known:
            return Fact(relation, name, "")


def questions(rng: Random, split: Split, facts: list[Fact], count: int, brief: bool = False) -> list[Message]:
    """Questions and answers about `facts`; later ones may follow up on the same person."""
    turns: list[Message] = []
    last: str | None = None
    pronoun = rng.choice(("he", "she"))
    for _ in range(count):
        same = [fact for fact in facts if fact.name == last]
        if same and rng.random() < 0.5:
            fact = rng.choice(same)
            question, answer = fact.follow_up(rng, pronoun), fact.answer(brief)
        elif rng.random() < 0.2:
            fact = _unknown(rng, split, facts)
            question, answer = fact.question(rng), UNKNOWN
        else:
            fact = rng.choice(facts)
            question, answer = fact.question(rng), fact.answer(brief)
        last = None if answer == UNKNOWN else fact.name
        turns += [user(question), assistant(answer)]
    return turns


def ask_facts(rng: Random, split: Split) -> Example:
    """Facts in the system message, in the question, or told in a turn before it."""
    brief = rng.random() < 0.25
    facts = make_facts(rng, split, rng.randint(1, 4), 3)
    told = rng.choice((" ", " ", "\n")).join(fact.text() for fact in facts)
    turns = questions(rng, split, facts, rng.choice((1, 2, 3, 4)), brief)
    style = [{"role": "system", "content": BRIEF}] if brief else []
    form = rng.random()
    if form < 0.45:
        if brief:
            return Example([{"role": "system", "content": f"{BRIEF} {told}"}, *turns])
        return Example(system(rng, rng.choice(("", "Facts: ", "Here are some facts. ")) + told) + turns)
    head = style or system(rng)
    if form < 0.8:
        first = rng.choice(("{t}\n{q}", "{t} {q}", "Facts: {t}\nQuestion: {q}", "{t}\n\n{q}"))
        turns[0] = user(first.format(t=told, q=turns[0]["content"]))
        return Example(head + turns)
    note = rng.choice(("Remember this: ", "Please remember: ", ""))
    return Example([*head, user(note + told), assistant("I will remember that."), *turns])


def unanswerable(rng: Random, split: Split) -> Example:
    """A question that the given facts do not answer."""
    facts = make_facts(rng, split, rng.randint(1, 4), 3)
    told = " ".join(fact.text() for fact in facts)
    asked = user(_unknown(rng, split, facts).question(rng))
    if rng.random() < 0.6:
        return Example([*system(rng, told), asked, assistant(UNKNOWN)])
    return Example([*system(rng), user(f"{told}\n{asked['content']}"), assistant(UNKNOWN)])


def repeat(rng: Random, split: Split) -> Example:
    """Say a list again."""
    items = [words.made_up(rng, split) for _ in range(rng.randint(2, 10))]
    joint = rng.choice((", ", " ", "\n"))
    text = joint.join(items)
    ask = rng.choice(("Repeat: ", "Say again: ", "Copy this: ", "Repeat after me:\n"))
    return Example([*system(rng), user(ask + text), assistant(text)])


def look_up(rng: Random, split: Split) -> Example:
    """Find the values of keys in `key: value` lines."""
    keys = sorted({words.made_up(rng, split) for _ in range(rng.randint(2, 10))})
    rng.shuffle(keys)
    numeric = rng.random() < 0.5
    values = [str(rng.randint(1, 999)) if numeric else words.made_up(rng, split) for _ in keys]
    table = rng.choice(("\n", ", ")).join(f"{k}: {v}" for k, v in zip(keys, values, strict=True))
    form = rng.choice(("What is {k}?", "Look up {k}.", "Value of {k}?", "{k}?"))
    picks = rng.sample(range(len(keys)), min(len(keys), rng.choice((1, 2, 3))))
    whole = rng.random() < 0.5
    turns: list[Message] = []
    for index in picks:
        answer = f"{keys[index]}: {values[index]}" if whole else values[index]
        turns += [user(form.format(k=keys[index])), assistant(answer)]
    if whole:
        for turn in turns[::2]:
            turn["content"] = turn["content"].replace("?", " in the list?").replace(".", " in the list.")
    if rng.random() < 0.5:
        return Example(system(rng, table) + turns)
    turns[0] = user(f"{table}\n{turns[0]['content']}")
    return Example(system(rng) + turns)


def end_word(rng: Random, split: Split) -> Example:
    """The first or the last word of a list."""
    items = [words.made_up(rng, split) for _ in range(rng.randint(2, 8))]
    which = rng.choice(("first", "last"))
    form = rng.choice(("What is the {w} word of: {t}", "Say the {w} word: {t}", "{t}\nWhich word is {w}?"))
    answer = items[0] if which == "first" else items[-1]
    return Example([*system(rng), user(form.format(w=which, t=" ".join(items))), assistant(answer)])
