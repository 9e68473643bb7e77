"""The composition root of the runtime process: arguments -> parts -> serve. Nothing else knows every part."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Threads at an OpenMP barrier spin for some 50 us before they sleep. Asleep at once, a product costs 70 us more: a fork
# of 32 decodes at 1,562 instead of 1,926 tok/s, one sequence at 141 instead of 225. Spinning without end, a 47 us
# operation takes 8 ms when a neighbour wants the core; with this bound a step then takes 12.5 ms, asleep at once 7.6.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from bough.runtime.config import SCHEDULE_POLICIES, RuntimeConfig
from bough.runtime.endpoint import Endpoint
from bough.runtime.grammar.limits import Limits
from bough.runtime.journal import Journal, RecordingExecutor
from bough.runtime.loading import Display, Loading
from bough.runtime.protocol import RequestError, Welcome
from bough.runtime.server import Server, parent_watch

log = logging.getLogger("bough.runtime")


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


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        compile_s=options.grammar_seconds,
        memory_bytes=options.grammar_memory << 20,
        max_pending=options.grammar_pending,
        max_lexer_states=options.grammar_states,
        max_grammar_size=options.grammar_size,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; return the exit status."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s")
    report = _reporter(options.status_fd)
    _say(options, f"loading {options.model}")
    try:
        _serve(options, report)
    except RequestError as error:
        report(phase="failed", kind=error.kind, message=error.message)
        _say(options, error.message)
        return 1
    except KeyboardInterrupt:  # while it loads; later on it is a signal to drain
        _say(options, "interrupted")
        return 128 + signal.SIGINT
    return 0


def _say(options: argparse.Namespace, text: str) -> None:
    """Tell a person; a launcher hears it by its pipe."""
    if options.status_fd is None:
        print(f"bough serve: {text}", file=sys.stderr)


def _serve(options: argparse.Namespace, report: Callable[..., None]) -> None:
    config = RuntimeConfig(
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
    limits = _limits(options)
    is_orphaned = parent_watch(options.parent_pid, _stdin_watch() if options.parent_pid is not None else bool)
    with ExitStack() as stack:
        endpoint = stack.enter_context(
            Endpoint(options.listen, curve_secret=options.curve_secret, curve_clients=options.curve_clients)
        )
        if options.parent_pid is not None:
            stack.callback(_remove_socket, endpoint.address)
        journal = None if options.journal is None else stack.enter_context(Journal(options.journal))
        with _loading(options, report) as loading:
            server = _build(options, config, limits, endpoint, journal, _signal_fd(), is_orphaned, loading)
        signal.signal(signal.SIGTERM, server.drain)
        signal.signal(signal.SIGINT, server.drain)
        gc.collect()
        gc.freeze()  # what start-up made lives for ever: keep it out of every later collection
        report(phase="ready", address=endpoint.address, pid=os.getpid())
        _say(options, f"{options.model} serves on {endpoint.address}; Ctrl-C ends it")
        log.info("serving %s on %s", options.model, endpoint.address)
        server.run()


def _build(
    options: argparse.Namespace,
    config: RuntimeConfig,
    limits: Limits,
    endpoint: Endpoint,
    journal: Journal | None,
    wake_fd: int,
    is_orphaned: Callable[[], bool],
    loading: Loading,
) -> Server:
    from bough.runtime.models.folder import resolve_model

    # On a terminal the hub draws bars of its own.
    loading.enter("" if options.status_fd is None and sys.stderr.isatty() else "fetching")
    folder = resolve_model(options.model)
    loading.enter("starting")
    # These import torch: after the arguments are known to be good.
    from bough.runtime.cache.prefix_cache import PrefixCache
    from bough.runtime.composer import Composer
    from bough.runtime.draft_costs import measure_draft_costs
    from bough.runtime.engine import Engine
    from bough.runtime.grammar.compiler import GrammarCompiler
    from bough.runtime.grammar.vetting import Vetter
    from bough.runtime.grammar.vocabulary import Vocabulary
    from bough.runtime.inflight import InFlight
    from bough.runtime.pipeline import Executor, Launcher
    from bough.runtime.prompter import Prompter
    from bough.runtime.runner import load_runner
    from bough.runtime.scheduler import Scheduler
    from bough.runtime.speculation import Speculator
    from bough.runtime.text.chat import load_chat_template
    from bough.runtime.text.tokenizer import load_tokenizer

    loading.enter("reading weights")
    runner = load_runner(
        folder,
        dtype=options.dtype,
        device=options.device,
        page_size=options.page_size,
        max_total_tokens=options.max_total_tokens,
        on_progress=loading.advance,
        exact=options.exact,
        attention=options.attention,
        share_prefixes=not options.no_tree_decode,
        kv_dtype=options.kv_dtype,
        weights=options.weights,
        mem_fraction=options.mem_fraction,
        token_budget=config.token_budget,
        max_running=config.max_running,
        cuda_graphs=not options.no_cuda_graphs,
    )
    if config.speculate and not runner.exact:
        raise RequestError(
            "invalid_request",
            "speculate: this attention gives a drafted token other bits than a drawn one; exact mends it",
            field="speculate",
        )
    config = dataclasses.replace(config, speculate=runner.exact and config.speculate is not False)
    loading.enter("reading the tokenizer")
    prompter = Prompter(load_tokenizer(folder), load_chat_template(folder), options.model)
    cache = PrefixCache(runner.num_pages, runner.page_size, enabled=config.radix_cache)
    loading.enter("warming up")
    runner.warm_up()
    draft_costs = measure_draft_costs(runner) if config.speculate else None
    scheduler = Scheduler(
        cache,
        token_budget=config.token_budget,
        max_running=config.max_running,
        policy=config.schedule_policy,
        speculator=Speculator(runner.context_len, costs=draft_costs) if draft_costs else None,
    )
    epoch = secrets.randbits(62)
    seed = config.seed if config.seed is not None else secrets.randbits(62)
    vocabulary = Vocabulary(prompter.tokenizer, runner.vocab_size)
    grammars = GrammarCompiler(vocabulary, limits, Vetter(limits, vocabulary).vet)
    composer = Composer(
        prompter,
        vocab_size=runner.vocab_size,
        context_len=runner.context_len,
        seed=seed,
        credit=config.credit,
        grammars=grammars,
    )
    executor: Executor = runner
    if journal is not None:
        executor = RecordingExecutor(runner, journal)
        journal.start(
            config,
            model=str(options.model),
            version=version("bough"),
            seed=seed,
            epoch=epoch,
            page_size=runner.page_size,
            num_pages=runner.num_pages,
            vocab_size=runner.vocab_size,
            context_len=runner.context_len,
            draft_costs=dataclasses.asdict(draft_costs) if draft_costs else None,
        )
    may_overlap = config.overlap and journal is None and not config.speculate
    launcher = runner if may_overlap and isinstance(runner, Launcher) else None
    in_flight = InFlight(scheduler, executor, launcher=launcher, credit=config.credit)
    engine = Engine(
        config,
        scheduler,
        in_flight,
        composer,
        epoch=epoch,
        wire_stats=lambda: {**server.stats(), **runner.figures()},
        on_compiled=journal.compiled if journal is not None else None,
    )

    our_version = version("bough")

    def welcome(op: int) -> Welcome:
        return Welcome(
            op=op,
            epoch=epoch,
            version=our_version,
            model=str(options.model),
            architecture=runner.config.architecture,
            dtype=runner.dtype,
            kv_dtype=runner.kv_dtype,
            weights=runner.weights,
            device=runner.device,
            pid=os.getpid(),
            vocab_size=runner.vocab_size,
            context_len=runner.context_len,
            page_size=runner.page_size,
            total_pages=runner.num_pages,
            has_chat_template=prompter.has_chat_template,
            has_tools=prompter.has_tools,
            credit=config.credit,
            heartbeat_s=config.heartbeat_s,
            lease_s=config.lease_s,
            seed=config.seed,
        )

    server = Server(config, engine, endpoint, welcome, is_orphaned=is_orphaned, journal=journal, wake_fd=wake_fd)
    return server


@contextmanager
def _loading(options: argparse.Namespace, report: Callable[..., None]) -> Iterator[Loading]:
    """Tell how the start goes, by the launcher's pipe or on standard error, until it is left."""
    display = Display(sys.stderr, "bough serve: ")

    def tell(text: str, is_line: bool) -> None:
        report(phase="loading", text=text, is_line=is_line)

    try:
        with Loading(Path(options.model).name, display.show if options.status_fd is None else tell) as loading:
            yield loading
    finally:
        display.erase()


def _signal_fd() -> int:
    """Return a descriptor that becomes readable when a signal arrives."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable


def _remove_socket(address: str) -> None:
    """Remove the socket and its directory, which the launcher made for it and, if it was killed, cannot remove."""
    path = Path(address.removeprefix("ipc://"))
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _reporter(fd: int | None) -> Callable[..., None]:
    """Return a function that tells the launcher how far the start is: JSON lines on `fd`, closed after the last."""

    def report(**fields: Any) -> None:
        nonlocal fd
        if fd is None:
            return
        try:
            os.write(fd, json.dumps(fields).encode() + b"\n")
            if fields["phase"] != "loading":
                os.close(fd)
                fd = None
        except OSError:  # the launcher is gone, which the parent watch will notice
            fd = None

    return report


def _stdin_watch() -> Callable[[], bool]:
    """Return a function that tells whether the launcher closed our standard input, as its death does."""
    closed = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        closed.set()

    threading.Thread(target=watch, name="bough-stdin", daemon=True).start()
    return closed.is_set


if __name__ == "__main__":
    sys.exit(main())
