"""A process of bench_busy.py's: times as many decode steps as each line of its input says, a line of JSON each.

It imports nothing of the other benchmarks: OpenMP reads how its threads wait when it is loaded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from bough.runtime.batch import Batch, Row, SampleRequest
from bough.runtime.protocol import SamplingParams
from bough.runtime.runner import load_runner

WIDTH: Final = 8
CONTEXT: Final = 512
PAGE: Final = 16
TOKEN: Final = 300


def main() -> None:
    """Load the model and answer."""
    runner = load_runner(Path(sys.argv[1]), dtype="bfloat16", page_size=PAGE, max_total_tokens=WIDTH * CONTEXT)
    for pages in (*runner.pool.k, *runner.pool.v):  # nobody computed what the rows read: it is whatever was there
        pages.zero_()
    batch = Batch(tuple(_row(i) for i in range(WIDTH)))
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            runner.execute(batch)
            times.append((time.perf_counter() - begin) * 1e3)
        print(json.dumps(times), flush=True)


def _row(index: int) -> Row:
    token, none = np.array([TOKEN], dtype=np.int32), np.zeros(0, dtype=np.int32)
    draw = SampleRequest(SamplingParams(temperature=0.0), 0, CONTEXT, generated=token, prompt=none, forbidden=())
    pages = CONTEXT // PAGE
    return Row(token, CONTEXT - 1, np.arange(index * pages, (index + 1) * pages, dtype=np.int32), draw)


if __name__ == "__main__":
    main()
