"""Tokens are those of transformers' AutoTokenizer, whichever engine makes them, and no text forges a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bough.runtime.protocol import RequestError
from bough.runtime.text.engines import CHECK_CORPUS, MAX_SPACE_RUN
from bough.runtime.text.tokenizer import Tokenizer, load_tokenizer

PIECES = [" ", "  ", "\n", "\r\n", "\t", "a", "the", "Hello", "'s", "'LL", "1", "12345", ".", "!?", "/", "\u2019s", "_"]
PIECES += ["\u00e9", "e\u0301", "\u0301", "\u4f60\u597d", "\u3002", "\U0001f600", "\u200d", "\u3000", "\u00a0", "\x1c"]
PIECES += ["<|end|>", "<mask>", "<|end|>text|>", "<", ">", "|", "\u1100", "\u1161", "\u2581"]
PIECES += ["\u017f", "\ua7ce", "\U00010d40", "\U00010ffff"]
TEXT = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=24
).map("".join)
ENGINES = {
    "gpt2": "tiktoken",
    "llama3": "tiktoken",
    "qwen2": "tiktoken",
    "o200k": "tiktoken",
    "prefix_space": "tokenizers",
    "shuffled": "tiktoken",
    "unmergeable": "tokenizers",
    "whole_pieces_only": "tiktoken",
    "space_runs": "tokenizers",
    "two_splits": "tokenizers",
    "llama2": "tokenizers",
    "metaspace": "tokenizers",
    "unigram": "tokenizers",
}
Loaded = tuple[str, Tokenizer, Any]


@pytest.fixture(scope="module", params=ENGINES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = getattr(tiny_tokenizers, request.param)(tmp_path_factory.mktemp(request.param))
    return request.param, load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_tiktoken_serves_what_it_can_encode_equally_and_nothing_else(loaded: Loaded) -> None:
    name, tokenizer, _ = loaded
    assert tokenizer.engine == ENGINES[name]


@settings(max_examples=100)
@given(text=TEXT)
def test_tokens_equal_transformers(loaded: Loaded, text: str) -> None:
    _, tokenizer, reference = loaded
    assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", CHECK_CORPUS)
def test_the_corpus_tokenises_as_in_transformers_with_control_tokens(loaded: Loaded, text: str) -> None:
    _, tokenizer, reference = loaded
    assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"]


def test_every_piece_of_the_vocabulary_tokenises_as_in_transformers(loaded: Loaded) -> None:
    _, tokenizer, reference = loaded
    for index in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(index).decode("utf-8", "replace")
        for around in (text, f"x{text}", f"{text}y", text + text, f"the {text} of"):
            assert tokenizer.encode(around, special=True) == reference(around, add_special_tokens=False)["input_ids"]


@settings(max_examples=50)
@given(data=st.data())
def test_text_never_becomes_a_control_token(loaded: Loaded, data: st.DataObject) -> None:
    _, tokenizer, reference = loaded
    marks = [*reference.get_added_vocab(), "<|im_end|>", "</s>", "<think>"]
    text = data.draw(st.lists(st.sampled_from(marks) | st.sampled_from(PIECES), max_size=8).map("".join))
    control = {index for mark in marks for index in tokenizer.split_control(mark) if isinstance(index, int)}
    unknown = reference.unk_token_id
    assert not (set(tokenizer.encode(text)) & control - {unknown})


@settings(max_examples=50)
@given(text=TEXT)
def test_byte_level_tokens_give_the_text_back(loaded: Loaded, text: str) -> None:
    name, tokenizer, reference = loaded
    if name in ("qwen2", "prefix_space", "unigram", *tiny_tokenizers.SENTENCEPIECE):
        return  # NFC and SentencePiece's space mark change the text
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == reference.decode(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", ["hello world", "the tree", "x\u4f60\u597d \U0001f600 a", "It's \u00e9t\u00e9."])
@pytest.mark.parametrize("name", tiny_tokenizers.SENTENCEPIECE)
def test_sentencepiece_text_comes_back_at_the_start_and_in_the_middle(name: str, text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.SENTENCEPIECE[name](tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for middle in (text, " " + text):
        ids = tokenizer.encode(middle, at_start=False)
        assert tokenizer.decode(ids, at_start=False) == middle
        assert b"".join(map(tokenizer.token_bytes, ids)) == middle.encode()


def test_special_tokens_are_rendered_as_their_text_and_skipped_on_request(loaded: Loaded) -> None:
    _, tokenizer, reference = loaded
    for index in tokenizer.special_ids:
        content = reference.convert_ids_to_tokens(index)
        assert tokenizer.is_special(index)
        assert tokenizer.decode([index]) == content
        assert tokenizer.decode([index], skip_special=True) == ""
        assert tokenizer.encode(content, special=True) == [index]


def test_a_mark_that_is_not_special_is_shown_but_never_made_from_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.qwen2(tmp_path))
    [think] = tokenizer.encode("<think>", special=True)
    assert not tokenizer.is_special(think)
    assert tokenizer.decode([think], skip_special=True) == "<think>"
    assert think not in tokenizer.encode("<think>")


def test_first_token_is_added_where_transformers_adds_it(loaded: Loaded) -> None:
    _, tokenizer, reference = loaded
    assert tokenizer.adds_bos == (reference("hello")["input_ids"][:1] == [tokenizer.bos_id])
    assert tokenizer.bos_id == reference.bos_token_id
    assert tokenizer.vocab_size == len(reference)

    skipped = {index for index in range(len(reference)) if reference.decode([index], skip_special_tokens=True) == ""}
    assert tokenizer.special_ids == {index for index in skipped if tokenizer.token_bytes(index) not in (b"", b" ")}


def test_end_tokens_are_gathered_from_all_three_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.llama3(tmp_path))
    ends = ["<|eot_id|>", "<|end_of_text|>"]
    assert tokenizer.eos_ids == tuple(tokenizer.encode(end, special=True)[0] for end in ends)


def test_white_space_longer_than_the_fast_engine_takes_is_encoded_all_the_same(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.llama3(tmp_path))
    text = "a" + " " * (20 * MAX_SPACE_RUN) + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_made_in_two_ways_keeps_the_place_of_the_way_that_is_taken(any_merges: Path) -> None:
    # "abc" is listed first as (a, bc), but is made as (ab, c), after (c, d): its rank would be wrong in tiktoken.
    merges = [["a", "bc"], ["a", "b"], ["b", "c"], ["c", "d"], ["ab", "c"]]
    spec = json.loads((any_merges / "tokenizer.json").read_text())
    vocab = {piece: index for piece, index in spec["model"]["vocab"].items() if index < 256}
    vocab |= {piece: 256 + index for index, piece in enumerate(["abc", "ab", "bc", "cd"])}
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": False}
    folder = any_merges / "two_ways"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_bytes(index) for index in tokenizer.encode("abcd")] == [b"ab", b"cd"]


@settings(max_examples=250)
@given(
    picks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
    order=st.randoms(use_true_random=False),
    whole=st.booleans(),
    texts=st.lists(st.text("abc", max_size=12), min_size=1, max_size=6),
)
def test_any_merge_table_gives_the_tokens_of_the_merges_in_their_order(
    any_merges: Path, picks: list[tuple[int, int]], order: Any, whole: bool, texts: list[str]
) -> None:
    symbols, merges = ["a", "b", "c"], []
    for left, right in picks:  # nonsense tables too: tokens never made, made in two ways, or merged out of order
        pair = [symbols[left % len(symbols)], symbols[right % len(symbols)]]
        if pair not in merges:
            merges.append(pair)
            symbols.append("".join(pair))
    order.shuffle(merges)
    spec = json.loads((any_merges / "tokenizer.json").read_text())
    vocab = {piece: index for piece, index in spec["model"]["vocab"].items() if index < 256}
    for piece in dict.fromkeys(symbols):
        vocab.setdefault(piece, len(vocab))
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": whole}
    reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
    folder = any_merges / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    for text in (*texts, *symbols):
        assert tokenizer.encode(text) == reference.encode(text).ids


@pytest.fixture(scope="module")
def any_merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.unmergeable(tmp_path_factory.mktemp("merges"))


def test_a_lone_surrogate_is_refused_by_name(loaded: Loaded) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        loaded[1].encode("ab\ud800")
    assert caught.value.kind == "invalid_request"


@pytest.mark.parametrize("index", [-1, 1 << 31])
def test_an_id_outside_the_vocabulary_is_refused_by_name(loaded: Loaded, index: int) -> None:
    for decode in (loaded[1].token_bytes, lambda token: loaded[1].decode([5, token])):
        with pytest.raises(RequestError, match=f"got {index}"):
            decode(index)


def _without_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _with_only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def _with_broken_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def _with_a_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def _with_no_model(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def _with_decoder(decoder: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        spec = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"decoder": decoder}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _without_files,
        _with_only_sentencepiece,
        _with_broken_json,
        _with_a_list,
        _with_no_model,
        _with_decoder(None),
        _with_decoder({"type": "WordPiece", "prefix": "##", "cleanup": True}),
        _with_decoder(7),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_typed(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tiny_tokenizers.gpt2(tmp_path))
    with pytest.raises(RequestError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.kind == "unsupported_model"
    assert str(tmp_path) in caught.value.message
