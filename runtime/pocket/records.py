"""A sentence about a person, a product or an event, turned into a JSON record."""

from __future__ import annotations

import json
from random import Random

from bough.runtime.pocket import words
from bough.runtime.pocket.example import Example, Message, assistant, system, user
from bough.runtime.pocket.words import Split

Record = dict[str, str | int]

_PEOPLE = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, lives in {city} and works as a {job}.",
    "{name} is a {age} year old {job} from {city}.",
    "In {city} there is a {job} called {name} who is {age} years old.",
    "My friend {name} works as a {job} in {city}.",
    "{name} from {city} has a {pet} and is {age} years old.",
    "{name} has a {pet} and works as a {job}.",
)
_PRODUCTS = (
    "The {colour} {product} costs {price} euros.",
    "{shop} sells a {colour} {product} for {price} euros.",
    "You can buy the {product} at {shop} for {price} euros.",
    "At {shop} a {colour} {product} is {price} euros.",
)
_EVENTS = (
    "The {event} takes place in {city} on {day}.",
    "On {day} {name} opens the {event} in {city}.",
    "{name} invites {guests} guests to the {event} on {day}.",
    "The {event} in {city} has {guests} guests.",
)
_EVENT_KINDS = words.listed("concert meeting festival wedding party lecture market race workshop dinner")
_ASKS = (
    "Extract {f} as JSON.\n{t}",
    "Extract {f} as JSON.\nText: {t}",
    "Text: {t}\nReturn JSON with the fields {f}.",
    "{t}\nWrite a JSON record with {f}.",
    "Return JSON with {f}: {t}",
)


def _fill(rng: Random, split: Split) -> tuple[str, Record]:
    """A sentence and what it says."""
    values: Record = {
        "name": words.person(rng, split),
        "age": rng.randint(5, 95),
        "city": words.place(rng, split),
        "job": rng.choice([job for job in words.JOBS if job[0] not in "aeiou"]),
        "pet": rng.choice(words.PETS),
        "colour": rng.choice(words.COLOURS),
        "product": rng.choice(words.THINGS),
        "price": rng.randint(2, 999),
        "shop": words.made_up(rng, split).capitalize(),
        "event": rng.choice(_EVENT_KINDS),
        "day": rng.choice(words.DAYS),
        "guests": rng.randint(5, 300),
    }
    form = rng.choice(rng.choice((_PEOPLE, _PEOPLE, _PRODUCTS, _EVENTS)))
    said = {key: value for key, value in values.items() if "{" + key + "}" in form}
    return form.format(**said), said


def _answer(said: Record, fields: list[str]) -> str:
    return json.dumps({field: said.get(field) for field in fields})


def json_record(rng: Random, split: Split) -> Example:
    """The asked fields in the asked order; a field that the text does not give is null."""
    turns: list[Message] = []
    fixed: list[str] | None = None
    for _ in range(rng.choice((1, 1, 1, 2))):
        text, said = _fill(rng, split)
        fields = rng.sample(sorted(said), rng.randint(min(2, len(said)), len(said)))
        if rng.random() < 0.08:
            fields.insert(
                rng.randint(0, len(fields)),
                rng.choice([f for f in ("age", "city", "price", "day") if f not in said]),
            )
        turns += [
            user(rng.choice(_ASKS).format(f=", ".join(fields), t=text)),
            assistant(_answer(said, fields)),
        ]
        if fixed is None and rng.random() < 0.2:
            fixed = fields
            turns = [user(text), assistant(_answer(said, fields))]
            break
    extra = f"Extract {', '.join(fixed)} as JSON." if fixed else ""
    if not extra and rng.random() < 0.2:
        extra = "Answer with JSON only."
    return Example(system(rng, extra) + turns)
