"""What a client asks of the runtime."""

from __future__ import annotations

from typing import TypeAlias

from bough.runtime.protocol.grammar import Grammar
from bough.runtime.protocol.message import Message
from bough.runtime.protocol.sampling import SamplingParams
from bough.runtime.protocol.scoring import ChoiceMethod


class Text(Message, frozen=True, tag="text"):
    """Text to append; neighbouring text is tokenised together, however it was split."""

    text: str


class RoleBegin(Message, frozen=True, tag="role_begin"):
    """Open a message of this role, as the model's own chat template writes it."""

    role: str


class RoleEnd(Message, frozen=True, tag="role_end"):
    """Close the open message."""


class Tools(Message, frozen=True, tag="tools"):
    """The tools that the model's chat template tells of, before any message: a JSON array of definitions, as OpenAI's
    protocol has them. Writes nothing by itself.
    """

    definitions: str


class Tokens(Message, frozen=True, tag="tokens"):
    """Token ids to append: the index of a raw int32 buffer of the same ZeroMQ message.

    They take the place of the last `replaces` tokens before them, with the text that begins theirs (token healing).
    """

    buffer: int
    replaces: int = 0


Part: TypeAlias = Text | RoleBegin | RoleEnd | Tools | Tokens


class Hello(Message, frozen=True, tag="hello"):
    op: int
    client: str = ""


class Open(Message, frozen=True, tag="open"):
    op: int
    branch: int


class Extend(Message, frozen=True, tag="extend"):
    """`commit=True` also tokenises the pending tail, so that the reply's `length` counts everything appended."""

    op: int
    branch: int
    parts: list[Part]
    commit: bool = False


class Fork(Message, frozen=True, tag="fork"):
    op: int
    branch: int
    children: list[int]


class Generate(Message, frozen=True, tag="generate"):
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


class Select(Message, frozen=True, tag="select"):
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


class Score(Message, frozen=True, tag="score"):
    """Score the choices as a select at temperature 0 does, and append nothing."""

    op: int
    branch: int
    choices: list[str]
    method: ChoiceMethod = "token_length_normalized"
    timeout_s: float | None = None


class Rollback(Message, frozen=True, tag="rollback"):
    """Keep the first `length` tokens of the branch, as they were when it had that many.

    Text not yet tokenised is dropped. Tokens that gave way to others (token healing) come back.
    """

    op: int
    branch: int
    length: int


class Cancel(Message, frozen=True, tag="cancel"):
    """Cancel the operation `target`, or every operation of `branch` and its descendants. Exactly one of the two.

    discard: also drop from the cache what only the branch and its descendants have computed since its fork.
    """

    op: int
    target: int | None = None
    branch: int | None = None
    discard: bool = False


class Release(Message, frozen=True, tag="release"):
    """Forget branches once what was sent before has been carried out; unknown ids are ignored (idempotent)."""

    op: int
    branches: list[int]


class Stat(Message, frozen=True, tag="stat"):
    op: int


class Flush(Message, frozen=True, tag="flush"):
    op: int


class Drain(Message, frozen=True, tag="drain"):
    op: int


class Ping(Message, frozen=True, tag="ping"):
    op: int


class Credit(Message, frozen=True, tag="credit"):
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
