"""What has come of an answer over OpenAI's protocol so far: whole, or piece by piece."""

from __future__ import annotations

import time
from typing import Any

from bough.backend import Delta, OnDelta
from bough.errors import BackendError
from bough.openai_protocol import (
    calls_text,
    chat_logprobs,
    completion_logprobs,
)
from bough.runtime.protocol import (
    TokenLogprob,
)


class Answer:
    """What has come of an answer so far."""

    def __init__(self, is_chat: bool, wants_logprobs: bool, on_delta: OnDelta | None) -> None:
        self._is_chat = is_chat
        self._wants_logprobs = wants_logprobs
        self._on_delta = on_delta
        self._begun = time.monotonic()
        self.text = ""
        self.reason: str | None = None
        self.choice: Any = None
        self.usage: Any = None
        self.logprobs: list[TokenLogprob] = []
        self.ttft_ms = 0.0
        self._calls: dict[int, dict[str, str]] = {}

    def elapsed_ms(self) -> float:
        """Return the milliseconds since the request was sent."""
        return (time.monotonic() - self._begun) * 1000

    def whole(self, answer: Any) -> None:
        """Take an answer that came at once."""
        if not answer.choices:
            raise BackendError("the server's answer has no choice")
        choice = answer.choices[0]
        self._take(choice, (choice.message.content if self._is_chat else choice.text) or "")
        if self._is_chat:
            self._add_calls(choice.message.tool_calls)
        self.usage = answer.usage
        self.ttft_ms = self.elapsed_ms()

    def add(self, chunk: Any) -> None:
        """Take the next piece of a stream; the last one may hold the usage and no choice."""
        self.usage = chunk.usage or self.usage
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        text = (choice.delta.content if self._is_chat else choice.text) or ""
        if self._is_chat:
            self._add_calls(choice.delta.tool_calls)
        if text and not self.text:
            self.ttft_ms = self.elapsed_ms()
        before = len(self.logprobs)
        self._take(choice, text)
        if text and self._on_delta is not None:
            self._on_delta(Delta(text, (), self.logprobs[before:] if self._wants_logprobs else None))

    def end(self) -> None:
        """Write the calls that the model made as text, after its words."""
        text = calls_text(self._calls.values())
        self.text += text
        if text and self._on_delta is not None:
            self._on_delta(Delta(text))

    def _add_calls(self, calls: Any) -> None:
        """Take calls, or the next pieces of them: a stream tells the name once, and the arguments bit by bit."""
        for position, call in enumerate(calls or ()):
            index = getattr(call, "index", None)
            known = self._calls.setdefault(
                position if index is None else index, {"id": "", "name": "", "arguments": ""}
            )
            known["id"] = call.id or known["id"]
            if call.function is not None:
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""

    def _take(self, choice: Any, text: str) -> None:
        self.text += text
        self.reason = choice.finish_reason or self.reason
        self.choice = choice
        if self._wants_logprobs:
            read = chat_logprobs if self._is_chat else completion_logprobs
            self.logprobs += read(choice.logprobs)
