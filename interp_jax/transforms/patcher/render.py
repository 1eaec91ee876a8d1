"""The change of upstream's text that a match calls for.

The text of the replacement (fill.py) goes where the match was: an expression gets parentheses where precedence asks
for them, statements are indented like those they replace. Where statements share a line with others (`if x: a; b`)
and the replacement does not fit on a line, the line is broken up.

>>> from interp_jax.transforms.patcher.match import find
>>> source = SourceText("y = a * f(b + c)")
>>> patch = Patch("f($x)", "$x - 1")
>>> edit = render(patch, find(patch.pattern, source.parse())[0], source)
>>> source.cut(edit.start, edit.end), edit.text
('f(b + c)', '(b + c - 1)')

Sharp edges: an `elif` is an `if` inside an `else`, and is matched and replaced as one. A block that loses its last
statement gets a `pass`.

Source: interp_jax.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.fill import filled_expression, filled_nodes, filled_text, wants_parentheses
from interp_jax.transforms.patcher.match import Match
from interp_jax.transforms.patcher.patterns import Patch, shown
from interp_jax.transforms.patcher.syntax import Place, SourceText, Substitution


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of upstream's text.

    Args:
        start: Byte offset of the first byte replaced.
        end: Byte offset after the last byte replaced.
        text: What comes there.
        careful: The same with parentheses, for use should `text` turn out to be read differently.
        patch: The patch it comes from.
        nodes: The nodes it replaces.
        place: Where the first of them hangs.
        substitution: What it does to the syntax tree.
    """

    start: int
    end: int
    text: str
    careful: str
    patch: Patch
    nodes: Sequence[ast.AST]
    place: Place | None
    substitution: Substitution


def render(patch: Patch, match: Match, source: SourceText) -> Edit:
    """The change of upstream's text that a match calls for.

    Args:
        patch: The patch.
        match: Where its pattern was found.
        source: Upstream's text.

    Returns:
        The edit.

    Raises:
        PatchError: The replacement cannot be written there.
    """
    new = filled_nodes(patch.replacement.nodes, match.captures)
    if patch.pattern.is_expression:
        return _expression_edit(patch, match, source, new[0])
    return _statements_edit(patch, match, source, new)


def _expression_edit(patch: Patch, match: Match, source: SourceText, new: ast.expr) -> Edit:
    (node,) = match.nodes
    start, end = source.span(node)
    if not source.is_text_of(node, source.cut(start, end)):
        raise PatchError(
            four_part(
                f"Pattern {shown(patch.before)} matches inside an f-string on line {source.line(start)}",
                expected="code outside f-strings: before Python 3.12 their insides have no exact place in the text.",
                fix="match the whole f-string.",
            )
        )
    line = source.before(start) + "x"
    plain = filled_expression(patch.replacement, match, source, indent=line[: len(line) - len(line.lstrip())])
    careful = f"({plain})"
    is_needed = wants_parentheses(new, match.place, plain) and not _has_parentheses(source, start, end, match.place)
    if is_needed or _takes_parentheses(node, match.place, source):
        plain = careful
    plain, careful = (_spaced(text, source, start, end) for text in (plain, careful))
    return Edit(start, end, plain, careful, patch, match.nodes, match.place, {node: [new]})


def _has_parentheses(source: SourceText, start: int, end: int, place: Place | None) -> bool:
    """Whether upstream's text has parentheses of its own right around an expression."""
    if place is not None and isinstance(place.parent, (ast.Call, ast.ClassDef)) and place.field != "func":
        return False
    return source.data[:start].rstrip()[-1:] == b"(" and source.data[end:].lstrip()[:1] == b")"


def _takes_parentheses(node: ast.AST, place: Place | None, source: SourceText) -> bool:
    """Whether the text of a node is that of `f(x for x in y)` from the parenthesis on, which the call needs."""
    call = place.parent if place is not None else None
    return (
        isinstance(node, ast.GeneratorExp)
        and isinstance(call, ast.Call)
        and node is not call.func
        and source.span(call)[1] == source.span(node)[1]
    )


def _spaced(text: str, source: SourceText, start: int, end: int) -> str:
    """Text with spaces where it would run into a neighbouring word: `return(a)` becomes `return b`."""
    left = source.data[max(start - 4, 0) : start].decode(errors="ignore")[-1:]
    right = source.data[end : end + 4].decode(errors="ignore")[:1]

    def is_word(a: str, b: str) -> bool:
        return bool(a and b) and f"x{a}".isidentifier() and f"x{b}".isidentifier()

    return " " * is_word(left, text[:1]) + text + " " * is_word(text[-1:], right)


def _statements_edit(patch: Patch, match: Match, source: SourceText, new: list[ast.AST]) -> Edit:
    start, end = source.span(match.nodes[0])[0], source.span(match.nodes[-1])[1]
    place = match.place
    is_emptied = place is not None and len(getattr(place.parent, place.field)) == len(match.nodes)
    left = source.before(start)
    has_own_lines = not left.strip() and not source.after(end).lstrip().startswith(";")
    needs_pass = not new and (is_emptied or not has_own_lines)
    if needs_pass:
        new = [ast.Pass()]

    def text(indent: str) -> str:
        body = filled_text(patch.replacement, match, source, indent=indent)
        return "\n".join(filter(None, [body, (indent if body else "") + "pass"])) if needs_pass else body

    if isinstance(match.nodes[0], ast.If) and source.data[start : start + 4] == b"elif":
        continued = text(left)
        is_if = len(new) == 1 and isinstance(new[0], ast.If) and continued.startswith("if")
        new_text = f"el{continued}" if is_if else f"else:\n{left}    {text(left + '    ')}"
    elif has_own_lines:
        new_text = text(left)
    elif "\n" not in text("") and "#" not in text("") and not any(hasattr(node, "body") for node in new):
        new_text = text("")
    else:
        start, end, new_text = _broken_up(match, source, text)
    substitution: Substitution = {**dict.fromkeys(match.nodes, ()), match.nodes[0]: new}
    return Edit(start, end, new_text, new_text, patch, match.nodes, place, substitution)


def _broken_up(match: Match, source: SourceText, text: Callable[[str], str]) -> tuple[int, int, str]:
    """Span and text for statements that share a line with others: each gets lines of its own."""
    assert match.place is not None  # a definition that is itself the member never shares its line
    parent, field, index = match.place
    block = getattr(parent, field)
    first = index = index or 0
    last = index + len(match.nodes) - 1
    while first > 0 and _on_one_line(source, block[first - 1], block[first]):
        first -= 1
    while last < len(block) - 1 and _on_one_line(source, block[last], block[last + 1]):
        last += 1
    start, end = source.span(block[first])[0], source.span(block[last])[1]
    left = source.before(start)
    header = source.before(source.start(parent)) if left.strip() else left
    indent = header[: len(header) - len(header.lstrip())] + ("    " if left.strip() else "")
    pieces = [source.cut(*source.span(node)) for node in block[first:index]]
    pieces.append(text(indent))
    pieces.extend(source.cut(*source.span(node)) for node in block[index + len(match.nodes) : last + 1])
    rest = source.after(end)
    if rest.lstrip().startswith(";"):
        end += len(rest) - len(rest.lstrip()) + 1
    joined = f"\n{indent}".join(pieces)
    return start, end, f"\n{indent}{joined}" if left.strip() else joined


def _on_one_line(source: SourceText, a: ast.stmt, b: ast.stmt) -> bool:
    return source.line(source.span(a)[1]) == source.line(source.span(b)[0])
