"""`separate_reasoning`: parts what a model thought aloud from what it answered, in the variables of an expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bough.errors import InvalidRequest
from bough.expressions import Concat, Expression, Gen, SeparateReasoning, pieces_of

SUFFIX: Final = "_reasoning_content"
"""Ends the name of the variable that holds the reasoning, as in SGLang."""


@dataclass(frozen=True)
class ReasoningFormat:
    """Between which texts a model thinks. `is_forced`: its chat template has opened the thinking already."""

    start: str
    end: str
    is_forced: bool = False

    def split(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the answer, without blanks at their ends.

        Thinking that was cut off before its end is all reasoning; a text without any is all answer.
        """
        before, found, after = text.partition(self.start)
        if not found and not (self.is_forced or self.end in text):
            return "", text
        thought = after if found else text
        reasoning, ended, answer = thought.partition(self.end)
        kept = before if found else ""
        return reasoning.strip(), (kept + answer.lstrip() if ended else kept).strip()

    def reasoning(self, text: str) -> str:
        """Return the reasoning."""
        return self.split(text)[0]

    def answer(self, text: str) -> str:
        """Return the answer."""
        return self.split(text)[1]


_THINK: Final = ReasoningFormat("<think>", "</think>")
_FORCED: Final = ReasoningFormat("<think>", "</think>", is_forced=True)
FORMATS: Final[Mapping[str, ReasoningFormat]] = {
    "deepseek-r1": _FORCED,
    "deepseek-v3": _THINK,
    "glm45": _THINK,
    "kimi": ReasoningFormat("◁think▷", "◁/think▷"),
    "minimax": _FORCED,
    "qwen3": _THINK,
    "qwen3-thinking": _FORCED,
    "step3": _FORCED,
}
"""How models think, by SGLang's names for their kinds."""


def separate_reasoning(expr: str | Expression | None = None, model_type: str | ReasoningFormat = "qwen3") -> Concat:
    """Return the expression, with the reasoning of each of its gens in a variable of its own.

    ::

        s += bo.assistant(bo.separate_reasoning(bo.gen("answer", max_tokens=512), model_type="qwen3"))
        s["answer"], s["answer_reasoning_content"]

    The state's text stays what was generated, thinking included: only the variables change. model_type: one of
    `bough.reasoning.FORMATS`, or a `ReasoningFormat` of your own. Raises InvalidRequest for an unknown one, and for an
    expression without a named gen.
    """
    pieces = () if expr is None else pieces_of(expr)
    gens = [piece for piece in pieces if isinstance(piece, Gen)]
    names = tuple(gen.name for gen in gens if gen.name is not None)
    if not names or len(names) < len(gens):
        raise InvalidRequest("separate_reasoning needs a name for each gen in it, and at least one", field="expr")
    form = _format(model_type)
    return Concat((*pieces, SeparateReasoning(names, SUFFIX, form.reasoning, form.answer)))


def _format(model_type: object) -> ReasoningFormat:
    if isinstance(model_type, ReasoningFormat):
        if not (model_type.start and model_type.end):
            raise InvalidRequest("a ReasoningFormat needs a start and an end that are not empty", field="model_type")
        return model_type
    if not isinstance(model_type, str) or model_type not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidRequest(
            f"model_type must be one of {known}, or a ReasoningFormat, got {model_type!r}", field="model_type"
        )
    return FORMATS[model_type]
