"""A server on loopback that speaks OpenAI's protocol from a script: real HTTP, real streams, real failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Answer:
    """What the server says to one request.

    pieces: the text, piece by piece if it streams. cut_after: the connection is closed after that many pieces, without
    an end. before: called before each piece with its number (to hold a stream). error: what an error event inside the
    stream says, after the pieces. calls: tools called, as (name, arguments as JSON text).
    """

    pieces: Sequence[str] = ("said",)
    finish_reason: str | None = "stop"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "refused"
    code: str | None = None
    cut_after: int | None = None
    before: Callable[[int], None] | None = None
    error: str | None = None
    has_usage: bool = True
    calls: Sequence[tuple[str, str]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def logprob_of(token: str, before: str) -> float:
    """Return a log-probability that depends on the token, and on whether anything precedes it."""
    return -(len(token) + (0.5 if before else 0.25)) / 4


def words(text: str) -> list[str]:
    """Return tokens: runs of letters with the blank before them, or single other characters."""
    found: list[str] = []
    for char in text:
        if found and char.isalnum() and (found[-1][-1].isalnum() or found[-1] == " "):
            found[-1] += char
        else:
            found.append(char)
    return found


class StubServer:
    """Answers each request with what `script(path, body)` returns; `requests` holds the bodies, in order."""

    def __init__(self, script: Callable[[str, Body], Answer]) -> None:
        self.script = script
        self.requests: list[Body] = []
        self.authorizations: list[str] = []
        self.lock = threading.Lock()
        self.disconnected = threading.Event()
        self.num_running = self.most_running = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The base_url."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(script: Callable[[str, Body], Answer] | Sequence[Answer]) -> Iterator[StubServer]:
    """Run a server; a list is used up in the order of the requests."""
    if not callable(script):
        left = list(script)
        server = StubServer(lambda path, body: left.pop(0))
    else:
        server = StubServer(script)
    try:
        yield server
    finally:
        server.close()


def _handler(server: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.requests.append(body)
                server.authorizations.append(self.headers.get("authorization", ""))
                server.num_running += 1
                server.most_running = max(server.most_running, server.num_running)
                answer = server.script(self.path, body)
            try:
                self._answer(body, answer)
            except (BrokenPipeError, ConnectionResetError):
                server.disconnected.set()
                self.close_connection = True
            finally:
                with server.lock:
                    server.num_running -= 1

        def _answer(self, body: Body, answer: Answer) -> None:
            is_chat = self.path.endswith("/chat/completions")
            if answer.status != 200:
                error = {"message": answer.message, "code": answer.code, "type": "stub"}
                self._send(json.dumps({"error": error}).encode(), answer)
            elif body.get("stream"):
                self._stream(body, answer, is_chat)
            else:
                if answer.before is not None:
                    answer.before(0)
                self._send(json.dumps(_whole(body, answer, is_chat)).encode(), answer)

        def _send(self, payload: bytes, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def _stream(self, body: Body, answer: Answer, is_chat: bool) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for number, piece in enumerate(answer.pieces):
                if answer.before is not None:
                    answer.before(number)
                if number == answer.cut_after:
                    self.close_connection = True
                    return
                self._event({"choices": [_choice(body, piece, None, is_chat, streamed=True)], "usage": None})
            if answer.error is not None:
                self._event({"error": {"message": answer.error}})
                return self._end()
            for part in _called(answer):
                called = {"index": 0, "finish_reason": None, "delta": {"tool_calls": [part]}}
                self._event({"choices": [called]})
            self._event({"choices": [_choice(body, "", answer.finish_reason, is_chat, True, answer.extra)]})
            if answer.has_usage and (body.get("stream_options") or {}).get("include_usage"):
                self._event({"choices": [], "usage": _usage(body, answer)})
            self._chunk(b"data: [DONE]\n\n")
            self._end()

        def _event(self, event: Mapping[str, Any]) -> None:
            kind = "error" not in event
            whole = {"id": "stub", "object": "chunk", "created": 0, "model": "stub", **event} if kind else event
            self._chunk(b"data: " + json.dumps(whole).encode() + b"\n\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def _end(self) -> None:
            self.wfile.write(b"0\r\n\r\n")

    return Handler


def _called(answer: Answer) -> Iterator[dict[str, Any]]:
    """Yield the pieces of calls as a stream tells them: the name first, then the arguments in two parts."""
    for index, (name, arguments) in enumerate(answer.calls):
        yield {"index": index, "id": f"id{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        for part in (arguments[:3], arguments[3:]):
            yield {"index": index, "function": {"arguments": part}}


def _whole(body: Body, answer: Answer, is_chat: bool) -> dict[str, Any]:
    text = "".join(answer.pieces)
    if body.get("echo"):
        choices = [_echoed(index, prompt) for index, prompt in enumerate(body["prompt"])]
        choices.reverse()  # servers may answer in any order
    else:
        choices = [_choice(body, text, answer.finish_reason, is_chat, False, answer.extra)]
        if answer.calls:
            choices[0]["message"]["tool_calls"] = [
                {"id": f"id{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for number, (name, arguments) in enumerate(answer.calls)
            ]
    usage = _usage(body, answer) if answer.has_usage else None
    return {"id": "stub", "object": "answer", "created": 0, "model": "stub", "choices": choices, "usage": usage}


def _choice(
    body: Body, text: str, reason: str | None, is_chat: bool, streamed: bool, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, **(extra or {})}
    tokens = words(text)
    if is_chat:
        choice["delta" if streamed else "message"] = {"role": "assistant", "content": text}
        if body.get("logprobs"):
            top = [{"token": "?", "logprob": -9.0, "bytes": None}] * body.get("top_logprobs", 0)
            choice["logprobs"] = {
                "content": [
                    {"token": t, "logprob": logprob_of(t, "x"), "bytes": None, "top_logprobs": top} for t in tokens
                ]
            }
    else:
        choice["text"] = text
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [logprob_of(t, "x") for t in tokens],
                "top_logprobs": [{"?": -9.0, t: logprob_of(t, "x")} for t in tokens],
                "text_offset": [0] * len(tokens),
            }
    return choice


def _echoed(index: int, prompt: str) -> dict[str, Any]:
    tokens = words(prompt)
    scores = [None if position == 0 else logprob_of(token, "x") for position, token in enumerate(tokens)]
    found = {"tokens": tokens, "token_logprobs": scores, "top_logprobs": None, "text_offset": [0] * len(tokens)}
    return {"index": index, "finish_reason": "length", "text": prompt, "logprobs": found}


def _usage(body: Body, answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": 10,
        "completion_tokens": len(answer.pieces),
        "total_tokens": 10 + len(answer.pieces),
        "prompt_tokens_details": {"cached_tokens": 4},
    }
