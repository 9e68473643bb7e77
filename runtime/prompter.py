"""`Prompter`: puts text and roles onto a branch as token ids, with the model's tokenizer and chat template."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from bough.runtime.protocol import RequestError
from bough.runtime.text.chat import ChatTemplate
from bough.runtime.text.tail import TextTail
from bough.runtime.text.tokenizer import Tokenizer
from bough.runtime.token_log import TokenLog

MAX_TOOL_SETS: Final = 64
"""Sets of tools whose renderings are remembered."""


class Prompter:
    """Tokenises what programs append. Text is never read as a special token; what the template writes is."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None, model: str) -> None:
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        self._model = model
        self._with_tools: OrderedDict[str, ChatTemplate] = OrderedDict()

    @property
    def has_tools(self) -> bool:
        """Whether the chat template tells of tools."""
        return self._chat_template is not None and self._chat_template.has_tools

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def tail(self, *, at_start: bool = True) -> TextTail:
        """Return an empty tail; `at_start`: no token comes before it."""
        return TextTail(self.tokenizer, at_start=at_start)

    def neutral_id(self) -> int:
        """Return the token before a text of which nothing is known: the model's BOS, else its first EOS."""
        bos = self.tokenizer.bos_id
        if bos is None and not self.tokenizer.eos_ids:
            raise RequestError(
                "invalid_request", "method pmi needs a model with a BOS or EOS token", field="method", value="pmi"
            )
        return self.tokenizer.eos_ids[0] if bos is None else bos

    def append_text(self, log: TokenLog, tail: TextTail, text: str) -> None:
        """Append a program's text; at the very beginning the model's BOS goes before it, where it wants one."""
        if not text:
            return
        if not len(log) and tail.is_empty and self.tokenizer.adds_bos and self.tokenizer.bos_id is not None:
            log.extend([self.tokenizer.bos_id])
        tail.append(text)

    def begin(self, roles: tuple[str, ...], role: str, tools: str = "") -> str:
        """Return what the template writes before the content of a message of `role` that follows `roles`."""
        return self._template(tools).begin(roles, role)

    def end(self, roles: tuple[str, ...], tools: str = "") -> str:
        """Return what the template writes after the content of the last message of `roles`."""
        return self._template(tools).end(roles)

    def between(self, roles: tuple[str, ...], role: str, tools: str = "") -> tuple[str, str]:
        """Return what the template writes between the last message of `roles` and one of `role`: its end, the begin."""
        return self._template(tools).between(roles, role)

    def check_tools(self, tools: str) -> None:
        """Raise RequestError if the model's template cannot tell of these tools."""
        self._template(tools)

    def _template(self, tools: str) -> ChatTemplate:
        if self._chat_template is None:
            raise RequestError(
                "invalid_request",
                f"model {self._model} has no chat template, so roles cannot be rendered: use plain text",
            )
        if not tools:
            return self._chat_template
        template = self._with_tools.get(tools)
        if template is None:
            template = self._with_tools[tools] = self._chat_template.with_tools(tools)
            if len(self._with_tools) > MAX_TOOL_SETS:
                self._with_tools.popitem(last=False)
        return template

    def continuations(self, tail: TextTail, choices: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of the waiting text followed by each choice, and how many leading ids are not the choice's.

        Waiting text and choice are tokenised together, so that the seam between them is where the tokenizer puts it.
        Leading ids that lie within the waiting text and are the same for all choices belong to the prompt.
        """
        continued: list[list[int]] = []
        for choice in choices:
            copy = tail.copy()
            copy.append(choice)
            continued.append(copy.flush())
        # Counted in the bytes of tokens, not of text: SentencePiece puts a space of its own before a first word.
        left = sum(len(self.tokenizer.token_bytes(token)) for token in tail.copy().flush())
        skip = 0
        for ids in zip(*continued, strict=False):
            left -= len(self.tokenizer.token_bytes(ids[0]))
            if left < 0 or len(set(ids)) > 1:
                break
            skip += 1
        return continued, min(skip, *(len(ids) - 1 for ids in continued))
