"""OpenAI's protocol as pure functions: what is sent for an operation, and what an answer or a failure means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from bough.backend import Generation
from bough.capabilities import Capabilities, require
from bough.errors import (
    BackendError,
    BoughError,
    ContextOverflow,
    InvalidRequest,
    Overloaded,
    ResourceExhausted,
    RuntimeLost,
    Timeout,
    UnsupportedByBackend,
    UnsupportedModel,
    of,
)
from bough.runtime.protocol import Grammar, SamplingParams, TokenLogprob, Usage
from bough.tool_formats import template_calls
from bough.transcript import Transcript
from bough.typed import ending_itself

NO_TOKEN_ID: Final = -1
"""The protocol tells the text of a token, not its id."""

# ----------------------------------------------------------------------------------------------- what is sent


def chat_request(
    model: str,
    transcript: Transcript,
    params: SamplingParams,
    grammar: Grammar | None,
    can: Capabilities,
    max_tokens_field: str,
) -> dict[str, Any]:
    """Return the arguments of a chat completion that continues the open assistant message.

    Raises UnsupportedByBackend for what the protocol cannot say: text outside messages, a generation outside an
    assistant message, or after text in it where the server does not continue messages.
    """
    conversation = transcript.messages()
    require(not conversation.outside.strip(), "plain_text", "take text outside messages: it is a chat model")
    require(conversation.role is not None, "plain_text", "generate outside a message: it is a chat model")
    require(conversation.role == "assistant", "roles", f"generate in a {conversation.role} message")
    messages, extra = _with_calls(conversation.closed), {}
    if conversation.content:
        require(
            "continue_final_message" in can.extensions,
            "continue_final_message",
            "go on with a message that has text already: let the gen follow the beginning of the message",
        )
        messages.append({"role": "assistant", "content": conversation.content})
        extra = {can.extensions["continue_final_message"]: True, "add_generation_prompt": False}
    params, grammar = _fitted(params, grammar, can)
    request = {"model": model, "messages": messages, **_sampling(params, can, max_tokens_field)}
    if conversation.tools:
        request["tools"] = json.loads(conversation.tools)
    if params.logprobs is not None:
        request |= {"logprobs": True} | ({"top_logprobs": params.logprobs} if params.logprobs else {})
    return _constrained(request, grammar, can, {**request.pop("extra_body", {}), **extra})


def _with_calls(closed: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the messages with calls, and the results that answer them in order, as the protocol has them.

    Raises UnsupportedByBackend for a result that answers no call.
    """
    messages: list[dict[str, Any]] = []
    unanswered: list[str] = []
    for number, message in enumerate(closed):
        role, content = message["role"], message["content"]
        if role == "tool":
            require(bool(unanswered), "roles", "write a message of the role 'tool' that answers no call")
            messages.append({"role": role, "content": content, "tool_call_id": unanswered.pop(0)})
            continue
        words, tag, _ = content.partition("<tool_call>")
        calls = template_calls(content) if tag and role == "assistant" else []
        if not calls:
            messages.append(dict(message))
            continue
        ids = [call.id or f"call_{number}_{index}" for index, call in enumerate(calls)]
        unanswered = list(ids)
        functions = [{"name": call.name, "arguments": _as_json(call.arguments)} for call in calls]
        made = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, functions, strict=True)]
        messages.append({"role": role, "content": words or None, "tool_calls": made})
    return messages


def _as_json(arguments: Mapping[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def calls_text(calls: Iterable[Mapping[str, str]]) -> str:
    """Return calls (id, name, arguments as JSON text) as the text that `tool_formats` reads."""
    lines = []
    for call in calls:
        try:
            arguments: object = json.loads(call["arguments"] or "{}")
        except ValueError:  # the model's mistake: the tool will tell it
            arguments = call["arguments"]
        said = {"name": call["name"], "arguments": arguments, "id": call["id"]}
        lines.append(f"<tool_call>{json.dumps(said, ensure_ascii=False)}</tool_call>")
    return "".join(lines)


def completion_request(
    model: str, transcript: Transcript, params: SamplingParams, grammar: Grammar | None, can: Capabilities
) -> dict[str, Any]:
    """Return the arguments of a completion of the text. Raises UnsupportedByBackend for messages."""
    prompt = prompt_of(transcript)
    params, grammar = _fitted(params, grammar, can)
    request = {"model": model, "prompt": prompt, **_sampling(params, can, "max_tokens")}
    if params.logprobs is not None:
        request["logprobs"] = params.logprobs
    return _constrained(request, grammar, can, request.pop("extra_body", {}))


def echo_request(model: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a completion that only scores texts."""
    return {"model": model, "prompt": list(prompts), "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}


def prompt_of(transcript: Transcript) -> str:
    """Return the text for a completion. Raises UnsupportedByBackend for messages: their template is not known here."""
    text, has_messages = transcript.whole()
    require(not has_messages, "roles", "write messages: a completion model takes plain text (or is_chat_model=True)")
    return text


def _fitted(
    params: SamplingParams, grammar: Grammar | None, can: Capabilities
) -> tuple[SamplingParams, Grammar | None]:
    """Return both in the words that the server knows. Raises UnsupportedByBackend if it has none for the grammar."""
    can.check_grammar(grammar)
    if grammar is None or "stop_regex" in can.extensions:
        return params, grammar
    grammar, stop_regex = ending_itself(grammar, params.stop_regex)
    return msgspec.structs.replace(params, stop_regex=stop_regex), grammar


def _sampling(params: SamplingParams, can: Capabilities, max_tokens_field: str) -> dict[str, Any]:
    can.check_sampling(params)
    fields: dict[str, Any] = {
        max_tokens_field: params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
    }  # fmt: skip
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(params, name):
            fields[name] = getattr(params, name)
    if params.seed is not None:
        fields["seed"] = params.seed
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    defaults = SamplingParams()
    more = {
        theirs: getattr(params, name)
        for name, theirs in can.extensions.items()
        if hasattr(defaults, name) and getattr(params, name) != getattr(defaults, name)
    }
    return {**fields, "extra_body": more} if more else fields


def _constrained(
    request: dict[str, Any], grammar: Grammar | None, can: Capabilities, extra: Mapping[str, Any]
) -> dict[str, Any]:
    more = dict(extra)
    if grammar is not None and grammar.kind in can.extensions:
        more[can.extensions[grammar.kind]] = json.loads(grammar.source) if grammar.kind == "choices" else grammar.source
    elif grammar is not None:
        schema = {"name": "value", "schema": json.loads(grammar.source), "strict": True}
        request = {**request, "response_format": {"type": "json_schema", "json_schema": schema}}
    return {**request, "extra_body": more} if more else request


# ----------------------------------------------------------------------------------------------- what came back


def generation_of(
    text: str,
    reason: str | None,
    choice: Any,
    usage: Usage,
    length: int,
    logprobs: list[TokenLogprob] | None,
    grammar: Grammar | None,
) -> Generation:
    """Return the end of a generate. Raises BackendError if the server ended it for a reason of its own."""
    reason = "stop" if reason == "tool_calls" else reason
    if reason not in ("stop", "length"):
        said = "the stream ended before the server was done" if reason is None else f"the server ended it: {reason}"
        raise BackendError(said, partial_text=text, finish_reason=reason)
    stop = _extra(choice, "stop_reason") or _extra(choice, "matched_stop")
    matched = stop if isinstance(stop, (str, int)) and not isinstance(stop, bool) else None
    is_whole = grammar is None or reason == "stop"
    return Generation(text, (), "stop" if reason == "stop" else "length", matched, length, usage, logprobs, is_whole)


def _extra(choice: Any, name: str) -> Any:
    return (getattr(choice, "model_extra", None) or {}).get(name)


def chat_logprobs(found: Any) -> list[TokenLogprob]:
    """Return a chat completion's log-probabilities; ids are NO_TOKEN_ID."""
    tokens = [] if found is None else found.content or []
    return [
        TokenLogprob(
            token.logprob,
            NO_TOKEN_ID,
            token.token,
            [(other.logprob, NO_TOKEN_ID, other.token) for other in token.top_logprobs or []],
        )
        for token in tokens
    ]


def completion_logprobs(found: Any, begin: int = 0) -> list[TokenLogprob]:
    """Return a completion's log-probabilities, of the tokens from `begin` on; ids are NO_TOKEN_ID."""
    if found is None:
        return []
    tops = found.top_logprobs or [None] * len(found.tokens)
    rows = list(zip(found.tokens, found.token_logprobs, tops, strict=True))[begin:]
    return [
        TokenLogprob(
            0.0 if logprob is None else logprob,
            NO_TOKEN_ID,
            token,
            sorted(((value, NO_TOKEN_ID, text) for text, value in (top or {}).items()), reverse=True),
        )
        for token, logprob, top in rows
    ]


def echoed(choices: Sequence[Any], prompt: str, texts: Sequence[str]) -> list[list[TokenLogprob]]:
    """Return the tokens of each scored text that are not the prompt's alone.

    Raises UnsupportedByBackend if the server does not score what it is given.
    """
    rows = []
    for choice, text in zip(sorted(choices, key=lambda choice: choice.index), texts, strict=True):
        found = choice.logprobs
        tokens = [] if found is None or found.tokens is None else found.tokens
        whole = "".join(tokens)
        require(
            bool(tokens) and whole.startswith(prompt + text) and (len(found.token_logprobs or ()) == len(tokens)),
            "select",
            "score given choices: the server does not return the log-probabilities of a prompt (echo)",
        )
        # A token that straddles the end of the prompt belongs to the choice.
        ends, position = [], 0
        for token in tokens:
            position += len(token)
            ends.append(position)
        first = next(index for index, end in enumerate(ends) if end > len(prompt))
        last = next(index for index, end in enumerate(ends) if end >= len(prompt) + len(text))
        rows.append(completion_logprobs(found, first)[: last - first + 1])
    return rows


def usage_of(given: Any, queue_ms: float, ttft_ms: float, latency_ms: float) -> Usage:
    """Return what an operation cost, from the server's count (zeros if it gave none) and times taken here."""
    if given is None:
        return Usage(queue_ms=queue_ms, ttft_ms=ttft_ms, latency_ms=latency_ms)
    details = getattr(given, "prompt_tokens_details", None)
    cached = (getattr(details, "cached_tokens", None) or 0) if details is not None else 0
    prompt = given.prompt_tokens or 0
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=min(cached, prompt),
        computed_tokens=max(prompt - cached, 0),
        completion_tokens=given.completion_tokens or 0,
        queue_ms=queue_ms,
        ttft_ms=ttft_ms,
        latency_ms=latency_ms,
    )


# ----------------------------------------------------------------------------------------------- what went wrong

_BY_STATUS: Final[Mapping[int, type[BoughError]]] = {
    404: UnsupportedModel,
    408: Timeout,
    429: Overloaded,
    501: UnsupportedByBackend,
    503: Overloaded,
    504: Timeout,
    529: Overloaded,
}
_BY_CODE: Final[Mapping[str, type[BoughError]]] = {
    "context_length_exceeded": ContextOverflow,
    "insufficient_quota": ResourceExhausted,
    "model_not_found": UnsupportedModel,
}


def error_of(raised: BaseException, base_url: str, partial_text: str = "") -> BoughError:
    """Return a failure of the `openai` package, or of its connection, as one of bough's errors, chained to it."""
    import openai

    if isinstance(raised, BoughError):
        return raised
    details: dict[str, object] = {"partial_text": partial_text} if partial_text else {}
    if isinstance(raised, openai.APITimeoutError):
        error: BoughError = Timeout(f"{base_url} did not answer in time", **details)
    elif isinstance(raised, openai.APIStatusError):
        error = _of_status(raised, details)
    elif isinstance(raised, openai.APIConnectionError):
        error = RuntimeLost(f"{base_url} cannot be reached: {raised.__cause__ or raised}", **details)
    elif isinstance(raised, openai.APIError):  # an error event inside a stream
        error = BackendError(f"the server failed: {raised.message}", **details)
    elif type(raised).__module__.startswith(("httpx", "httpcore")):
        error = RuntimeLost(f"the connection to {base_url} broke: {type(raised).__name__}: {raised}", **details)
    else:
        error = of(raised)
    error.__cause__ = raised if error is not raised else error.__cause__
    return error


def _of_status(raised: Any, details: Mapping[str, object]) -> BoughError:
    status, code, message = raised.status_code, raised.code, raised.message
    kind = _BY_CODE.get(code or "") or _BY_STATUS.get(status)
    if kind is None:
        kind = InvalidRequest if 400 <= status < 500 else BackendError
    if kind is InvalidRequest and "context length" in message.lower():  # servers other than OpenAI's give no code
        kind = ContextOverflow
    after = raised.response.headers.get("retry-after")
    more = {"retry_after": after} if after is not None else {}
    return kind(f"HTTP {status}: {message}", status=status, code=code, **more, **details)
