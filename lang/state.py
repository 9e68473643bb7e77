"""`State`, the `s` of a program: one growing text with its variables.

Appending never waits; a variable waits when it is read, and raises there what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, overload

from bough.awaiting import AsyncReads
from bough.backend import Backend
from bough.branching import Branching
from bough.calls import Call, GenCall
from bough.errors import InvalidRequest, UnknownVariable
from bough.expressions import Expression, Piece, SeparateReasoning, gen, pieces_of
from bough.following import Following
from bough.interpreter import Interpreter
from bough.pieces import messages_of, text_of
from bough.running import begin
from bough.sampling import DEFAULTS, Sampling
from bough.searching import Searching
from bough.streaming import Feed, Run
from bough.tool_calling import ToolCalling
from bough.travel import TimeTravel
from bough.variables import LAZY, Derived, Span, pending, read, variables_of

if TYPE_CHECKING:
    from bough.scopes import RoleScope, VarScope
    from bough.toolbox import Toolbox
    from bough.usage import RunUsage
    from bough.var import Var

T = TypeVar("T")
S = TypeVar("S", bound="State")


class State(AsyncReads, Following, ToolCalling, Branching, TimeTravel, Searching):
    """One growing text with its variables.

    `s += text_or_expression` appends; `s["x"]` reads the variable x, waiting for it; `s.fork(n)` branches. A state may
    be used from several threads; what two threads append at once comes in some order.
    """

    __slots__ = (
        "__weakref__",
        "_arg",
        "_assigned",
        "_feed",
        "_interpreter",
        "_name",
        "_return_value",
        "_run",
        "_title",
        "_toolbox",
        "_variables",
    )

    def __init__(
        self, backend: Backend, sampling: Sampling = DEFAULTS, *, title: str = "state", run: Run | None = None
    ) -> None:
        self._title = title
        self._run = run
        self._feed: Feed | None = None if run is None else run.new_feed()
        backend, seeds = begin(backend, sampling, title)
        self._interpreter = Interpreter(backend, sampling, self._feed, seeds=seeds)
        self._variables: dict[str, Any] = {}
        self._assigned: dict[str, None] = {}  # in this state, since it was forked; in order
        self._return_value: Any = None
        self._toolbox: Toolbox | None = None
        self._arg: Any = None
        self._name: str | None = None

    def __repr__(self) -> str:
        """Return what the state is, and which variables it has; nothing is waited for."""
        place = "".join(f"[{number}]" for number in self.path)
        names = ", ".join(f"{name} (pending)" if pending(value) else name for name, value in [*self._variables.items()])
        return f"<{type(self).__name__} {self._title}{place}: {names or 'no variables'}>"

    def __reduce__(self) -> NoReturn:
        """Raise TypeError: a state is part of a run, which lives in this process."""
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, it is part of a run: take what it says, with dict(state), "
            "state.text() or state.messages()"
        )

    # ------------------------------------------------------------------------------------------ append

    def __iadd__(self: S, other: str | Expression) -> S:
        """Append text or an expression. Raises InvalidRequest at once for what cannot be appended here."""
        self._append(pieces_of(other))
        return self

    def _append(self, pieces: Sequence[Piece]) -> list[Call]:
        calls = self._interpreter.append(pieces)
        for call in calls:
            for name, value in variables_of(call):
                self._assign(name, value)
        for piece in pieces:
            if isinstance(piece, SeparateReasoning):
                self._separate(piece)
        if self._feed is not None:
            self._feed.notify()
        return calls

    @overload
    def gen(self, type: type[T], name: str | None = None, **options: Any) -> Var[T]: ...
    @overload
    def gen(self, type: Any, name: str | None = None, **options: Any) -> Var[Any]: ...
    def gen(self, type: Any, name: str | None = None, **options: Any) -> Var[Any]:
        """Append `gen(name, type=type, ...)` and return its variable, of which a type checker knows the type.

        ::

            s += "Age: "
            age = s.gen(int, "age", max_tokens=8)     # Var[int], at once
            age.value + 1                             # waits for it; the same as s["age"] + 1
        """
        from bough.var import Var

        (call,) = self._append(pieces_of(gen(name, type=type, **options)))
        assert isinstance(call, GenCall), "a gen with a type is no select"
        return Var(call)

    def _separate(self, piece: SeparateReasoning) -> None:
        for name in piece.names:
            call = self._variables[name]
            self._assign(name, Derived(call, piece.answer))
            self._assign(name + piece.suffix, Derived(call, piece.reasoning))

    # ------------------------------------------------------------------------------------------ roles and scopes

    def role(self, name: str, expr: str | Expression | None = None) -> RoleScope:
        """Append a message of a role; without an expression, use it as `with s.role("tool"): s += ...`."""
        from bough.scopes import RoleScope

        return RoleScope(self, name, expr)

    def system(self, expr: str | Expression | None = None) -> RoleScope:
        """Append a system message; without an expression, use it as `with s.system(): s += ...`."""
        return self.role("system", expr)

    def user(self, expr: str | Expression | None = None) -> RoleScope:
        """Append a user message; without an expression, use it as `with s.user(): s += ...`."""
        return self.role("user", expr)

    def assistant(self, expr: str | Expression | None = None) -> RoleScope:
        """Append an assistant message; without an expression, use it as `with s.assistant(): s += ...`."""
        return self.role("assistant", expr)

    def var_scope(self, name: str) -> VarScope:
        """Name the text appended inside `with s.var_scope(name):`; the variable exists once the block is left."""
        from bough.scopes import VarScope

        return VarScope(self, name)

    # ------------------------------------------------------------------------------------------ variables

    def __getitem__(self, name: str) -> Any:
        """Wait for a variable and return its value; raise there what went wrong. Raises UnknownVariable at once."""
        value = self._find(name)
        if isinstance(value, Span):
            self._interpreter.flush()
        return read(value)

    def _find(self, name: str) -> Any:
        """Return what a variable holds; in a streaming run, wait until the body has assigned it or has ended."""
        run, feed = self._run, self._feed
        # Others may wait for the body; the body itself would wait for ever.
        if run is not None and feed is not None and not run.is_here:
            feed.wait_until(lambda: name in self._variables or run.finished)
        if name not in self._variables:
            self._raise_unknown(name)
        return self._variables[name]

    def _raise_unknown(self, name: str) -> None:
        self._raise_if_body_failed(f"{name!r} was assigned")
        known = ", ".join(sorted(self._variables)) or "none"
        raise UnknownVariable(f"no variable {name!r} was assigned in this state; assigned: {known}", name=name)

    def get_var(self, name: str) -> Any:
        """Wait for a variable and return its value."""
        return self[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Assign a variable; the text does not change."""
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"a variable's name must be a text that is not empty, got {name!r}", field="name")
        self._assign(name, value)
        if self._feed is not None:
            self._feed.notify()

    def set_var(self, name: str, value: Any) -> None:
        """Assign a variable; the text does not change."""
        self[name] = value

    def __contains__(self, name: object) -> bool:
        """Return whether a variable of this name was assigned, be it computed yet or not."""
        return name in self._variables

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the variables that were assigned, computed yet or not; `dict(state)` reads them all."""
        return iter(list(self._variables))

    def keys(self) -> list[str]:
        """Return the names of the variables that were assigned, computed yet or not."""
        return list(self._variables)

    def _assign(self, name: str, value: Any) -> None:
        self._variables[name] = value
        self._assigned[name] = None

    def get_meta_info(self, name: str) -> Any:
        """Wait for a gen or select, and return what it cost and why it ended.

        A dict with prompt_tokens, cached_tokens, computed_tokens, completion_tokens (forced_tokens of them by a
        grammar), drafted_tokens and how many of them came true (accepted_tokens), queue_ms, ttft_ms, latency_ms;
        for a gen also finish_reason, matched_stop, token_ids and, when asked for, output_token_logprobs and
        output_top_logprobs; for a select also index, choice, scores, distribution, choice_token_logprobs. A list of
        them for n > 1 and for joined variables.
        """
        value = self._find(name)
        if not isinstance(value, LAZY) or isinstance(value, Span):
            raise InvalidRequest(f"{name!r} is not the result of a gen or select, it has no meta information")
        return value.meta()

    # ------------------------------------------------------------------------------------------ reading

    def text(self) -> str:
        """Wait for the whole text: what was appended, what the roles were rendered to, what was generated."""
        self._settle("its text was complete")
        return text_of(list(self._interpreter.items()))

    def messages(self) -> list[dict[str, str]]:
        """Wait for the closed messages, as [{"role": ..., "content": ...}]; the content is exact, nothing stripped."""
        self._settle("its messages were complete")
        return messages_of(self._interpreter.items())

    def _settle(self, what: str) -> None:
        self._wait_for_body()
        self._raise_if_body_failed(what)
        self._interpreter.flush()

    def sync(self) -> None:
        """Wait until everything appended so far is done, well or not; `error()` tells which."""
        self.error()

    def error(self) -> BaseException | None:
        """Wait until everything appended so far is done; return what went wrong first, or None.

        An exception of the program's own code comes before what the backend reports.
        """
        self._wait_for_body()
        failure = self._interpreter.error()
        return (self._run.error if self._run is not None else None) or failure

    @property
    def ret_value(self) -> Any:
        """What the program's body returned, once it has ended."""
        self._wait_for_body()
        self._raise_if_body_failed("it returned")
        return self._return_value

    def recorded(self, name: str, call: Callable[[], T]) -> T:
        """Return what `call()` returns; in a replay of the run's journal, what it returned then, without calling it.

        For what a program takes from outside, such as a clock, a search or a tool: then a replay needs no outside. The
        value must be None, a number, text, bytes, or lists and dicts of them::

            today = s.recorded("today", lambda: datetime.date.today().isoformat())
        """
        interpreter = self._interpreter
        record = getattr(interpreter.backend, "recorded", None)
        return call() if record is None else cast(T, record(interpreter._branch(), name, call))

    @property
    def path(self) -> tuple[int, ...]:
        """This branch's place in the run: () is the root, then the number of each child on the way down.

        Children count on over all forks of a branch; a gen with n > 1 forks too, and the state goes on with the first.
        """
        return self._interpreter._path

    @property
    def usage(self) -> RunUsage:
        """What this state and all that was forked off it cost so far; of a run's own state, the whole run. Never waits.

        ::

            usage = program.run(question).usage
            print(usage.computed_tokens, usage.generated_tokens, usage.decode_ms)
        """
        from bough.usage import usage_of

        return usage_of(self._interpreter.first)

    @property
    def seed(self) -> int:
        """The run's seed, from which every gen has its own: given to `run`, or drawn when it began.

        `again = program.run(..., seed=state.seed)` says the same, whatever else runs.
        """
        return self._interpreter.seeds.run

    def tree(self) -> str:
        """Wait for the run and draw it as text: branches, gens, and what was cached, computed and generated."""
        from bough.tree import draw

        self.error()
        return draw(self._title, self._interpreter.first)

    def _child(self, interpreter: Interpreter, kind: type[State]) -> State:
        child = kind.__new__(kind)
        child._title = self._title
        child._run = self._run
        child._feed = interpreter.feed = None if self._run is None or self._feed is None else self._run.new_feed()
        child._interpreter = interpreter
        child._variables = self._variables.copy()
        child._assigned = {}
        child._return_value = None
        child._toolbox = self._toolbox
        child._arg = self._arg
        child._name = None
        return child

    # ------------------------------------------------------------------------------------------ the body's thread

    def _body_finished(self) -> bool:
        """Whether nothing more will come, as far as the caller can wait: a body cannot wait for its own end."""
        return self._run is None or self._run.finished or self._run.is_here

    def _wait_for_body(self) -> None:
        """Wait for a body that runs in a thread of its own, unless the caller is that body."""
        run, feed = self._run, self._feed
        if run is not None and feed is not None and not run.is_here:
            feed.wait_until(lambda: run.finished)

    def _raise_if_body_failed(self, what: str) -> None:
        if self._run is not None:
            self._run.reached(what)
