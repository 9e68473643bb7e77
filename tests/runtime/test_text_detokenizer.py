"""Tokens come in one at a time; only whole characters go out, and a cut in the text finds its token."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bough.runtime.protocol import RequestError
from bough.runtime.text.detokenizer import IncrementalDecoder
from bough.runtime.text.tokenizer import Tokenizer, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=16)


@pytest.fixture(scope="module", params=["llama3", "qwen2", "llama2", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_tokenizers.ALL[request.param](tmp_path_factory.mktemp(request.param)))


def _draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    some = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)  # mostly no valid UTF-8
    spelt = TEXT.map(lambda text: tokenizer.encode(text, at_start=False))
    return [index for ids in data.draw(st.lists(some | spelt, max_size=3)) for index in ids]


@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans(), at_start=st.booleans())
def test_the_pieces_join_to_the_text_of_all_tokens(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, at_start: bool
) -> None:
    ids = _draw_ids(data, tokenizer)
    decoder = IncrementalDecoder(tokenizer, skip_special=skip, at_start=at_start)
    text = "".join([decoder.feed(index) for index in ids]) + decoder.finish()
    assert text == tokenizer.decode(ids, at_start=at_start, skip_special=skip) == decoder.text
    assert decoder.num_tokens == len(ids)


@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans(), at_start=st.booleans(), may_cut=st.booleans())
def test_tokens_fed_together_give_what_they_give_one_by_one(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, at_start: bool, may_cut: bool
) -> None:
    ids = _draw_ids(data, tokenizer)
    num = data.draw(st.integers(0, 3))
    one = IncrementalDecoder(tokenizer, skip_special=skip, at_start=at_start, skip_bytes=num)
    many = IncrementalDecoder(tokenizer, skip_special=skip, at_start=at_start, skip_bytes=num, may_cut=may_cut)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        assert many.feed_all(ids[begin:end]) == "".join([one.feed(index) for index in ids[begin:end]])
        assert many.num_tokens == one.num_tokens
    assert many.finish() == one.finish()


@settings(max_examples=150)
@given(text=TEXT)
def test_valid_text_never_shows_a_replacement_character_of_its_own(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.feed(index) for index in tokenizer.encode(text, at_start=False)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert decoder.finish() == ""


def test_a_character_comes_out_with_its_last_byte(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.unmergeable(tmp_path))  # a token per byte
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode("\U0001f600a")
    assert [decoder.feed(index) for index in ids] == ["", "", "", "\U0001f600", "a"]


def test_a_character_that_never_ends_becomes_one_replacement(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.unmergeable(tmp_path))
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode("\U0001f600")
    assert [decoder.feed(index) for index in ids[:2]] == ["", ""]
    assert decoder.feed(tokenizer.encode("x")[0]) == "\ufffdx"
    decoder.feed(ids[0])
    assert decoder.finish() == "\ufffd"


@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_a_cut_keeps_the_most_whole_tokens_and_gives_the_rest_as_text(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = _draw_ids(data, tokenizer)
    decoder = IncrementalDecoder(tokenizer, skip_special=skip)
    lengths = [0]  # characters after that many tokens, None where bytes wait
    for index in ids:
        decoder.feed(index)
        length = len(decoder.text)
        kept = tokenizer.decode(ids[: len(lengths)], at_start=False, skip_special=skip)
        lengths.append(length if kept == decoder.text else 1 << 30)
    text = decoder.text
    for num_chars in range(len(text) + 1):
        num_tokens, rest = decoder.tokens_within(num_chars)
        assert tokenizer.decode(ids[:num_tokens], at_start=False, skip_special=skip) + rest == text[:num_chars]
        assert num_tokens == max(count for count, length in enumerate(lengths) if length <= num_chars)


def test_a_stop_inside_a_token_leaves_the_start_of_the_token_as_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.qwen2(tmp_path))
    ids = tokenizer.encode("hello world")
    assert len(ids) == 2, "both words are single tokens"
    decoder = IncrementalDecoder(tokenizer)
    for index in ids:
        decoder.feed(index)
    assert decoder.tokens_within(len("hello wo")) == (1, " wo")
    assert decoder.tokens_within(len("hello")) == (1, "")
    assert decoder.tokens_within(len("hel")) == (0, "hel")


def test_an_unknown_id_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="token ids must be"):
        IncrementalDecoder(tokenizer).feed(tokenizer.vocab_size)
