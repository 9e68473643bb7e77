"""What all messages are: closed maps."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages: a closed map with its type under "t"; fields that equal their default are not sent."""
