"""The composition root of the runtime: a model and settings -> parts, wired. Nothing else knows every part."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import msgspec

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.draft_costs import measure_draft_costs
from bough.runtime.drafts import DraftCosts
from bough.runtime.endpoint import Endpoint
from bough.runtime.engine import Engine
from bough.runtime.grammar.compiler import GrammarCompiler
from bough.runtime.grammar.limits import Limits
from bough.runtime.grammar.vetting import Vetter
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.inflight import InFlight
from bough.runtime.journal import Journal, RecordingExecutor
from bough.runtime.loading import Loading
from bough.runtime.pipeline import Launcher
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import RequestError, Welcome
from bough.runtime.runner import Runner, load_runner
from bough.runtime.scheduler import Scheduler
from bough.runtime.server import Server
from bough.runtime.speculation import Speculator
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tokenizer import load_tokenizer


def assemble(
    options: argparse.Namespace,
    config: RuntimeConfig,
    limits: Limits,
    endpoint: Endpoint,
    journal: Journal | None,
    folder: Path,
    loading: Loading,
    *,
    is_orphaned: Callable[[], bool],
    wake_fd: int,
) -> Server:
    """Load the model and return the server of it, warm.

    options: of `options.build_parser`; config and limits are made of them. folder: the model's files. is_orphaned,
    wake_fd: see `Server`. Raises RequestError: "unsupported_model", "invalid_request" or "resource_exhausted".
    """
    loading.enter("reading weights")
    runner = _runner(options, config, folder, loading)
    config = _with_drafts_decided(config, runner)
    loading.enter("reading the tokenizer")
    prompter = Prompter(load_tokenizer(folder), load_chat_template(folder), options.model)
    loading.enter("warming up")
    runner.warm_up()
    draft_costs = measure_draft_costs(runner) if config.speculate else None
    epoch = secrets.randbits(62)
    seed = config.seed if config.seed is not None else secrets.randbits(62)
    if journal is not None:
        _start_journal(journal, options, config, runner, draft_costs, epoch=epoch, seed=seed)
    scheduler = _scheduler(config, runner, draft_costs)
    engine = Engine(
        config,
        scheduler,
        _in_flight(config, scheduler, runner, journal),
        _composer(config, limits, runner, prompter, seed),
        epoch=epoch,
        wire_stats=lambda: {**server.stats(), **runner.figures()},
        on_compiled=journal.compiled if journal is not None else None,
    )
    welcome = _welcome(options, config, runner, prompter, epoch)
    server = Server(config, engine, endpoint, welcome, is_orphaned=is_orphaned, journal=journal, wake_fd=wake_fd)
    return server


def _runner(options: argparse.Namespace, config: RuntimeConfig, folder: Path, loading: Loading) -> Runner:
    return load_runner(
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


def _with_drafts_decided(config: RuntimeConfig, runner: Runner) -> RuntimeConfig:
    """Return the settings with `speculate` known. Raises RequestError if drafts would change the output."""
    if config.speculate and not runner.exact:
        raise RequestError(
            "invalid_request",
            "speculate: this attention gives a drafted token other bits than a drawn one; exact mends it",
            field="speculate",
        )
    return replace(config, speculate=runner.exact and config.speculate is not False)


def _start_journal(
    journal: Journal,
    options: argparse.Namespace,
    config: RuntimeConfig,
    runner: Runner,
    draft_costs: DraftCosts | None,
    *,
    epoch: int,
    seed: int,
) -> None:
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
        draft_costs=asdict(draft_costs) if draft_costs else None,
    )


def _scheduler(config: RuntimeConfig, runner: Runner, draft_costs: DraftCosts | None) -> Scheduler:
    return Scheduler(
        PrefixCache(runner.num_pages, runner.page_size, enabled=config.radix_cache),
        token_budget=config.token_budget,
        max_running=config.max_running,
        policy=config.schedule_policy,
        speculator=Speculator(runner.context_len, costs=draft_costs) if draft_costs else None,
    )


def _in_flight(config: RuntimeConfig, scheduler: Scheduler, runner: Runner, journal: Journal | None) -> InFlight:
    executor = runner if journal is None else RecordingExecutor(runner, journal)
    may_overlap = config.overlap and journal is None and not config.speculate
    launcher = runner if may_overlap and isinstance(runner, Launcher) else None
    return InFlight(scheduler, executor, launcher=launcher, credit=config.credit)


def _composer(config: RuntimeConfig, limits: Limits, runner: Runner, prompter: Prompter, seed: int) -> Composer:
    vocabulary = Vocabulary(prompter.tokenizer, runner.vocab_size)
    return Composer(
        prompter,
        vocab_size=runner.vocab_size,
        context_len=runner.context_len,
        seed=seed,
        credit=config.credit,
        grammars=GrammarCompiler(vocabulary, limits, Vetter(limits, vocabulary).vet),
    )


def _welcome(
    options: argparse.Namespace, config: RuntimeConfig, runner: Runner, prompter: Prompter, epoch: int
) -> Callable[[int], Welcome]:
    """Return what answers a hello of an operation's id."""
    greeting = Welcome(
        op=0,
        epoch=epoch,
        version=version("bough"),
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
    return lambda op: msgspec.structs.replace(greeting, op=op)
