"""Text appended to a branch that is not tokens yet, so that tokens do not depend on how a program cuts its text.

`"Hel" + "lo"` must give the tokens of `"Hello"`. So appended text waits until no continuation can change its tokens:

    [ ... taken as tokens ... | parts: looked at, no cut in them | fresh: not looked at yet ]
                              ^ the last safe cut
"""

from __future__ import annotations

from bough.runtime.text.tokenizer import Tokenizer


class TextTail:
    """The pending text of one branch.

    Whatever the appends and takes, the ids taken, one after the other, are those of the whole text.
    at_start: nothing precedes the text (SentencePiece tokenizers then put a space before its first word).
    """

    __slots__ = ("_at_start", "_fresh", "_parts", "_ready", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start
        self._ready: list[int] = []
        self._parts: list[str] = []
        self._fresh: list[str] = []

    @property
    def pending(self) -> str:
        """The text whose tokens are not fixed yet."""
        self._parts = ["".join(self._parts)]
        self._fresh = ["".join(self._fresh)]
        return self._parts[0] + self._fresh[0]

    @property
    def num_pending(self) -> int:
        """How many characters have tokens that are not fixed yet."""
        return sum(map(len, self._parts)) + sum(map(len, self._fresh))

    @property
    def least_pending(self) -> int:
        """A number of tokens that `flush` cannot stay below, for a byte-level tokenizer; 0 where none is known.

        Such a token holds so many bytes at most, and NFC leaves at least one byte of four characters.
        """
        return self.num_pending // (4 * self._tokenizer.longest_token) if self._tokenizer.has_boundaries else 0

    @property
    def is_empty(self) -> bool:
        """Whether `flush` would give nothing."""
        return not self._ready and not any(self._parts) and not any(self._fresh)

    def append(self, text: str, *, special: bool = False) -> None:
        """Append text. `special=True` is for what a chat template wrote: control tokens in it are recognised.

        A control token is a hard edge: the text before it is fixed. One that takes the white space beside it (rstrip)
        takes the template's own, never what a program appends next. Raises RequestError("invalid_request") on text
        that is not valid Unicode, when it is tokenised.
        """
        if not special:
            if text:
                self._fresh.append(text)
            return
        for part in self._tokenizer.split_control(text):
            if isinstance(part, str):
                self._fresh.append(part)
            else:
                self._encode_pending()
                self._ready.append(part)
                self._at_start = self._tokenizer.spaces_after_control

    def take_stable(self) -> list[int]:
        """Return, once, the ids of the longest known prefix whose tokens no continuation can change."""
        if self._fresh and self._tokenizer.has_boundaries:
            self._cut()
        return self._take_ready()

    def flush(self) -> list[int]:
        """Return the ids of everything pending; what is appended later starts anew."""
        self._encode_pending()
        return self._take_ready()

    def follow_tokens(self) -> None:
        """Note that tokens were appended to the branch by other means, so that later text continues them."""
        assert self.is_empty, "pending text comes before the tokens: flush it first"
        self._at_start = False

    def copy(self) -> TextTail:
        """Return an independent tail with the same pending text; O(1) in its length when nothing changed since."""
        twin = TextTail(self._tokenizer, at_start=self._at_start)
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        if len(self._fresh) > 1:
            self._fresh = ["".join(self._fresh)]
        twin._ready, twin._parts, twin._fresh = self._ready[:], self._parts[:], self._fresh[:]
        return twin

    def _cut(self) -> None:
        fresh = "".join(self._fresh)
        before = self._parts[-1][-1:] if self._parts else ""
        at = self._tokenizer.last_boundary(before, fresh)
        self._fresh = []
        if at is None:
            self._parts.append(fresh)
            return
        self._encode("".join(self._parts) + fresh[:at])
        self._parts = [fresh[at:]]

    def _encode_pending(self) -> None:
        self._encode("".join(self._parts) + "".join(self._fresh))
        self._parts, self._fresh = [], []

    def _encode(self, text: str) -> None:
        if text:
            self._ready += self._tokenizer.encode(text, at_start=self._at_start)
            self._at_start = False

    def _take_ready(self) -> list[int]:
        taken, self._ready = self._ready, []
        return taken
