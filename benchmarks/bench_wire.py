"""What does a message cost, and how far away is the runtime?

Encoding and decoding (with validation) of what travels most; and round trips to a real runtime over ipc, one at a time,
means of 20: from a bare socket a ping, and an extend by 200 bytes of text, which the runtime also tokenises; and the
client's own `stats()`, which crosses its socket thread.

    python benchmarks/bench_wire.py [--quick] [--reps N] [--save]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Final

import harness
import zmq
from harness import Summary, timed_us

import bough
from bough.runtime import protocol
from bough.runtime.protocol import Delta, Extend, Extended, Hello, Ok, Open, Ping, Pong, Release, Text, Welcome

WIDTH: Final = 64
TRIPS: Final = 20
TEXT: Final = "Mara lives in Oslo. " * 10


def main() -> None:
    """Measure and report."""
    options = harness.parser(__doc__, needs_model=False).parse_args()
    environment = harness.environment()
    reps = options.reps or (100 if options.quick else 2000)
    figures = {**messages(reps), **round_trips(reps)}
    aims = {"round trip: extend by 200 bytes": "≤ 60"}
    rows = [(name, figure, aims.get(name, "")) for name, figure in figures.items()]
    harness.report("bench_wire", options, environment, figures, [harness.table(("wire", "µs", "aim"), rows)])


def messages(reps: int) -> dict[str, Summary]:
    """Microseconds to encode and to decode a text of 200 bytes, and what 64 streams send in a step."""
    ask = Extend(1, 1, [Text(TEXT)])
    deltas = [Delta(op, " word", protocol.encode_tokens([7])) for op in range(WIDTH)]
    asked, told = protocol.encode_request(ask), protocol.encode_replies(deltas)
    cases: dict[str, Callable[[], object]] = {
        "encode request, 200 B": lambda: protocol.encode_request(ask),
        "decode request, 200 B": lambda: protocol.decode_request(asked),
        "encode 64 deltas": lambda: protocol.encode_replies(deltas),
        "decode 64 deltas": lambda: protocol.decode_replies(told),
    }
    return {name: Summary.of(timed_us(case, 20) for _ in range(reps)) for name, case in cases.items()}


def round_trips(reps: int) -> dict[str, Summary]:
    """Microseconds from sending a request to having its decoded reply, one at a time."""
    with bough.Runtime() as runtime, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(runtime.address)
        dealer.linger = 0
        ops, branches = count(1), count(1)

        def ask(request: protocol.Request, kind: type) -> None:
            dealer.send_multipart(protocol.encode_request(request))
            assert dealer.poll(10_000), "no reply"
            replies, _ = protocol.decode_replies(dealer.recv_multipart())
            assert isinstance(replies[0], kind), replies

        def extend_us() -> float:
            branch = next(branches)  # a new one each time: the model's context is finite
            ask(Open(next(ops), branch), Ok)
            taken = timed_us(lambda: ask(Extend(next(ops), branch, [Text(TEXT)]), Extended), TRIPS)
            ask(Release(next(ops), [branch]), Ok)
            return taken

        ask(Hello(next(ops)), Welcome)
        cases: dict[str, Callable[[], float]] = {
            "round trip: ping": lambda: timed_us(lambda: ask(Ping(next(ops)), Pong), TRIPS),
            "round trip: extend by 200 bytes": extend_us,
            "round trip: client's stats()": lambda: timed_us(runtime.stats, TRIPS),
        }
        times = harness.interleaved(cases, max(5, reps // TRIPS), warm_up=5)
        return {name: Summary.of(many) for name, many in times.items()}


if __name__ == "__main__":
    main()
