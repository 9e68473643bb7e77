"""The suite's run: systems are started and warmed up, workloads carried out in turn, and what came of it made rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import rows
from asks import Trace
from calls import Run
from clients import NotInstalled, NotPossible, System
from schedule import Budget, in_turn, missing, order, worth_repeating
from systems import BOUGH, NO_TREE, VLLM

CACHING: Final = frozenset({BOUGH, NO_TREE, VLLM})
"""Systems with a prefix cache that tell of its hits. They alone run the sweep's forks: the others compute the prefix of
every branch, which says little and takes minutes."""


class SuiteRun:
    """Traces carried out on systems within a budget, and what came of it."""

    def __init__(
        self,
        traces: Sequence[Trace],
        names: Sequence[str],
        budget: Budget,
        *,
        reps: int | None = None,
        why_not: Mapping[str, str] | None = None,
        warm_up: Sequence[Trace] = (),
    ) -> None:
        """`why_not`: systems that are not to be started, and why; `warm_up`: what each runs before it is measured."""
        self._traces, self._budget, self._reps, self._warm_up = traces, budget, reps, warm_up
        self._repeat_all = reps is not None
        self._all, self._names = names, [name for name in names if name not in (why_not or {})]
        self._systems: dict[str, System] = {}
        self._why = dict(why_not or {})  # a system's, or (workload/system)'s, reason to have no figures
        self._figures: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        self._same: dict[tuple[str, str], tuple[int, int]] = {}

    def start(self, begin: Callable[[str], System], stack: ExitStack) -> None:
        """Start every system and warm it up; one that cannot be started has that as its rows' reason.

        All have started, compilation included, before any runs: none computes beside another that is measured.
        """
        _say(f"starting {', '.join(self._names)} ...")
        pool = stack.enter_context(ThreadPoolExecutor(len(self._names)))  # most of it is waiting for imports
        starts = {name: pool.submit(begin, name) for name in self._names}
        for name, future in starts.items():
            try:
                self._systems[name] = future.result()
                stack.callback(self._systems[name].close)
            except Exception as error:
                self._give_up(name, error)
        for name, system in list(self._systems.items()):
            try:
                for trace in self._warm_up:
                    system.run(trace)
            except NotPossible:
                continue
            except Exception as error:
                self._give_up(name, error)
        self._systems = {name: self._systems[name] for name in self._names if name in self._systems}

    def _give_up(self, name: str, error: Exception) -> None:
        self._systems.pop(name, None)
        kind = "not installed: " if isinstance(error, NotInstalled) else f"failed: {type(error).__name__}: "
        self._why[name] = f"{kind}{error}"
        _say(f"{name}: {self._why[name]}")

    def measure(self) -> None:
        """Carry out what fits into the budget."""
        for trace, repetition in order(self._traces, self._reps):
            fitting = self._able(trace, repetition)
            if repetition or trace is not self._traces[0]:  # the first of all runs whatever time starting took
                fitting = self._budget.fits(trace, fitting, CACHING)
            if repetition and not {BOUGH} < set(fitting) and len(self._systems) > 1:
                continue  # a ratio needs both sides
            ran: dict[str, Run] = {}
            for name in in_turn(fitting, repetition):
                if (run := self._run(trace, name, repetition)) is not None:
                    ran[name] = run
            if repetition == 0:
                self._same |= {(trace.name, name): share for name, share in rows.same_tokens(ran).items()}
            if ran:
                walls = ", ".join(f"{name} {run.wall_s:.2f} s" for name, run in sorted(ran.items()))
                _say(f"[{self._budget.left():.0f} s left] {trace.name} #{repetition + 1}: {walls}")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per workload and system, those without figures included."""
        found = []
        for trace in self._traces:
            ours = self._figures.get((trace.name, BOUGH), {})
            for name in self._all:
                runs = self._figures.get((trace.name, name), {})
                if not runs:
                    why = self._why.get(name) or missing(self._why, f"{trace.name}/{name}")
                    found.append(rows.empty_row(trace, name, why))
                    continue
                both = [i for i in runs if i in ours]
                row = rows.row(trace, name, list(runs.values()), [(runs[i], ours[i]) for i in both])
                found.append(row | {"same_tokens": self._same.get((trace.name, name), (0, 0))})
        return found

    def _able(self, trace: Trace, repetition: int) -> list[str]:
        """Return the systems that are to run the trace."""
        able = []
        for name in self._systems:
            key = f"{trace.name}/{name}"
            if trace.kind == "sweep" and name not in CACHING:
                self._why[key] = "left out: it computes every branch's prefix again"
            elif key not in self._why and (repetition == 0 or self._again(trace, name)):
                able.append(name)
        return able

    def _again(self, trace: Trace, name: str) -> bool:
        if (trace.name, name) not in self._figures:
            return False
        return self._repeat_all or worth_repeating(self._budget.seen, trace, name, BOUGH)

    def _run(self, trace: Trace, name: str, repetition: int) -> Run | None:
        system, begin = self._systems[name], time.monotonic()
        try:
            run = system.run(trace)
        except NotPossible as error:
            self._why[f"{trace.name}/{name}"] = f"not possible: {error}"
            return None
        except Exception as error:
            self._why[f"{trace.name}/{name}"] = f"failed: {type(error).__name__}: {error}"
            _say(f"{trace.name}, {name}: {error}")
            return None
        self._budget.seen[trace.name, name] = time.monotonic() - begin
        made = rows.figures(trace, run, system.peak_bytes(), name in CACHING)
        self._figures.setdefault((trace.name, name), {})[repetition] = made
        return run


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
