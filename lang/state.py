"""`State`, the `s` of a program: one growing text with its variables.

Appending never waits; a variable waits when it is read, and raises there what went wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from bough.awaiting import AsyncReads
from bough.backend import Backend
from bough.calls import Call, GenCall
from bough.errors import InvalidRequest, UnknownVariable
from bough.expressions import Expression, Piece, SeparateReasoning, gen, pieces_of
from bough.interpreter import Interpreter
from bough.pieces import messages_of, text_of
from bough.running import begin, log_of
from bough.sampling import DEFAULTS, Sampling, count
from bough.searching import Searching
from bough.streaming import Feed, Run, iterate, iterate_async, iterate_with_meta
from bough.travel import TimeTravel
from bough.variables import LAZY, Derived, Span, read, variables_of, written

if TYPE_CHECKING:
    from bough.events import Event
    from bough.group import Copy, Group, Scratch
    from bough.scopes import RoleScope, VarScope
    from bough.tool_formats import ToolFormat
    from bough.toolbox import OnError, Toolbox, ToolRun
    from bough.tools import Tool
    from bough.usage import RunUsage
    from bough.var import Var

T = TypeVar("T")
S = TypeVar("S", bound="State")


class State(AsyncReads, TimeTravel, Searching):
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

    # ------------------------------------------------------------------------------------------ tools

    def tools(
        self, functions: Sequence[Callable[..., Any] | Tool], *, system: str = "", format: ToolFormat | None = None
    ) -> Toolbox:
        """Tell the model of functions that it may call, in a system message; return them as a `Toolbox`.

        ::

            def calculator(expression: str) -> int:
                "Computes a number."
                ...

            s.tools([calculator], system="You are a careful assistant.")
            s += bo.user("What is 17 + 25?")
            done = s.run_tools(max_rounds=4, name="answer", max_tokens=64)
            done.answer, done.results

        system: what the message says besides. format: "template" tells of them through the chat template's own `tools`
        variable, "text" in plain words; by default the former where the model has it. Both are in
        `bough.tool_formats`. A fork has its parent's tools. Raises InvalidRequest for functions without annotations.
        """
        from bough.toolbox import Toolbox

        if format is None:
            format = "template" if self._interpreter.backend.server_info().get("has_tools") else "text"
        box = Toolbox(functions, format)
        box.introduce(self, system)
        self._toolbox = box
        return box

    def run_tools(
        self,
        *,
        max_rounds: int = 8,
        on_error: OnError = "feed",
        name: str | None = None,
        constrain: bool | None = None,
        **options: Any,
    ) -> ToolRun:
        """Let the model write turns, and carry out the calls in them, until a turn has none: that is the answer.

        Calls of one turn run beside each other, in threads; an `async def` function is awaited. max_rounds: most
        turns; without an answer after them, `answer` is None. on_error: "feed" tells the model what went wrong, "raise"
        raises ToolError. name: the variable that the answer is put in. options: of each turn's `gen`.
        constrain: hold each turn to a grammar, so that what begins as a call is one of these tools with arguments that
        fit, and a call that `max_tokens` cuts raises Truncated; by default where the backend is a runtime, or an HTTP
        server that takes Lark grammars. A script says what it says.
        """
        if self._toolbox is None:
            raise InvalidRequest("this state has no tools: call s.tools([...]) first")
        return self._toolbox.run(
            self, max_rounds=max_rounds, on_error=on_error, name=name, constrain=constrain, **options
        )

    async def arun_tools(
        self,
        *,
        max_rounds: int = 8,
        on_error: OnError = "feed",
        name: str | None = None,
        constrain: bool | None = None,
        **options: Any,
    ) -> ToolRun:
        """Do as `run_tools`, leaving the event loop free."""
        from bough.onloop import on_loop

        return await on_loop(
            self.run_tools, max_rounds=max_rounds, on_error=on_error, name=name, constrain=constrain, **options
        )

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

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Yield the text (or one variable's) as it comes, if the run streams; all at once if it does not.

        Any number of readers may follow, each from the beginning; together the chunks are the whole text.
        """
        if self._feed is not None:
            return iterate(self, self._feed, var_name)
        return iter([self.text() if var_name is None else written(self._find(var_name))])

    @overload
    def text_async_iter(
        self, var_name: str | None = None, return_meta_data: Literal[False] = False
    ) -> AsyncIterator[str]: ...
    @overload
    def text_async_iter(
        self, var_name: str, return_meta_data: Literal[True]
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]: ...
    def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """Yield the text (or one variable's) as it comes, leaving the event loop free.

        return_meta_data: yield pairs of a variable's text and what is known by then: a dict with the token_ids (and
        output_token_logprobs, where asked for) of this piece, completion_tokens so far, and finish_reason None. The
        last pair has what is left of the text, if anything, and all of `get_meta_info`.
        """
        if return_meta_data and var_name is None:
            raise InvalidRequest("return_meta_data needs the name of a variable", field="return_meta_data")
        if self._feed is None:
            return self._text_once(var_name, return_meta_data)
        if var_name is not None and return_meta_data:
            return iterate_with_meta(self, self._feed, var_name)
        return iterate_async(self, self._feed, var_name)

    def value_iter(self, name: str) -> Iterator[Any]:
        """Yield what a variable's value is known to be so far, while it is written; the last is the whole value.

        For a `gen` with a type that is written as JSON, plain lists, dicts, texts and numbers that grow (a number or a
        word once it is whole), then the value of the type: `[]`, `[{"name": "Ad"}]`, ..., `[Person("Ada")]`. For other
        types only the value; without a type the text as it grows. Raises Truncated at the end as `s[name]` does.
        """
        from bough.growth import growing

        return growing(self, name)

    def value_async_iter(self, name: str) -> AsyncIterator[Any]:
        """Yield what a variable's value is known to be so far, leaving the event loop free; as `value_iter`."""
        from bough.growth import growing_async

        return growing_async(self, name)

    async def _text_once(self, name: str | None, with_meta: bool) -> AsyncIterator[Any]:
        if name is None:
            yield await self.atext()
            return
        await self.get(name)
        text = written(self._find(name))
        yield (text, self.get_meta_info(name)) if with_meta else text

    def events(self, start: int = 0) -> Iterator[Event]:
        """Yield what happens in the whole run, on all branches, as it happens; from event number `start` on.

        Ends when nothing runs any more; in the body of the run itself, when nothing is in flight. Any number of readers
        may follow, each on its own. Raises InvalidRequest unless the run has `events=True` or `stream=True`::

            for event in program.run(question, stream=True).events():
                print(event.seq, event.kind, event.branch, event.text)
        """
        return log_of(self._interpreter.backend).read(start)

    def aevents(self, start: int = 0) -> AsyncIterator[Event]:
        """Yield the same as `events`, leaving the event loop free."""
        return log_of(self._interpreter.backend).aread(start)

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

    # ------------------------------------------------------------------------------------------ branches

    def fork(self, size: int | Sequence[Any] | Mapping[str, Any] = 1, *, names: Sequence[str] | None = None) -> Group:
        """Return states that share all that this one holds; nothing is copied, re-sent or waited for.

        size: how many; or a list of arguments, one state each, which knows it as `state.arg`; or a dict of arguments by
        the states' names. names: the states' names, for `forks["plan"]`; as many states if no size is given.

        They inherit text, variables, messages, meta information and the open role. Raises InvalidRequest if there were
        not between 1 and 4096 of them::

            for f in s.fork(["kind", "strict"]):
                f += bo.user(f"Be {f.arg}.") + bo.assistant(bo.gen("review"))
        """
        from bough.group import Group

        return Group(self, self._named_fork(size, names))

    def branches(
        self, size: int | Sequence[Any] | Mapping[str, Any] = 1, *, names: Sequence[str] | None = None
    ) -> Group:
        """Fork for a `with` block that cancels on the way out, also by an exception, what was not joined.

        ::

            with s.branches(4) as forks:
                forks += bo.gen("answer", max_tokens=200)
                (first,) = forks.race()
                s["answer"] = first["answer"]
        """
        return self.fork(size, names=names)

    @property
    def arg(self) -> Any:
        """The argument that this state, or the one it was forked off, was forked for; None without one."""
        return self._arg

    @property
    def branch_name(self) -> str | None:
        """The name that this state was forked under; None without one."""
        return self._name

    def _named_fork(self, size: int | Sequence[Any] | Mapping[str, Any], names: Sequence[str] | None) -> list[State]:
        if isinstance(size, Mapping):
            if names is not None:
                raise InvalidRequest("a fork over a dict takes its names from there: leave names out", field="names")
            names, size = list(size), list(size.values())
        args = list(size) if isinstance(size, Sequence) and not isinstance(size, (str, bytes)) else None
        number: Any = size if args is None else len(args)
        if names is not None:
            names = _checked_names(names)
            number = len(names) if args is None and size == 1 else number
            if len(names) != number:
                raise InvalidRequest(f"names must be one per branch, {number!r}, got {len(names)}", field="names")
        states = self._fork(number, State)
        for number, state in enumerate(states):
            if names is not None:
                state._name = state._interpreter.strand.name = names[number]
            if args is not None:
                state._arg = args[number]
        return states

    def scratch(self) -> Scratch:
        """Return a state for a `with` block whose text never enters this one; only what is taken from it does.

        ::

            with s.scratch() as t:
                t += bo.user("Think aloud first.") + bo.assistant(bo.gen("thoughts"))
                s["thoughts"] = t["thoughts"]
        """
        from bough.group import Scratch

        (child,) = self._fork(1, Scratch)
        assert isinstance(child, Scratch)
        return child

    def adopt(self, branch: State) -> None:
        """Go on as a branch that was forked off this state, or off such a branch: its text, its variables, its KV.

        The branch takes no more text; it can still be read. Raises InvalidRequest if this state took text of its own
        since the fork::

            leaves = s.fork(2)[0].fork(2)
            s.adopt(leaves[1])
        """
        from bough.joins import adopt

        if not isinstance(branch, State):
            raise InvalidRequest(f"adopt takes a branch of this state, got {branch!r}", field="branch")
        adopt(self, branch)

    def copy(self) -> Copy:
        """Return one state that shares all that this one holds.

        `with s.copy() as c:` also joins it: the variables that c assigns become lists of one in `s`.
        """
        from bough.group import Copy

        (child,) = self._fork(1, Copy)
        assert isinstance(child, Copy)
        child._parent = self
        return child

    def _fork(self, size: int, kind: type[State]) -> list[State]:
        if count("a fork's size", size) is None:
            raise InvalidRequest("a fork's size must be a whole number, got None")
        return [self._child(interpreter, kind) for interpreter in self._interpreter.fork(size)]

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

    def cancel(self) -> None:
        """End what is running on this branch and its forks; reads of what was not done raise Cancelled.

        The state takes no more text; what was done before can still be read.
        """
        self._interpreter.cancel()

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


def _checked_names(names: Sequence[str]) -> list[str]:
    checked = list(names)
    for name in checked:
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"a branch's name must be a text that is not empty, got {name!r}", field="names")
        if checked.count(name) > 1:
            raise InvalidRequest(f"names must differ, {name!r} is there twice", field="names")
    return checked
