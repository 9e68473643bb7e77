"""The suite's workloads, carried out by every system in the same way: seeded programs of asks.

A program is a tuple of asks; an ask is sent when those it names in `after` have their answers, and its prompt may
contain what they answered. The paper's eleven shapes are those of shapes.py, which the simulator runs too: there an
answer is drawn in advance, here the place where it stands in a later prompt is left open for what the model says. Texts
are `scale` of the paper's length, so that a run takes seconds on two cores; what is shared with what stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from asks import Ask, Ids, Program, Trace
from models import FIRST_WORD, VOCAB_SIZE
from shapes import SHAPES, Writer
from shapes import Program as Recorded

from bough.runtime.vector import IntArray

FIRST_TOKEN: Final = "first token"
"""The workload of which the times of first tokens are told, cold and cached."""


def writer(seed: int, scale: float = 1.0) -> Writer:
    """Return a writer of words that the benchmarks' models have as one token each."""
    return Writer(seed, scale=scale, first=FIRST_WORD, end=VOCAB_SIZE - 1)


# ---------------------------------------------------------------------------------------------- the paper's shapes


def from_shape(place: int, num_requests: int, scale: float, concurrency: int = 16, kind: str = "paper") -> Trace:
    """Return the shape at that place of SHAPES, with its texts scaled."""
    shape = SHAPES[place]
    recorded = shape.programs(num_requests, writer=writer(100 + place, scale))
    programs = tuple(live(program) for program in recorded)
    look = f"{len(programs)} programs, texts × {scale:g}: {shape.lengths.split(';')[0]}"  # noqa: RUF001
    return Trace(shape.name, look, kind, programs, concurrency)


def live(program: Recorded) -> Program:
    """Return a recorded program with its answers left open; requests that score one prompt become one select."""
    asks: list[Ask] = []
    place_of: dict[int, int] = {}  # a request's place -> its ask's
    for place, request in enumerate(program):
        parts = _parts(program, place, place_of)
        after = tuple(place_of[i] for i in request.after)
        if request.score_start is not None:
            question = tuple(request.prompt[: request.score_start].tolist())
            choice = tuple(request.prompt[request.score_start :].tolist())
            if asks and asks[-1].choices and asks[-1].parts == (question,):
                asks[-1] = Ask((question,), choices=(*asks[-1].choices, choice), after=after)
            else:
                asks.append(Ask((question,), choices=(choice,), after=after))
        else:
            assert request.output is not None, "a request generates or scores"
            same = sum(ask.parts[: len(parts)] == parts and len(ask.parts) <= len(parts) + 1 for ask in asks)
            # Siblings that would be sampled apart get a word of their own: greedily they would all say the same.
            parts = (*parts, (FIRST_WORD + same,)) if same else parts
            asks.append(Ask(parts, num_tokens=len(request.output), after=after))
        place_of[place] = len(asks) - 1
    return tuple(asks)


def _parts(program: Recorded, place: int, place_of: Mapping[int, int]) -> tuple[Ids | int, ...]:
    """Return a prompt cut where the answers stand that it waited for.

    An answer is known by its ids: they are random, so two that are equal from end to end are the same one.
    """
    prompt = program[place].prompt
    found: list[tuple[int, int, int]] = []
    for before in sorted(_waited_for(program, place)):
        output = program[before].output
        if output is not None and len(output) > 1 and (at := _find(prompt, output)) is not None:
            found.append((at, at + len(output), place_of[before]))
    parts: list[Ids | int] = []
    done = 0
    for begin, end, ask in sorted(found):
        assert begin >= done, "answers do not overlap"
        parts += [tuple(prompt[done:begin].tolist())] if begin > done else []
        parts.append(ask)
        done = end
    return (*parts, tuple(prompt[done:].tolist())) if done < len(prompt) else tuple(parts)


def _waited_for(program: Recorded, place: int) -> set[int]:
    """Return the places of all requests that must have finished before this one."""
    seen: set[int] = set()
    pending = list(program[place].after)
    while pending:
        before = pending.pop()
        if before not in seen:
            seen.add(before)
            pending += program[before].after
    return seen


def _find(ids: IntArray, wanted: IntArray) -> int | None:
    if len(wanted) > len(ids):
        return None
    places = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, len(wanted)) == wanted).all(-1))
    return int(places[0]) if len(places) else None


# ---------------------------------------------------------------------------------------------- goals, sweeps, control


def fork(width: int, prefix: int, own: int, answer: int, kind: str = "sweep") -> Trace:
    """`width` branches with a little text of their own behind one prefix (or none), all generating at once."""
    words = writer(width * 10_007 + prefix)
    shared = words.text(prefix).tolist() if prefix else []
    asks = tuple(Ask(((*shared, *words.text(own).tolist()),), num_tokens=answer) for _ in range(width))
    each = f"({prefix} shared + {own})" if prefix else own
    shape = f"{width} × {each} → {answer}"  # noqa: RUF001
    name = f"fork {width} × {prefix}" if prefix else f"batch {width}"  # noqa: RUF001
    return Trace(name, shape, kind, (asks,), 1, width, prefix)


def control(prompts: int, prompt: int, answer: int) -> Trace:
    """Random prompts of which no two begin alike: what a prefix cache costs where it cannot help."""
    words = writer(5)
    programs = tuple((Ask((tuple(words.text(prompt).tolist()),), num_tokens=answer),) for _ in range(prompts))
    return Trace("no sharing", f"{prompts} × {prompt} → {answer}", "headline", programs, prompts)  # noqa: RUF001


def prefill(prompts: int, prompt: int) -> Trace:
    """Prompts without anything in common, of which only the first token is wanted: prefill alone."""
    words = writer(7)
    asks = tuple(Ask((tuple(words.text(prompt).tolist()),), num_tokens=1) for _ in range(prompts))
    name = f"prefill {prompts} × {prompt}"  # noqa: RUF001
    return Trace(name, f"{prompts} × {prompt} → 1", "headline", (asks,), 1)  # noqa: RUF001


def first_token(prefix: int, own: int, programs: int = 3, cached: int = 4) -> Trace:
    """A cold prompt, then some that have all but `own` of their tokens in common with it, one at a time."""
    words, made = writer(11), []
    for _ in range(programs):
        shared = words.text(prefix).tolist()
        prompts = [(*shared, *words.text(own).tolist()) for _ in range(1 + cached)]
        made.append(tuple(Ask((ids,), num_tokens=1, after=(i - 1,) if i else ()) for i, ids in enumerate(prompts)))
    shape = f"{programs} × ({prefix + own} cold, then {cached} × {own} on {prefix} cached) → 1"  # noqa: RUF001
    return Trace(FIRST_TOKEN, shape, "headline", tuple(made), 1)


MMLU, HELLASWAG, REACT, AGENTS, TREE, SKELETON, JUDGE, JSON, CHAT, LONG_CHAT, RAG = range(11)
_PAPER: Final = range(len(SHAPES))
_CONCURRENCY: Final = {CHAT: 8, LONG_CHAT: 8, TREE: 2}


def suite(size: str) -> list[Trace]:
    """Return all workloads, the most important first. size: "quick", "standard" or "full" (the paper's lengths)."""
    return _SUITES[size]()


def _quick() -> list[Trace]:
    return [
        fork(16, 256, 16, 16, "headline"),
        *_decode(64, 16),
        prefill(1, 256),
        prefill(4, 256),
        first_token(512, 32, programs=1, cached=2),
        control(4, 128, 16),
        *(from_shape(place, 30 if place == TREE else 8, 0.1) for place in _PAPER),
        fork(4, 64, 16, 16),
        fork(16, 64, 16, 16),
        fork(4, 256, 16, 16),
    ]


def _headlines() -> list[Trace]:
    return [
        fork(32, 1024, 32, 64, "headline"),
        *_decode(128, 64),
        prefill(1, 1024),
        prefill(8, 1024),
        first_token(1024, 64),
        control(16, 512, 32),
    ]


def _decode(prompt: int, answer: int) -> list[Trace]:
    """Return decoding alone: prompts that share nothing, as one batch."""
    return [fork(width, 0, prompt, answer, "headline") for width in (8, 1)]


def _standard() -> list[Trace]:
    requests = {MMLU: 32, HELLASWAG: 24, REACT: 16, TREE: 60, JUDGE: 21, CHAT: 32, LONG_CHAT: 16, RAG: 18}
    paper = (from_shape(place, requests.get(place, 30), 0.5, _CONCURRENCY.get(place, 16)) for place in _PAPER)
    return [*_headlines(), *paper, *_sweep((8, 32, 64), (256, 1024, 4096))]


def _full() -> list[Trace]:
    paper = (from_shape(place, 64, 1.0, _CONCURRENCY.get(place, 16)) for place in _PAPER)
    return [*_headlines(), *paper, *_sweep((4, 8, 16, 32, 64), (256, 1024, 2048, 4096))]


def _sweep(widths: Sequence[int], prefixes: Sequence[int]) -> list[Trace]:
    """Return a fork per width and prefix, of the same own text and answers as the headline, which is one of them."""
    points = ((width, prefix) for prefix in prefixes for width in widths)
    return [fork(width, prefix, 32, 64) for width, prefix in points if (width, prefix) != (32, 1024)]


_SUITES: Final[Mapping[str, Callable[[], list[Trace]]]] = {"quick": _quick, "standard": _standard, "full": _full}
