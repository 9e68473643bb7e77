"""How a `select` decides: the three named methods, and the base of methods that a program brings itself.

The named ones are decided by the backend, which scores exactly what would be generated. One of your own is given the
log-probabilities of every choice and names the winner::

    class Shortest(bo.ChoicesSamplingMethod):
        def __call__(self, *, choices, **_):
            return bo.ChoicesDecision(min(choices, key=len))

    s += bo.select("x", ["yes", "perhaps"], choices_method=Shortest())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from bough.runtime.protocol import CHOICE_METHODS, ChoiceMethod
from bough.runtime.protocol.scoring import best, score_choices

Triple: TypeAlias = "tuple[float, int, str]"
"""A token's natural-log probability, its id, its text."""


@dataclass(frozen=True)
class ChoicesDecision:
    """What a method decided: one of the choices, and what `get_meta_info` shall tell besides."""

    decision: str
    meta_info: Mapping[str, Any] | None = None


class ChoicesSamplingMethod(ABC):
    """Decides which of some choices is taken. Subclass it, or use one of the three that are named.

    A method of your own is called once the backend has scored the choices, in whichever thread needs the choice first;
    what is appended after such a `select` waits for it.
    """

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether the choices' log-probabilities without the prompt are needed; they cost a second scoring."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[Triple]],
        output_token_logprobs: Sequence[Sequence[Triple]],
        unconditional_token_logprobs: Sequence[Sequence[Triple]] | None = None,
    ) -> ChoicesDecision:
        """Return which choice is taken.

        normalized_prompt_logprobs[i]: mean natural-log probability of choice i's tokens. input_token_logprobs[i]: its
        tokens, none of the prompt's. output_token_logprobs[i]: empty, nothing is generated. unconditional_...[i]: the
        same tokens without the prompt, where asked for; a first token with nothing before it has 0.0.
        """


class NamedMethod(str, ChoicesSamplingMethod):
    """One of the methods that backends carry out themselves; equal to its name as a text.

    Called, it decides from given log-probabilities as the backend would.
    """

    __slots__ = ()

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether the choices' log-probabilities without the prompt are needed."""
        return self in ("unconditional_likelihood_normalized", "pmi")

    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[Triple]],
        output_token_logprobs: Sequence[Sequence[Triple]],
        unconditional_token_logprobs: Sequence[Sequence[Triple]] | None = None,
    ) -> ChoicesDecision:
        """Return the choice with the highest score; the first on ties."""
        given = [[logprob for logprob, _, _ in row] for row in input_token_logprobs]
        alone = unconditional_token_logprobs
        without = None if alone is None else [[logprob for logprob, _, _ in row] for row in alone]
        scores = score_choices(literal(self), given, without, [len(choice.encode()) for choice in choices])
        return ChoicesDecision(choices[best(scores)], {"scores": scores})


token_length_normalized: Final = NamedMethod("token_length_normalized")
"""The choice with the highest mean log-probability per token."""
greedy_token_selection: Final = NamedMethod("greedy_token_selection")
"""The choice that greedy decoding, restricted to the choices, would take; token by token."""
unconditional_likelihood_normalized: Final = NamedMethod("unconditional_likelihood_normalized")
"""The choice that the prompt makes likelier most, against its likelihood without any prompt (per token)."""
byte_length_normalized: Final = NamedMethod("byte_length_normalized")
"""The choice with the highest log-likelihood per byte of its text."""
pmi: Final = NamedMethod("pmi")
"""The choice that the prompt makes likelier most, as a whole, against a neutral prompt (the BOS token alone)."""
total_likelihood: Final = NamedMethod("sum")
"""The choice with the highest log-likelihood as a whole."""


def literal(method: str) -> ChoiceMethod:
    """Return a named method as the word the protocol has for it. Raises ValueError for any other text."""
    found: ChoiceMethod = CHOICE_METHODS[CHOICE_METHODS.index(method)]  # type: ignore[assignment]
    return found
