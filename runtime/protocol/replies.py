"""What the runtime answers."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from bough.runtime.protocol.errors import ErrorKind
from bough.runtime.protocol.message import Message

FinishReason = Literal["stop", "length", "context"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one operation cost. prompt_tokens = cached_tokens + computed_tokens.

    cached_tokens were already in the radix cache; computed_tokens had their KV computed for this operation;
    completion_tokens were sampled, or forced by a grammar: forced_tokens of them. drafted_tokens were computed before
    they were drawn, accepted_tokens of them came true. Times in milliseconds since the operation arrived: queue_ms
    until it was first scheduled, ttft_ms until its first token, latency_ms until its end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    latency_ms: float = 0.0


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token with the natural log of its probability, and likelier-first alternatives as (logprob, id, text).

    entropy: of the whole distribution it was drawn from, unmodified, in nats; None where that is not known.
    """

    logprob: float
    token_id: int
    text: str
    top: list[tuple[float, int, str]] = []
    entropy: float | None = None


class Welcome(Message, frozen=True, tag="welcome"):
    """What runs here. `epoch` is drawn anew at every start: nothing of another epoch is valid.

    `credit` is how many tokens a stream may be ahead of its grants. `seed` is the one that the runtime was started
    with, None if it drew its own: then nobody asked for the same again.
    """

    op: int
    epoch: int
    version: str
    model: str
    architecture: str
    dtype: str
    device: str
    pid: int
    vocab_size: int
    context_len: int
    page_size: int
    total_pages: int
    has_chat_template: bool
    credit: int
    heartbeat_s: float
    lease_s: float
    has_tools: bool = False
    """Whether the chat template tells of tools."""
    seed: int | None = None
    kv_dtype: str = ""
    """The type in which keys and values are kept; `weights`: that of the linear layers' weights."""
    weights: str = ""


class Ok(Message, frozen=True, tag="ok"):
    op: int


class Extended(Message, frozen=True, tag="extended"):
    """`rendered` holds, for each role part in order, the text the chat template wrote for it.

    `length` counts the branch's tokens so far, without text that still waits to be tokenised with what follows.
    """

    op: int
    length: int
    rendered: list[str] = msgspec.field(default_factory=list)


class Delta(Message, frozen=True, tag="delta"):
    """New text of a streaming operation, whole characters only. token_ids: the new ones, raw little-endian int32."""

    op: int
    text: str
    token_ids: bytes
    logprobs: list[TokenLogprob] | None = None


class Generated(Message, frozen=True, tag="generated"):
    """The end of a `generate`: the whole text, and what ended it (`matched_stop`, if `finish_reason` is stop).

    `leftover` is the end of the text that is in no token of the buffer, where a stop string cut a token in two: the
    branch tokenises it with what is appended next. `replaced` tokens at the end of the branch gave way to the first of
    the buffer, which begin with their text (token healing); `text` is what is new. Tokens that were drawn
    again as they were are neither counted nor in the buffer.

    is_whole: False if a grammar was given and the text only begins to match it. captures: by name, the text that the
    grammar's captures matched, a list of texts where one matched several times.
    """

    op: int
    text: str
    buffer: int
    finish_reason: FinishReason
    length: int
    usage: Usage
    matched_stop: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    leftover: str = ""
    replaced: int = 0
    is_whole: bool = True
    captures: dict[str, str | list[str]] = msgspec.field(default_factory=dict)


class Selected(Message, frozen=True, tag="selected"):
    """The end of a `select` or `score`.

    `scores` are what the method compares, one per choice; `distribution` is the model's own over the choices, the same
    for every method: softmax over summed log-probabilities, divided by the temperature if there is one (it sums to 1);
    `logprobs` the tokens of each choice, `unconditional` the same without the prompt where the method needs it.
    """

    op: int
    index: int
    scores: list[float]
    distribution: list[float]
    logprobs: list[list[TokenLogprob]]
    length: int
    usage: Usage
    unconditional: list[list[float]] | None = None


class Cancelled(Message, frozen=True, tag="cancelled"):
    """How many operations the cancel ended; each also gets its own `failed`."""

    op: int
    count: int


class Stats(Message, frozen=True, tag="stats"):
    op: int
    values: dict[str, int | float | str]


class Pong(Message, frozen=True, tag="pong"):
    """Alive, and moving: `steps` must grow while `running` or `waiting` is not 0."""

    op: int
    epoch: int
    steps: int
    running: int
    waiting: int
    phase: str


class Failed(Message, frozen=True, tag="failed"):
    """The end of an operation that could not be carried out. op is None when the frame was unreadable.

    Of one that had begun to run, `details` holds the fields of `Usage`, and of a generate also `partial_text`.
    """

    op: int | None
    kind: ErrorKind
    message: str
    details: dict[str, int | float | str | bool | None] = msgspec.field(default_factory=dict)
    cause: int | None = None
    """The operation whose failure this one depends on (kind dependency_failed)."""


Reply: TypeAlias = Welcome | Ok | Extended | Delta | Generated | Selected | Cancelled | Stats | Pong | Failed
