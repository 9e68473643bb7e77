"""A model folder's tokenizer: text to token ids and back, with control tokens only where they are asked for.

Ordinary text never becomes a control token: `encode("<|im_end|>")` spells it out, so a program's input cannot forge the
end of a message. `special=True` is for what the chat template wrote. Ids to bytes is a table: a token's bytes do not
depend on its neighbours, with one exception, the space that SentencePiece tokenizers put before a text's first word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bough.runtime.protocol import RequestError
from bough.runtime.text.boundaries import last_boundary
from bough.runtime.text.engines import (
    Engine,
    build_engine,
    byte_alphabet,
    check_unicode,
    cuts_are_known,
    full_tokenizer,
)
from bough.runtime.text.folder import TokenizerFiles, read_folder, refuse

# Unicode's white space, which lstrip and rstrip of an added token take; str.strip() also takes \x1c to \x1f.
_WHITE_SPACE: Final = " \t\n\x0b\x0c\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes and decodes for one model. Immutable once loaded; made by `load_tokenizer`.

    vocab_size: the largest id plus one, added tokens included. longest_token: most bytes of one. bos_id: None if the
    model has no such token. adds_bos: whether Hugging Face tokenisation of raw text starts with it. eos_ids: every id
    that ends generation, by the tokenizer, generation_config.json and config.json, in that order. special_ids: tokens
    left out of shown text.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        full = full_tokenizer(files)
        self._engine: Engine = build_engine(files)
        self._control: dict[str, int] = {token.content: token.id for token in files.added if token.control}
        self._strips: dict[str, tuple[bool, bool]] = {t.content: (t.lstrip, t.rstrip) for t in files.added if t.control}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._unknown_id = files.id_of(files.named.get("unk_token", ""))
        self._control_ids = frozenset(self._control.values()) - {self._unknown_id}
        self._table = _token_bytes(files)
        self._first_space_is_dropped = _drops_first_space(files.spec.get("decoder"))
        self._cuts_are_known = cuts_are_known(files)

        self.vocab_size: int = len(self._table)
        self.longest_token: int = max(map(len, self._table))
        self.bos_id: int | None = files.id_of(files.named["bos_token"]) if "bos_token" in files.named else None
        self.adds_bos: bool = self.bos_id is not None and _adds(full, files, self.bos_id)
        self.eos_ids: tuple[int, ...] = files.eos_ids
        self.special_ids: frozenset[int] = frozenset(token.id for token in files.added if token.special)
        self.spaces_after_control: bool = self._puts_space_after_control(full)

    @property
    def engine(self) -> str:
        """The library that encodes: "tiktoken" or "tokenizers"."""
        return self._engine.name

    def encode(self, text: str, *, special: bool = False, at_start: bool = True) -> list[int]:
        """Return the token ids of `text`.

        special: control tokens in the text (<|im_end|>, <think> ...) are recognised; without it they are spelt out.
        at_start: False for text that continues other tokens: no space is put before its first word (SentencePiece
        tokenizers do that at the start of a text; for byte-level ones it changes nothing).
        Raises RequestError("invalid_request") on a lone surrogate.
        """
        if not special:
            return self._encode_plain(text, at_start)
        ids: list[int] = []
        for part in self.split_control(text):
            if isinstance(part, int):
                ids.append(part)
                at_start = self.spaces_after_control
            else:
                ids += self._encode_plain(part, at_start)
                at_start = False
        return ids

    def split_control(self, text: str) -> list[str | int]:
        """Return the text as runs of ordinary text and ids of the control tokens between them, in order."""
        parts: list[str | int] = []
        start = 0
        for match in self._control_pattern.finditer(text) if self._control_pattern else ():
            left, right = self._strips[match.group()]
            between = text[start : match.start()]
            between = between.rstrip(_WHITE_SPACE) if left else between
            if between:
                parts.append(between)
            parts.append(self._control[match.group()])
            start = match.end()
            if right:
                start += len(text) - start - len(text[start:].lstrip(_WHITE_SPACE))
        if start < len(text):
            parts.append(text[start:])
        return parts

    def decode_bytes(self, ids: Sequence[int], *, at_start: bool = True) -> bytes:
        """Return the bytes of `ids`, special tokens as their text. `at_start` as in `encode`.

        Raises RequestError("invalid_request") on an id outside the vocabulary.
        """
        try:
            if min(ids, default=0) < 0:
                raise IndexError
            joined = b"".join([self._table[index] for index in ids])
        except IndexError:
            raise self._no_such_token(ids) from None
        return joined[1:] if at_start and self._first_space_is_dropped and joined.startswith(b" ") else joined

    def decode(self, ids: Sequence[int], *, at_start: bool = True, skip_special: bool = False) -> str:
        """Return the text of `ids`; bytes that are no character become U+FFFD."""
        kept = [index for index in ids if index not in self.special_ids] if skip_special else ids
        return self.decode_bytes(kept, at_start=at_start).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token that follows others. An id without text (a padded row) gives b""."""
        if not 0 <= token_id < self.vocab_size:
            raise self._no_such_token((token_id,))
        return self._table[token_id]

    def is_special(self, token_id: int) -> bool:
        """Return whether a token is left out of shown text."""
        return token_id in self.special_ids

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding from the start of a text drops the space before its first word."""
        return self._first_space_is_dropped

    @property
    def has_boundaries(self) -> bool:
        """Whether text can be cut before its end is known; see `last_boundary`."""
        return self._cuts_are_known

    def last_boundary(self, before: str, text: str) -> int | None:
        """Return the last index of `text` where the tokens before it are fixed whatever follows, None if unknown.

        before: the character before `text`, "" at the start of ordinary text.
        """
        return last_boundary(before, text) if self._cuts_are_known else None

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        check_unicode(text)
        ids = self._engine.encode(text, at_start)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A unigram model, or one that takes whole pieces, can hit on a control token: break its text after a character.
        assert self._control_pattern is not None, "a control id has a text"
        ids, start = [], 0
        for match in self._control_pattern.finditer(text):
            cut = match.start() + 1
            ids += self._engine.encode(text[start:cut], at_start and start == 0)
            start = cut
        ids += self._engine.encode(text[start:], at_start and start == 0)
        if not self._control_ids.isdisjoint(ids):
            raise RequestError(
                "invalid_request",
                f"text must not hold a control token that cannot be spelt out, got {text[:64]!r}",
                field="text",
                limit="no control tokens",
                value=repr(text[:64]),
            )
        return ids

    def _puts_space_after_control(self, full: Any) -> bool:
        for content, token in self._control.items():
            coded: list[int] = full.encode(content + "a", add_special_tokens=False).ids
            if coded[:1] == [token]:
                return coded[1:] == self._engine.encode("a", True)
        return False

    def _no_such_token(self, ids: Sequence[int]) -> RequestError:
        wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
        return RequestError(
            "invalid_request",
            f"token ids must be at least 0 and below {self.vocab_size}, got {wrong}",
            field="token_ids",
            limit=self.vocab_size,
            value=wrong,
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face model folder.

    Raises RequestError("unsupported_model") if the folder has none, or one whose tokens cannot be turned into bytes.
    """
    files = read_folder(folder)
    try:
        return Tokenizer(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a file of another shape than its type says
        raise refuse(folder, f"tokenizer.json is malformed: {error!r}") from error


def _adds(full: Any, files: TokenizerFiles, bos_id: int) -> bool:
    # transformers builds its own template where the file has none or where the option is given.
    given = files.config.get("add_bos_token")
    if isinstance(given, bool):
        return given
    ids: list[int] = full.encode("a", add_special_tokens=True).ids
    return ids[:1] == [bos_id]


def _token_bytes(files: TokenizerFiles) -> list[bytes]:
    """Return the bytes of each id in the middle of a text; ids between known ones have none."""
    size = max([*files.vocab.values(), *(token.id for token in files.added)]) + 1
    table = [b""] * size
    steps = _decoder_steps(files.spec.get("decoder"))
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        for piece, index in files.vocab.items():
            known = alphabet.keys() >= set(piece)
            table[index] = bytes(alphabet[char] for char in piece) if known else piece.encode("utf-8", "replace")
    elif kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        for piece, index in files.vocab.items():
            table[index] = _spelt(piece, steps)
    else:
        named = ", ".join(sorted(map(str, kinds))) or "none"
        raise refuse(files.folder, f"its decoder ({named}) does not give each token bytes of its own")
    for token in files.added:
        table[token.id] = token.content.encode("utf-8", "replace")
    return table


def _spelt(piece: str, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        if step["type"] == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes((int(byte.group(1), 16),))
        if step["type"] == "Replace" and "String" in step["pattern"]:
            piece = piece.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            piece = piece.replace(step.get("replacement", "\u2581"), " ")
    return piece.encode("utf-8", "replace")


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        return []
    return decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]


def _drops_first_space(decoder: Any) -> bool:
    for step in _decoder_steps(decoder):
        if step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False
