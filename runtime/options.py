"""The options of `bough serve` and of `python -m bough.runtime`, and the settings that they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from bough.runtime.config import SCHEDULE_POLICIES, RuntimeConfig
from bough.runtime.grammar.limits import Limits
from bough.runtime.protocol import RequestError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `bough serve` and of `python -m bough.runtime`."""
    defaults = RuntimeConfig()
    parser = argparse.ArgumentParser(prog="bough serve", description="Serve a model to bough programs.")
    parser.add_argument("model", help='"pocket", a Hugging Face folder, or a hub id')
    parser.add_argument("--listen", required=True, metavar="ADDRESS", help="ipc://PATH or tcp://HOST:PORT (with keys)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (on a GPU); default: what the checkpoint and this machine do best"
    )
    parser.add_argument("--kv-dtype", help="auto (as --dtype), int8 or, on a GPU, fp8, with a scale per token and head")
    parser.add_argument("--weights", help="auto (as --dtype) or int8, with a scale per output channel")
    parser.add_argument("--device", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--mem-fraction", type=float, metavar="F", help="of the GPU's memory that may be used; default: 0.9"
    )
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel by itself")
    parser.add_argument(
        "--no-overlap", action="store_true", help="on a GPU: plan each step after the one before has ended"
    )
    parser.add_argument("--page-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--max-total-tokens", type=int, metavar="N", help="tokens the KV pool holds")
    parser.add_argument("--token-budget", type=int, default=defaults.token_budget, metavar="N")
    parser.add_argument("--max-running", type=int, default=defaults.max_running, metavar="N")
    parser.add_argument(
        "--max-waiting", type=int, default=defaults.max_waiting, metavar="N", help="operations queued before overloaded"
    )
    parser.add_argument("--schedule-policy", choices=SCHEDULE_POLICIES, default=defaults.schedule_policy)
    parser.add_argument("--no-radix-cache", action="store_true", help="keep no prefixes between operations")
    parser.add_argument(
        "--exact", action="store_true", help="prefill computes the same bits as decode, whatever it costs"
    )
    parser.add_argument("--attention", choices=("native", "torch"), help="default: native where it works")
    parser.add_argument("--no-tree-decode", action="store_true", help="every sequence reads its own KV, shared or not")
    _add_grammar_limits(parser)
    parser.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        help="draft what repeats earlier text and verify it in one step; the output stays the same (default: where"
        " attention gives a drafted token the bits of a drawn one)",
    )
    parser.add_argument("--seed", type=int, help="makes sampling reproducible; default: drawn at start")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--lease", type=float, default=defaults.lease_s, metavar="S", help=argparse.SUPPRESS)
    parser.add_argument("--credit", type=int, default=defaults.credit, help=argparse.SUPPRESS)
    parser.add_argument("--unsent-bytes", type=int, default=defaults.unsent_bytes, help=argparse.SUPPRESS)
    parser.add_argument("--curve-secret", type=Path, metavar="FILE", help="this server's secret certificate, for tcp")
    parser.add_argument("--curve-clients", type=Path, metavar="DIR", help="public certificates that may connect")
    parser.add_argument(
        "--journal", type=Path, metavar="FILE", help="record everything, prompts included, for a replay"
    )
    parser.add_argument("--status-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    return parser


def _add_grammar_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that bound what one grammar may cost; a grammar beyond them is refused, and costs nobody else."""
    defaults = Limits()
    group = parser.add_argument_group(
        "grammars",
        "What one constrained generate may cost. A grammar is tried out in a process of its own first; one beyond a"
        " limit is refused as too_complex, and other clients' decoding goes on meanwhile.",
    )
    for flag, value, metavar, text in (
        ("--grammar-seconds", defaults.compile_s, "S", "time to compile a grammar"),
        ("--grammar-memory", defaults.memory_bytes >> 20, "MIB", "memory to compile a grammar"),
        ("--grammar-states", defaults.max_lexer_states, "N", "states of its automata, 1 to 2 kB each"),
        ("--grammar-size", defaults.max_grammar_size, "N", "symbols of its rules"),
        ("--grammar-pending", defaults.max_pending, "N", "grammars waiting to be compiled before overloaded"),
    ):
        group.add_argument(flag, type=type(value), default=value, metavar=metavar, help=f"{text} (default: {value})")


def config_of(options: argparse.Namespace) -> RuntimeConfig:
    """Return the settings of the loop. Raises RequestError("invalid_request") for a number that cannot be."""
    for name in ("page_size", "max_total_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(
                "invalid_request", f"{name} must be at least 1, got {value}", field=name, limit=1, value=value
            )
    return RuntimeConfig(
        token_budget=options.token_budget,
        max_running=options.max_running,
        schedule_policy=options.schedule_policy,
        radix_cache=not options.no_radix_cache,
        speculate=options.speculate,
        overlap=not options.no_overlap,
        seed=options.seed,
        lease_s=options.lease,
        max_waiting=options.max_waiting,
        credit=options.credit,
        unsent_bytes=options.unsent_bytes,
    )


def limits_of(options: argparse.Namespace) -> Limits:
    """Return what one grammar may cost."""
    return Limits(
        compile_s=options.grammar_seconds,
        memory_bytes=options.grammar_memory << 20,
        max_pending=options.grammar_pending,
        max_lexer_states=options.grammar_states,
        max_grammar_size=options.grammar_size,
    )
