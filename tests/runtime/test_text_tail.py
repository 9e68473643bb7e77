"""However a program cuts its text, and whenever stable tokens are taken, the tokens are those of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.text.boundaries import is_understood, last_boundary
from bough.runtime.text.engines import GPT2_PATTERN
from bough.runtime.text.tail import TextTail
from bough.runtime.text.tokenizer import Tokenizer, load_tokenizer

PIECES = [" ", "  ", "   ", "\n", "\r\n", "\t ", "a", "the", "Hello", "'s", "'", "\u2019", "1", "12345", ".", "!?", "/"]
PIECES += [
    "\u00e9",
    "e\u0301",
    "\u0301",
    "\u0338",
    "\u4f60\u597d",
    "\u3002",
    "\uff0c",
    "\U0001f600",
    "\u200d",
    "\u3000",
]
PIECES += [
    "\u00a0",
    "\x1c",
    "\u180e",
    "\u1100",
    "\u1161",
    "\u037e",
    "\u0374",
    "\ua7ce",
    "\U00010d40",
    "=",
    "<|im_end|>",
]
CHUNKS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=24)
PROSE = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20


@pytest.fixture(scope="module", params=tiny_tokenizers.ALL)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_tokenizers.ALL[request.param](tmp_path_factory.mktemp(request.param)))


@settings(max_examples=150)
@given(chunks=CHUNKS)
def test_tokens_do_not_depend_on_how_the_text_is_cut(tokenizer: Tokenizer, chunks: list[str]) -> None:
    tail = TextTail(tokenizer)
    ids: list[int] = []
    for chunk in chunks:
        tail.append(chunk)
        ids += tail.take_stable()
    assert ids + tail.flush() == tokenizer.encode("".join(chunks))
    assert tail.is_empty
    assert tail.pending == ""


@settings(max_examples=80)
@given(chunks=CHUNKS, take=st.lists(st.booleans(), min_size=24, max_size=24))
def test_template_text_with_control_tokens_joins_what_programs_append(
    tokenizer: Tokenizer, chunks: list[str], take: list[bool]
) -> None:
    if tokenizer.split_control("<|end|>  x")[1:] == ["x"]:
        return  # a control token that takes white space takes the template's, never the program's
    controls = [token.decode() for token in map(tokenizer.token_bytes, sorted(tokenizer.special_ids))] or ["plain"]
    chunks = [chunk for chunk in chunks if "<" not in chunk and "|" not in chunk]
    tail = TextTail(tokenizer)
    ids: list[int] = []
    whole = ""
    for index, chunk in enumerate(chunks):
        template = f"{controls[index % len(controls)]}\n\n"
        tail.append(template, special=True)
        tail.append(chunk)
        whole += template + chunk
        if take[index]:
            ids += tail.take_stable()
    assert ids + tail.flush() == tokenizer.encode(whole, special=True)


@settings(max_examples=50)
@given(before=CHUNKS, one=CHUNKS, other=CHUNKS)
def test_a_copy_goes_its_own_way(tokenizer: Tokenizer, before: list[str], one: list[str], other: list[str]) -> None:
    tail = TextTail(tokenizer)
    for chunk in before:
        tail.append(chunk)
    shared = tail.take_stable()
    twin = tail.copy()
    for chunk in one:
        tail.append(chunk)
    for chunk in other:
        twin.append(chunk)
    assert shared + tail.take_stable() + tail.flush() == tokenizer.encode("".join(before + one))
    assert shared + twin.take_stable() + twin.flush() == tokenizer.encode("".join(before + other))


def test_of_prose_all_but_the_last_word_is_stable(tokenizer: Tokenizer) -> None:
    tail = TextTail(tokenizer)
    tail.append(PROSE + "Bough")
    ids = tail.take_stable()
    assert tail.pending == (" Bough" if tokenizer.has_boundaries else PROSE + "Bough")
    assert ids == (tokenizer.encode(PROSE.rstrip()) if tokenizer.has_boundaries else [])


def test_of_chinese_prose_all_but_the_last_clause_is_stable(tmp_path: Path) -> None:
    tail = TextTail(load_tokenizer(tiny_tokenizers.qwen2(tmp_path)))
    tail.append("\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4f60\u597d")
    tail.take_stable()
    assert tail.pending == "\u3002\u4f60\u597d"


@pytest.mark.parametrize("chunks", [["it", "'", "s"], ["it'", "s don\u2019", "t"], ["hello", " world"]])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "o200k"])
def test_a_word_and_its_contraction_stay_together(name: str, chunks: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.BYTE_LEVEL[name](tmp_path))
    tail = TextTail(tokenizer)
    ids: list[int] = []
    for chunk in chunks:
        tail.append(chunk)
        ids += tail.take_stable()
    assert ids + tail.flush() == tokenizer.encode("".join(chunks))


def test_a_cut_between_two_appends_is_found(tmp_path: Path) -> None:
    tail = TextTail(load_tokenizer(tiny_tokenizers.qwen2(tmp_path)))
    for chunk in ("hello", " world"):
        tail.append(chunk)
        tail.take_stable()
    assert tail.pending == " world"


def test_a_letter_or_mark_younger_than_the_tables_is_no_place_to_cut() -> None:
    assert last_boundary("", "a.") == 1
    assert last_boundary("", "a\u2e53") is None  # punctuation since Unicode 14
    assert last_boundary("", "\u08b0.") is None  # a letter since Unicode 7


def test_text_after_a_flush_continues_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.llama2(tmp_path))
    tail = TextTail(tokenizer)
    ids: list[int] = []
    for chunk in ("hello", "world", " the"):
        tail.append(chunk)
        ids += tail.flush()
    assert tokenizer.decode(ids) == "helloworld the"


def test_text_after_generated_tokens_gets_no_leading_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.llama2(tmp_path))
    tail = TextTail(tokenizer)
    tail.follow_tokens()
    tail.append("hello")
    assert tokenizer.decode(tail.flush(), at_start=False) == "hello"
    tail.append(" world")
    assert tokenizer.decode(tail.flush(), at_start=False) == " world"


@pytest.mark.parametrize("piece", ["word ", "x", "\u4f60", "\n", " "])
@pytest.mark.parametrize("name", ["qwen2", "llama2"])
def test_ten_thousand_appends_look_at_each_character_once(
    name: str, piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.ALL[name](tmp_path))
    looked_at = encoded = 0
    look, encode = Tokenizer.last_boundary, Tokenizer.encode

    def counted_look(self: Tokenizer, before: str, text: str) -> int | None:
        nonlocal looked_at
        looked_at += len(text)
        return look(self, before, text)

    def counted_encode(self: Tokenizer, text: str, *, special: bool = False, at_start: bool = True) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return encode(self, text, special=special, at_start=at_start)

    monkeypatch.setattr(Tokenizer, "last_boundary", counted_look)
    monkeypatch.setattr(Tokenizer, "encode", counted_encode)
    tail = TextTail(tokenizer)
    for _ in range(10_000):
        tail.append(piece)
        tail.take_stable()
    tail.flush()
    assert encoded == 10_000 * len(piece)
    assert looked_at <= 10_000 * len(piece)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "o200k"])
def test_a_cut_beside_any_character_of_the_basic_plane_is_an_edge_of_the_split(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.BYTE_LEVEL[name](tmp_path))
    cuts = 0
    for char in (chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000):
        for text in (f"a{char} a", f"a{char}a"):
            at = last_boundary("", text)
            if at is None:
                continue
            cuts += 1
            assert tokenizer.encode(text[:at]) + tokenizer.encode(text[at:]) == tokenizer.encode(text), (text, at)
    assert cuts > 30_000


def test_patterns_of_another_kind_are_not_trusted() -> None:
    for known in (GPT2_PATTERN, tiny_tokenizers.LLAMA3_SPLIT, tiny_tokenizers.QWEN2_SPLIT, tiny_tokenizers.O200K_SPLIT):
        assert is_understood(known)
    for unknown in (r"\w+ \w+|\s+", r"[^|]+|\|", "", r"a|b"):
        assert not is_understood(unknown)
