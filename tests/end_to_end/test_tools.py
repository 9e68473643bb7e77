"""The tool loop on the bundled model, which was trained on calculator and lookup lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import within
from transformers import AutoTokenizer

import bough as bo
from bough.runtime import pocket as pocket_package

FACTS = {"price of the lamp": "36", "city of Mara": "Oslo"}


def calculator(expression: str) -> int:
    """computes a number"""
    left, sign, right = expression.split()
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


def lookup(key: str) -> str:
    """finds a fact"""
    return FACTS.get(key.strip(), "not found")


@bo.function
def agent(s: bo.State, question: str) -> Any:
    s.tools([calculator, lookup])
    s += bo.user(question)
    return s.run_tools(name="answer", max_rounds=4, max_tokens=48)


@pytest.mark.parametrize(
    ("question", "calls", "answer"),
    [
        ("What is 17 + 25?", ["calculator"], "42"),
        ("Where does Mara live?", ["lookup"], "Oslo"),
        ("What is the price of the lamp plus 12?", ["lookup", "calculator"], "48"),
        ("What is the job of Tom?", ["lookup"], "I do not know"),
    ],
)
def test_the_bundled_model_uses_its_tools(pocket: bo.Runtime, question: str, calls: list[str], answer: str) -> None:
    state = within(30, lambda: agent.run(question, temperature=0, backend=pocket))
    assert [result.call.name for result in state.ret_value.results] == calls
    assert state["answer"] == answer


# ------------------------------------------------------------------------------------------------ the model's template

WEIGHTS = Path(str(pocket_package.__file__)).parent / "weights"
# As Qwen's: definitions in the system message, neighbouring results in one turn of the user.
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}
{%- endif %}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user\\n' }}{%- endif %}
{{- '<result>' + m.content + '</result>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif not (tools and m.role == 'system') %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a chat template that tells of tools."""
    path = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(WEIGHTS, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[bo.Runtime]:
    with bo.Runtime(folder, seed=1) as runtime:
        yield runtime


@bo.function
def told(s: bo.State, system: str) -> Any:
    box = s.tools([calculator, lookup], system=system)
    s += bo.user("What is 17 + 25?") + bo.assistant(bo.gen("turn", max_tokens=8, temperature=0))
    calls = box.calls(
        '<tool_call>{"name": "lookup", "arguments": {"key": "city of Mara"}}</tool_call>'
        '<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 2"}}</tool_call>'
    )
    box.tell(s, box.call(calls))
    s += bo.assistant(bo.gen("then", max_tokens=8, temperature=0))
    return box


@pytest.mark.parametrize("system", ["", "Be careful."])
def test_a_template_with_tools_tells_of_them_as_transformers_does(
    runtime: bo.Runtime, folder: Path, system: str
) -> None:
    state = within(30, lambda: told.run(system, backend=runtime))
    box, messages = state.ret_value, within(30, state.messages)
    assert box.format == "template"
    assert [message["content"] for message in messages if message["role"] == "tool"] == ["Oslo", "3"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer.apply_chat_template(messages, tools=box.definitions(), tokenize=False)
    assert state.text() == whole
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=box.definitions(), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert state.get_meta_info("then")["prompt_tokens"] == len(ids)
    fork = state.fork()[0]
    fork += bo.user("And?")
    assert fork.text().startswith(whole)


def test_tools_come_before_messages_and_only_where_the_template_has_them(
    runtime: bo.Runtime, pocket: bo.Runtime
) -> None:
    s = bo.State(runtime)
    s += bo.user("hello")
    s.tools([lookup])
    assert isinstance(s.error(), bo.InvalidRequest)
    assert "before the first message" in str(s.error())
    other = bo.State(pocket)
    other.tools([lookup], format="template")
    assert "does not tell of tools" in str(other.error())
