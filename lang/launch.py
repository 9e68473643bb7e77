"""`Runtime`: starts a runtime process, waits until it serves, stops it, and is a backend meanwhile."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn

from bough.backend import Branch, Generation, OnDelta
from bough.client import RuntimeClient
from bough.errors import InvalidRequest
from bough.life import RuntimeLife
from bough.runtime.protocol import ChoiceMethod, Extended, Grammar, Part, SamplingParams, Selected
from bough.spellings import runtime_arguments

if TYPE_CHECKING:
    from bough.recovery import RecoveringLink


class Runtime:
    """A runtime process of this program's own; a backend, and a context manager.

    model: "pocket" (the bundled one), a model folder, or a hub id. dtype: "float32", "bfloat16" or, on a GPU,
    "float16"; device: "cpu" or "cuda"; None lets the runtime choose. mem_fraction: the share of the GPU's memory that
    the runtime may use (0.9 by default); what weights and a step leave of it is the cache.
    kv_dtype: "int8" keeps keys and values as int8 with a scale per token and head, so that about twice as many tokens
    fit (four times with float32), "fp8" likewise on GPUs of compute capability 8.9 and later; the default keeps them
    in dtype. weights: "int8" keeps the linear layers' weights in int8, half of bfloat16's memory; answers may differ a
    little. page_size: tokens per page of the KV cache; max_total_tokens: tokens the cache holds; token_budget: most
    tokens of one step; max_running: most sequences of one step. schedule_policy: "lpm" (longest cached prefix first)
    or "fcfs". radix_cache=False shares nothing between requests. seed: of everything sampled without a seed of its
    own.
    start_timeout: seconds until the runtime must serve.

    exact=True: a token's keys and values have the same bits however they came about, computed with a prompt or while
    generating (slower). Without it, what is sampled may change where two tokens are almost equally likely, when a text
    is computed in another way than before.

    speculate: what repeats earlier text of this program, of its siblings or of the prompt is guessed and verified
    several tokens at a time. Texts and log-probabilities stay the same bits; where little repeats, nothing is guessed.
    None does so where the attention keeps the bits: the native one, or any with exact=True. False never does.

    restart=True: when the process dies or hangs, a new one is started with the same options, the branches in use are
    made again in it from the tokens they had, and what was in flight runs again with the seed it had; programs go on
    and do not notice. Their texts are those of an undisturbed run for sure only with exact=True, without it nearly
    always; a stream whose text comes out different is ended with RuntimeLost. After three restarts within a minute, or
    if a restart fails, everything raises RuntimeLost as it does without. `address` and `pid` change with each restart.

    server_args: SGLang's words for the same: random_seed, max_running_requests, chunked_prefill_size, launch_timeout,
    disable_radix_cache; its other arguments raise InvalidRequest, unless they say what is so anyway (tp_size=1).

    The process ends with `shutdown`, with the `with` block, with this object, or with this process, whatever ends it.

    Raises InvalidRequest for bad values, UnsupportedModel for a model that cannot be loaded, and RuntimeLost if the
    process dies before it serves.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "pocket",
        *,
        model_path: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        kv_dtype: str | None = None,
        weights: str | None = None,
        device: str | None = None,
        page_size: int = 16,
        max_total_tokens: int | None = None,
        mem_fraction: float | None = None,
        token_budget: int | None = None,
        max_running: int | None = None,
        schedule_policy: str = "lpm",
        radix_cache: bool = True,
        seed: int | None = None,
        exact: bool = False,
        speculate: bool | None = None,
        restart: bool = False,
        log_level: str = "warning",
        start_timeout: float = 120.0,
        **server_args: Any,
    ) -> None:
        if server_args:
            named = runtime_arguments(server_args)
            seed, radix_cache = named.get("seed", seed), named.get("radix_cache", radix_cache)
            max_running, token_budget = named.get("max_running", max_running), named.get("token_budget", token_budget)
            start_timeout = named.get("start_timeout", start_timeout)
        if model_path is not None:
            if model != "pocket":
                raise InvalidRequest("model_path is another name of model: give one of them")
            model = model_path
        if not isinstance(restart, bool):
            raise InvalidRequest(f"restart must be True or False, got {restart!r}", field="restart")
        if restart and seed is None:
            seed = int.from_bytes(os.urandom(8), "little") >> 2  # each process must have the same
        options = runtime_options(
            dtype=dtype,
            kv_dtype=kv_dtype,
            weights=weights,
            device=device,
            page_size=page_size,
            max_total_tokens=max_total_tokens,
            mem_fraction=mem_fraction,
            token_budget=token_budget,
            max_running=max_running,
            schedule_policy=schedule_policy,
            radix_cache=radix_cache,
            seed=seed,
            exact=exact,
            speculate=speculate,
            log_level=log_level,
        )
        if not isinstance(start_timeout, (int, float)) or isinstance(start_timeout, bool) or not start_timeout > 0:
            raise InvalidRequest(f"start_timeout must be a positive number of seconds, got {start_timeout!r}")
        begin = functools.partial(RuntimeLife, _model_argument(model), options, float(start_timeout))
        life = begin()
        try:
            life.start()
        except BaseException:
            life.end()
            raise
        self._life = life
        self._recovering: RecoveringLink | None = None
        if restart:
            from bough.recovery import RecoveringLink

            assert seed is not None, "drawn above"
            self._recovering = RecoveringLink(begin, life, seed)
        self._client = RuntimeClient.over(self._recovering or life.link)
        self._finalizer = weakref.finalize(self, _shutdown, self._client, self._recovering or life)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def __reduce__(self) -> NoReturn:
        """Raise TypeError: another process connects by itself."""
        raise TypeError(f"Runtime cannot be pickled: give the other process bo.RuntimeClient({self.address!r})")

    def __repr__(self) -> str:
        return f"<Runtime {self._client.welcome.model} pid {self.pid} at {self.address}>"

    def shutdown(self) -> None:
        """Stop the process and wait for its end; whoever still waits gets RuntimeLost. Idempotent."""
        self._finalizer()

    @property
    def address(self) -> str:
        """Where the runtime listens; other processes of this user can reach it with RuntimeClient(address).

        A restart changes it, and is not noticed by clients of other processes: they get RuntimeLost.
        """
        return self._client.address

    @property
    def pid(self) -> int:
        """The process id of the runtime."""
        return self._life.pid if self._recovering is None else self._recovering.pid

    @property
    def client(self) -> RuntimeClient:
        """The connection to the runtime."""
        return self._client

    @property
    def endpoint(self) -> RuntimeClient:
        """The connection to the runtime, by SGLang's name."""
        return self._client

    # ------------------------------------------------------------------------------------------ backend

    def next_seed(self) -> int | None:
        """Return the next run's seed if this runtime was given one."""
        return self._client.next_seed()

    def open(self) -> Branch:
        """Start an empty branch."""
        return self._client.open()

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        return self._client.fork(branch, count)

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles."""
        return self._client.extend(branch, parts, commit=commit)

    def generate(
        self,
        branch: Branch,
        params: SamplingParams,
        *,
        name: str | None = None,
        on_delta: OnDelta | None = None,
        timeout_s: float | None = None,
        grammar: Grammar | None = None,
        heal: bool = True,
    ) -> Future[Generation]:
        """Sample tokens and append them."""
        return self._client.generate(
            branch, params, name=name, on_delta=on_delta, timeout_s=timeout_s, grammar=grammar, heal=heal
        )

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
        return self._client.select(
            branch, choices, method, name=name, timeout_s=timeout_s, temperature=temperature, seed=seed
        )

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
        return self._client.score(branch, choices, method, name=name, timeout_s=timeout_s)

    def rollback(self, branch: Branch, length: int) -> Future[Extended]:
        """Cut the branch back to its first `length` tokens."""
        return self._client.rollback(branch, length)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants; discard: and free the KV that only they have."""
        return self._client.cancel(branch, discard=discard)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches; never raises."""
        self._client.release(branches)

    def stats(self) -> dict[str, int | float | str]:
        """Return the runtime's counters: tokens cached, computed and generated, pages, branches, steps."""
        values = self._client.stats()
        if self._recovering is not None:
            values["num_restarts"] = self._recovering.num_restarts
        return values

    def flush_cache(self) -> None:
        """Drop every cached prefix that is not in use."""
        self._client.flush_cache()

    def server_info(self) -> dict[str, object]:
        """Return what the runtime said of itself."""
        return self._client.server_info()


def runtime_options(**given: Any) -> list[str]:
    """Return the command-line options of the runtime process. Raises InvalidRequest for values that cannot be."""
    for name in ("page_size", "max_total_tokens", "token_budget", "max_running", "seed"):
        value, least = given[name], 0 if name == "seed" else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise InvalidRequest(f"{name} must be a whole number of at least {least}, got {value!r}", field=name)
    if given["page_size"] is None:
        raise InvalidRequest("page_size must be a whole number of at least 1, got None", field="page_size")
    fraction = given.get("mem_fraction")
    if fraction is not None and (not isinstance(fraction, (int, float)) or not 0 < fraction <= 1):
        raise InvalidRequest(f"mem_fraction must be above 0 and at most 1, got {fraction!r}", field="mem_fraction")
    for name, allowed in _ALLOWED.items():
        if given.get(name) is not None and given[name] not in allowed:
            raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {given[name]!r}", field=name)
    for name in ("radix_cache", "exact", "speculate"):
        if not isinstance(given[name], bool) and (name, given[name]) != ("speculate", None):
            raise InvalidRequest(f"{name} must be True or False, got {given[name]!r}", field=name)
    options = [] if given.pop("radix_cache") else ["--no-radix-cache"]
    options += ["--exact"] if given.pop("exact") else []
    speculate = given.pop("speculate")
    options += [] if speculate is None else ["--speculate" if speculate else "--no-speculate"]
    for name, value in given.items():
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


_ALLOWED = {
    "dtype": ("float32", "bfloat16", "float16"),
    "kv_dtype": ("auto", "int8", "fp8"),
    "weights": ("auto", "int8"),
    "schedule_policy": ("lpm", "fcfs"),
    "log_level": ("debug", "info", "warning", "error"),
}


def _model_argument(model: object) -> str:
    """Return the model as the process needs it: it runs in another folder, so a path must be absolute."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise InvalidRequest(f'model must be "pocket", a folder or a hub id, got {model!r}', field="model")
    name = str(os.fspath(model))
    looks_like_path = isinstance(model, os.PathLike) or name.startswith((".", "/", "~"))
    path = os.path.abspath(os.path.expanduser(name))
    return path if looks_like_path or (name != "pocket" and os.path.isdir(path)) else name


def _shutdown(client: RuntimeClient, life: RuntimeLife | RecoveringLink) -> None:
    client.close()
    life.end()
