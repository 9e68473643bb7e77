"""The wire contract between a client and the runtime: every message, its limits, its encoding.

A message is a ZeroMQ multipart message::

    [prefix: 4 bytes] [header: MessagePack] [buffer 0: raw little-endian int32] [buffer 1] ...

    prefix   b"B", major version, minor version, kind (0 = one request, 1 = a list of replies)
    header   kind 0: one map, a member of the closed set `Request`; kind 1: an array of maps, members of `Reply`.
             Each map carries its type under the key "t".
    buffers  token ids; a message refers to them by index. (A MessagePack list of ids costs 100 times as much.) The few
             ids of a delta stand in it, as such bytes: a frame for each of 32 streams cost 0.2 ms a step.

Client to runtime (one per message; `op` and `branch` ids are chosen by the client, so nothing waits to learn an id):

    hello      who is there, which protocol                                -> welcome
    open       a new, empty branch                                        -> ok
    extend     append text, roles or token ids to a branch                -> extended
    fork       n children that share everything the branch holds          -> ok
    generate   append sampled tokens to a branch                          -> delta* then generated
    select     score choices, append the best one                         -> selected
    score      score continuations, append nothing                        -> selected
    rollback   cut a branch back to a number of tokens                    -> extended
    cancel     stop one operation, or a branch with all its descendants   -> cancelled
    release    forget branches                                            -> ok
    stat       counters                                                   -> stats
    flush      drop every cached prefix that is not in use                -> ok
    drain      finish what runs, refuse what is new, then stop            -> ok
    ping       liveness                                                   -> pong
    credit     the client can take n more streamed tokens of an operation -> (nothing)

Every operation but `credit` gets exactly one terminal reply, `failed` included. Operations on one branch are carried
out in the order sent; an operation that fails poisons its branch, and with it only what depends on it. Repeating an
operation id that is in flight or was answered lately is refused, never carried out twice.

`lang` may import this module and nothing else of the runtime.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, cast, get_args

import msgspec

MAJOR: Final = 2
MINOR: Final = 0

MAX_FRAME_BYTES: Final = 64 << 20
MAX_FRAMES: Final = 1026  # prefix, header and 1,024 buffers
MAX_FORK: Final = 4096
MAX_PARTS: Final = 65_536
MAX_CHOICES: Final = 65_536
MAX_TEMPERATURE: Final = 100.0
MAX_STOPS: Final = 64
MAX_LOGIT_BIAS: Final = 4096
MAX_TOP_LOGPROBS: Final = 64
MAX_GRAMMAR_CHARS: Final = 262_144
MAX_TOOLS_CHARS: Final = 1 << 20
MAX_ID: Final = (1 << 63) - 1
MAX_TOKEN_ID: Final = (1 << 31) - 1

REQUEST: Final = 0
REPLIES: Final = 1

ErrorKind = Literal[
    "invalid_request",
    "context_overflow",
    "resource_exhausted",
    "overloaded",
    "unsupported_model",
    "timeout",
    "cancelled",
    "dependency_failed",
    "protocol",
    "unknown_client",
    "internal",
]

FinishReason = Literal["stop", "length", "context"]

GrammarKind = Literal["regex", "json_schema", "lark", "choices"]

ChoiceMethod = Literal[
    "token_length_normalized",
    "greedy_token_selection",
    "unconditional_likelihood_normalized",
    "sum",
    "byte_length_normalized",
    "pmi",
]
CHOICE_METHODS: Final[tuple[str, ...]] = get_args(ChoiceMethod)


class RequestError(Exception):
    """A request that cannot be carried out; crosses the wire as `Failed`.

    `details` holds the numbers of the message (field, limit, value ...) for programs that want to act on them.
    """

    def __init__(self, kind: ErrorKind, message: str, **details: object) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.details = details


class ProtocolError(RequestError):
    """A frame that is not a message of this protocol. `op` is the operation it named, when that could be read."""

    def __init__(self, message: str, op: int | None = None) -> None:
        super().__init__("protocol", message)
        self.op = op


class UnknownClient(ProtocolError):
    """A request of a client that did not say hello, or whose lease ran out: all that it had here is gone."""

    def __init__(self, op: int | None) -> None:
        super().__init__("say hello first: this runtime does not know you, or no longer", op)
        self.kind = "unknown_client"


# --------------------------------------------------------------------------------------------- sampling


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a `generate` samples and when it stops. Defaults are SGLang's.

    max_tokens: most tokens generated (>= 1). min_tokens: no end-of-sequence or stop id is drawn before that many.
    temperature: 0 is greedy. top_p in (0, 1]; top_k: -1 (off) or >= 1; min_p in [0, 1], relative to the likeliest.
    frequency_penalty, presence_penalty in [-2, 2], over the tokens generated by this operation (OpenAI's definition);
    repetition_penalty > 0, over prompt and generated tokens (CTRL, Keskar et al. 2019).
    logit_bias: token id -> added to its logit. seed: None derives one from the runtime's seed and the branch's path.
    stop, stop_regex: text that ends generation, removed from the result; stop_token_ids: the same with token ids.
    ignore_eos: end-of-sequence is a token like any other. logprobs: None, or how many alternatives to return beside
    each generated token's own natural-log probability (of the unmodified distribution).
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def check(self) -> None:
        """Raise `RequestError("invalid_request")` naming field, limit and value of the first value out of range."""
        _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        _between("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _between("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise _invalid("top_p", "greater than 0 and at most 1", self.top_p)
        if self.top_k != -1 and self.top_k < 1:
            raise _invalid("top_k", "-1 (off) or at least 1", self.top_k)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0.0:
            raise _invalid("repetition_penalty", "greater than 0", self.repetition_penalty)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _invalid("logit_bias", f"at most {MAX_LOGIT_BIAS} entries", len(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _between(f"logit_bias[{token}]", bias, -1000.0, 1000.0)
        if self.seed is not None:
            _at_least("seed", self.seed, 0)
            if self.seed > MAX_ID:
                raise _invalid("seed", f"at most {MAX_ID}", self.seed)
        for name, value in (
            ("stop", self.stop),
            ("stop_token_ids", self.stop_token_ids),
            ("stop_regex", self.stop_regex),
        ):
            if len(value) > MAX_STOPS:
                raise _invalid(name, f"at most {MAX_STOPS} entries", len(value))
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids:
                if not 0 <= token <= MAX_TOKEN_ID:
                    raise _invalid(name, f"token ids from 0 to {MAX_TOKEN_ID}", token)
        if any(not text for text in self.stop) or any(not text for text in self.stop_regex):
            raise _invalid("stop", "non-empty strings", "")
        if self.logprobs is not None:
            _at_least("logprobs", self.logprobs, 0)
            if self.logprobs > MAX_TOP_LOGPROBS:
                raise _invalid("logprobs", f"at most {MAX_TOP_LOGPROBS}", self.logprobs)


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the text of a `generate` must match, from its first character to its last.

    kind and source: "regex": a regular expression (Rust's `regex-syntax`, no look-around, no back-references);
    "json_schema": a JSON Schema as JSON text; "lark": a grammar in llguidance's Lark dialect, whose rules may be marked
    `rule[capture]` or `rule[capture="name"]`; "choices": a JSON array of strings, of which the text is one.
    source has at most MAX_GRAMMAR_CHARS characters.
    on_limit: what happens when `max_tokens` nears before the text is whole. "truncate": it ends there, marked not whole
    (`Generated.is_whole`); "close": it is closed by a short accepting path that still fits.
    jump_forward: tokens that the grammar forces are computed together; without, one by one. The tokens are the same.
    """

    kind: GrammarKind
    source: str
    on_limit: Literal["truncate", "close"] = "truncate"
    jump_forward: bool = True

    def check(self) -> None:
        """Raise `RequestError("invalid_request")` if the source is empty or too long."""
        if not 1 <= len(self.source) <= MAX_GRAMMAR_CHARS:
            size = f"{len(self.source)} characters"
            raise _invalid("grammar", f"1 to {MAX_GRAMMAR_CHARS} characters of {self.kind}", size)


def _invalid(field: str, limit: str, value: object) -> RequestError:
    return RequestError(
        "invalid_request", f"{field} must be {limit}, got {value!r}", field=field, limit=limit, value=repr(value)
    )


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise _invalid(field, f"at least {least}", value)


def _between(field: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise _invalid(field, f"between {low:g} and {high:g}", value)


# --------------------------------------------------------------------------------------------- requests


class _Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages: a closed map with its type under "t"; fields that equal their default are not sent."""


class Text(_Message, frozen=True, tag="text"):
    """Text to append; neighbouring text is tokenised together, however it was split."""

    text: str


class RoleBegin(_Message, frozen=True, tag="role_begin"):
    """Open a message of this role, as the model's own chat template writes it."""

    role: str


class RoleEnd(_Message, frozen=True, tag="role_end"):
    """Close the open message."""


class Tools(_Message, frozen=True, tag="tools"):
    """The tools that the model's chat template tells of, before any message: a JSON array of definitions, as OpenAI's
    protocol has them. Writes nothing by itself.
    """

    definitions: str


class Tokens(_Message, frozen=True, tag="tokens"):
    """Token ids to append: the index of a raw int32 buffer of the same ZeroMQ message.

    They take the place of the last `replaces` tokens before them, with the text that begins theirs (token healing).
    """

    buffer: int
    replaces: int = 0


Part: TypeAlias = Text | RoleBegin | RoleEnd | Tools | Tokens


class Hello(_Message, frozen=True, tag="hello"):
    op: int
    client: str = ""


class Open(_Message, frozen=True, tag="open"):
    op: int
    branch: int


class Extend(_Message, frozen=True, tag="extend"):
    """`commit=True` also tokenises the pending tail, so that the reply's `length` counts everything appended."""

    op: int
    branch: int
    parts: list[Part]
    commit: bool = False


class Fork(_Message, frozen=True, tag="fork"):
    op: int
    branch: int
    children: list[int]


class Generate(_Message, frozen=True, tag="generate"):
    """`stream=True` sends deltas; `timeout_s` is a deadline from arrival, after which the operation fails typed.

    grammar: what the text must match. heal: text that ends inside a token is continued as if it were one with what is
    drawn: its last tokens are drawn again where the vocabulary has longer ones that begin with their text (token
    healing). Never a role's text, given token ids, or tokens that were drawn before.
    """

    op: int
    branch: int
    params: SamplingParams
    stream: bool = False
    timeout_s: float | None = None
    grammar: Grammar | None = None
    heal: bool = False


class Select(_Message, frozen=True, tag="select"):
    """Score the choices by `method` and append the best, the first on ties.

    A choice is scored by the tokens that its text adds to the branch's text, without an end: one that begins another
    is as likely as its own tokens. temperature > 0: the choice is drawn from the distribution instead,
    by `seed`, or by the branch's next.
    """

    op: int
    branch: int
    choices: list[str]
    method: ChoiceMethod = "token_length_normalized"
    timeout_s: float | None = None
    temperature: float = 0.0
    seed: int | None = None


class Score(_Message, frozen=True, tag="score"):
    """Score the choices as a select at temperature 0 does, and append nothing."""

    op: int
    branch: int
    choices: list[str]
    method: ChoiceMethod = "token_length_normalized"
    timeout_s: float | None = None


class Rollback(_Message, frozen=True, tag="rollback"):
    """Keep the first `length` tokens of the branch, as they were when it had that many.

    Text not yet tokenised is dropped. Tokens that gave way to others (token healing) come back.
    """

    op: int
    branch: int
    length: int


class Cancel(_Message, frozen=True, tag="cancel"):
    """Cancel the operation `target`, or every operation of `branch` and its descendants. Exactly one of the two.

    discard: also drop from the cache what only the branch and its descendants have computed since its fork.
    """

    op: int
    target: int | None = None
    branch: int | None = None
    discard: bool = False


class Release(_Message, frozen=True, tag="release"):
    """Forget branches once what was sent before has been carried out; unknown ids are ignored (idempotent)."""

    op: int
    branches: list[int]


class Stat(_Message, frozen=True, tag="stat"):
    op: int


class Flush(_Message, frozen=True, tag="flush"):
    op: int


class Drain(_Message, frozen=True, tag="drain"):
    op: int


class Ping(_Message, frozen=True, tag="ping"):
    op: int


class Credit(_Message, frozen=True, tag="credit"):
    target: int
    tokens: int


Request: TypeAlias = (
    Hello
    | Open
    | Extend
    | Fork
    | Generate
    | Select
    | Score
    | Rollback
    | Cancel
    | Release
    | Stat
    | Flush
    | Drain
    | Ping
    | Credit
)

# --------------------------------------------------------------------------------------------- replies


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one operation cost. prompt_tokens = cached_tokens + computed_tokens.

    cached_tokens were already in the radix cache; computed_tokens had their KV computed for this operation;
    completion_tokens were sampled, or forced by a grammar: forced_tokens of them. drafted_tokens were computed before
    they were drawn, accepted_tokens of them came true. Times in milliseconds
    since the operation arrived: queue_ms until it was first scheduled, ttft_ms until its first token, latency_ms until
    its end.
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


class Welcome(_Message, frozen=True, tag="welcome"):
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


class Ok(_Message, frozen=True, tag="ok"):
    op: int


class Extended(_Message, frozen=True, tag="extended"):
    """`rendered` holds, for each role part in order, the text the chat template wrote for it.

    `length` counts the branch's tokens so far, without text that still waits to be tokenised with what follows.
    """

    op: int
    length: int
    rendered: list[str] = []


class Delta(_Message, frozen=True, tag="delta"):
    """New text of a streaming operation, whole characters only. token_ids: the new ones, raw little-endian int32."""

    op: int
    text: str
    token_ids: bytes
    logprobs: list[TokenLogprob] | None = None


class Generated(_Message, frozen=True, tag="generated"):
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
    captures: dict[str, str | list[str]] = {}


class Selected(_Message, frozen=True, tag="selected"):
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


class Cancelled(_Message, frozen=True, tag="cancelled"):
    """How many operations the cancel ended; each also gets its own `failed`."""

    op: int
    count: int


class Stats(_Message, frozen=True, tag="stats"):
    op: int
    values: dict[str, int | float | str]


class Pong(_Message, frozen=True, tag="pong"):
    """Alive, and moving: `steps` must grow while `running` or `waiting` is not 0."""

    op: int
    epoch: int
    steps: int
    running: int
    waiting: int
    phase: str


class Failed(_Message, frozen=True, tag="failed"):
    """The end of an operation that could not be carried out. op is None when the frame was unreadable.

    Of one that had begun to run, `details` holds the fields of `Usage`, and of a generate also `partial_text`.
    """

    op: int | None
    kind: ErrorKind
    message: str
    details: dict[str, int | float | str | bool | None] = {}
    cause: int | None = None
    """The operation whose failure this one depends on (kind dependency_failed)."""


Reply: TypeAlias = Welcome | Ok | Extended | Delta | Generated | Selected | Cancelled | Stats | Pong | Failed

# --------------------------------------------------------------------------------------------- encoding

_ENCODER: Final = msgspec.msgpack.Encoder()
_REQUEST_DECODER: Final = msgspec.msgpack.Decoder(Request)
_REPLY_DECODER: Final = msgspec.msgpack.Decoder(list[Reply])
_LITTLE: Final = sys.byteorder == "little"

Buffer: TypeAlias = bytes | memoryview


def prefix(kind: int) -> bytes:
    """Return the four bytes that open a message of this kind."""
    return bytes((0x42, MAJOR, MINOR, kind))


def encode_request(request: Request, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the frames of one request."""
    return [prefix(REQUEST), _ENCODER.encode(request), *buffers]


def encode_replies(replies: Sequence[Reply], buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the frames of a list of replies; their buffer indices refer to `buffers`."""
    return [prefix(REPLIES), _ENCODER.encode(replies), *buffers]


def decode_request(frames: Sequence[Buffer]) -> tuple[Request, list[Buffer]]:
    """Return the request and its buffers. Raises ProtocolError, with the operation's id where it can be told."""
    _check_prefix(frames, REQUEST)
    try:
        request = _REQUEST_DECODER.decode(frames[1])
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a request of this protocol: {error}", _op_of(frames[1])) from None
    return request, list(frames[2:])


def decode_replies(frames: Sequence[Buffer]) -> tuple[list[Reply], list[Buffer]]:
    """Return the replies and their buffers. Raises ProtocolError."""
    _check_prefix(frames, REPLIES)
    try:
        return _REPLY_DECODER.decode(frames[1]), list(frames[2:])
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not replies of this protocol: {error}") from None


def _check_prefix(frames: Sequence[Buffer], kind: int) -> None:
    if len(frames) < 2:
        raise ProtocolError(f"a message has at least 2 frames, got {len(frames)}")
    if len(frames) > MAX_FRAMES:
        raise ProtocolError(f"a message has at most {MAX_FRAMES} frames, got {len(frames)}")
    head = bytes(frames[0][:5])
    if len(head) != 4 or head[0] != 0x42:
        raise ProtocolError("the first frame is not a bough prefix")
    if head[1] != MAJOR:
        raise ProtocolError(f"protocol version {head[1]} is not supported, this side speaks {MAJOR}")
    if head[3] != kind:
        raise ProtocolError(f"message kind {head[3]} is not expected here, expected {kind}")


def _op_of(header: Buffer) -> int | None:
    """Read the operation id of a header that failed validation, so that the answer can name it."""
    try:
        fields = msgspec.msgpack.decode(header)
    except Exception:  # whatever is wrong with it, the answer goes out without an id
        return None
    op = fields.get("op") if isinstance(fields, dict) else None
    return op if isinstance(op, int) and not isinstance(op, bool) and 0 <= op <= MAX_ID else None


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Return token ids as raw little-endian int32."""
    ids = array("i", token_ids)
    if not _LITTLE:
        ids.byteswap()
    return ids.tobytes()


def decode_tokens(buffers: Sequence[Buffer], index: int) -> list[int]:
    """Return the token ids of buffer `index`. Raises ProtocolError on a missing or odd-sized buffer."""
    if not 0 <= index < len(buffers):
        raise ProtocolError(f"buffer {index} is not in this message, which has {len(buffers)}")
    raw = buffers[index]
    if len(raw) % 4:
        raise ProtocolError(f"buffer {index} must be a multiple of 4 bytes, got {len(raw)}")
    return _tokens(raw)


def delta_tokens(delta: Delta) -> list[int]:
    """Return the token ids of a delta. Raises ProtocolError if there is a part of one."""
    if len(delta.token_ids) % 4:
        raise ProtocolError(f"token_ids must be a multiple of 4 bytes, got {len(delta.token_ids)}")
    return _tokens(delta.token_ids)


def _tokens(raw: Buffer) -> list[int]:
    ids = array("i")
    ids.frombytes(cast(bytes, raw))
    if not _LITTLE:
        ids.byteswap()
    return ids.tolist()
