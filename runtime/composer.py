"""`Composer`: what a request does to its branch: appends text and roles, cuts back, becomes work for the scheduler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Items
from itertools import zip_longest
from typing import Final

from bough.runtime.branch import Branch, Roles
from bough.runtime.grammar.compiler import GrammarCompiler, GrammarKey
from bough.runtime.grammar.constraint import Constraint
from bough.runtime.grammar.healing import PrefixConstraint
from bough.runtime.grammar.matching import GrammarConstraint
from bough.runtime.grammar.vocabulary import MOST_BACK, Vocabulary
from bough.runtime.operation import Operation
from bough.runtime.prompter import Prompter
from bough.runtime.protocol import (
    MAX_CHOICES,
    MAX_ID,
    MAX_PARTS,
    MAX_TEMPERATURE,
    Buffer,
    ChoiceMethod,
    Extend,
    Generate,
    Part,
    RequestError,
    RoleBegin,
    RoleEnd,
    Rollback,
    Score,
    Select,
    Text,
    Tokens,
    Tools,
    decode_tokens,
)
from bough.runtime.selection import Selection, ids_of
from bough.runtime.sequence import Sequence
from bough.runtime.text.tail import TextTail
from bough.runtime.vector import IntArray
from bough.runtime.work import Generation

_PIECE: Final = 1 << 16
"""Characters of text that are tokenised at once, some 10 ms, before it is looked whether the context holds them."""


class Composer:
    """Knows the tokenizer, the template and the model's limits; keeps no state of its own.

    Every method raises RequestError for what the request may not ask; a branch may then be half changed, which is why
    a failed operation poisons it.
    """

    def __init__(
        self,
        prompter: Prompter,
        *,
        vocab_size: int,
        context_len: int,
        seed: int,
        credit: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._prompter = prompter
        self.grammars = grammars or GrammarCompiler(Vocabulary(prompter.tokenizer, vocab_size))
        self._vocab_size = vocab_size
        self._context_len = context_len
        self._seed = seed
        self._credit = credit

    def empty_tail(self) -> TextTail:
        """Return the tail of a branch without any text."""
        return self._prompter.tail()

    def extend(self, branch: Branch, request: Extend, buffers: Items[Buffer]) -> list[str]:
        """Append the parts; return the text that the chat template wrote for each role among them."""
        if len(request.parts) > MAX_PARTS:
            raise RequestError("invalid_request", f"parts must be at most {MAX_PARTS}, got {len(request.parts)}")
        rendered: list[str] = []
        for part, following in zip_longest(request.parts, request.parts[1:]):
            if isinstance(part, RoleBegin | RoleEnd):
                text, roles = self._role(branch.roles, part, following)
                branch.tail.append(text, special=True)
                branch.log.extend(branch.tail.take_stable())
                branch.set_roles(roles)
                branch.set_seam()
                rendered.append(text)
            else:
                self._append(branch, part, buffers)
        branch.log.extend(branch.tail.flush() if request.commit else branch.tail.take_stable())
        self._check_length(branch)
        return rendered

    def _append(self, branch: Branch, part: Text | Tokens | Tools, buffers: Items[Buffer]) -> None:
        match part:
            case Text(text):
                self._append_text(branch, text)
            case Tokens(buffer, replaces):
                token_ids = decode_tokens(buffers, buffer)
                self._check_vocabulary(token_ids)
                branch.log.extend(branch.tail.flush())
                self._take_back(branch, replaces, token_ids)
                branch.log.extend(token_ids)
                branch.tail.follow_tokens()
                branch.set_seam()
            case Tools(definitions):
                if branch.roles.names:
                    raise RequestError("invalid_request", "tools are told of before the first message", field="tools")
                self._prompter.check_tools(definitions)
                branch.set_roles(Roles(tools=definitions))

    def _append_text(self, branch: Branch, text: str) -> None:
        """Append a program's text piece by piece, and refuse it where the context is full.

        A text far beyond the context would otherwise be tokenised whole, while everybody else waits: 13 s for 40 MB.
        """
        for start in range(0, len(text), _PIECE):
            self._prompter.append_text(branch.log, branch.tail, text[start : start + _PIECE])
            if branch.tail.num_pending >= _PIECE:
                branch.log.extend(branch.tail.take_stable())
                self._check_length(branch, more=branch.tail.least_pending, is_part=True)

    def _role(self, roles: Roles, part: RoleBegin | RoleEnd, following: Part | None) -> tuple[str, Roles]:
        """Return what the chat template writes where a message begins or ends, and the roles from there on.

        A message that follows at once is known: what the template writes between the two then belongs to the end.
        """
        names = roles.names
        if isinstance(part, RoleBegin):
            if roles.is_open:
                raise RequestError("invalid_request", f"role {part.role!r} cannot begin inside role {names[-1]!r}")
            begun = "" if roles.is_joined else self._prompter.begin(names, part.role, roles.tools)
            return begun, Roles((*names, part.role), is_open=True, tools=roles.tools)
        if not roles.is_open:
            raise RequestError("invalid_request", "a role cannot end, none is open")
        if not isinstance(following, RoleBegin):
            return self._prompter.end(names, roles.tools), Roles(names, tools=roles.tools)
        end, begin = self._prompter.between(names, following.role, roles.tools)
        is_joined = not begin
        return end, Roles(names, tools=roles.tools, is_joined=is_joined)

    def _take_back(self, branch: Branch, count: int, token_ids: Items[int]) -> None:
        """Take the last `count` tokens off the branch, whose text the tokens that come instead have to begin with."""
        if not count:
            return
        if not 0 <= count < len(branch.log):
            raise RequestError(
                "invalid_request", f"replaces must be at least 0 and below {len(branch.log)}, got {count}"
            )
        kept = len(branch.log) - count
        tokenizer = self._prompter.tokenizer
        taken = tokenizer.decode_bytes(branch.log.array()[kept:].tolist(), at_start=False)
        if not tokenizer.decode_bytes(token_ids, at_start=False).startswith(taken):
            raise RequestError("invalid_request", f"the token ids do not begin with the text {taken!r} they replace")
        branch.take_back(count)

    def _check_vocabulary(self, token_ids: Items[int]) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._vocab_size):
            worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise RequestError(
                "invalid_request", f"token ids must be between 0 and {self._vocab_size - 1}, got {worst}"
            )

    def _check_length(self, branch: Branch, more: int = 0, *, is_part: bool = False) -> None:
        length, limit = len(branch.log) + more, self._context_len
        if length > limit:
            raise RequestError(
                "context_overflow",
                f"the branch has {'at least ' if is_part else ''}{length} tokens, the model's context holds {limit}",
                num_tokens=length,
                context_len=limit,
            )

    def rollback(self, branch: Branch, request: Rollback) -> None:
        """Cut the branch back to the length asked for."""
        if not 0 <= request.length <= branch.longest:
            raise RequestError(
                "invalid_request", f"length must be between 0 and {branch.longest}, got {request.length}"
            )
        branch.rollback(request.length, self._prompter.tail(at_start=request.length == 0))

    def wanted_grammar(self, branch: Branch, request: Generate) -> GrammarKey | None:
        """Return which grammar has to be compiled for this generate, if any; all waiting text becomes tokens now."""
        request.params.check()
        branch.log.extend(branch.tail.flush())
        if request.grammar is None:
            return None
        request.grammar.check()
        taken = self._healed(branch, request)
        before = self._prompter.tokenizer.decode_bytes(taken, at_start=False).decode()
        return GrammarKey(request.grammar.kind, request.grammar.source, before)

    def generation(self, operation: Operation, branch: Branch, request: Generate) -> Generation:
        """Return the work of a generate on this branch, once its grammar is compiled."""
        params = request.params
        key = self.wanted_grammar(branch, request)
        self._check_vocabulary([*params.stop_token_ids, *params.logit_bias])
        tokens = branch.log.array()
        if not len(tokens):
            raise RequestError("invalid_request", "generate needs at least one token of text before it")
        self._check_length(branch, more=1)
        branch.num_draws += 1
        seed = params.seed if params.seed is not None else self._derive_seed(branch)
        taken = self._healed(branch, request)
        sequence = Sequence(
            tokens[: len(tokens) - len(taken)],
            namespace=operation.session.namespace,
            params=params,
            seed=seed,
            forbidden_early=(*self._prompter.tokenizer.eos_ids, *params.stop_token_ids) if params.min_tokens else (),
            constraint=self._constraint(request, key, taken, self._context_len - len(tokens)),
            most_len=min(self._context_len, len(tokens) + params.max_tokens),
        )
        generation = Generation(operation, request, sequence, self._prompter.tokenizer, self._context_len, taken)
        generation.credit = self._credit
        return generation

    def _healed(self, branch: Branch, request: Generate) -> list[int]:
        """Return the ids at the branch's end that are drawn again; its tail is empty."""
        if not request.heal:
            return []
        ids: list[int] = branch.log.last(MOST_BACK + 1).tolist()
        length, waiting, _ = branch.seams or (0, 0, None)
        while waiting > 0 and length < len(branch.log):  # tokens that hold what no program wrote as text
            waiting -= len(self._prompter.tokenizer.token_bytes(branch.log.at(length)))
            length += 1
        count = self.grammars.vocabulary.back_off(ids, len(branch.log) - length)
        taken = ids[len(ids) - count :]
        try:  # a grammar is of characters: one that the tokens cut in two cannot be part of it
            self._prompter.tokenizer.decode_bytes(taken, at_start=False).decode()
        except UnicodeDecodeError:
            return []
        return taken

    def _constraint(self, request: Generate, key: GrammarKey | None, taken: list[int], room: int) -> Constraint | None:
        vocabulary = self.grammars.vocabulary
        if request.grammar is not None and key is not None:
            matcher = self.grammars.find(key)
            assert matcher is not None, "the engine waits for a grammar before it starts what needs it"
            budget = min(request.params.max_tokens, room)
            ignores_eos = request.params.ignore_eos
            return GrammarConstraint(
                request.grammar,
                matcher,
                vocabulary,
                budget,
                ignore_eos=ignores_eos,
                find_way=lambda: self.grammars.way_to_end(key),
            )
        return PrefixConstraint(vocabulary, taken) if taken else None

    def follow_choice(self, branch: Branch, choice_ids: list[int]) -> None:
        """Append the choice that a selection decided for."""
        branch.log.extend(choice_ids)
        branch.tail = self._prompter.tail(at_start=False)
        branch.set_seam()

    def _derive_seed(self, branch: Branch) -> int:
        """A seed for the next draw of a branch, the same whenever the same program runs with the same runtime seed."""
        key = ",".join(map(str, (self._seed, *branch.path, branch.num_draws)))
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") & MAX_ID

    def selection(self, operation: Operation, branch: Branch, request: Select | Score) -> Selection:
        """Return the work of a select or score on this branch, which itself is not changed yet."""
        choices = request.choices
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise RequestError("invalid_request", f"choices must be between 1 and {MAX_CHOICES}, got {len(choices)}")
        if any(not choice for choice in choices):
            raise RequestError("invalid_request", "choices must not be empty strings")
        if len(set(choices)) != len(choices):
            raise RequestError("invalid_request", "choices must be distinct")
        branch.log.extend(branch.tail.take_stable())
        choice_ids, skip = self._prompter.continuations(branch.tail, choices)
        context = branch.log.array()
        if not len(context) + skip:
            raise RequestError("invalid_request", "select needs at least one token of text before it")
        self._check_length(branch, more=max(map(len, choice_ids)))
        seed = 0
        if isinstance(request, Select) and request.temperature != 0:
            if not 0 <= request.temperature <= MAX_TEMPERATURE:
                limit = f"temperature must be between 0 and {MAX_TEMPERATURE:g}, got {request.temperature}"
                raise RequestError("invalid_request", limit, field="temperature")
            branch.num_draws += 1
            seed = self._derive_seed(branch) if request.seed is None else request.seed
            if not 0 <= seed <= MAX_ID:
                raise RequestError("invalid_request", f"seed must be between 0 and {MAX_ID}, got {seed}", field="seed")
        return Selection(
            operation,
            request,
            ids_of(context, choice_ids[0][:skip]),
            choice_ids,
            skip,
            self._prompter.tokenizer,
            base=self._base(request.method),
            seed=seed,
        )

    def _base(self, method: ChoiceMethod) -> IntArray | None:
        """Return what stands in the context's place for unconditional log-probabilities, None if none are needed."""
        if method == "unconditional_likelihood_normalized":
            return ids_of(())
        return ids_of([self._prompter.neutral_id()]) if method == "pmi" else None
