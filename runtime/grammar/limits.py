"""`Limits`: what one grammar may cost. Light to import: the command line reads its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bough.runtime.protocol import RequestError

if TYPE_CHECKING:
    import llguidance

MOST: Final = 1 << 40
LLGUIDANCE_LIMITS: Final = (
    "max_lexer_states",
    "max_grammar_size",
    "initial_lexer_fuel",
    "step_lexer_fuel",
    "step_max_items",
    "max_items_in_row",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one grammar may cost. Defaults of llguidance, but for the states (1 to 2 kB each).

    compile_s: seconds for compiling and the first steps, on trial. memory_bytes: address space that the trial may add.
    max_pending: grammars that wait or are compiled at once.
    """

    compile_s: float = 5.0
    memory_bytes: int = 1 << 30
    max_pending: int = 256
    num_threads: int = 2
    max_lexer_states: int = 50_000
    max_grammar_size: int = 500_000
    initial_lexer_fuel: int = 1_000_000
    step_lexer_fuel: int = 200_000
    step_max_items: int = 50_000
    max_items_in_row: int = 2000

    def __post_init__(self) -> None:
        for name in ("compile_s", "memory_bytes", "max_pending", "num_threads", *LLGUIDANCE_LIMITS):
            value = getattr(self, name)
            if not 0 < value <= MOST:
                raise RequestError(
                    "invalid_request",
                    f"the grammar limit {name} must be above 0 and at most {MOST}, got {value}",
                    field=name,
                    limit=MOST,
                )


def for_llguidance(limits: Limits) -> llguidance.LLParserLimits:
    """Return the limits as llguidance takes them."""
    import llguidance

    named = {name: getattr(limits, name) for name in LLGUIDANCE_LIMITS}
    return llguidance.LLParserLimits(**named, verbose_errors=False)
