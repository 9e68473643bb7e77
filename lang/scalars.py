"""The texts of single values: regular expressions that hold exactly what can be read back.

A grammar that lets 2023-02-30 through would only move the error from decoding to reading.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_INT: Final = 10**18 - 1
"""Whole numbers have at most 18 digits: without a bound, a model that likes digits would never end."""
MAX_JSON_FLOAT: Final = 1e15
"""A bound on numbers in JSON, where none is given: a float of any size could also be one that no float can hold."""

INT: Final = r"-?(?:0|[1-9][0-9]{0,17})"
FLOAT: Final = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,17})?(?:[eE][-+]?[0-9]{1,2})?"
BOOL: Final = r"[Tt]rue|[Ff]alse"
DECIMAL: Final = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?"
UUID: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
BASE64: Final = r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
DURATION: Final = r"-?P[0-9]{1,5}DT(?:[01][0-9]|2[0-3])H[0-5][0-9]M[0-5][0-9]S"

_LEAP_YEAR: Final = r"(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[13579][26]|[2468][048])00)"
_DAY_28: Final = r"(?:0[1-9]|1[0-9]|2[0-8])"
DATE: Final = (
    rf"(?:[1-9][0-9]{{3}}-(?:(?:0[1-9]|1[0-2])-{_DAY_28}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    rf"|{_LEAP_YEAR}-02-29)"
)
_CLOCK: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_OFFSET: Final = r"(?:Z|[-+](?:0[0-9]|1[0-3]):[0-5][0-9])"


def clock(tz: bool | None) -> str:
    """Return the pattern of a time of day: with an offset from UTC (True), without (False), or either (None)."""
    return _CLOCK + {True: _OFFSET, False: "", None: f"{_OFFSET}?"}[tz]


def moment(tz: bool | None) -> str:
    """Return the pattern of a date and time: with an offset from UTC (True), without (False), or either (None)."""
    return f"{DATE}T{clock(tz)}"


def _bool(text: str) -> bool:
    return text.lower() == "true"


def _from_text(kind: type[Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        import msgspec

        return msgspec.convert(text, kind)

    return read


BARE: Final[Mapping[type[Any], tuple[str, str, Callable[[str], Any]]]] = {
    int: (INT, "-.,0-9", int),
    float: (FLOAT, "-+.,eE0-9", float),
    bool: (BOOL, "", _bool),
    datetime.date: (DATE, "", _from_text(datetime.date)),
    datetime.time: (clock(None), "-+:.Z0-9", _from_text(datetime.time)),
    datetime.datetime: (moment(None), "-+:.TZ0-9", _from_text(datetime.datetime)),
    datetime.timedelta: (DURATION, "", _from_text(datetime.timedelta)),
    decimal.Decimal: (DECIMAL, "-.,0-9", decimal.Decimal),
    uuid.UUID: (UUID, "", uuid.UUID),
}
"""The types whose values are written without quotes.

The pattern; if a text of it could go on, the characters (as in a character class) that cannot end it; and what reads a
text. A whole number does not end at a point or a comma: 4.2 must not become 4, nor 1,000 become 1.
"""
