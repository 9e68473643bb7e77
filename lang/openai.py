"""`OpenAI`: the backend that reaches a server over HTTP with OpenAI's protocol: theirs, or any other that speaks it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from random import Random
from typing import Any, Final

import msgspec

from bough.backend import Branch, Generation, OnDelta
from bough.capabilities import Capabilities, extensions_of, require
from bough.errors import BoughError, InvalidRequest, Timeout, UnsupportedByBackend
from bough.local_branches import Branches, Outcome
from bough.openai_answer import Answer
from bough.openai_protocol import (
    chat_request,
    completion_request,
    echo_request,
    echoed,
    error_of,
    generation_of,
    prompt_of,
    usage_of,
)
from bough.runtime import protocol
from bough.runtime.protocol import (
    ChoiceMethod,
    Extended,
    Grammar,
    Part,
    SamplingParams,
    Selected,
    TokenLogprob,
    scoring,
)
from bough.transcript import Transcript

MAX_TOKENS_FIELDS: Final = ("max_tokens", "max_completion_tokens")


class OpenAI:
    """A server that speaks OpenAI's protocol, to be used as a backend; a context manager.

    ::

        with bo.OpenAI("gpt-4o-mini") as backend:                                  # OPENAI_API_KEY
            answer.run("What is 17 + 25?", backend=backend)
        local = bo.OpenAI("my-model", base_url="http://localhost:8000/v1", api_key="-", is_chat_model=False)

    Needs the `openai` package (`pip install 'bough[openai]'`). base_url, api_key: as in that package, also from
    OPENAI_BASE_URL and OPENAI_API_KEY. is_chat_model: True sends messages, False plain text. timeout: seconds for one
    request. max_retries: of a request that was refused for load, failed inside the server or did not reach it, after
    the time the server's Retry-After says; a stream that has begun is not tried again. max_concurrency: most requests
    at once. max_tokens_field: "max_completion_tokens" for models that want it. extensions: what the server takes beyond
    the protocol, by our names, or a mapping from them to the server's: `bough.capabilities.EXTENSIONS`. stream_usage:
    whether the server counts tokens in streams (`stream_options`). sends_seed: False for servers that refuse `seed`;
    what is sampled then differs from run to run. options: anything else that `openai.AsyncOpenAI` takes.

    Branches are texts and messages kept here: a fork copies nothing, but each request carries its whole text. What
    the server cannot do raises UnsupportedByBackend, where it is read: `capabilities` says what that is. `s.text()`
    writes roles in the manner of ChatML; only the server knows its template. One thread, however many programs run.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        is_chat_model: bool = True,
        timeout: float = 600.0,
        max_retries: int = 3,
        max_concurrency: int = 64,
        max_tokens_field: str = "max_tokens",
        extensions: Sequence[str] | Mapping[str, str] = (),
        stream_usage: bool = True,
        sends_seed: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise InvalidRequest(f"model must be the name of a model, got {model!r}", field="model")
        if not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise InvalidRequest(
                f"max_concurrency must be at least 1, got {max_concurrency!r}", field="max_concurrency"
            )
        if max_tokens_field not in MAX_TOKENS_FIELDS:
            known = ", ".join(MAX_TOKENS_FIELDS)
            raise InvalidRequest(f"max_tokens_field must be one of {known}, got {max_tokens_field!r}")
        self.model = model
        self.capabilities = Capabilities(
            roles=is_chat_model,
            plain_text=not is_chat_model,
            select=not is_chat_model,
            json_schema=is_chat_model,
            tools=is_chat_model,
            extensions=extensions_of(extensions),
        )
        given = {"base_url": base_url, "api_key": api_key, "timeout": timeout, "max_retries": max_retries, **options}
        self._client = _client(given)
        self._base_url = str(self._client.base_url)
        self._is_chat_model = is_chat_model
        self._max_tokens_field = max_tokens_field
        self._stream_usage = stream_usage
        self._sends_seed = sends_seed
        self._slots = asyncio.Semaphore(max_concurrency)
        self._totals = dict.fromkeys(("prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens"), 0)
        self._num_requests = 0
        self._branches = Branches("bough-openai")
        self._finalizer = weakref.finalize(self, self._branches.close, self._client.close)

    def __enter__(self) -> OpenAI:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OpenAI {self.model} at {self._base_url}>"

    def close(self) -> None:
        """End what runs, with RuntimeLost, and close the connections. Idempotent."""
        self._finalizer()

    # ------------------------------------------------------------------------------------------ branches

    def open(self) -> Branch:
        """Start an empty branch."""
        return self._branches.open()

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """Start `count` branches that share all that `branch` holds."""
        return self._branches.fork(branch, count)

    def cancel(self, branch: Branch, *, discard: bool = False) -> Future[int]:
        """End every operation of the branch and of its descendants; their connections are closed."""
        return self._branches.cancel(branch)

    def release(self, branches: Sequence[Branch]) -> None:
        """Forget branches; never raises."""
        self._branches.release(branches)

    def rollback(self, branch: Branch, length: int) -> Future[Extended]:
        """Cut the branch back to a length that an operation on it has returned: here in characters and marks."""

        def act(holds: Transcript) -> Outcome:
            cut = holds.cut(length)
            return cut, Extended(0, cut.length)

        return self._branches.submit(branch, act, heals=True)

    def extend(self, branch: Branch, parts: Sequence[Part], *, commit: bool = False) -> Future[Extended]:
        """Append text and roles; nothing is sent before a generate."""
        return self._branches.submit(branch, lambda holds: _extended(holds, parts, self.capabilities))

    # ------------------------------------------------------------------------------------------ operations

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
        """Continue the text, or the open assistant message. `heal` has no meaning for a text that the server splits."""

        async def work(holds: Transcript, queue_ms: float) -> Outcome:
            return await self._generate(holds, params, on_delta, grammar, queue_ms)

        return self._branches.submit(branch, self._within(timeout_s, work))

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
        """Score the choices and append the best; only completion models whose server echoes log-probabilities can.

        At a temperature the choice is drawn here, by `seed`.
        """

        async def work(holds: Transcript, queue_ms: float) -> Outcome:
            selected = await self._score(holds, choices, method, queue_ms)
            if temperature:
                given = [[token.logprob for token in row] for row in selected.logprobs]
                shares = scoring.distribution(given, temperature)
                index = scoring.draw(shares, Random(seed).random())
                length = holds.length + len(choices[index])
                selected = msgspec.structs.replace(selected, distribution=shares, index=index, length=length)
            taken = holds.append(choices[selected.index])
            return taken, selected

        return self._branches.submit(branch, self._within(timeout_s, work))

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

        async def work(holds: Transcript, queue_ms: float) -> Outcome:
            return holds, await self._score(holds, choices, method, queue_ms)

        return self._branches.submit(branch, self._within(timeout_s, work))

    # ------------------------------------------------------------------------------------------ counters

    def stats(self) -> dict[str, int | float | str]:
        """Return the tokens the server counted, and how many requests and branches there are."""
        return {**self._totals, "num_requests": self._num_requests, "num_branches": len(self._branches)}

    def flush_cache(self) -> None:
        """Raise UnsupportedByBackend: the protocol has no word for it."""
        require(False, "flush_cache", "drop the server's cache")

    def server_info(self) -> dict[str, object]:
        """Return the model's name, the address, and what was declared of the server."""
        can = self.capabilities
        info: dict[str, object] = {"model": self.model, "address": self._base_url, "capabilities": can}
        return {**info, "has_tools": can.tools, "has_grammars": "lark" in can.extensions}

    # ------------------------------------------------------------------------------------------ on the loop

    def _within(
        self, timeout_s: float | None, work: Callable[[Transcript, float], Awaitable[Outcome]]
    ) -> Callable[[Transcript], Awaitable[Outcome]]:
        """Return the work with its deadline, counted from now, and a place among the requests."""
        asked = time.monotonic()

        async def in_turn(holds: Transcript) -> Outcome:
            async with self._slots:
                self._num_requests += 1
                return await work(holds, (time.monotonic() - asked) * 1000)

        async def act(holds: Transcript) -> Outcome:
            left = None if timeout_s is None else timeout_s - (time.monotonic() - asked)
            try:
                return await asyncio.wait_for(in_turn(holds), left)
            except BoughError:  # the server's own deadline is a TimeoutError too
                raise
            except asyncio.TimeoutError:
                raise Timeout(f"the operation took longer than its {timeout_s} s", timeout_s=timeout_s) from None

        return act

    async def _generate(
        self,
        holds: Transcript,
        params: SamplingParams,
        on_delta: OnDelta | None,
        grammar: Grammar | None,
        queue_ms: float,
    ) -> Outcome:
        if self._is_chat_model:
            request = chat_request(self.model, holds, params, grammar, self.capabilities, self._max_tokens_field)
            create = self._client.chat.completions.create
        else:
            request = completion_request(self.model, holds, params, grammar, self.capabilities)
            create = self._client.completions.create
        if not self._sends_seed:
            request.pop("seed", None)
        answer = Answer(self._is_chat_model, params.logprobs is not None, on_delta)
        try:
            if on_delta is None:
                answer.whole(await create(**request))
            else:
                options = {"stream_options": {"include_usage": True}} if self._stream_usage else {}
                async with await create(**request, **options, stream=True) as stream:
                    async for chunk in stream:
                        answer.add(chunk)
            answer.end()
        except Exception as raised:
            raise error_of(raised, self._base_url, answer.text) from raised
        usage = usage_of(answer.usage, queue_ms, queue_ms + answer.ttft_ms, queue_ms + answer.elapsed_ms())
        self._count(usage)
        text = holds.append(answer.text)
        logprobs = answer.logprobs if params.logprobs is not None else None
        return text, generation_of(answer.text, answer.reason, answer.choice, usage, text.length, logprobs, grammar)

    async def _score(self, holds: Transcript, texts: Sequence[str], method: ChoiceMethod, queue_ms: float) -> Selected:
        require(self.capabilities.select, "select", "score given choices: a chat model's protocol cannot")
        require(method != "pmi", "pmi", "score choices after a neutral token alone")
        prompt, begun = prompt_of(holds), time.monotonic()
        answer = await self._echo([prompt + text for text in texts])
        rows = echoed(answer.choices, prompt, texts)
        given = [[token.logprob for token in row] for row in rows]
        alone = await self._alone(rows, texts) if method == "unconditional_likelihood_normalized" else None
        scores = scoring.score_choices(method, given, alone, [len(text.encode()) for text in texts])
        index = scoring.best(scores)
        elapsed_ms = (time.monotonic() - begun) * 1000
        usage = usage_of(answer.usage, queue_ms, queue_ms + elapsed_ms, queue_ms + elapsed_ms)
        self._count(usage)
        length = holds.length + len(texts[index])
        return Selected(0, index, scores, scoring.distribution(given), rows, length, usage, alone)

    async def _alone(self, rows: Sequence[Sequence[TokenLogprob]], texts: Sequence[str]) -> list[list[float]]:
        """Return the log-probabilities of the choices without the prompt."""
        answer = await self._echo(list(texts))
        alone = echoed(answer.choices, "", texts)
        same = all(
            [token.text for token in with_prompt] == [token.text for token in without]
            for with_prompt, without in zip(rows, alone, strict=True)
        )
        require(same, "unconditional_likelihood_normalized", "score a choice alone as the tokens it has in the prompt")
        return [[0.0 if index == 0 else token.logprob for index, token in enumerate(row)] for row in alone]

    async def _echo(self, prompts: Sequence[str]) -> Any:
        try:
            return await self._client.completions.create(**echo_request(self.model, prompts))
        except Exception as raised:
            error = error_of(raised, self._base_url)
            if isinstance(error, InvalidRequest):  # a server that knows no echo, or none with log-probabilities
                raise UnsupportedByBackend(
                    f"this backend cannot score given choices (capability 'select'): {error}", capability="select"
                ) from raised
            raise error from raised

    def _count(self, usage: protocol.Usage) -> None:
        self._totals["prompt_tokens"] += usage.prompt_tokens
        self._totals["cached_tokens"] += usage.cached_tokens
        self._totals["computed_tokens"] += usage.computed_tokens
        self._totals["generated_tokens"] += usage.completion_tokens


def _extended(holds: Transcript, parts: Sequence[Part], can: Capabilities) -> Outcome:
    rendered: list[str] = []
    for part in parts:
        if isinstance(part, protocol.Text):
            holds = holds.append(part.text)
        elif isinstance(part, protocol.RoleBegin):
            holds = holds.begin(part.role)
            rendered.append(f"<|im_start|>{part.role}\n")
        elif isinstance(part, protocol.Tools):
            require(can.tools, "tools", "tell a completion model of tools but in plain words (format='text')")
            holds = holds.tell(part.definitions)
        elif isinstance(part, protocol.RoleEnd):
            holds = holds.end()
            rendered.append("<|im_end|>\n")
        else:
            require(False, "tokens", "take token ids: the protocol has only text")
    return holds, Extended(0, holds.length, rendered)


def _client(given: Mapping[str, Any]) -> Any:
    """Return the package's client. Raises InvalidRequest if the package is not installed or refuses the arguments."""
    try:
        import openai
    except ImportError as error:
        raise InvalidRequest("bough.OpenAI needs the openai package: pip install 'bough[openai]'") from error
    try:
        return openai.AsyncOpenAI(**given)
    except openai.OpenAIError as error:
        raise InvalidRequest(f"the openai package refuses this: {error}") from error
