"""The pieces a template gives for each message join to transformers' rendering of the whole conversation."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bough.runtime.protocol import RequestError
from bough.runtime.text.chat import ChatTemplate, load_chat_template

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12)  # survives trimming


def _roles(name: str) -> st.SearchStrategy[tuple[str, ...]]:
    if name in ("CHATML", "LLAMA3_CHAT"):
        return st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=6).map(tuple)
    opening = st.just(()) if name == "MISTRAL_CHAT" else st.sampled_from([(), ("system",)])
    turns = st.integers(1, 3).map(lambda count: ("user", "assistant") * count)
    return st.tuples(opening, turns, st.sampled_from([(), ("user",)])).map(lambda parts: sum(parts, ()))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizers.llama2(tmp_path_factory.mktemp("llama2")))


def _join(chat: ChatTemplate, roles: tuple[str, ...], contents: list[str]) -> str:
    return "".join(
        chat.begin(roles[:index], role) + contents[index] + chat.end(roles[: index + 1])
        for index, role in enumerate(roles)
    )


def _whole(reference: Any, template: str, roles: tuple[str, ...], contents: list[str], *, prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    rendered: str = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    return rendered


def _as_generated(name: str, rendered: str) -> str:
    """Write finished assistant messages as they were produced: after the generation prompt, and nothing else."""
    if name == "QWEN3_CHAT":
        return rendered.replace("<think>\n\n</think>\n\n", "")
    if name in ("MISTRAL_CHAT", "LLAMA2_CHAT"):
        return rendered.replace("[/INST] ", "[/INST]")
    return rendered


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3_CHAT", "QWEN3_CHAT", "MISTRAL_CHAT", "LLAMA2_CHAT"])
@settings(max_examples=40)
@given(data=st.data())
def test_the_pieces_join_to_the_rendering_of_transformers(name: str, reference: Any, data: st.DataObject) -> None:
    template = getattr(tiny_tokenizers, name)
    roles = data.draw(_roles(name))
    contents = [data.draw(CONTENT) for _ in roles]
    chat = ChatTemplate(template, SPECIALS)
    assert _join(chat, roles, contents) == _as_generated(name, _whole(reference, template, roles, contents))


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3_CHAT", "QWEN3_CHAT", "MISTRAL_CHAT", "LLAMA2_CHAT"])
def test_what_precedes_an_answer_is_the_generation_prompt(name: str, reference: Any) -> None:
    template = getattr(tiny_tokenizers, name)
    chat = ChatTemplate(template, SPECIALS)
    for roles in (("user",), ("user", "assistant", "user")):
        contents = ["Hi", "Yes?", "Bye"][: len(roles)]
        written = _join(chat, roles, contents) + chat.begin(roles, "assistant")
        assert written == _as_generated(name, _whole(reference, template, roles, contents, prompt=True))


def test_a_default_system_message_is_written_before_the_first_user_message() -> None:
    chat = ChatTemplate(tiny_tokenizers.CHATML, SPECIALS)
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert chat.begin((), "user") == default + "<|im_start|>user\n"
    assert chat.begin((), "system") == "<|im_start|>system\n"
    assert chat.begin(("system",), "user") == "<|im_start|>user\n"
    assert chat.end(("user",)) == "<|im_end|>\n"


def test_a_system_message_that_belongs_to_the_user_message_is_closed_by_it() -> None:
    chat = ChatTemplate(tiny_tokenizers.LLAMA2_CHAT, SPECIALS)
    assert chat.begin((), "system") == "<s>[INST] <<SYS>>\n"
    assert chat.end(("system",)) == ""
    assert chat.begin(("system",), "user") == "\n<</SYS>>\n\n"


def test_a_template_that_moves_a_message_is_refused_when_it_shows() -> None:
    chat = ChatTemplate(tiny_tokenizers.MOVING_SYSTEM_CHAT, SPECIALS)
    assert chat.begin(("system", "user"), "assistant") == ""
    with pytest.raises(RequestError, match="message by message, which this chat template does not allow"):
        chat.begin(("system", "user", "assistant"), "user")


def test_the_end_of_a_message_that_depends_on_the_next_is_refused() -> None:
    grouped = (
        "{% for m in messages %}{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}END"
        "{% endif %}{% endfor %}"
    )
    chat = ChatTemplate(grouped)
    assert chat.end(("tool",)) == "END"
    with pytest.raises(RequestError, match=r"message 1 \(tool\) is followed by '' here"):
        chat.begin(("tool",), "tool")


def test_it_is_written_where_the_next_message_is_known() -> None:
    chat = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% if loop.last or messages[loop.index0 + 1].role != m.role %}END"
        "{% else %}, {% endif %}{% endfor %}"
    )
    assert chat.between(("tool",), "tool") == (", ", "")
    assert chat.between(("tool", "tool"), "user") == ("END", "")
    assert chat.begin(("tool", "tool"), "user") == ""


# In the manner of Qwen 2.5 and of Llama 3.1: where definitions stand, and how results are grouped.
TOOLS_CHAT = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- 'Tools:' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (loop.first and m.role == 'system') %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <b>", "parameters": {"type": "object"}}}]


def _join_known(chat: ChatTemplate, roles: tuple[str, ...], contents: list[str]) -> str:
    """Join as a client does that sends all messages at once."""
    text = chat.begin((), roles[0])
    for index, content in enumerate(contents):
        before = roles[: index + 1]
        text += content + (
            "".join(chat.between(before, roles[index + 1])) if len(roles) > index + 1 else chat.end(before)
        )
    return text


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("opening", [(), ("system",)])
@given(data=st.data())
@settings(max_examples=20)
def test_tools_are_told_of_as_transformers_does(
    reference: Any, tools: Any, opening: tuple[str, ...], data: st.DataObject
) -> None:
    turns = data.draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=5).map(tuple))
    roles = (*opening, *turns)
    contents = [data.draw(CONTENT) for _ in roles]
    chat = ChatTemplate(TOOLS_CHAT, SPECIALS)
    if tools is not None:
        chat = chat.with_tools(json.dumps(tools))
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    whole = reference.apply_chat_template(messages, tools=tools, chat_template=TOOLS_CHAT, tokenize=False)
    assert _join_known(chat, roles, contents) == whole


def test_tools_that_a_template_cannot_tell_of_are_refused() -> None:
    assert ChatTemplate(TOOLS_CHAT).has_tools
    assert not ChatTemplate(tiny_tokenizers.CHATML).has_tools
    with pytest.raises(RequestError, match="does not tell of tools"):
        ChatTemplate(tiny_tokenizers.CHATML).with_tools("[]")
    for bad in ("", "[]", "{}", "[1]", "["):
        with pytest.raises(RequestError, match="tools must be a JSON array of objects"):
            ChatTemplate(TOOLS_CHAT).with_tools(bad)
    with pytest.raises(RequestError, match="tools must be at most 1048576 characters"):
        ChatTemplate(TOOLS_CHAT).with_tools("[" + " " * (1 << 20) + "]")


def test_a_message_whose_introduction_changes_later_is_refused() -> None:
    chat = ChatTemplate("{% for m in messages %}{{ messages | length }}:{{ m.content }};{% endfor %}")
    assert chat.begin((), "user") == "1:"
    with pytest.raises(RequestError, match=r"message 1 \(user\) is introduced by '2:' here"):
        chat.begin(("user",), "user")


def test_white_space_of_blocks_is_trimmed_as_in_transformers(reference: Any) -> None:
    template = "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    written = _join(ChatTemplate(template), ("user",), ["Hi"])
    assert written == _whole(reference, template, ("user",), ["Hi"])


def test_a_role_the_template_does_not_know_is_refused_in_its_own_words() -> None:
    chat = ChatTemplate(tiny_tokenizers.MISTRAL_CHAT, SPECIALS)
    with pytest.raises(RequestError, match="Conversation roles must alternate user/assistant") as caught:
        chat.begin((), "system")
    assert caught.value.kind == "invalid_request"
    with pytest.raises(RequestError, match="must alternate"):
        chat.begin(("user",), "user")


@pytest.mark.parametrize("role", ["", "user<|im_end|>", "us er", "a" * 65, "\u00fcser", "user\n"])
def test_a_role_that_could_forge_a_control_token_is_refused(role: str) -> None:
    with pytest.raises(RequestError, match="role must be a word"):
        ChatTemplate(tiny_tokenizers.CHATML).begin((), role)


@pytest.mark.parametrize(
    "template",
    ["{{ messages[99].content }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}{{ messages[0].content.__init__() }}"],
)
def test_a_template_that_fails_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(template).begin((), "user")
    assert caught.value.kind == "invalid_request"


def test_a_template_that_is_not_jinja_is_refused_at_load() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{% for %}")
    assert caught.value.kind == "unsupported_model"


def test_templates_have_what_transformers_gives_them() -> None:
    now = datetime.datetime(2026, 11, 21)
    template = (
        "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ strftime_now('%d %b %Y') }} {{ {'a': '<é>'} | tojson }}"
        "{{ tools is none }}{{ documents is none }}{{ eos_token }}"
    )
    chat = ChatTemplate(template, SPECIALS, now=now)
    assert chat.end(("user",)) == '21 Nov 2026 {"a": "<é>"}TrueTrue</s>'


def test_a_long_conversation_is_remembered_within_bounds() -> None:
    chat = ChatTemplate(tiny_tokenizers.CHATML)
    roles: tuple[str, ...] = ()
    for _ in range(150):
        roles += ("user", "assistant")
        assert chat.end(roles) == "<|im_end|>\n"
        assert chat.begin(roles, "user") == "<|im_start|>user\n"


@pytest.mark.parametrize("kind", ["string", "named", "jinja", "json"])
def test_the_template_is_found_wherever_models_keep_it(kind: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    config: dict[str, Any] = {"bos_token": {"content": "<s>", "special": True}}
    if kind == "string":
        config["chat_template"] = template
    elif kind == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    elif kind == "jinja":
        config["chat_template"] = "the file wins"
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = load_chat_template(tmp_path)
    assert chat is not None
    assert chat.begin((), "user") == "<s>"


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tiny_tokenizers.gpt2(tmp_path)) is None
