"""What a `State` can do to its own past: go back, edit, check and draw again, look ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from bough.check import Feedback, Predicate
    from bough.checkpoint import Checkpoint, CheckpointSpan
    from bough.expressions import Expression
    from bough.state import State


class TimeTravel:
    """The part of a state that is about its past. Each `a...` method waits as its namesake, leaving the loop free."""

    __slots__ = ()

    def checkpoint(self) -> Checkpoint:
        """Return a mark of this point, to `rewind` to; nothing is waited for, also while gens are pending.

        As `with s.checkpoint() as span:` it also tells, for `drop` and `replace`, what was appended inside::

            mark = s.checkpoint()
            s += bo.gen("draft")
            if len(s["draft"]) > 500:
                s.rewind(mark)
                s += "Briefly: " + bo.gen("draft")
        """
        from bough.checkpoint import Checkpoint

        return Checkpoint(cast("State", self))

    def rewind(self, mark: Checkpoint) -> None:
        """Go back to a checkpoint: text, variables, messages, the open role. Nothing before it is computed again.

        What runs of the text that is given up is cancelled in the runtime, unless a fork made since still needs it. A
        mark serves any number of times. Raises InvalidRequest for a mark of another state, or one that lies beyond
        the text because the state was rewound to before it.
        """
        from bough.checkpoint import rewind

        rewind(cast("State", self), mark)

    def replace(self, span: CheckpointSpan, text: str | Expression) -> int:
        """Put text or messages in the place of a span, and keep what follows it; variables stay as they are.

        span: what was appended inside `with s.checkpoint() as span:`, or a pair of checkpoints. Returns how many tokens
        follow the edit point: what the next call computes again. Waits for the gens after the span, whose text is
        kept. Raises InvalidRequest if the span opens or closes a message that the replacement does not::

            with s.checkpoint() as page:
                s += bo.user(long_page)
            s += bo.assistant(bo.gen("summary"))
            s.replace(page, bo.user("(the page)"))
        """
        from bough.checkpoint import edit

        return edit(cast("State", self), span, text)

    def drop(self, span: CheckpointSpan) -> int:
        """Take a span out of the text, and keep what follows it; see `replace`."""
        return self.replace(span, "")

    def check(self, predicate: Predicate, *, retries: int = 3, feedback: Feedback | None = None) -> Any:
        """Draw the last gen again until its value satisfies a predicate; return the value that did.

        A retry goes back to right before the gen, without computing anything again, and draws with the next seed.
        feedback: a function of the failed value that returns what to tell the model. Then the attempts stand, with what
        was said about them, in a branch of their own, and only the one that passes enters this text. What follows the
        gen (the end of its message, text) is appended again. Raises CheckFailed after `retries` retries::

            s += bo.assistant(bo.gen("year", stop="."))
            s.check(lambda year: year.isdigit(), feedback=lambda year: bo.user(f"{year!r} is not a number. Again."))
        """
        from bough.check import check

        return check(cast("State", self), predicate, retries, feedback)

    def peek(self, k: int = 10) -> list[tuple[str, int, float]]:
        """Return the `k` likeliest next tokens as (text, token id, natural-log probability), the likeliest first.

        Nothing is appended and no later draw changes. Exact: of the model's own distribution, before temperature and
        filters, for the text up to here. Waits for it; k is between 1 and 64::

            for text, token_id, logprob in s.peek(3):
                print(f"{math.exp(logprob):6.1%} {text!r}")
        """
        from bough.peek import peek

        return [(text, token_id, logprob) for logprob, token_id, text in peek(cast("State", self), k).top]

    def entropy(self) -> float:
        """Return the entropy of the next token's whole distribution, in nats: how undecided the model is here.

        Nothing is appended; see `peek`. Raises InvalidRequest on a backend that does not tell it::

            if s.entropy() > 3:
                s += bo.assistant("Let me think. " + bo.gen("thoughts"))
        """
        from bough.peek import entropy

        return entropy(cast("State", self))

    async def apeek(self, k: int = 10) -> list[tuple[str, int, float]]:
        """Peek, leaving the event loop free; see `peek`."""
        from bough.onloop import on_loop

        return await on_loop(self.peek, k)

    async def aentropy(self) -> float:
        """Return the entropy, leaving the event loop free; see `entropy`."""
        from bough.onloop import on_loop

        return await on_loop(self.entropy)

    async def areplace(self, span: CheckpointSpan, text: str | Expression) -> int:
        """Replace, leaving the event loop free; see `replace`."""
        from bough.onloop import on_loop

        return await on_loop(self.replace, span, text)

    async def adrop(self, span: CheckpointSpan) -> int:
        """Drop, leaving the event loop free; see `drop`."""
        from bough.onloop import on_loop

        return await on_loop(self.drop, span)

    async def acheck(self, predicate: Predicate, *, retries: int = 3, feedback: Feedback | None = None) -> Any:
        """Check, leaving the event loop free; see `check`."""
        from bough.onloop import on_loop

        return await on_loop(self.check, predicate, retries=retries, feedback=feedback)
