"""Looking at the next token, against transformers."""

from __future__ import annotations

import pytest
import torch
from processes import within
from tiny_checkpoints import Oracle, tiny_checkpoint

import bough as bo


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_the_next_tokens_distribution_is_the_models_and_looking_changes_nothing(variant: str) -> None:
    folder = tiny_checkpoint(variant)
    oracle = Oracle(folder)
    text = "The tree and a branch"
    with bo.Runtime(folder, dtype="float32", max_total_tokens=4096) as runtime:
        s = bo.State(runtime)
        s += text
        top = within(60, lambda: s.peek(8))
        entropy = s.entropy()
        s += bo.gen("x", max_tokens=4, temperature=1.0, seed=5, ignore_eos=True)
        plain = bo.State(runtime)
        plain += text + bo.gen("x", max_tokens=4, temperature=1.0, seed=5, ignore_eos=True)
        assert within(60, lambda: s.get_meta_info("x"))["token_ids"] == plain.get_meta_info("x")["token_ids"]
        assert s.get_meta_info("x")["computed_tokens"] == 1
    with torch.no_grad():
        logits = oracle.model(torch.tensor([oracle.ids(text)])).logits[0, -1].double()
    expected = torch.log_softmax(logits, -1)
    values, ids = expected.topk(8)
    assert [token_id for _, token_id, _ in top] == ids.tolist()
    assert [logprob for *_, logprob in top] == pytest.approx(values.tolist(), abs=1e-4)
    assert entropy == pytest.approx(-float((expected.exp() * expected).sum()), abs=1e-4)
