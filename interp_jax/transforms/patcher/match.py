"""Where a pattern occurs in a syntax tree, and where it almost does.

Nodes are compared with nodes: comments, layout and quotes play no part, and a string constant matches no code. A
run of statements matches anywhere inside one block. `$$` at the end of such a run reaches to the end of the block,
at its start to the start; elsewhere it is as short as it can be.

>>> from interp_jax.transforms.patcher.patterns import parse
>>> tree = ast.parse("y = f(a, 1) + f(b, 2)")
>>> [found.captures["x"].id for found in find(parse("f($x, 1)"), tree)]
['a']
>>> near_misses(parse("g(b, 2)"), tree)[0].difference
'upstream has `f` where the pattern has `g`'

Sharp edges: a run matches once per statement it can start at. Annotations count: `x: int = 3` is not `x = 3`.

Source: interp_jax.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from interp_jax.transforms.patcher.patterns import Pattern, any_name, run_name, shown
from interp_jax.transforms.patcher.syntax import DEFS, Place, is_block, normal, walk

# What placeholders stand for: an expression or bare name for `$name`, statements for `$$name`.
Capture: TypeAlias = "ast.expr | str | Sequence[ast.stmt]"
Captures: TypeAlias = Mapping[str, Any]

_IGNORED = frozenset({"ctx", "kind", "type_comment"})


@dataclass(frozen=True, eq=False)
class Match:
    """One place where a pattern occurs.

    Args:
        nodes: One expression, or the run of statements.
        place: Where the first of them hangs; None for the root itself.
        captures: What the placeholders stand for.
    """

    nodes: Sequence[ast.AST]
    place: Place | None
    captures: Captures


class NearMiss(NamedTuple):
    """Code that resembles a pattern: how much (0 to 1), which node, and what differs first."""

    likeness: float
    node: ast.AST
    difference: str


def find(pattern: Pattern, root: ast.AST) -> list[Match]:
    """All places where a pattern occurs at or below a node, in the order of the text.

    Args:
        pattern: What to find.
        root: Where to look. Decorators of the root itself are not looked at.

    Returns:
        The matches, which may overlap.
    """
    found = []
    if pattern.is_expression:
        for node, place in _inside(root):
            if isinstance(node, ast.expr):
                for captures in _node(pattern.nodes[0], node, {}):
                    found.append(Match([node], place, captures))
                    break
        return found
    for parent, field, block in _blocks(root):
        for start in range(len(block)):
            matched = next(_run(pattern.nodes, block, start, {}), None)
            if matched is not None:
                end, captures = matched
                place = None if parent is None else Place(parent, field, start)
                found.append(Match(block[start:end], place, captures))
    return sorted(found, key=lambda match: (match.nodes[0].lineno, match.nodes[0].col_offset))  # type: ignore[attr-defined]


def _inside(root: ast.AST) -> Iterator[tuple[ast.AST, Place | None]]:
    own_decorators = set(getattr(root, "decorator_list", ()))
    if not own_decorators:
        yield from walk(root)
        return
    yield root, None
    for field, value in ast.iter_fields(root):
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, ast.AST) and item not in own_decorators:
                yield from walk(item, Place(root, field, index if isinstance(value, list) else None))


def _blocks(root: ast.AST) -> Iterator[tuple[ast.AST | None, str, list[ast.stmt]]]:
    """Every list of statements at or below a node; a function itself counts as a block of one."""
    if isinstance(root, DEFS):
        yield None, "", [root]
    for node, _ in _inside(root):
        for field, value in ast.iter_fields(node):
            if is_block(value):
                yield node, field, value


def _run(
    patterns: Sequence[Any], block: Sequence[ast.stmt], start: int, captures: Captures
) -> Iterator[tuple[int, Captures]]:
    """Ways a run of statements matches from `start` on: the index after its end, and the captures."""
    if run_name(patterns[0]) is not None and start > 0:
        return
    ends: Sequence[int] = range(start, len(block) + 1)
    if run_name(patterns[-1]) is not None:
        ends = [len(block)]
    elif all(run_name(pattern) is None for pattern in patterns):
        ends = [start + len(patterns)]
    for end in ends:
        if end > start:
            for found in _list(patterns, block[start:end], captures):
                yield end, found


def _node(pattern: Any, node: Any, captures: Captures) -> Iterator[Captures]:
    """All ways to match a node, identifier or list with a part of a pattern."""
    name = any_name(pattern)
    if name is not None:
        # Neither is an expression in its own right.
        if isinstance(node, (ast.expr, str)) and not isinstance(node, (ast.Starred, ast.Slice)):
            yield from _bind(name, node, captures)
        return
    if isinstance(pattern, list):
        if isinstance(node, list):
            yield from _list(pattern, node, captures)
        return
    if type(pattern) is not type(node):
        return
    if not isinstance(pattern, ast.AST):
        # By their text, because 1 == True and 0.0 == -0.0.
        if repr(pattern) == repr(node):
            yield captures
        return
    fields = [field for field in pattern._fields if field not in _IGNORED]
    yield from _fields(pattern, node, fields, captures)


def _fields(pattern: ast.AST, node: ast.AST, fields: Sequence[str], captures: Captures) -> Iterator[Captures]:
    if not fields:
        yield captures
        return
    field = fields[0]
    for found in _node(getattr(pattern, field, None), getattr(node, field, None), captures):
        yield from _fields(pattern, node, fields[1:], found)


def _list(patterns: Sequence[Any], nodes: Sequence[Any], captures: Captures) -> Iterator[Captures]:
    if not patterns:
        if not nodes:
            yield captures
        return
    run = run_name(patterns[0])
    if run is not None:
        for length in range(len(nodes) + 1):
            for found in _bind(run, list(nodes[:length]), captures):
                yield from _list(patterns[1:], nodes[length:], found)
    elif nodes:
        for found in _node(patterns[0], nodes[0], captures):
            yield from _list(patterns[1:], nodes[1:], found)


def _bind(name: str, value: Any, captures: Captures) -> Iterator[Captures]:
    if name not in captures:
        yield {**captures, name: value}
    elif _canonical(captures[name]) == _canonical(value):
        yield captures


def _canonical(value: Any) -> Any:
    """A capture's normal form; a bare name is the same code as an expression that is just this name."""
    if isinstance(value, list):
        return tuple(map(normal, value))
    return normal(ast.Name(value)) if isinstance(value, str) else normal(value)


def near_misses(pattern: Pattern, root: ast.AST, *, limit: int = 3) -> list[NearMiss]:
    """The code at or below a node that is most like a pattern.

    Args:
        pattern: What was to be found.
        root: Where it was looked for.
        limit: How many to return at most.

    Returns:
        Likest first; empty when nothing is like it.
    """
    candidates: list[NearMiss] = []
    if pattern.is_expression:
        for node, _ in _inside(root):
            if isinstance(node, ast.expr):
                candidates.append(_likeness(pattern.nodes, [node]))
    else:
        wanted = [node for node in pattern.nodes if run_name(node) is None]
        for _, _, block in _blocks(root):
            candidates.extend(_likeness(wanted, block[i : i + len(wanted)]) for i in range(len(block)))
    near = sorted((miss for miss in candidates if miss.likeness > 0.4), key=lambda miss: -miss.likeness)
    return near[:limit]


def _likeness(patterns: Sequence[Any], nodes: Sequence[ast.AST]) -> NearMiss:
    differences: list[str] = []
    equal, total = _compare(list(patterns), list(nodes), differences)
    return NearMiss(equal / max(total, 1), nodes[0], differences[0] if differences else "a repeated $name differs")


def _compare(pattern: Any, node: Any, differences: list[str]) -> tuple[int, int]:
    """How many of a pattern's parts a node has; `differences` collects in words what differs."""
    if any_name(pattern) is not None or run_name(pattern) is not None:
        return 1, 1
    if isinstance(pattern, list) and isinstance(node, list):
        return _compare_lists(pattern, node, differences)
    if type(pattern) is not type(node):
        differences.append(f"upstream has {_words(node)} where the pattern has {_words(pattern)}")
        return 0, _size(pattern)
    if not isinstance(pattern, ast.AST):
        return (1, 1) if repr(pattern) == repr(node) else (0, 1)
    equal, total = 1, 1
    before = len(differences)
    for field in pattern._fields:
        if field not in _IGNORED:
            sub_equal, sub_total = _compare(getattr(pattern, field, None), getattr(node, field, None), differences)
            equal, total = equal + sub_equal, total + sub_total
    if equal < total and len(differences) == before:
        differences.append(f"upstream has {_words(node)} where the pattern has {_words(pattern)}")
    return equal, total


def _compare_lists(patterns: list[Any], nodes: list[Any], differences: list[str]) -> tuple[int, int]:
    """Compares item by item from the front, and from a `$$` on from the back."""
    run = next((i for i, item in enumerate(patterns) if run_name(item) is not None), None)
    if run is not None:
        front = _compare_lists(patterns[:run], nodes[:run], differences)
        rest = [item for item in patterns[run:] if run_name(item) is None]
        back = _compare_lists(rest, nodes[run:][max(len(nodes) - run - len(rest), 0) :], differences)
        return front[0] + back[0], front[1] + back[1]
    equal, total = 0, 0
    for pattern, node in zip(patterns, nodes, strict=False):
        sub_equal, sub_total = _compare(pattern, node, differences)
        equal, total = equal + sub_equal, total + sub_total
    missing, extra = patterns[len(nodes) :], nodes[len(patterns) :]
    if missing or extra:
        absent = f"nothing where the pattern has {_words(missing)}" if missing else f"{_words(extra)} besides"
        differences.append(f"upstream has {absent}")
        total += sum(map(_size, missing)) + len(extra)
    return equal, total


def _size(pattern: Any) -> int:
    if isinstance(pattern, list):
        return sum(map(_size, pattern))
    if not isinstance(pattern, ast.AST):
        return 1
    return sum(not isinstance(node, ast.expr_context) for node in ast.walk(pattern))


def _words(value: Any) -> str:
    """A part of a pattern or of upstream in words."""
    if value is None or value == []:
        return "nothing"
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value[:3]) + (", ..." if len(value) > 3 else "")
    if isinstance(value, (ast.operator, ast.unaryop, ast.cmpop, ast.boolop)):
        return type(value).__name__
    return shown(value, limit=60) if isinstance(value, (ast.AST, str)) else shown(repr(value))
