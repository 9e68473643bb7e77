"""Nothing that comes from a socket can make the runtime unpickle, unmarshal, compile or execute: watched while it runs.

The hook is armed when the runtime says that it is ready, in the runtime's own process, and ends it at the first event
of the forbidden kinds; so a runtime that has survived has not seen one.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from bough.runtime.protocol import (
    Extend,
    Fork,
    Generate,
    Generated,
    Hello,
    Open,
    Request,
    RoleBegin,
    RoleEnd,
    SamplingParams,
    Select,
    Selected,
    Stat,
    Text,
    Tokens,
    decode_replies,
    encode_request,
    encode_tokens,
)

WATCHED = """
import os, sys, traceback
FORBIDDEN = {"pickle.find_class", "marshal.loads", "marshal.load", "exec", "compile", "code.__new__", "import",
             "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
armed = False
def hook(event, arguments):
    if armed and event in FORBIDDEN:
        traceback.print_stack()
        print("forbidden:", event, arguments[:1], file=sys.stderr, flush=True)
        os._exit(13)
sys.addaudithook(hook)
import bough.runtime.__main__ as runtime
from bough.runtime.server import Server
serve = Server.run
def run(self):
    global armed
    armed = True
    print("ready", flush=True)
    serve(self)
    armed = False
Server.run = run
sys.exit(runtime.main(sys.argv[1:]))
"""


@pytest.fixture
def watched(tmp_path: Path) -> object:
    tmp_path.chmod(0o700)
    address = f"ipc://{tmp_path}/s"
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, "pocket", "--listen", address, "--max-total-tokens", "4096"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process, address, tmp_path / "err"
    process.kill()
    process.wait()
    process.stdout.close()


def test_no_frame_makes_the_runtime_run_foreign_code(watched: tuple[subprocess.Popen[str], str, Path]) -> None:
    process, address, errors = watched
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(address)
    params = SamplingParams(max_tokens=8, stop=("zz",), stop_regex=("[0-9]{9}",), logprobs=2, repetition_penalty=1.1)
    honest: list[tuple[Request, list[bytes]]] = [
        (Hello(op=1), []),
        (Open(op=2, branch=1), []),
        (Extend(op=3, branch=1, parts=[RoleBegin("user"), Text("Hello"), RoleEnd(), RoleBegin("assistant")]), []),
        (Extend(op=4, branch=1, parts=[RoleBegin("wizard")]), []),
        (Open(op=5, branch=2), []),
        (Extend(op=6, branch=2, parts=[Tokens(0)]), [encode_tokens([50, 60, 70])]),
        (Fork(op=7, branch=2, children=[3]), []),
        (Generate(op=8, branch=3, params=params, stream=True), []),
        (Select(op=9, branch=2, choices=[" yes", " no"], method="unconditional_likelihood_normalized"), []),
        (Stat(op=10), []),
    ]
    frames = [encode_request(request, buffers) for request, buffers in honest]
    for message in frames:
        socket.send_multipart(message)
    rng = random.Random(7)
    for _ in range(2000):
        mutated = [bytearray(bytes(frame)) for frame in rng.choice(frames)]
        frame = rng.choice(mutated)
        for _ in range(rng.randint(1, 3)):
            if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        socket.send_multipart([bytes(frame) for frame in mutated])
    socket.send_multipart([b"B\1\0\0", b"\x80\x04\x95cos\nsystem\n(S'true'\ntR."])  # a pickle
    seen: set[type] = set()
    while not {Generated, Selected} <= seen:
        assert socket.poll(20_000), errors.read_text()
        seen |= {type(reply) for reply in decode_replies(socket.recv_multipart())[0]}
    assert process.poll() is None, errors.read_text()
    socket.close()
    context.term()
    process.terminate()
    assert process.wait(20) == 0, errors.read_text()
