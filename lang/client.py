"""`RuntimeClient`: the backend that reaches a runtime over ZeroMQ."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from bough.backend import Branch, Generation, OnDelta
from bough.errors import BoughError, InvalidRequest, RuntimeLost
from bough.link import Convert, Entry, Keys, Link
from bough.runtime import protocol
from bough.runtime.protocol import ChoiceMethod, Extended, Part, SamplingParams, Selected, Welcome
from bough.seeds import derived
from bough.waiting import wait

if TYPE_CHECKING:
    from bough.recovery import RecoveringLink


ANSWER_S: Final = 10.0
SOCKET_S: Final = 1.0
LOOK_S: Final = 0.02
TELL_AFTER_S: Final = 2.0


class RuntimeClient:
    """A connection to a running runtime, to be used as a backend; a context manager.

    address: `ipc:///path` or `tcp://host:port`. timeout: seconds to wait for the runtime to listen and to answer; if it
    is not given, 10, but 1 for the socket of an ipc address to be there. silence_timeout: seconds without any answer
    after which the runtime counts as hung. For tcp with CURVE: the runtime's public key and
    this client's key pair, in Z85. `watch` returns why the runtime's process has ended, or None.

    One socket, one thread, however many programs run. Raises RuntimeLost if nothing answers at the address.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = None,
        silence_timeout: float = 10.0,
        server_public_key: str | None = None,
        public_key: str | None = None,
        secret_key: str | None = None,
        watch: Callable[[], str | None] | None = None,
    ) -> None:
        keys = _keys(server_public_key, public_key, secret_key)
        begin, limit = time.monotonic(), ANSWER_S if timeout is None else timeout
        _await_socket(address, SOCKET_S if timeout is None else timeout)
        link = Link(address, silence_s=silence_timeout, watch=watch, keys=keys)
        link.start(limit, waited_s=time.monotonic() - begin, tell_after_s=TELL_AFTER_S)
        self._use(link)

    @classmethod
    def over(cls, link: Link | RecoveringLink) -> RuntimeClient:
        """Return a client that owns a link which was started already."""
        client = cls.__new__(cls)
        client._use(link)
        return client

    def _use(self, link: Link | RecoveringLink) -> None:
        self._link = link
        self._branches = count(1)
        self._runs = count(1)
        self._live: set[Branch] = set()
        self._finalizer = weakref.finalize(self, _close, link, self._live)

    def __enter__(self) -> RuntimeClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Raise TypeError: another process connects by itself."""
        raise TypeError(f"RuntimeClient cannot be pickled: give the other process bo.RuntimeClient({self.address!r})")

    def __repr__(self) -> str:
        state = "closed" if self._link.lost else "connected"
        return f"<RuntimeClient {self.address} {state}, model {self.welcome.model}>"

    def close(self) -> None:
        """Give all branches back and disconnect; whoever still waits gets RuntimeLost. Idempotent."""
        self._finalizer()

    @property
    def address(self) -> str:
        """Where the runtime listens."""
        return self._link.address

    @property
    def welcome(self) -> Welcome:
        """What the runtime said of itself."""
        welcome = self._link.welcome
        assert welcome is not None, "the link was started"
        return welcome

    @property
    def bytes_out(self) -> int:
        """Bytes sent so far."""
        return self._link.bytes_out

    @property
    def bytes_in(self) -> int:
        """Bytes received so far."""
        return self._link.bytes_in

    def next_seed(self) -> int | None:
        """Return the next run's seed if the runtime was started with one; the same for any client's first run."""
        fixed = self.welcome.seed
        return None if fixed is None else derived(fixed, next(self._runs))

    # ------------------------------------------------------------------------------------------ primitives

    def open(self) -> Branch:
        """Start an empty branch."""
        branch = next(self._branches)
        self._link.send(protocol.Open(next(self._link.ops), branch), Entry(protocol.Ok))
        self._live.add(branch)
        return branch

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        children = [next(self._branches) for _ in range(count)]
        self._link.send(protocol.Fork(next(self._link.ops), branch, children), Entry(protocol.Ok))
        self._live.update(children)
        return children

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles."""
        op = next(self._link.ops)
        return self._ask(protocol.Extend(op, branch, list(parts), commit), protocol.Extended)

    def generate(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        name: str | None = None,
        on_delta: OnDelta | None = None,
        timeout_s: float | None = None,
        grammar: protocol.Grammar | None = None,
        heal: bool = True,
    ) -> Future[Generation]:
        """Sample tokens and append them."""
        op = next(self._link.ops)
        request = protocol.Generate(op, branch, params, on_delta is not None, timeout_s, grammar, heal)
        return self._ask(request, protocol.Generated, _generation, on_delta)

    def select(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Future[Selected]:
        """Score the choices and append the best."""
        op = next(self._link.ops)
        request = protocol.Select(op, branch, list(choices), method, timeout_s, temperature, seed)
        return self._ask(request, protocol.Selected, _selected(len(choices)))

    def score(
        self,
        branch: Branch,
        choices: Sequence[str],
        method: ChoiceMethod,
        *,
        name: str | None = None,
        timeout_s: float | None = None,
    ) -> Future[Selected]:
        """Score the choices and append nothing."""
        request = protocol.Score(next(self._link.ops), branch, list(choices), method, timeout_s)
        return self._ask(request, protocol.Selected, _selected(len(choices)))

    def rollback(self, branch: Branch, length: int) -> Future[Extended]:
        """Cut the branch back to its first `length` tokens."""
        return self._ask(protocol.Rollback(next(self._link.ops), branch, length), protocol.Extended)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants; discard: and free the KV that only they have."""
        request = protocol.Cancel(next(self._link.ops), branch=branch, discard=discard)
        return self._ask(request, protocol.Cancelled, lambda reply, buffers: reply.count)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches once what was sent before has been carried out; never raises."""
        self._live.difference_update(branches)
        with contextlib.suppress(BoughError):  # if the connection is gone, so are the branches
            self._link.send(protocol.Release(next(self._link.ops), list(branches)), Entry(protocol.Ok))

    def stats(self) -> dict[str, int | float | str]:
        """Return the runtime's counters."""
        reply = self._ask(protocol.Stat(next(self._link.ops)), protocol.Stats, lambda reply, buffers: reply.values)
        values: dict[str, int | float | str] = _now(reply)
        return values

    def flush_cache(self) -> None:
        """Drop every cached prefix that is not in use."""
        _now(self._ask(protocol.Flush(next(self._link.ops)), protocol.Ok))

    def drain(self) -> None:
        """Let the runtime finish what runs, refuse what is new, and stop."""
        _now(self._ask(protocol.Drain(next(self._link.ops)), protocol.Ok))

    def server_info(self) -> dict[str, object]:
        """Return what the runtime said of itself: model, device, dtype, limits."""
        info: dict[str, object] = msgspec.structs.asdict(self.welcome)
        del info["op"]
        return {**info, "address": self.address, "has_grammars": True}

    def _ask(
        self, request: Any, kind: type[Any], convert: Convert | None = None, on_delta: OnDelta | None = None
    ) -> Future[Any]:
        future: Future[Any] = Future()
        self._link.send(request, Entry(kind, convert, future, on_delta))
        return future


def _generation(reply: protocol.Generated, buffers: Sequence[protocol.Buffer]) -> Generation:
    token_ids = protocol.decode_tokens(buffers, reply.buffer)
    return Generation(
        reply.text,
        token_ids,
        reply.finish_reason,
        reply.matched_stop,
        reply.length,
        reply.usage,
        reply.logprobs,
        reply.is_whole,
        reply.captures,
        reply.length - len(token_ids) + reply.replaced,
    )


def _selected(num_choices: int) -> Convert:
    def convert(reply: Selected, buffers: Sequence[protocol.Buffer]) -> Selected:
        if not 0 <= reply.index < num_choices:
            raise protocol.ProtocolError(f"choice {reply.index} of {num_choices}")
        return reply

    return convert


def _await_socket(address: str, timeout_s: float) -> None:
    """Wait until the socket of an ipc address is there: ZeroMQ would try to connect for ever, and say nothing."""
    scheme, _, path = address.partition("://")
    if scheme != "ipc" or path.startswith(("@", "*")):
        return
    ends_at = time.monotonic() + timeout_s
    while not os.path.exists(path):
        if time.monotonic() > ends_at:
            raise RuntimeLost(
                f"no runtime answered at {address} within {timeout_s:g} s: there is no socket {path}", path=path
            )
        time.sleep(LOOK_S)


def _now(future: Future[Any]) -> Any:
    wait(future)
    failure = future.exception()
    if isinstance(failure, BoughError):
        raise failure.again()
    return future.result()


def _keys(server_public: str | None, public: str | None, secret: str | None) -> Keys | None:
    if server_public is None and public is None and secret is None:
        return None
    if server_public is None or public is None or secret is None:
        raise InvalidRequest("CURVE needs server_public_key, public_key and secret_key, all three")
    return Keys(server_public, public, secret)


def _close(link: Link | RecoveringLink, live: set[Branch]) -> None:
    """Stop what still runs for this client, and release its branches."""
    farewell: list[Any] = []
    if live:
        roots = sorted(live)
        if link.is_busy:
            farewell = [protocol.Cancel(next(link.ops), branch=branch) for branch in roots]
        farewell.append(protocol.Release(next(link.ops), roots))
    link.stop(farewell)
