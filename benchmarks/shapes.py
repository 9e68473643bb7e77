"""The eleven workload shapes of the SGLang paper (arXiv 2312.07104v2, section 6.1, appendix C), in token ids.

A program is a tuple of requests; a request is issued when those it names in `after` have finished. Ids are drawn at
random, so that nothing is shared but what the shape shares; what a model would answer is drawn in advance, so that a
later prompt can contain it. Structure, fork widths and limits are those of the programs in `benchmark/` of
sgl-project/sglang; where a length depends on a data set it is chosen so that the offline optimum comes near the one
the paper's figure 13 shows, given here as `paper_optimum` (read off bars, so approximate).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

import numpy as np

from bough.runtime.vector import IntArray

VOCAB: Final = 32_000


@dataclass(frozen=True, eq=False)
class Request:
    """One generate (`output` has the ids it will draw), or one choice to score (`score_start` is where it begins).

    after: positions in the program of the requests that must have finished first.
    """

    prompt: IntArray
    output: IntArray | None = None
    score_start: int | None = None
    after: tuple[int, ...] = ()


Program: TypeAlias = tuple[Request, ...]


@dataclass(frozen=True)
class Shape:
    """A workload: an endless stream of programs. `lengths`: their look in tokens, and where that is from."""

    name: str
    lengths: str
    paper_optimum: float
    stream: Callable[[Writer], Iterator[Program]]

    def programs(self, num_requests: int, seed: int = 0, writer: Writer | None = None) -> list[Program]:
        """Return the first programs that make `num_requests` requests or a little more. writer: one of other texts."""
        programs: list[Program] = []
        stream, num = self.stream(writer or Writer(seed)), 0
        while num < num_requests:
            programs.append(next(stream))
            num += len(programs[-1])
        return programs


class Writer:
    """Draws ids from `first` up to `end`, and lengths; texts have `scale` of the length they are asked for."""

    def __init__(self, seed: int, *, scale: float = 1.0, first: int = 1, end: int = VOCAB) -> None:
        self._random = np.random.default_rng(seed)
        self._scale, self._first, self._end = scale, first, end

    def text(self, least: int, most: int | None = None) -> IntArray:
        """Return at least `least` and at most `most` ids, by default exactly `least`, before they are scaled."""
        length = self.number(least, most or least)
        if self._scale != 1.0:
            length = max(min(length, 2), round(length * self._scale))
        return self._random.integers(self._first, self._end, length).astype(np.int32)

    def number(self, least: int, most: int) -> int:
        return int(self._random.integers(least, most + 1))

    def shuffled(self, num: int) -> list[int]:
        return [int(i) for i in self._random.permutation(num)]


def join(*parts: IntArray) -> IntArray:
    """Return the parts as one array."""
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------- the shapes


def mmlu(writer: Writer) -> Iterator[Program]:
    """Questions subject by subject, each behind the five examples of its subject; one token is the answer."""
    while True:
        examples = writer.text(400, 900)
        for _ in range(160):
            yield (Request(join(examples, writer.text(60, 150)), writer.text(1)),)


def hellaswag(writer: Writer) -> Iterator[Program]:
    """A select between four endings, scored as four requests at once, behind twenty examples that all share."""
    examples = writer.text(1800)
    while True:
        question = join(examples, writer.text(20, 60))
        endings = (writer.text(10, 40) for _ in range(4))
        yield tuple(Request(join(question, ending), score_start=len(question)) for ending in endings)


def react(writer: Writer) -> Iterator[Program]:
    """A replayed trace: what is generated at a step is thrown away, the recorded thought and observation appended."""
    examples = writer.text(1500)
    while True:
        prompt, program = join(examples, writer.text(15, 40)), []
        for turn in range(writer.number(3, 6)):
            program.append(Request(prompt, writer.text(20, 100), after=(turn - 1,) if turn else ()))
            prompt = join(prompt, writer.text(50, 170))
        yield tuple(program)


def generative_agents(writer: Writer) -> Iterator[Program]:
    """An agent's calls one after the other, each of one of five functions with its own template and a few arguments."""
    templates = [writer.text(300, 900) for _ in range(5)]
    while True:
        calls = [join(templates[writer.number(0, 4)], writer.text(30, 90)) for _ in range(10)]
        yield tuple(Request(prompt, writer.text(3, 30), after=(i - 1,) if i else ()) for i, prompt in enumerate(calls))


def tree_of_thought(writer: Writer) -> Iterator[Program]:
    """Plan, execute, reflect, answer: every answer of a level is continued two ways, 30 requests in all."""
    first, *rest = (writer.text(num) for num in (65, 45, 40, 30))
    limits = [(80, 150), (100, 256), (100, 256), (40, 120)]
    while True:
        program: list[Request] = []
        level: list[tuple[int, ...]] = [()]
        for depth, (least, most) in enumerate(limits):
            following: list[tuple[int, ...]] = []
            question = writer.text(40, 100) if depth == 0 else None
            for after in level:
                if question is not None:
                    prompt = join(first, question)
                else:
                    parent = program[after[0]]
                    assert parent.output is not None
                    prompt = join(parent.prompt, parent.output, rest[depth - 1])
                for _ in range(2):
                    following.append((len(program),))
                    program.append(Request(prompt, writer.text(least, most), after=after))
            level = following
        yield tuple(program)


def skeleton_of_thought(writer: Writer) -> Iterator[Program]:
    """Five tips one after the other; each is expanded on its own, behind examples, while the next is written."""
    system, examples = writer.text(35), writer.text(340)
    while True:
        topic = writer.text(3, 12)
        prompt, program = join(system, topic, writer.text(1)), []
        previous: tuple[int, ...] = ()
        for _ in range(5):
            tip = writer.text(6, 16)
            program.append(Request(prompt, tip, after=previous))
            previous = (len(program) - 1,)
            program.append(Request(join(examples, topic, tip, writer.text(4)), writer.text(80, 128), after=previous))
            prompt = join(prompt, tip, writer.text(3))
        yield tuple(program)


def llm_judge(writer: Writer) -> Iterator[Program]:
    """An article judged along six dimensions at once, then a summary that contains all judgements."""
    system, dimensions = writer.text(35), [writer.text(80, 120) for _ in range(6)]
    while True:
        article = join(system, writer.text(500, 1200))
        judgements = [writer.text(50, 120) for _ in dimensions]
        branches = [Request(join(article, dim), text) for dim, text in zip(dimensions, judgements, strict=True)]
        parts = [part for text in judgements for part in (writer.text(4), text)]
        yield (*branches, Request(join(article, writer.text(12), *parts), writer.text(2), after=tuple(range(6))))


def json_decoding(writer: Writer) -> Iterator[Program]:
    """Five fields extracted one after the other from a page, with the keys between them given."""
    system, keys = writer.text(15), [writer.text(6, 12) for _ in range(5)]
    while True:
        prompt, program = join(system, writer.text(300, 1000)), []
        for i, key in enumerate(keys):
            prompt, value = join(prompt, key), writer.text(4, 24 if i == 4 else 8)
            program.append(Request(prompt, value, after=(i - 1,) if i else ()))
            prompt = join(prompt, value)
        yield tuple(program)


def multi_turn(least: int, most: int) -> Callable[[Writer], Iterator[Program]]:
    """Return chats of four turns of 256 to 512 tokens, nothing shared between chats; answers of `least` to `most`."""

    def chats(writer: Writer) -> Iterator[Program]:
        while True:
            prompt, program = writer.text(256, 512), []
            for turn in range(4):
                answer = writer.text(least, most)
                program.append(Request(prompt, answer, after=(turn - 1,) if turn else ()))
                prompt = join(prompt, answer, writer.text(256, 512))
            yield tuple(program)

    return chats


def dspy_rag(writer: Writer) -> Iterator[Program]:
    """A search query, then an answer from the passages found, then the field that the first completion left out."""
    demos_of_query, demos_of_answer = writer.text(800), writer.text(1500)
    while True:
        question = writer.text(15, 35)
        prompt = join(demos_of_answer, writer.text(160, 320), question)
        rationale = writer.text(30, 60)
        yield (
            Request(join(demos_of_query, question), writer.text(8, 20)),
            Request(prompt, rationale, after=(0,)),
            Request(join(prompt, rationale, writer.text(4)), writer.text(4, 12), after=(1,)),
        )


SHAPES: Final = (
    Shape("MMLU", "57 × (5-shot 400–900 → 160 × 60–150) → 1; mmlu/", 0.85, mmlu),  # noqa: RUF001
    Shape("HellaSwag", "20-shot 1800, 20–60, best of 4 × 10–40; hellaswag/", 0.98, hellaswag),  # noqa: RUF001
    Shape("ReAct", "1500, 3–6 steps of 50–170, → 20–100 unused; react/", 0.94, react),  # noqa: RUF001
    Shape("generative agents", "5 templates of 300–900, 30–90 → 3–30; generative_agents/", 0.91, generative_agents),  # noqa: RUF001
    Shape("tree of thought", "4 levels × 2 branches → 40–256; tree_of_thought_deep/", 0.99, tree_of_thought),  # noqa: RUF001
    Shape("skeleton of thought", "5 × (→ 6–16, 340 + it → 80–128); tip_suggestion/", 0.95, skeleton_of_thought),  # noqa: RUF001
    Shape("LLM judge", "article 500–1200, 6 × 80–120 → 50–120, then all → 2; llm_judge/", 0.73, llm_judge),  # noqa: RUF001
    Shape("JSON decoding", "page 300–1000, 5 × → 4–24; json_decode_regex/", 0.88, json_decoding),  # noqa: RUF001
    Shape("multi-turn short", "4 × (256–512 → 4–8); multi_turn_chat/", 0.60, multi_turn(4, 8)),  # noqa: RUF001
    Shape("multi-turn long", "4 × (256–512 → 256–512); multi_turn_chat/ --long", 0.74, multi_turn(256, 512)),  # noqa: RUF001
    Shape("DSPy RAG", "800 + 15–35, 1500 + 160–320 → 30–60, → 4–12; dspy/", 0.93, dspy_rag),  # noqa: RUF001
)


# ---------------------------------------------------------------------------------------------- what is possible


def optimum(programs: list[Program]) -> tuple[float, float]:
    """Return the best hit rate of any cache and schedule, and the figure of the paper, for all these programs.

    paper: 1 - unique tokens of the prompts' radix tree / prompt tokens, which counts an answer that comes back in a
    later prompt as one that must be computed as a prompt. best: those need not be, they were computed when drawn (all
    but the last token of an answer). A prompt's last token, always computed, is not counted against either.
    """
    prompts, drawn = [], []
    for request in (request for program in programs for request in program):
        hashes = prefix_hashes(request.prompt if request.output is None else join(request.prompt, request.output))
        # A scored sequence's last token is never computed.
        prompts.append(hashes[: len(request.prompt) - (request.output is None)])
        if request.output is not None:
            drawn.append(hashes[len(request.prompt) : -1])
    num_tokens = sum(map(len, prompts))
    unique = np.unique(np.concatenate(prompts))
    computed = np.setdiff1d(unique, np.concatenate(drawn) if drawn else unique[:0])
    return 1 - len(computed) / num_tokens, 1 - len(unique) / num_tokens


def prefix_hashes(ids: IntArray) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return 64 bits for every prefix of `ids`: the sum of mixed (position, id) pairs, after splitmix64."""
    mixed = np.arange(len(ids), dtype=np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed + np.uint64(0x9E3779B97F4A7C15) ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return np.cumsum(mixed ^ mixed >> np.uint64(31), dtype=np.uint64)


def working_set(programs: list[Program], concurrency: int) -> int:
    """Return the most distinct tokens, answers included, of any `concurrency` programs that follow each other."""
    most = 0
    for start in range(0, len(programs), concurrency):
        requests = (request for program in islice(programs, start, start + concurrency) for request in program)
        full = (r.prompt if r.output is None else join(r.prompt, r.output) for r in requests)
        most = max(most, len(np.unique(np.concatenate([prefix_hashes(ids) for ids in full]))))
    return most


def longest_request(programs: list[Program]) -> int:
    """Return the most tokens that one request needs."""
    return max(len(r.prompt) + (0 if r.output is None else len(r.output)) for program in programs for r in program)
