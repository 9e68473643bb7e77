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

`lang` may import this package and nothing else of the runtime. Its files: requests.py and replies.py have the messages,
sampling.py and grammar.py what a generate asks for, scoring.py what the methods of a select mean, limits.py how much of
anything is taken, errors.py how requests fail, frames.py the encoding.
"""

from bough.runtime.protocol.errors import ErrorKind, ProtocolError, RequestError, UnknownClient
from bough.runtime.protocol.frames import (
    MAJOR,
    MINOR,
    REPLIES,
    REQUEST,
    Buffer,
    decode_replies,
    decode_request,
    decode_tokens,
    delta_tokens,
    encode_replies,
    encode_request,
    encode_tokens,
    prefix,
)
from bough.runtime.protocol.grammar import Grammar, GrammarKind
from bough.runtime.protocol.limits import (
    MAX_CHOICES,
    MAX_FORK,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_GRAMMAR_CHARS,
    MAX_ID,
    MAX_LOGIT_BIAS,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOKEN_ID,
    MAX_TOOLS_CHARS,
    MAX_TOP_LOGPROBS,
)
from bough.runtime.protocol.replies import (
    Cancelled,
    Delta,
    Extended,
    Failed,
    FinishReason,
    Generated,
    Ok,
    Pong,
    Reply,
    Selected,
    Stats,
    TokenLogprob,
    Usage,
    Welcome,
)
from bough.runtime.protocol.requests import (
    Cancel,
    Credit,
    Drain,
    Extend,
    Flush,
    Fork,
    Generate,
    Hello,
    Open,
    Part,
    Ping,
    Release,
    Request,
    RoleBegin,
    RoleEnd,
    Rollback,
    Score,
    Select,
    Stat,
    Text,
    Tokens,
    Tools,
)
from bough.runtime.protocol.sampling import SamplingParams
from bough.runtime.protocol.scoring import CHOICE_METHODS, ChoiceMethod

__all__ = [
    "CHOICE_METHODS",
    "MAJOR",
    "MAX_CHOICES",
    "MAX_FORK",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "MAX_GRAMMAR_CHARS",
    "MAX_ID",
    "MAX_LOGIT_BIAS",
    "MAX_PARTS",
    "MAX_STOPS",
    "MAX_TEMPERATURE",
    "MAX_TOKEN_ID",
    "MAX_TOOLS_CHARS",
    "MAX_TOP_LOGPROBS",
    "MINOR",
    "REPLIES",
    "REQUEST",
    "Buffer",
    "Cancel",
    "Cancelled",
    "ChoiceMethod",
    "Credit",
    "Delta",
    "Drain",
    "ErrorKind",
    "Extend",
    "Extended",
    "Failed",
    "FinishReason",
    "Flush",
    "Fork",
    "Generate",
    "Generated",
    "Grammar",
    "GrammarKind",
    "Hello",
    "Ok",
    "Open",
    "Part",
    "Ping",
    "Pong",
    "ProtocolError",
    "Release",
    "Reply",
    "Request",
    "RequestError",
    "RoleBegin",
    "RoleEnd",
    "Rollback",
    "SamplingParams",
    "Score",
    "Select",
    "Selected",
    "Stat",
    "Stats",
    "Text",
    "TokenLogprob",
    "Tokens",
    "Tools",
    "UnknownClient",
    "Usage",
    "Welcome",
    "decode_replies",
    "decode_request",
    "decode_tokens",
    "delta_tokens",
    "encode_replies",
    "encode_request",
    "encode_tokens",
    "prefix",
]
