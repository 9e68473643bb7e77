"""An engine in the same thread with a fake model that obeys constraints, for tests of grammars and token healing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from fakes import FakeClock, FakeRunner

from bough.runtime.cache.prefix_cache import PrefixCache
from bough.runtime.composer import Composer
from bough.runtime.config import RuntimeConfig
from bough.runtime.engine import Engine
from bough.runtime.grammar.compiler import GrammarCompiler
from bough.runtime.grammar.vocabulary import Vocabulary
from bough.runtime.inflight import InFlight
from bough.runtime.models.folder import resolve_model
from bough.runtime.pipeline import Executor
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    Buffer,
    Delta,
    Extend,
    Generate,
    Generated,
    Grammar,
    Open,
    Part,
    Reply,
    SamplingParams,
    Text,
    decode_tokens,
)
from bough.runtime.scheduler import Scheduler
from bough.runtime.session import Session
from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.tokenizer import load_tokenizer

POCKET = resolve_model("pocket")
TOKENIZER = load_tokenizer(POCKET)
VOCABULARY = Vocabulary(TOKENIZER, TOKENIZER.vocab_size)
R = TypeVar("R", bound=Reply)


class GrammarEngine:
    """One session on an engine; `ask` sends a generate on a new branch, `run` works until nothing is left to do."""

    def __init__(
        self,
        *,
        pages: int = 256,
        context_len: int = 500,
        compiler: GrammarCompiler | None = None,
        runner: Executor | None = None,
        usual_len: float = 256.0,
        **config: Any,
    ) -> None:
        self.config = RuntimeConfig(**config)
        clock = FakeClock()
        self.clock = clock
        self.scheduler = Scheduler(
            PrefixCache(pages, 4),
            token_budget=self.config.token_budget,
            max_running=64,
            usual_len=usual_len,
            clock=clock,
        )
        self.compiler = compiler or GrammarCompiler(VOCABULARY)
        composer = Composer(
            Prompter(TOKENIZER, load_chat_template(POCKET), "pocket"),
            vocab_size=TOKENIZER.vocab_size,
            context_len=context_len,
            seed=1,
            credit=4096,
            grammars=self.compiler,
        )
        self.runner = runner or FakeRunner(pages, 4, vocab_size=TOKENIZER.vocab_size)
        in_flight = InFlight(self.scheduler, self.runner, credit=4096, clock=clock)
        self.engine = Engine(self.config, self.scheduler, in_flight, composer, epoch=1, clock=clock)
        self.session = Session(b"id", "one", "test", 0.0)
        self.replies: dict[int | None, list[Reply]] = {}
        self.buffers: dict[int, list[int]] = {}
        self.deltas: dict[int, str] = {}
        self._op = 0

    def send(self, kind: Any, *, buffers: Sequence[Buffer] = (), **fields: Any) -> int:
        self._op += 1
        self.engine.handle(self.session, kind(op=self._op, **fields), buffers)
        return self._op

    def branch(self, *parts: Part | str) -> int:
        """Open a branch with some text; return its id."""
        branch = self.send(Open, branch=self._op + 1000) + 999
        said = [Text(part) if isinstance(part, str) else part for part in parts]
        self.send(Extend, branch=branch, parts=said)
        return branch

    def generate(
        self,
        branch: int,
        grammar: Grammar | None = None,
        *,
        heal: bool = False,
        stream: bool = False,
        timeout_s: float | None = None,
        **params: Any,
    ) -> int:
        params.setdefault("max_tokens", 60)
        fields: dict[str, Any] = {"stream": stream, "grammar": grammar, "heal": heal, "timeout_s": timeout_s}
        return self.send(Generate, branch=branch, params=SamplingParams(**params), **fields)

    def ask(self, text: str, grammar: Grammar | None = None, **options: Any) -> int:
        return self.generate(self.branch(text), grammar, **options)

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.step() and not self.engine.has_work:
                self.collect()
                return
            self.scheduler.check_invariants()
        raise AssertionError("not done")

    def collect(self) -> None:
        for message in self.session.take_outbox():
            for reply in message.replies:
                self.replies.setdefault(getattr(reply, "op", None), []).append(reply)
                if isinstance(reply, Generated):
                    self.buffers[reply.op] = decode_tokens(message.buffers, reply.buffer)
                elif isinstance(reply, Delta):
                    self.deltas[reply.op] = self.deltas.get(reply.op, "") + reply.text

    def last(self, op: int, kind: type[R]) -> R:
        self.collect()
        terminal = self.replies[op][-1]
        assert isinstance(terminal, kind), terminal
        return terminal

    def answer(self, text: str, grammar: Grammar | None = None, **options: Any) -> Generated:
        """Ask, run to the end, return the reply."""
        op = self.ask(text, grammar, **options)
        self.run()
        return self.last(op, Generated)

    def ids(self, branch: int) -> list[int]:
        """The ids of a branch, without text that waits."""
        ids: list[int] = self.session.branches[branch].log.array().tolist()
        return ids

    def text(self, branch: int) -> str:
        """All text of a branch."""
        return TOKENIZER.decode(self.ids(branch)) + self.session.branches[branch].tail.pending
