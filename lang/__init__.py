"""bough: a language for LLM programs, and the runtime that was built for it.

::

    import bough as bo

    @bo.function
    def answer(s, question):
        s += bo.user(question)
        s += bo.assistant(bo.gen("answer", max_tokens=64))

    with bo.Runtime() as rt:
        print(answer.run("What is 17 + 25?", backend=rt)["answer"])

The map of this folder, each line a part and its files:

    a program               program.py runs with a *state*: state.py and its parts: branching.py and group.py (forks),
                            following.py and streaming.py (reading along), awaiting.py, scopes.py, tree.py
    what it appends         expressions.py, sampling.py; choices.py decides selects
    what became of it       calls.py (gens and selects), pieces.py (the text), strands.py (whose pieces are whose),
                            variables.py; cells.py after a join
    who carries it out      interpreter.py turns pieces into primitives of a *backend* (backend.py), whose branches
                            it holds by lease.py
    the backends            the runtime over ZeroMQ (client.py, link.py, liveness.py; launch.py, life.py and process.py
                            start one; recovery.py starts another when it dies, from what record.py, ledger.py and
                            rebuild.py know), a script (scripted.py, scripted_branch.py, script.py), an HTTP API
                            (openai.py, openai_protocol.py, openai_answer.py, transcript.py, local_branches.py,
                            capabilities.py)
    going back, and ahead   checkpoint.py, check.py, travel.py; peek.py
    many branches           joins.py and race.py end them; search.py and searching.py try many
    what a gen is held to   constraint.py; grammars are values: grammars.py builds trees of grammar_nodes.py, and
                            grammar_facts.py knows what they hold; lark_source.py writes them for the runtime,
                            matching.py reads texts against them (acceptor.py, capture_reader.py), samples.py makes
                            texts
    types                   typed.py, scalars.py, schemas.py (schema_parts.py, msgspec_schemas.py, pydantic_schemas.py,
                            type_limits.py); partial.py and growth.py while they are written, var.py names their results
    tools                   tool_calling.py, tools.py, toolbox.py, tool_formats.py, tool_grammars.py
    thoughts                reasoning.py parts them from answers, thinking.py makes those that later context forgets
    waiting                 waiting.py, on an event loop by way of onloop.py
    many items              batchruns.py, batch.py, abatch.py; book.py, inflight.py, retries.py, items.py, results.py,
                            progress.py, hub.py, loopthread.py
    what surrounds a run    running.py, seeds.py; usage.py adds up what it cost
    watching a run          watch.py are those who watch, watched.py the backend that tells them, places.py where in the
                            run: the event log (events.py), a journal (journal.py), a budget (budget.py)
    replaying a run         replaying.py on a model, playback.py without; expected.py has what a journal says of it
    besides                 errors.py is the tree of what can go wrong, spellings.py and endpoint.py have SGLang's
                            other names, cli.py is the `bough` command
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from bough import errors
from bough.backend import Backend, Generation, chosen, set_default_backend
from bough.cells import Cells
from bough.checkpoint import Checkpoint
from bough.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    byte_length_normalized,
    greedy_token_selection,
    pmi,
    token_length_normalized,
    total_likelihood,
    unconditional_likelihood_normalized,
)
from bough.errors import (
    BackendError,
    BlockingRead,
    BoughError,
    BudgetExceeded,
    Cancelled,
    CheckFailed,
    ContextOverflow,
    InvalidRequest,
    InvalidValue,
    Overloaded,
    ProgramError,
    ProtocolMismatch,
    ReplayMismatch,
    ResourceExhausted,
    RuntimeLost,
    Timeout,
    ToolError,
    Truncated,
    UnknownVariable,
    UnsupportedByBackend,
    UnsupportedModel,
)
from bough.expressions import (
    Expression,
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    role,
    role_begin,
    role_end,
    select,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
)
from bough.grammar_nodes import Grammar, lit
from bough.grammars import (
    capture,
    json_schema,
    json_type,
    lark,
    many,
    of_type,
    one_of,
    optional,
    rule,
    rx,
    separated,
    substring_of,
    until,
)
from bough.group import Group, arace, race
from bough.items import ItemState
from bough.joins import mean_logprob
from bough.program import Program, function
from bough.reasoning import ReasoningFormat, separate_reasoning
from bough.retries import Retries
from bough.scripted import ScriptedBackend
from bough.search import SearchNode, TreeSearch
from bough.spellings import NOT_HERE, gen_int, gen_string, image, video
from bough.state import State
from bough.thinking import think
from bough.tools import Tool, ToolCall, ToolResult, tool
from bough.var import Var

if TYPE_CHECKING:
    from bough.budget import Budget
    from bough.client import RuntimeClient
    from bough.endpoint import RuntimeEndpoint
    from bough.events import Event
    from bough.journal import Journal
    from bough.launch import Runtime
    from bough.openai import OpenAI
    from bough.playback import ReplayBackend
    from bough.replaying import replay
    from bough.usage import RunUsage

__version__ = "0.1.0"

_LAZY: Final = {
    "Budget": "bough.budget",
    "Event": "bough.events",
    "Journal": "bough.journal",
    "ReplayBackend": "bough.playback",
    "RunUsage": "bough.usage",
    "Runtime": "bough.launch",
    "RuntimeClient": "bough.client",
    "OpenAI": "bough.openai",
    "RuntimeEndpoint": "bough.endpoint",
    "replay": "bough.replaying",
}


def flush_cache(backend: Backend | None = None) -> None:
    """Drop every cached prefix that is not in use, on the given or the default backend."""
    chosen(backend).flush_cache()


def get_server_info(backend: Backend | None = None) -> dict[str, object]:
    """Return what the given or the default backend runs: model, device, limits."""
    return chosen(backend).server_info()


def __getattr__(name: str) -> Any:
    """Import what not every program needs when it is used: ZeroMQ is a third of the time that an import may take."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    hint = f": {NOT_HERE[name]}" if name in NOT_HERE else ""
    raise AttributeError(f"module 'bough' has no attribute {name!r}{hint}")


__all__ = [
    "Backend",
    "BackendError",
    "BlockingRead",
    "BoughError",
    "Budget",
    "BudgetExceeded",
    "Cancelled",
    "Cells",
    "CheckFailed",
    "Checkpoint",
    "ChoicesDecision",
    "ChoicesSamplingMethod",
    "ContextOverflow",
    "Event",
    "Expression",
    "Generation",
    "Grammar",
    "Group",
    "InvalidRequest",
    "InvalidValue",
    "ItemState",
    "Journal",
    "OpenAI",
    "Overloaded",
    "Program",
    "ProgramError",
    "ProtocolMismatch",
    "ReasoningFormat",
    "ReplayBackend",
    "ReplayMismatch",
    "ResourceExhausted",
    "Retries",
    "RunUsage",
    "Runtime",
    "RuntimeClient",
    "RuntimeEndpoint",
    "RuntimeLost",
    "ScriptedBackend",
    "SearchNode",
    "State",
    "Timeout",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "TreeSearch",
    "Truncated",
    "UnknownVariable",
    "UnsupportedByBackend",
    "UnsupportedModel",
    "Var",
    "arace",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "byte_length_normalized",
    "capture",
    "errors",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "json_schema",
    "json_type",
    "lark",
    "lit",
    "many",
    "mean_logprob",
    "of_type",
    "one_of",
    "optional",
    "pmi",
    "race",
    "replay",
    "role",
    "role_begin",
    "role_end",
    "rule",
    "rx",
    "select",
    "separate_reasoning",
    "separated",
    "set_default_backend",
    "substring_of",
    "system",
    "system_begin",
    "system_end",
    "think",
    "token_length_normalized",
    "tool",
    "total_likelihood",
    "unconditional_likelihood_normalized",
    "until",
    "user",
    "user_begin",
    "user_end",
    "video",
]
