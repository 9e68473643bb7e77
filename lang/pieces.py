"""What a state's text is made of: text, the calls whose results are text, and where messages begin and end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from bough.calls import GenCall, SelectCall, result_of
from bough.errors import Cancelled
from bough.runtime.protocol import Extended


class Mark:
    """Where a message begins (with its role) or ends (None); knows its text once the backend has rendered it."""

    __slots__ = ("index", "reply", "role")

    def __init__(self, role: str | None) -> None:
        self.role = role
        self.reply: Future[Extended] | None = None
        self.index = 0

    def sent(self, reply: Future[Extended], index: int) -> None:
        """Remember which reply will hold the rendered text, and where in it."""
        self.reply, self.index = reply, index

    def text(self) -> str:
        """Wait for what the chat template writes here."""
        if self.reply is None:  # readers send what is pending first, unless there is no branch to send it to
            raise Cancelled("this branch was closed before its last messages were sent, nobody has rendered them")
        rendered = result_of(self.reply).rendered
        return rendered[self.index] if self.index < len(rendered) else ""


Item: TypeAlias = str | Mark | GenCall | SelectCall


def text_of(items: Sequence[Item]) -> str:
    """Return the text of pieces, waiting for those that are not known yet."""
    return "".join([item if isinstance(item, str) else item.text() for item in items])


def futures_of(item: Item) -> Sequence[Future[Any]]:
    """Return what has to be done before the piece's text is known."""
    if isinstance(item, str):
        return ()
    if isinstance(item, Mark):
        return () if item.reply is None else (item.reply,)
    return item.futures()


def messages_of(items: Iterator[Item]) -> list[dict[str, str]]:
    """Return the closed messages among the pieces; their content is what was appended inside, exactly."""
    messages: list[dict[str, str]] = []
    role: str | None = None
    inside: list[Item] = []
    for item in items:
        if not isinstance(item, Mark):
            inside.append(item)
            continue
        if item.role is None and role is not None:
            messages.append({"role": role, "content": text_of(inside)})
        role, inside = item.role, []
    return messages
