"""Where a text may be cut so that the tokens before the cut do not depend on what follows it.

A byte-level BPE first splits the text by a pattern and then encodes each piece alone. A cut is safe where every
pattern of the family puts a piece's edge whatever stands to the left and right. Two such places, found by local
inspection, because Python's `re`, `regex`, Rust and Oniguruma disagree on the classes of recently assigned characters
(17,144 code points between `regex` 2026.11 and the encoders for \\p{L} alone):

    x|" "   before a space that follows a character which is no white space: no alternative takes white space after
            something else, except newlines after punctuation
    l|p     before punctuation that follows a letter, apostrophes left out (contractions)

Both also survive NFC: neither a space nor punctuation ever joins the character before it.
"""

from __future__ import annotations

import unicodedata
from typing import Final

# Alternatives of which the two rules above hold. A pattern made of these and nothing else is understood.
_CONTRACTIONS: Final = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS_BY_CASE: Final = tuple(
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}{suffix}"
    for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    for suffix in ("", f"(?i:{_CONTRACTIONS})?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
)
_UNDERSTOOD: Final = frozenset(
    (
        *_CONTRACTIONS.split("|"),
        f"(?i:{_CONTRACTIONS})",
        "'(?:[sdmt]|ll|ve|re)",
        "'(?i:[sdmt]|ll|ve|re)",
        r" ?\p{L}+",
        r" ?\p{N}+",
        r" ?\p{L}++",
        r" ?\p{N}++",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        *_WORDS_BY_CASE,
        r"\p{N}",
        r"\p{N}{1,3}",
        r"\p{N}{1,3}+",
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]++",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r"\s++$",
        r"\s+(?!\S)",
        r"\s+",
        r"\s",
    )
)
_APOSTROPHES: Final = "'\u2019"


def is_understood(pattern: str) -> bool:
    """Return whether `last_boundary` holds for texts split by this pattern."""
    return all(alternative in _UNDERSTOOD for alternative in _alternatives(pattern))


def last_boundary(before: str, text: str) -> int | None:
    """Return the largest index of `text` at which `before + text` may be cut, None if there is none.

    before: the character that precedes `text`, or "" at the start; index 0 is the cut between the two.
    """
    at = text.rfind(" ")
    while at >= 0:
        left = text[at - 1] if at else before
        if left and _is_visible(left):
            return at
        at = text.rfind(" ", 0, at)
    for index in range(len(text) - 1, -1, -1):  # scripts without spaces; each character is looked at once
        left = text[index - 1] if index else before
        if left and _is_punctuation(text[index]) and _is_letter(left):
            return index
    return None


def _is_visible(char: str) -> bool:
    # Letters, marks, numbers, punctuation and symbols have never been white space in any version of Unicode.
    return "!" <= char <= "~" or unicodedata.category(char)[0] in "LMNPS"


def _is_letter(char: str) -> bool:
    return _is_settled(char, "L")


def _is_punctuation(char: str) -> bool:
    return char not in _APOSTROPHES and _is_settled(char, "P")


def _is_settled(char: str, kind: str) -> bool:
    # The same class in Unicode 3.2 and in today's Python: then the encoders' tables agree as well.
    return unicodedata.category(char)[0] == kind and unicodedata.ucd_3_2_0.category(char)[0] == kind


def _alternatives(pattern: str) -> list[str]:
    """Split a pattern at the bars that stand outside all groups and classes."""
    found, start, depth, in_class, index = [], 0, 0, False, 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\\":
            index += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            found.append(pattern[start:index])
            start = index + 1
        index += 1
    return [*found, pattern[start:]]
