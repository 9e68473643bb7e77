"""Words to build conversations from, split so that evaluation meets names and sums never seen."""

from __future__ import annotations

from random import Random
from typing import Literal, TypeAlias
from zlib import crc32

Split: TypeAlias = Literal["train", "eval"]


def listed(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


PEOPLE = listed(
    "Ann Ben Carla David Emma Frank Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam "
    "Tina Victor Wendy Yusuf Zoe Alice Bob Clara Dan Ella Finn Gina Hugo Iris John Karl Lena "
    "Mark Nina Oscar Peter Ruth Sara Tom Uma Vera Will Amir Chen Diego Fatima Ivan Keiko Lucas "
    "Mia Omar Priya"
)
CITIES = listed(
    "Rome Paris London Berlin Madrid Lisbon Vienna Prague Oslo Dublin Athens Cairo Tokyo Delhi "
    "Lima Boston Chicago Denver Seattle Toronto Sydney Milan Munich Zurich Geneva Warsaw Porto "
    "Lyon Bergen Kyoto"
)
JOBS = listed(
    "teacher doctor nurse baker driver farmer painter singer writer lawyer pilot cook gardener "
    "carpenter dentist engineer librarian plumber tailor actor chemist judge sailor waiter "
    "photographer mechanic"
)
COLOURS = listed("red blue green yellow black white orange purple brown pink grey silver")
PETS = listed("cat dog horse rabbit parrot hamster turtle goldfish goat duck snake lizard pony canary")
FOODS = listed(
    "pizza soup rice pasta bread cheese apples cake fish salad noodles beans potatoes honey "
    "pancakes olives mushrooms tomatoes chocolate yoghurt"
)
INSTRUMENTS = listed("piano guitar violin drum flute trumpet cello harp clarinet banjo")
THINGS = listed(
    "lamp chair table book phone bag clock bottle box cup knife mirror pen shirt hat coat bike "
    "tent camera radio basket blanket kettle ladder spoon umbrella candle ring"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")

_ONSETS = listed("b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl sh st th tr qu y ch")
_VOWELS = listed("a e i o u a e i o ai ee ou ia")
_CODAS = ("", "", "", "n", "r", "l", "s", "m", "t", "k", "x", "nd", "rt", "sh")


def held_out(key: str) -> bool:
    """Whether `key` belongs to evaluation: about one key in ten does, on every machine the same."""
    return crc32(key.encode()) % 10 == 0


def made_up(rng: Random, split: Split) -> str:
    """A pronounceable lower-case word of two or three syllables on the right side of the split."""
    while True:
        count = rng.choice((1, 2, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_CODAS)
        if len(word) > 2 and held_out(word) == (split == "eval"):
            return word


def person(rng: Random, split: Split) -> str:
    """A first name; in training a third of them are real ones."""
    if split == "train" and rng.random() < 0.35:
        return rng.choice(PEOPLE)
    return made_up(rng, split).capitalize()


def place(rng: Random, split: Split) -> str:
    """A city, real or made up."""
    return rng.choice(CITIES) if rng.random() < 0.4 else made_up(rng, split).capitalize()


def distinct_people(rng: Random, split: Split, count: int) -> list[str]:
    """Names of which no two are the same."""
    names: list[str] = []
    while len(names) < count:
        name = person(rng, split)
        if name not in names:
            names.append(name)
    return names


def pair(rng: Random, split: Split, sign: str) -> tuple[int, int]:
    """Two numbers below 100 for `a sign b`; a difference is never negative."""
    while True:
        a, b = (rng.randint(0, 99) if rng.random() < 0.15 else rng.randint(10, 99) for _ in range(2))
        if sign == "-" and a < b:
            a, b = b, a
        if held_out(f"{a}{sign}{b}") == (split == "eval"):
            return a, b
