"""The two encoders: tiktoken where it provably gives the same tokens, Hugging Face `tokenizers` for the rest.

tiktoken merges the neighbours whose *joined bytes* have the lowest rank; a tokenizer.json lists which *pairs* merge, in
order. The two agree on every text if and only if, for each token t of the table,

    1. merging the bytes of t alone by the listed pairs ends in the one token t, and
    2. ranks are in the order of the merges, one merge per token.

Why: as long as nothing merged across the edges of t inside a longer text, its inside goes through the same states as t
alone. So a state in which two neighbours join to t occurs in a text only if it occurs in t alone, and there the next
step is the listed merge. Tokens that fail (1) are never made and are left out of the table. With `ignore_merges` a
whole piece that is a token is taken as it is, which tiktoken always does: then a token that fails (1) may stay if its
own merging stops at three or more parts (tiktoken could not join it inside a text either); at two it could, and the
conversion is given up. What this cannot prove, the split pattern under two regex engines, is checked on a fixed corpus.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import tiktoken
import tokenizers

from bough.runtime.protocol import RequestError
from bough.runtime.text.boundaries import is_understood
from bough.runtime.text.folder import Json, TokenizerFiles, refuse

# What ByteLevel splits by when the file gives no pattern of its own (GPT-2's).
GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regex engine overflows its stack, and panics, on a run of a million spaces; 100,000 pass.
MAX_SPACE_RUN: Final = 50_000

CHECK_CORPUS: Final = (
    "",
    " ",
    "  \t \n\n \r\n x",
    "It's we'll THEY'RE i'M 'S o'clock don\u2019t '\u017ft '\u212a",
    "0 12 345 6789 1234567 3.14159 1,000,000 \u0663\u0664\u0665 \u00bd \u2167 \u4e00\u4e8c",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # ok\n\n\n\tif __name__ == \"__main__\":\r\n",
    "<|im_start|>user\n</s>[INST]<|endoftext|><0x0A>\u2581a",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\u3001\ud55c\uad6d\uc5b4!",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "e\u0301 \u00e9 A\u030a \u212b \u1100\u1161\u11a8 \u0958 \u0344",
    "\u00a0\u2003\u3000\u200b\u180e\u0085\x1c\x1f\ufeff x\u00a0y",
    "\x00\x01\x7f\ufffd\U0010ffff\ue000",
    "\u0915\u094d\u0937 \u0e17\u0e35\u0e48 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05c1",
    # one letter or digit first assigned in each of Unicode 13 to 17
    "a\U00010e80a a\U00010570a a\U0001e4d0a a\U00031350a a\U000105c0a a\U00016ea0a a\U00011de0a a\ua7cea",
    "   leading and trailing   ",
    "https://example.org/a?b=c&d=%20#e_f-g --flag /usr/bin !!!??? ...\n\n...\r\n/",
    "CamelCaseWords snake_case_words SCREAMING kebab-case \u01c5 \u02b0 \u00aa",
)


class Engine(Protocol):
    """Turns ordinary text into token ids."""

    @property
    def name(self) -> str:
        """Which library it is."""
        ...

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Return the ids of `text`; `at_start=False` leaves out the space some tokenizers put before a first word."""
        ...


@dataclass(frozen=True)
class HuggingFaceEngine:
    """The `tokenizers` library, told not to see control tokens. `inner` is the same without a leading space."""

    first: tokenizers.Tokenizer
    inner: tokenizers.Tokenizer
    name: str = "tokenizers"

    def encode(self, text: str, at_start: bool) -> list[int]:
        chosen = self.first if at_start else self.inner
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids


@dataclass(frozen=True)
class TiktokenEngine:
    """tiktoken's encoder; `ids` maps its ranks to token ids where they differ."""

    encoding: tiktoken.Encoding
    ids: list[int] | None
    normalizer: tokenizers.normalizers.Normalizer | None
    checked_against: HuggingFaceEngine
    name: str = "tiktoken"

    def encode(self, text: str, at_start: bool) -> list[int]:
        if len(text) > MAX_SPACE_RUN and _has_long_space_run(text):
            return self.checked_against.encode(text, at_start)
        # The library's own NFC, since Python's may know another version of Unicode; most text needs none.
        if self.normalizer and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            text = self.normalizer.normalize_str(text)
        ranks = self.encoding.encode_ordinary(text)
        return ranks if self.ids is None else [self.ids[rank] for rank in ranks]


def build_engine(files: TokenizerFiles) -> Engine:
    """Return the fastest engine that gives the file's own tokens. Raises RequestError("unsupported_model")."""
    slow = _hugging_face(files)
    fast = _tiktoken(files, slow)
    return fast if fast and all(fast.encode(t, True) == slow.encode(t, True) for t in CHECK_CORPUS) else slow


def full_tokenizer(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Return the tokenizer exactly as its file describes it."""
    return _parse(files, files.spec)


def cuts_are_known(files: TokenizerFiles) -> bool:
    """Return whether `boundaries.last_boundary` holds for this tokenizer."""
    pattern = _split_pattern(files.spec)
    plain_added = any(not token.control for token in files.added)  # matched before the pattern splits
    return pattern is not None and not plain_added and _nfc_or_nothing(files.spec) and is_understood(pattern)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's map of printable stand-ins to the 256 bytes: printable Latin-1 is itself, the rest from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


# ----------------------------------------------------------------------------------------- Hugging Face


def _hugging_face(files: TokenizerFiles) -> HuggingFaceEngine:
    spec = copy.copy(files.spec)
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    # What is special here is not matched (encode_special_tokens), and that is what control tokens need to be.
    spec["added_tokens"] = [asdict(token) | {"special": token.control} for token in files.added]
    for token in spec["added_tokens"]:
        del token["control"]
    first = _parse(files, spec)
    first.encode_special_tokens = True
    without_prefix = _without_prefix(spec)
    if without_prefix == spec:
        return HuggingFaceEngine(first, first)
    inner = _parse(files, without_prefix)
    inner.encode_special_tokens = True
    return HuggingFaceEngine(first, inner)


def _parse(files: TokenizerFiles, spec: Json) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise refuse(files.folder, f"tokenizer.json is not understood: {error}") from None


def _without_prefix(part: Any) -> Any:
    """Return the specification without the parts that put a space before the first word."""
    if isinstance(part, list):
        return [_without_prefix(item) for item in part if not _is_prepend(item)]
    if not isinstance(part, dict):
        return part
    kept = {
        key: value if key in ("model", "added_tokens", "decoder") else _without_prefix(value)
        for key, value in part.items()
    }
    if _is_prepend(kept.get("normalizer")):
        kept["normalizer"] = None
    if kept.get("type") in ("Metaspace", "ByteLevel") and "add_prefix_space" in kept:
        kept["add_prefix_space"] = False
    if kept.get("type") == "Metaspace":
        kept["prepend_scheme"] = "never"
    return kept


def _is_prepend(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


# ----------------------------------------------------------------------------------------- tiktoken


def _tiktoken(files: TokenizerFiles, slow: HuggingFaceEngine) -> TiktokenEngine | None:
    pattern = _split_pattern(files.spec)
    if pattern is None or slow.first is not slow.inner or any(not token.control for token in files.added):
        return None
    table = _ranks(files)
    if table is None:
        return None
    ranks, ids = table
    try:
        encoding = tiktoken.Encoding("bough", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # a pattern its regex engine does not take
        return None
    normalizer = tokenizers.normalizers.NFC() if files.spec.get("normalizer") else None
    return TiktokenEngine(encoding, ids, normalizer, slow)


def _split_pattern(spec: Json) -> str | None:
    """Return the pattern of a pre-tokenizer that is one split and then ByteLevel, None for any other."""
    part = spec.get("pre_tokenizer")
    if not isinstance(part, dict) or spec["model"].get("type", "BPE") != "BPE":
        return None
    if part.get("type") == "ByteLevel":
        return GPT2_PATTERN if part.get("use_regex", True) else None
    steps = part.get("pretokenizers")
    if part.get("type") != "Sequence" or not isinstance(steps, list) or len(steps) != 2:
        return None
    split, byte_level = steps
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    if byte_level.get("type") != "ByteLevel" or byte_level.get("use_regex", True):
        return None
    pattern = split.get("pattern", {}).get("Regex")
    return pattern if isinstance(pattern, str) else None


def _nfc_or_nothing(spec: Json) -> bool:
    part = spec.get("normalizer")
    return part is None or part == {"type": "NFC"}


def _ranks(files: TokenizerFiles) -> tuple[dict[bytes, int], list[int] | None] | None:
    """Return tiktoken's table, and the map from its ranks to ids if they differ; None where it would not be equal."""
    model = files.spec["model"]
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    decoder = files.spec.get("decoder") or {}
    if decoder.get("type") != "ByteLevel" or any(model.get(name) for name in unsupported):
        return None
    if not _nfc_or_nothing(files.spec):
        return None
    control = {token.content for token in files.added}
    alphabet = byte_alphabet()
    if any(symbol not in files.vocab for symbol in alphabet):
        return None  # a byte without a token: tiktoken has no unknown token
    pieces = _mergeable(files, control)
    if pieces is None:
        return None
    symbols = {*alphabet}
    if any(not symbols.issuperset(piece) for piece in pieces):
        return None
    order = [*alphabet, *pieces]
    ids = [files.vocab[piece] for piece in order]
    as_bytes = [bytes(alphabet[char] for char in piece) for piece in order]
    merged_ids = ids[len(alphabet) :]
    if merged_ids == sorted(merged_ids):  # ranks of single bytes are never compared: ids can be the ranks
        return dict(zip(as_bytes, ids, strict=True)), None
    return {piece: rank for rank, piece in enumerate(as_bytes)}, ids


def _mergeable(files: TokenizerFiles, control: set[str]) -> list[str] | None:
    """Return the tokens that merging makes, in the order of their merges; None if tiktoken would make others."""
    model = files.spec["model"]
    merges: list[tuple[str, str]] = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges") or []
    ]
    rank: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, pair in enumerate(merges):
        joined = "".join(pair)
        # Several splits of one token must be neighbours in the list, or their order is not that of the tokens.
        if joined in rank and last[joined] != index - 1:
            return None
        rank.setdefault(joined, index)
        last[joined] = index
    whole = bool(model.get("ignore_merges"))
    single = byte_alphabet()
    candidates = [piece for piece in files.vocab if piece not in single and piece not in control]
    if not whole:
        candidates = [piece for piece in candidates if piece in rank]
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=files.vocab, merges=merges))
    kept = []
    for piece, coded in zip(candidates, bare.encode_batch(candidates, add_special_tokens=False), strict=True):
        num_parts = len(coded.ids)
        if num_parts == 2 and whole:
            return None
        if num_parts == 1 or whole:
            kept.append(piece)
    # Tokens that only a whole piece can become rank last; their merges are never listed, so no comparison uses them.
    return sorted(kept, key=lambda piece: rank.get(piece, len(merges)))


def _has_long_space_run(text: str) -> bool:
    return any(run.end() - run.start() > MAX_SPACE_RUN for run in re.finditer(r"\s+", text))


def check_unicode(text: str) -> None:
    """Raise RequestError("invalid_request") if `text` holds half a surrogate pair, which no encoder can take."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "invalid_request",
            f"text must be valid Unicode, got a lone surrogate {text[error.start]!r} at character {error.start}",
            field="text",
            limit="valid Unicode",
            value=repr(text[error.start]),
        ) from None
