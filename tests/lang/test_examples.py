"""Every example runs on a script; the end-to-end tests run them on the bundled model."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import bough as bo

EXAMPLES = Path(__file__).parents[2] / "examples"
TIPS = "1. Sleep.\n2. Walk.\n3. Read."
ACTS = {
    "17 + 25": ["Action: calculator[17 + 25]", "Answer: 42"],
    "lamp plus": ["Action: lookup[price of the lamp]", "Action: calculator[36 + 12]", "Answer: 48"],
    "Where does Mara": ["Action: lookup[city of Mara]", "Answer: Oslo"],
}


def say(text: str, params: Any) -> str:
    """Answer as the bundled model should."""
    if "these tools:\n" in text:
        return ACTS[next(key for key in ACTS if key in text)][text.count("<|im_start|>tool")]
    if text.endswith("Thought:"):
        return " I need a tool.\nAction: it was stopped before this"
    if "\nThought:" in text.rpartition("<|im_start|>")[2]:
        question = next(key for key in ACTS if key in text)
        return ACTS[question][text.count("<|im_start|>tool")]
    if "Invent somebody" in text:
        return "Name: Mara\nLucky number: 36\nMood: calm\nLikes: tea, rain\n"
    if "right?" in text:
        return "10 + 20 = 30.\nYes, it is right."
    asked = text.rpartition("<|im_start|>user\n")[2]
    return TIPS if "tips for" in asked or "Summarize" in asked else "The answer is 42."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hello", "The answer is 42."),
        ("fork_join", "2. Walk.\n   The answer is 42."),
        ("few_shot_select", "positive  100.0%"),
        ("chat_streaming", "> What pet does Tom have?\nThe answer is 42."),
        ("tree_of_thought", "best: 17 + 25 = 42"),
        ("tool_loop", "   answer  48"),
        ("tools", "48  (lookup 'price of the lamp' -> 36, calculator '36 + 12' -> 48)"),
        ("template", "Oslo: Mara, 36, calm, likes tea and rain\n"),
        ("batch", "ValueError('an empty sentence')"),
        ("async_batch", "rerun: 12 results, 12 read from the file"),
        ("demo", "  in total"),
    ],
)
def test_an_example_prints_what_it_promises(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(bo.ScriptedBackend(say))
    assert expected in capsys.readouterr().out


def test_every_example_is_short_listed_and_tested() -> None:
    files = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    listed = (EXAMPLES / "README.md").read_text()
    cases = test_an_example_prints_what_it_promises.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert files == sorted(name for name, _ in cases)
    for name in files:
        assert f"({name}.py)" in listed
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= (90 if name == "demo" else 60)
