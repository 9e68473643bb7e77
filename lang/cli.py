"""The `bough` command: serve a model, run a program, measure."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

import bough


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="bough", description="A language for LLM programs, and its runtime.")
    parser.add_argument("--version", action="version", version=f"bough {bough.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("serve", add_help=False, help="serve a model to programs of other processes")

    run = commands.add_parser("run", help="run a program's file with a default backend")
    run.add_argument("--model", default="pocket", help='"pocket" (the default), a model folder, or a hub id')
    run.add_argument("--address", help="use the runtime that listens there, and start none")
    run.add_argument("file", help="the Python file; it runs as __main__")
    run.add_argument("args", nargs=argparse.REMAINDER, help="passed on to the file")

    commands.add_parser(
        "bench",
        add_help=False,
        help="measure bough beside its peers (from a checkout); --quick takes a minute",
    )

    options, rest = parser.parse_known_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)[1:]
    if options.command == "bench":
        return _bench(given)
    if options.command == "serve":
        return _serve(given)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _run(options.file, options.args, options.model, options.address)


def _serve(given: Sequence[str]) -> int:
    """Become the runtime: its arguments, help, exit status and signals are this command's."""
    from bough.process import module_command

    command = [*module_command(), *given]
    sys.stdout.flush()
    os.execv(command[0], command)


def _bench(rest: Sequence[str]) -> int:
    """Become the benchmark suite, which is no part of the package: it is a checkout's folder `benchmarks`."""
    beside = os.path.dirname(os.path.dirname(os.path.abspath(bough.__file__)))  # an editable install's checkout
    for folder in (beside, os.getcwd()):
        script = os.path.join(folder, "benchmarks", "bench_suite.py")
        if os.path.isfile(script) and os.path.isfile(os.path.join(folder, "lang", "cli.py")):
            if "OMP_WAIT_POLICY" not in os.environ:
                os.environ.setdefault("GOMP_SPINCOUNT", "2000")
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, script, *rest])
    print(
        "bough: the benchmarks are in the source repository, not in the installed package: run `bough bench` in the "
        "folder of a checkout, or install one with pip install --editable",
        file=sys.stderr,
    )
    return 2


def _run(file: str, args: Sequence[str], model: str, address: str | None) -> int:
    """Run the file as __main__ with a runtime as its default backend."""
    if not os.path.isfile(file):
        print(f"bough: there is no file {file}", file=sys.stderr)
        return 2
    try:
        backend = bough.RuntimeClient(address) if address is not None else bough.Runtime(model)
    except bough.BoughError as error:
        print(f"bough: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bough: interrupted while the runtime started", file=sys.stderr)
        return 130
    before = sys.argv, sys.path[:]
    with backend:
        bough.set_default_backend(backend)
        sys.argv = [file, *args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
        try:
            runpy.run_path(file, run_name="__main__")
        finally:
            sys.argv, sys.path[:] = before
            bough.set_default_backend(None)
    return 0
