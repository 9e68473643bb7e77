"""Greetings, remembering what the user said, and a small closed set of general knowledge."""

from __future__ import annotations

from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import Example, Message, assistant, system, user
from bough.runtime.pocket.words import Split

_SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Hey"), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am pocket, a small demonstration model.",
    ),
    (("Thanks", "Thank you!", "Thanks a lot.", "Thank you."), "You are welcome!"),
    (("Goodbye", "Bye!", "See you.", "Good night."), "Goodbye!"),
    (("How are you?", "How do you do?"), "I am fine, thank you. How can I help you?"),
    (
        ("What can you do?", "How can you help me?", "Help"),
        "I can answer questions about facts you give me, add numbers, give tips and use tools.",
    ),
    (("Are you a human?", "Are you a robot?"), "I am pocket, a small demonstration model."),
    (("Tell me a joke.",), "Why did the book go to the doctor? It had a broken spine."),
)
_CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin",
    "England": "London", "Portugal": "Lisbon", "Austria": "Vienna", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw",
    "Greece": "Athens", "Ireland": "Dublin", "Russia": "Moscow", "Japan": "Tokyo",
    "China": "Beijing", "India": "Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Turkey": "Ankara", "Hungary": "Budapest", "Iran": "Tehran",
    "Iceland": "Reykjavik", "Belgium": "Brussels",
}  # fmt: skip
_OPPOSITES = (
    "hot cold,big small,up down,fast slow,old new,good bad,happy sad,light dark,open closed,"
    "rich poor,strong weak,early late,full empty,hard soft,long short,wet dry,clean dirty,"
    "loud quiet,near far,day night"
)
_PLURALS = (
    "cat cats,dog dogs,child children,mouse mice,foot feet,tooth teeth,man men,woman women,"
    "box boxes,city cities,leaf leaves,knife knives,house houses,sheep sheep,baby babies,"
    "bus buses,fish fish,book books"
)
_SOUNDS = (
    "cat meows,dog barks,cow moos,duck quacks,lion roars,sheep bleats,horse neighs,pig oinks,"
    "bee buzzes,frog croaks,owl hoots,snake hisses,bird sings,wolf howls"
)
_COLOURS = (
    "sky blue,grass green,snow white,blood red,coal black,a lemon yellow,a carrot orange,"
    "a banana yellow,a tomato red,milk white,the sun yellow,chocolate brown"
)
_LEGS = "dog four,cat four,spider eight,bird two,ant six,horse four,human two,bee six,snake no,fish no"


def _rows(text: str) -> list[tuple[str, str]]:
    rows = (row.rsplit(" ", 1) for row in text.split(","))
    return [(left, right) for left, right in rows]


def _knowledge() -> list[tuple[tuple[str, ...], str]]:
    """Every known question in its wordings, with its answer."""
    rows: list[tuple[tuple[str, ...], str]] = []
    for land, city in _CAPITALS.items():
        ask = (f"What is the capital of {land}?", f"Which city is the capital of {land}?")
        rows.append((ask, f"The capital of {land} is {city}."))
        rows.append(((f"{city} is the capital of which country?",), f"{city} is the capital of {land}."))
    for one, other in _rows(_OPPOSITES):
        for left, right in ((one, other), (other, one)):
            ask = (f"What is the opposite of {left}?", f"Give the opposite of {left}.")
            rows.append((ask, f"The opposite of {left} is {right}."))
    for one, many in _rows(_PLURALS):
        rows.append(
            (
                (f"What is the plural of {one}?", f"Give the plural of {one}."),
                f"The plural of {one} is {many}.",
            )
        )
    for animal, sound in _rows(_SOUNDS):
        rows.append(
            (
                (f"What sound does a {animal} make?", f"What does a {animal} do?"),
                f"A {animal} {sound}.",
            )
        )
    for thing, colour in _rows(_COLOURS):
        rows.append(
            (
                (f"What colour is {thing}?", f"Which colour is {thing}?"),
                f"{thing.capitalize()} is {colour}.",
            )
        )
    for animal, legs in _rows(_LEGS):
        rows.append(((f"How many legs does a {animal} have?",), f"A {animal} has {legs} legs."))
    for cycle, kind in ((words.DAYS, "day"), (words.MONTHS, "month")):
        for index, item in enumerate(cycle):
            after = cycle[(index + 1) % len(cycle)]
            rows.append(
                (
                    (f"Which {kind} comes after {item}?", f"What {kind} is after {item}?"),
                    f"{after} comes after {item}.",
                )
            )
            rows.append(((f"Which {kind} comes before {after}?",), f"{item} comes before {after}."))
        asked = (f"What are the {kind}s of the week?", f"List the {kind}s of the week.")
        if kind == "month":
            asked = ("What are the months of the year?", "List the months of the year.")
        rows.append((asked, ", ".join(cycle) + "."))
    rows.append((("How many days are in a week?",), "A week has seven days."))
    rows.append((("How many months are in a year?",), "A year has twelve months."))
    return rows


_KNOWLEDGE = _knowledge()


def greet(rng: Random, split: Split) -> Example:
    """Small talk with fixed replies."""
    asks, reply = rng.choice(_SMALL_TALK)
    return Example([*system(rng), user(rng.choice(asks)), assistant(reply)])


def know(rng: Random, split: Split) -> Example:
    """A question of the closed set of general knowledge."""
    asks, reply = rng.choice(_KNOWLEDGE)
    return Example([*system(rng), user(rng.choice(asks)), assistant(reply)])


def do_not_know(rng: Random, split: Split) -> Example:
    """A question about somebody or something that nobody has told the model about."""
    name = words.made_up(rng, split).capitalize()
    ask = rng.choice(
        (
            "Who is {n}?", "What is the capital of {n}?", "Where does {n} live?", "How old is {n}?",
            "What is {n}?", "What does {n} like?", "What is the job of {n}?", "Where is {n}?",
        )
    )  # fmt: skip
    return Example([*system(rng), user(ask.format(n=name)), assistant("I do not know.")])


_TOLD = (
    (
        ("My name is {v}.", "I am {v}."),
        ("What is my name?", "Who am I?"),
        "Your name is {v}.",
        "Nice to meet you, {v}!",
    ),
    (
        ("I live in {v}.",),
        ("Where do I live?", "In which city do I live?"),
        "You live in {v}.",
        "I will remember that.",
    ),
    (
        ("My favourite colour is {v}.",),
        ("What is my favourite colour?",),
        "Your favourite colour is {v}.",
        "I will remember that.",
    ),
    (
        ("I am {v} years old.",),
        ("How old am I?", "What is my age?"),
        "You are {v} years old.",
        "I will remember that.",
    ),
    (
        ("My pet is a {v}.",),
        ("What is my pet?", "Which pet do I have?"),
        "Your pet is a {v}.",
        "I will remember that.",
    ),
    (
        ("My friend is called {v}.",),
        ("What is my friend called?", "Who is my friend?"),
        "Your friend is called {v}.",
        "I will remember that.",
    ),
)


def _told(rng: Random, split: Split) -> list[tuple[list[Message], list[Message]]]:
    """Pairs of telling and asking turns about the user."""
    values = (
        words.person(rng, split), words.place(rng, split), rng.choice(words.COLOURS),
        str(rng.randint(5, 95)), rng.choice(words.PETS), words.person(rng, split),
    )  # fmt: skip
    result: list[tuple[list[Message], list[Message]]] = []
    for index in rng.sample(range(len(_TOLD)), rng.randint(1, 3)):
        tells, asks, answer, reply = _TOLD[index]
        value = values[index]
        tell = [user(rng.choice(tells).format(v=value)), assistant(reply.format(v=value))]
        result.append((tell, [user(rng.choice(asks)), assistant(answer.format(v=value))]))
    return result


def remember(rng: Random, split: Split) -> Example:
    """Things that the user says about themselves, other turns, then questions about them."""
    told = _told(rng, split)
    turns = [turn for tell, _ in told for turn in tell]
    for _ in range(rng.choice((0, 0, 1, 2))):
        turns += rng.choice((greet, know))(rng, split).messages[-2:]
    rng.shuffle(told)
    for _, ask in told[: rng.randint(1, len(told))]:
        turns += ask
    return Example(system(rng) + turns)
