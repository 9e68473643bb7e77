"""The `with` forms: a message of a role, and a named stretch of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bough.errors import InvalidRequest
from bough.expressions import RoleEnd, role, role_begin
from bough.strands import Point, items_after
from bough.variables import Span

if TYPE_CHECKING:
    from bough.expressions import Expression
    from bough.state import State


class RoleScope:
    """`with s.user(): ...` opens a message and closes it on the way out, also when an exception passes through."""

    __slots__ = ("_role", "_state")

    def __init__(self, state: State, name: str, expr: str | Expression | None) -> None:
        self._state = state
        self._role = role_begin(name)
        if expr is not None:
            state += role(name, expr)

    def __enter__(self) -> State:
        self._state += self._role
        return self._state

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        interpreter = self._state._interpreter
        if kind is None:
            self._state += RoleEnd(self._role.role)
        elif interpreter.role == self._role.role and not interpreter.closed:
            self._state += RoleEnd()


class VarScope:
    """`with s.var_scope("x"): ...` makes `s["x"]` the text appended inside."""

    __slots__ = ("_name", "_start", "_state")

    def __init__(self, state: State, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"a variable's name must be a text that is not empty, got {name!r}", field="name")
        self._state = state
        self._name = name
        self._start: Point | None = None

    def __enter__(self) -> State:
        strand = self._state._interpreter.strand
        self._start = strand, len(strand.items)
        return self._state

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        interpreter = self._state._interpreter
        assert self._start is not None, "a block is entered before it is left"
        inside = items_after(interpreter.trunk, interpreter.strand, self._start)
        # None: the state was rewound to before the block, which then began where it went on.
        self._state[self._name] = Span(interpreter.strand.items[:] if inside is None else inside)
