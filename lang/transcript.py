"""What a branch holds when the client keeps it: text and messages, as a list that branches share.

Appending makes a new end; the old one stays valid, so that a fork is a second reference and a rollback an older one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from bough.errors import InvalidRequest

Kind = Literal["root", "text", "begin", "end", "tools"]


@dataclass(frozen=True, slots=True)
class Transcript:
    """The end of a list of parts. `length` counts characters, and 1 for each mark that opens or closes a message."""

    parent: Transcript | None = None
    kind: Kind = "root"
    text: str = ""
    role: str | None = None
    length: int = 0

    def append(self, text: str) -> Transcript:
        """Return the list with text after it."""
        return Transcript(self, "text", text, self.role, self.length + len(text)) if text else self

    def tell(self, tools: str) -> Transcript:
        """Return the list with the definitions of tools. Raises InvalidRequest after the first message."""
        if any(part.kind == "begin" for part in self.parts()):
            raise InvalidRequest("tools are told of before the first message", field="tools")
        return Transcript(self, "tools", tools, None, self.length + 1)

    def begin(self, role: str) -> Transcript:
        """Return the list with a message opened. Raises InvalidRequest inside another."""
        if self.role is not None:
            raise InvalidRequest(f"a message of role {role!r} cannot begin inside the open {self.role} message")
        return Transcript(self, "begin", "", role, self.length + 1)

    def end(self) -> Transcript:
        """Return the list with the message closed. Raises InvalidRequest if none is open."""
        if self.role is None:
            raise InvalidRequest("no message is open, none can be closed")
        return Transcript(self, "end", "", None, self.length + 1)

    def cut(self, length: int) -> Transcript:
        """Return the list as it was when it had this length. Raises InvalidRequest if it never had."""
        if not 0 <= length <= self.length:
            raise InvalidRequest(f"length must be between 0 and {self.length}, got {length}", field="length")
        at = self
        while at.parent is not None and at.parent.length >= length:
            at = at.parent
        if at.length == length or at.parent is None:
            return at
        return at.parent.append(at.text[: length - at.parent.length])

    def parts(self) -> Iterator[Transcript]:
        """Yield the parts from the first on."""
        found = []
        at: Transcript | None = self
        while at is not None and at.kind != "root":
            found.append(at)
            at = at.parent
        return reversed(found)

    def messages(self) -> Conversation:
        """Return the messages."""
        closed: list[dict[str, str]] = []
        role: str | None = None
        inside: list[str] = []
        outside = tools = ""
        for part in self.parts():
            if part.kind == "tools":
                tools = part.text
            elif part.kind == "text" and part.role is None:
                outside += part.text
            elif part.kind == "text":
                inside.append(part.text)
            elif part.kind == "begin":
                role, inside = part.role, []
            else:
                assert role is not None, "a message that ends has begun"
                closed.append({"role": role, "content": "".join(inside)})
        return Conversation(closed, self.role, "".join(inside) if self.role is not None else "", outside, tools)

    def whole(self) -> tuple[str, bool]:
        """Return the text alone, and whether there are messages in it."""
        parts = list(self.parts())
        return "".join(part.text for part in parts), any(part.kind != "text" for part in parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Closed messages, the open one, text that stands in none, and the definitions of tools."""

    closed: list[dict[str, str]]
    role: str | None
    content: str
    outside: str
    tools: str


EMPTY: Final = Transcript()
