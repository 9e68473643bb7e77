"""Few-shot classification: labelled examples in the context, as a chat and as raw text."""

from __future__ import annotations

from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import Example, Message, assistant, system, user
from bough.runtime.pocket.words import Split

_GOOD = words.listed(
    "great lovely wonderful excellent fantastic delightful perfect superb brilliant amazing "
    "charming good fine beautiful fun pleasant"
)
_BAD = words.listed(
    "bad awful terrible boring horrible poor dreadful disappointing ugly dull nasty weak broken annoying sad rude"
)
_OBJECTS = words.listed(
    "film book meal hotel song play room phone game concert dinner show trip service story "
    "coffee music staff beach museum car food view bed soup lesson"
)
_GOOD_FORMS = (
    "The {o} was {g}.",
    "What a {g} {o}!",
    "I loved the {o}, it was {g}.",
    "A {g} {o} and a {h} {p}.",
    "The {o} is {g} and the {p} is {h}.",
    "I really enjoyed this {g} {o}.",
    "We had a {g} time with the {o}.",
)
_BAD_FORMS = (
    "The {o} was {g}.",
    "What a {g} {o}!",
    "I hated the {o}, it was {g}.",
    "A {g} {o} and a {h} {p}.",
    "The {o} is {g} and the {p} is {h}.",
    "I did not like this {g} {o}.",
    "We wasted our time with the {g} {o}.",
)
_PAIRS = (
    ("positive", "negative"),
    ("positive", "negative"),
    ("good", "bad"),
    ("happy", "sad"),
    ("yes", "no"),
    ("up", "down"),
    ("A", "B"),
    ("1", "0"),
)
TOPICS: dict[str, tuple[str, ...]] = {
    "sports": (
        "The team won the match.",
        "She scored two goals.",
        "The runner finished the race first.",
        "He trained for the tennis final.",
        "The coach praised the players.",
        "They lost the football game.",
        "The swimmer broke a record.",
        "Our club plays in the cup on Sunday.",
    ),
    "food": (
        "The soup needs more salt.",
        "She baked bread with butter.",
        "We ate rice and beans for dinner.",
        "He cooked fish with lemon.",
        "The cake is in the oven.",
        "Fry the onions in oil.",
        "They ordered pizza with cheese.",
        "The sauce is made of tomatoes.",
    ),
    "weather": (
        "It will rain tomorrow.",
        "The wind is strong today.",
        "Snow fell in the night.",
        "The sun shines and the sky is clear.",
        "A storm comes from the sea.",
        "It is cold and foggy.",
        "Clouds cover the hills.",
        "Thunder and lightning woke us.",
    ),
    "music": (
        "She plays the violin in a band.",
        "The choir sang an old song.",
        "He wrote a tune for the piano.",
        "The concert began with drums.",
        "The singer has a new album.",
        "They practise guitar every day.",
        "The orchestra played a slow piece.",
        "I heard this melody on the radio.",
    ),
    "travel": (
        "The train to the coast leaves at noon.",
        "We booked a hotel near the beach.",
        "Pack your passport and a map.",
        "The plane landed late.",
        "They took a bus across the country.",
        "Our tour visits three islands.",
        "She bought tickets for the ferry.",
        "The guide showed us the old town.",
    ),
    "money": (
        "The bank raised its interest rate.",
        "Prices went up again this month.",
        "He saved ten euros a week.",
        "She paid the bill by card.",
        "The shares fell on the market.",
        "They asked for a loan.",
        "The company earned a profit.",
        "Taxes are due in April.",
    ),
}


def _review(rng: Random, good: bool) -> str:
    adjectives, forms = (_GOOD, _GOOD_FORMS) if good else (_BAD, _BAD_FORMS)
    g, h = rng.sample(adjectives, 2)
    o, p = rng.sample(_OBJECTS, 2)
    return rng.choice(forms).format(g=g, h=h, o=o, p=p)


def _shots(rng: Random, split: Split, count: int) -> tuple[list[tuple[str, str]], str, list[str]]:
    """Labelled texts, what a label is called, the labels; each is shown before the last text."""
    if rng.random() < 0.5:
        labels = list(rng.choice(_PAIRS))
        kind = "sentiment"
        if rng.random() < 0.25:
            labels, kind = [words.made_up(rng, split) for _ in range(2)], "label"
        classes = [0, 1]
        texts = [lambda: _review(rng, True), lambda: _review(rng, False)]
    else:
        names = rng.sample(sorted(TOPICS), rng.choice((2, 2, 3)))
        labels = names if rng.random() < 0.7 else [words.made_up(rng, split) for _ in names]
        kind = "topic" if labels is names else "label"
        classes = list(range(len(names)))
        texts = [lambda name=name: rng.choice(TOPICS[name]) for name in names]  # type: ignore[misc]
    if kind != "label" and rng.random() < 0.3:
        kind = "label"
    order = classes + [rng.choice(classes) for _ in range(max(0, count - len(classes)))]
    rng.shuffle(order)
    order.append(rng.choice(classes))
    return [(texts[c](), labels[c]) for c in order], kind, labels


def chat_labels(rng: Random, split: Split) -> Example:
    """Each labelled text is a turn; the label is the reply."""
    shots, kind, labels = _shots(rng, split, rng.randint(2, 5))
    head = rng.choice(
        (
            f"Give the {kind} of each text.",
            f"Classify each text: {', '.join(labels)}.",
            f"Answer with the {kind} only.",
        )
    )
    field = rng.choice(("Text: ", "Review: ", "", "Sentence: "))
    turns: list[Message] = []
    for text, label in shots:
        turns += [user(field + text), assistant(label)]
    return Example(system(rng, head) + turns)


def raw_labels(rng: Random, split: Split) -> Example:
    """Labelled texts one under the other, without any chat markup."""
    shots, kind, _ = _shots(rng, split, rng.randint(2, 6))
    field = rng.choice(("Review", "Text", "Sentence", "Message", "Input"))
    name = rng.choice((kind.capitalize(), kind.capitalize(), "Label", "Output" if field == "Input" else "Class"))
    gap = rng.choice(("\n\n", "\n\n", "\n"))
    pieces: list[tuple[str, bool]] = []
    for text, label in shots:
        pieces += [
            (f"{field}: {text}\n{name}:", False),
            (f" {label}{gap[:1]}", True),
            (gap[1:], False),
        ]
    return Example(pieces=pieces)


def zero_shot(rng: Random, split: Split) -> Example:
    """Name the class of one text without examples."""
    if rng.random() < 0.5:
        good = rng.random() < 0.5
        ask = rng.choice(
            (
                "Is this review positive or negative? {t}",
                "What is the sentiment of this review?\n{t}",
                "Positive or negative? {t}",
            )
        )
        reply = "positive" if good else "negative"
        return Example([*system(rng), user(ask.format(t=_review(rng, good))), assistant(reply)])
    topic = rng.choice(sorted(TOPICS))
    ask = rng.choice(("What is the topic of this text? {t}", "What is this text about?\n{t}"))
    return Example([*system(rng), user(ask.format(t=rng.choice(TOPICS[topic]))), assistant(topic)])
