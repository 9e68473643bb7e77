"""What is true of a grammar as a whole: what is inside, whether it is recursive or regular, what it captures."""

from __future__ import annotations

from collections.abc import Iterator

from bough.grammar_nodes import Alt, Capture, Grammar, Json, Lark, Repeat, Rule


def walk(grammar: Grammar) -> Iterator[Grammar]:
    """Yield every grammar inside, this one first, each object once."""
    seen: set[int] = set()
    waiting = [grammar]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(reversed(node.children()))


def recursive_rules(grammar: Grammar) -> frozenset[Rule]:
    """Return the rules inside that can reach themselves."""
    rules = [node for node in walk(grammar) if isinstance(node, Rule)]
    return frozenset(rule for rule in rules if any(node is rule for node in walk_below(rule)))


def walk_below(grammar: Grammar) -> Iterator[Grammar]:
    """Yield every grammar that is reached from this one in one step or more: itself only if it is recursive."""
    seen: set[int] = set()
    waiting = list(grammar.children())
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting.extend(node.children())


def is_regular(grammar: Grammar) -> bool:
    """Return whether a finite automaton knows the grammar: nothing in it is recursive, JSON or Lark source."""
    return not any(isinstance(node, (Json, Lark)) for node in walk(grammar)) and not recursive_rules(grammar)


def has_captures(grammar: Grammar) -> bool:
    """Return whether something inside is captured."""
    return any(isinstance(node, Capture) for node in walk(grammar))


def capture_names(grammar: Grammar) -> dict[str, bool]:
    """Return the names that are captured, each with whether it can be captured more than once."""
    counts: dict[str, int] = {}
    inside_loops = {id(node) for rule in recursive_rules(grammar) for node in walk(rule)}
    _count(grammar, 1, counts, inside_loops, frozenset())
    return {name: number > 1 for name, number in counts.items()}


def _count(
    grammar: Grammar, times: int, counts: dict[str, int], loops: set[int], open_rules: frozenset[Grammar]
) -> None:
    """Add how often each name can be captured, 2 standing for any more."""
    if isinstance(grammar, Rule):
        if grammar in open_rules:
            return
        open_rules |= {grammar}
    if isinstance(grammar, Alt):
        branches: list[dict[str, int]] = []
        for item in grammar.items:
            branches.append({})
            _count(item, times, branches[-1], loops, open_rules)
        for name in dict.fromkeys(name for branch in branches for name in branch):
            counts[name] = counts.get(name, 0) + max(branch.get(name, 0) for branch in branches)
        return
    if isinstance(grammar, Repeat) and grammar.max != 1:
        times = 2
    if isinstance(grammar, Capture):
        counts[grammar.name] = counts.get(grammar.name, 0) + (2 if id(grammar) in loops else times)
    for child in grammar.children():
        _count(child, times, counts, loops, open_rules)
