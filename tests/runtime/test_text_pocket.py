"""The bundled model's tokenizer and chat template, as the runtime loads them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bough.runtime.text.chat import load_chat_template
from bough.runtime.text.engines import CHECK_CORPUS
from bough.runtime.text.tokenizer import Tokenizer, load_tokenizer

WEIGHTS = Path(str(files("bough.runtime.pocket"))) / "weights"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(WEIGHTS)


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_it_is_served_by_the_fast_engine_and_its_text_can_be_cut(tokenizer: Tokenizer) -> None:
    assert tokenizer.engine == "tiktoken"
    assert tokenizer.has_boundaries


def test_its_special_tokens_are_found(tokenizer: Tokenizer, reference: Any) -> None:
    end, stop = reference.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_ids == (end, stop)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    assert tokenizer.vocab_size == len(reference)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(CHECK_CORPUS))
def test_its_tokens_equal_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_conversations_render_as_in_transformers(reference: Any) -> None:
    chat = load_chat_template(WEIGHTS)
    assert chat is not None
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f"Words {index}."} for index, role in enumerate(roles)]
    written = "".join(
        chat.begin(roles[:index], role) + messages[index]["content"] + chat.end(roles[: index + 1])
        for index, role in enumerate(roles)
    )
    assert written == reference.apply_chat_template(messages, tokenize=False)
    prompted = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written + chat.begin(roles, "assistant") == prompted
