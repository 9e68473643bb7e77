"""What does the language cost: per program, per fork, on the wire, in threads, and before the first line runs?

gen          a program of one text and one gen on `ScriptedBackend`, and the same primitives called by hand: the
             difference is the language's own
fork         fork(16) and join on `ScriptedBackend`: nothing in the branches; and a gen in each, with its primitives
             by hand beside it
loop         the same program awaited on an event loop, `async def` and not; and 2,500 programs with a trunk and three
             forks each, all waiting at once on one loop: time and memory per branch, and threads
wire         bytes and text characters that a program of 50 gens and 6,150 new characters sends to a real runtime
threads      OS threads of the client's process while 200 programs with a fork of 8 each run on a real runtime: started
             one after the other without waiting, and by `run_batch` with its default
import       `import bough` in a fresh interpreter
start        `Runtime()` with the bundled model until it serves, and its shutdown

    python benchmarks/bench_language.py [--quick] [--reps N] [--save]
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import harness
from harness import Summary, timed_us

import bough as bo
from bough.runtime.protocol import SamplingParams, Text

NUM_GENS: Final = 50
NEW_CHARACTERS: Final = 6150
BRANCHES: Final = 16
IMPORT: Final = "import time; t = time.perf_counter(); import bough; print(time.perf_counter() - t)"


@bo.function
def one_gen(s: bo.State) -> None:
    s += "Say something: "
    s += bo.gen("x", max_tokens=4)


@bo.function
def fork_and_join(s: bo.State, gens: bool) -> None:
    s += "Say something: "
    forks = s.fork(BRANCHES)
    if gens:
        for index, f in enumerate(forks):
            f += f"{index}. "
            f += bo.gen("x", max_tokens=4)
    forks.join()


@bo.function
async def one_gen_async(s: bo.State) -> None:
    s += "Say something: "
    s += bo.gen("x", max_tokens=4)
    await s.get("x")


@bo.function
def one_gen_read(s: bo.State) -> None:
    s += "Say something: "
    s += bo.gen("x", max_tokens=4)
    s["x"]


@bo.function
def trunk_and_forks(s: bo.State, number: int) -> None:
    s += f"Question {number}: " + bo.gen("plan")
    forks = s.fork(3)
    forks += f"{s['plan']}: " + bo.gen("x")
    forks.join()
    s["x"]


@bo.function
def many_turns(s: bo.State, text: str) -> None:
    for index in range(NUM_GENS):
        s += text
        s += bo.gen(f"x{index}", max_tokens=1, temperature=0, ignore_eos=True)


@bo.function
def wide(s: bo.State, index: int, seen: list[int]) -> None:
    s += f"Question {index}: "
    for branch, f in enumerate(s.fork(8)):
        f += f"{branch}. "
        f += bo.gen("x", max_tokens=2, temperature=0, ignore_eos=True)
    seen.append(num_threads())


def num_threads() -> int:
    """Return how many threads this process has, native ones too where that can be told."""
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.exists() else threading.active_count()


# ---------------------------------------------------------------------------------------------- what is measured


def on_script(reps: int) -> dict[str, Summary]:
    """Microseconds per program on a backend that costs next to nothing, and of its primitives by hand."""
    backend = bo.ScriptedBackend(lambda prompt, params: "yes")

    def primitives(width: int) -> None:
        branches = [backend.open()]
        backend.extend(branches[0], [Text("Say something: ")])
        if width:
            branches += backend.fork(branches[0], width)
        for index, branch in enumerate(branches[1:] or branches):
            if width:
                backend.extend(branch, [Text(f"{index}. ")])
            backend.generate(branch, SamplingParams(max_tokens=4)).result()
        backend.release(branches)

    cases: dict[str, Callable[[], object]] = {
        "one gen": lambda: one_gen.run(backend=backend)["x"],
        "one gen, primitives by hand": lambda: primitives(0),
        "fork(16) + join": lambda: fork_and_join.run(gens=False, backend=backend).sync(),
        "fork(16), a gen each, join": lambda: fork_and_join.run(gens=True, backend=backend)["x"],
        "fork(16), a gen each, by hand": lambda: primitives(BRANCHES),
    }
    times = harness.interleaved({name: partial(timed_us, case, 20) for name, case in cases.items()}, reps, warm_up=5)
    return {name: Summary.of(many) for name, many in times.items()}


def on_loop(reps: int) -> dict[str, Summary]:
    """Microseconds per program that is awaited on an event loop, on a backend that costs next to nothing."""
    backend = bo.ScriptedBackend(lambda prompt, params: "yes")

    async def measured(program: bo.Program) -> float:
        begin = time.perf_counter()
        for _ in range(20):
            await program.arun(backend=backend)
        return (time.perf_counter() - begin) / 20 * 1e6

    cases = {"one gen, awaited, def": one_gen_read, "one gen, awaited, async def": one_gen_async}
    runs = {name: partial(lambda program: asyncio.run(measured(program)), program) for name, program in cases.items()}
    return {name: Summary.of(times) for name, times in harness.interleaved(runs, reps, warm_up=2).items()}


def live_branches(programs: int) -> dict[str, float]:
    """What many branches cost that wait at once on one event loop, and how many threads there are then."""
    backend = bo.ScriptedBackend(lambda prompt, params: "yes")
    found: dict[str, float] = {"branches": 0, "threads": 0, "kb": 0}

    async def main() -> None:
        memory = resident_kb()
        with backend.paused():
            runs = [asyncio.ensure_future(trunk_and_forks.arun(index, backend=backend)) for index in range(programs)]
            while not all(run.done() for run in runs):
                await asyncio.sleep(0)
                found["branches"] = max(found["branches"], float(backend.stats()["num_branches"]))
                found["threads"] = max(found["threads"], num_threads())
                found["kb"] = max(found["kb"], resident_kb() - memory)
                backend.step(None)

    before, begin = num_threads(), time.perf_counter()
    asyncio.run(main())
    seconds = time.perf_counter() - begin
    return {
        "programs": programs,
        "branches_at_once": found["branches"],
        "us_per_branch": seconds / found["branches"] * 1e6,
        "kb_per_branch": found["kb"] / found["branches"],
        "threads_more": found["threads"] - before,
    }


def resident_kb() -> int:
    """Return the resident memory of this process in KB, or 0 where that cannot be told."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return int(next((line.split()[1] for line in lines if line.startswith("VmRSS:")), "0"))


def wire(runtime: bo.Runtime) -> dict[str, float]:
    """Bytes that a program of 50 gens sends and receives."""
    fact = (
        "Mara lives in Oslo and works as a teacher. The red lamp costs 36 euros. Tom has a cat, and Anna plays chess. "
    )
    text = (fact * 2)[: NEW_CHARACTERS // NUM_GENS]
    before = runtime.client.bytes_out, runtime.client.bytes_in
    many_turns.run(text, backend=runtime).sync()
    sent, received = runtime.client.bytes_out - before[0], runtime.client.bytes_in - before[1]
    new = len(text) * NUM_GENS
    return {"new_characters": new, "bytes_out": sent, "bytes_in": received, "bytes_out_per_character": sent / new}


def threads(runtime: bo.Runtime, programs: int) -> dict[str, int]:
    """The most threads that the body of a program saw."""
    seen: list[int] = []
    states = [wide.run(index, seen, backend=runtime) for index in range(programs)]
    alone, in_flight = max(seen), int(runtime.stats()["num_branches"])
    for state in states:
        state.sync()
    seen.clear()
    wide.run_batch([(index, seen) for index in range(programs)], backend=runtime)
    return {"programs": programs, "one_after_the_other": alone, "branches_open_then": in_flight, "run_batch": max(seen)}


def import_ms() -> float:
    """Milliseconds of `import bough` in a fresh interpreter."""
    return float(subprocess.run([sys.executable, "-P", "-c", IMPORT], capture_output=True, check=True).stdout) * 1e3


def start_and_stop() -> tuple[float, float]:
    """Seconds until a runtime serves, and until it has ended."""
    begin = time.perf_counter()
    runtime = bo.Runtime()
    ready = time.perf_counter()
    runtime.shutdown()
    return ready - begin, time.perf_counter() - ready


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__, needs_model=False).parse_args()
    environment = harness.environment()
    reps = options.reps or (10 if options.quick else 100)
    few = 2 if options.quick else 7
    script = {**on_script(reps), **on_loop(reps)}
    live = live_branches(250 if options.quick else 2500)
    with bo.Runtime(seed=1) as runtime:
        sent, counted = wire(runtime), threads(runtime, 20 if options.quick else 200)
    imports = harness.interleaved({"import bough": import_ms}, few)
    starts = harness.interleaved({"start": start_and_stop}, few)["start"]
    times = {
        "import bough, ms": Summary.of(imports["import bough"]),
        "Runtime() until it serves, s": Summary.of(start for start, _ in starts),
        "shutdown, s": Summary.of(stop for _, stop in starts),
    }
    aims = {
        "one gen": "< 100",
        "one gen, awaited, def": "< 100",
        "one gen, awaited, async def": "< 100",
        "fork(16) + join": "< 300",
    }
    tables = [
        harness.table(("on ScriptedBackend", "µs", "aim"), [(k, v, aims.get(k, "")) for k, v in script.items()]),
        harness.table(
            ("one loop", "branches at once", "µs per branch", "KB per branch", "threads more"),
            [(f"{live['programs']} programs × (trunk, 3 forks)", *map(harness.short, list(live.values())[1:]))],  # noqa: RUF001
        ),
        harness.table(
            (f"program of {NUM_GENS} gens", "new characters", "bytes sent", "per new character", "bytes received"),
            [
                (
                    *map(harness.short, (sent["new_characters"], sent["bytes_out"], sent["bytes_out_per_character"])),
                    harness.short(sent["bytes_in"]),
                )
            ],
        ),
        harness.table(
            (f"threads, {counted['programs']} programs × fork 8", "most seen"),  # noqa: RUF001
            [("started one after the other", counted["one_after_the_other"]), ("run_batch", counted["run_batch"])],
        ),
        harness.table(("process", "time"), list(times.items())),
    ]
    results: dict[str, Any] = {"script": script, "loop": live, "wire": sent, "threads": counted, "process": times}
    harness.report("bench_language", options, environment, results, tables)


if __name__ == "__main__":
    main()
