"""Looking at the next token's distribution: one token is drawn on a fork of the branch, which is given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bough.calls import result_of
from bough.errors import InvalidRequest
from bough.runtime.protocol import MAX_TOP_LOGPROBS, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from bough.state import State


def peek(state: State, k: int) -> TokenLogprob:
    """Return the likeliest next token with the `k` likeliest. The prefix it computes stays cached for the next gen."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"k must be between 1 and {MAX_TOP_LOGPROBS}, got {k!r}", field="k")
    interpreter = state._interpreter
    interpreter._await_decision()
    with interpreter.lock:
        interpreter._check_open()
        interpreter.flush()
        (fork,) = interpreter.backend.fork(interpreter._branch(), 1)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=k, ignore_eos=True)
    try:
        # Without healing: the tokens of the text as they are, and what comes after them.
        reply = interpreter.backend.generate(fork, params, timeout_s=interpreter._time_left(None), heal=False)
    finally:
        interpreter.backend.release((fork,))
    logprobs = result_of(reply).logprobs
    if not logprobs:
        raise InvalidRequest("this backend does not tell the distribution of the next token")
    return logprobs[0]


def entropy(state: State) -> float:
    """Return the entropy of the next token's distribution, in nats."""
    found = peek(state, 1).entropy
    if found is None:
        raise InvalidRequest("this backend does not tell the entropy of the next token")
    return found
