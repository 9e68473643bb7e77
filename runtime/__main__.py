"""The process of the runtime: arguments -> parts -> serve, with what a launcher gave it: a pipe for news, an input."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

# Threads at an OpenMP barrier spin for some 50 us before they sleep. Asleep at once, a product costs 70 us more: a fork
# of 32 decodes at 1,562 instead of 1,926 tok/s, one sequence at 141 instead of 225. Spinning without end, a 47 us
# operation takes 8 ms when a neighbour wants the core; with this bound a step then takes 12.5 ms, asleep at once 7.6.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from bough.runtime.endpoint import Endpoint
from bough.runtime.journal import Journal
from bough.runtime.loading import Display, Loading
from bough.runtime.options import build_parser, config_of, limits_of
from bough.runtime.protocol import RequestError
from bough.runtime.server import parent_watch

log = logging.getLogger("bough.runtime")


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
    config, limits = config_of(options), limits_of(options)
    is_orphaned = parent_watch(options.parent_pid, _stdin_watch() if options.parent_pid is not None else bool)
    with ExitStack() as stack:
        endpoint = stack.enter_context(
            Endpoint(options.listen, curve_secret=options.curve_secret, curve_clients=options.curve_clients)
        )
        if options.parent_pid is not None:
            stack.callback(_remove_socket, endpoint.address)
        journal = None if options.journal is None else stack.enter_context(Journal(options.journal))
        wake_fd = _signal_fd()
        with _loading(options, report) as loading:
            folder = _folder(options, loading)
            # This imports torch: after the arguments are known to be good.
            from bough.runtime.assembly import assemble

            server = assemble(
                options, config, limits, endpoint, journal, folder, loading, is_orphaned=is_orphaned, wake_fd=wake_fd
            )
        signal.signal(signal.SIGTERM, server.drain)
        signal.signal(signal.SIGINT, server.drain)
        gc.collect()
        gc.freeze()  # what start-up made lives for ever: keep it out of every later collection
        report(phase="ready", address=endpoint.address, pid=os.getpid())
        _say(options, f"{options.model} serves on {endpoint.address}; Ctrl-C ends it")
        log.info("serving %s on %s", options.model, endpoint.address)
        server.run()


def _folder(options: argparse.Namespace, loading: Loading) -> Path:
    """Return the folder of the model's files, fetched if need be."""
    from bough.runtime.models.folder import resolve_model

    # On a terminal the hub draws bars of its own.
    loading.enter("" if options.status_fd is None and sys.stderr.isatty() else "fetching")
    folder = resolve_model(options.model)
    loading.enter("starting")
    return folder


@contextmanager
def _loading(options: argparse.Namespace, report: Callable[..., None]) -> Iterator[Loading]:
    """Tell how the start goes, by the launcher's pipe or on standard error, until it is left."""
    display = Display(sys.stderr, "bough serve: ")

    def tell(text: str, is_line: bool) -> None:
        report(phase="loading", text=text, is_line=is_line)

    try:
        with Loading(
            Path(options.model).name or options.model, display.show if options.status_fd is None else tell
        ) as loading:
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
