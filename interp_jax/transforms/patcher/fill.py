"""A replacement with its placeholders filled: as a syntax tree, and as text.

The tree says what the code must be; the text is upstream's own wherever something was captured, comments included.
Lines that start inside a string keep their indentation, all others get that of the place they go to.

>>> from interp_jax.transforms.patcher.match import find
>>> from interp_jax.transforms.patcher.patterns import Patch
>>> patch = Patch("with a: $$body", "if b:\\n    $$body")
>>> source = SourceText("with a:\\n  f( 1 )\\n  g()  # later\\n")
>>> match = find(patch.pattern, source.parse())[0]
>>> print(filled_text(patch.replacement, match, source, indent="  "))
if b:
      f( 1 )
      g()

Sharp edges: a captured run takes along the comments above it and the comment behind it, as far as they lie inside
the match; here `# later` stays where it is.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Collection, Sequence
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.match import Captures, Match
from interp_jax.transforms.patcher.patterns import Pattern, any_name, run_name, shown
from interp_jax.transforms.patcher.precedence import needs_parentheses
from interp_jax.transforms.patcher.syntax import Place, SourceText, lines_in_strings, parents, tokens_of


def filled_nodes(nodes: Sequence[Any], captures: Captures) -> list[Any]:
    """The nodes of a replacement with captured nodes in the places of the placeholders.

    Args:
        nodes: Nodes, or values of their fields.
        captures: What the placeholders stand for.

    Returns:
        New nodes; captured ones are not copied.

    Raises:
        PatchError: Something other than a name is to stand where Python wants a name.
    """
    out: list[Any] = []
    for node in nodes:
        run, name = run_name(node), any_name(node)
        if run is not None:
            out.extend(captures[run])
        elif name is None:
            out.append(_filled_node(node, captures) if isinstance(node, ast.AST) else node)
        elif isinstance(node, str):
            out.append(_bare_name(name, captures))
        else:
            value = captures[name]
            out.append(ast.Name(value, ast.Load()) if isinstance(value, str) else value)
    return out


def _filled_node(node: ast.AST, captures: Captures) -> ast.AST:
    fields: dict[str, Any] = {}
    for field, value in ast.iter_fields(node):
        if isinstance(value, list):
            fields[field] = filled_nodes(value, captures)
            if value and not fields[field]:
                fields[field] = [ast.Pass()]
        else:
            (fields[field],) = filled_nodes([value], captures)
    return type(node)(**fields)


def _bare_name(name: str, captures: Captures) -> str:
    value = captures[name]
    if isinstance(value, (str, ast.Name)):
        return value if isinstance(value, str) else value.id
    raise PatchError(
        four_part(
            f"${name} stands for {shown(value)}, but the replacement uses it as a bare name",
            expected="a name where Python wants one: of an attribute, argument, keyword or definition.",
            fix="use the placeholder as an expression, or match a name with it.",
        )
    )


def filled_text(pattern: Pattern, match: Match, source: SourceText, *, indent: str) -> str:
    """The text of a replacement made of statements.

    Args:
        pattern: The replacement.
        match: Where its pattern was found.
        source: Upstream's text.
        indent: What all lines but the first start with.

    Returns:
        The text, without indentation of its first line.
    """
    own = pattern.source
    edits, dropped = _placeholder_edits(pattern, match, source, indent)
    inside = lines_in_strings(own.text)
    for line in range(1, own.text.count("\n") + 2):
        at = own.line_start(line)
        if line in dropped:
            edits.append((at, own.line_start(line + 1), ""))
        elif line not in inside and own.after(at).strip():
            edits.append((at, at, indent))
    return _edited(own, edits, 0, len(own.data)).strip("\n").removeprefix(indent)


def filled_expression(pattern: Pattern, match: Match, source: SourceText, *, indent: str) -> str:
    """The text of a replacement that is an expression; arguments as for `filled_text`."""
    own = pattern.source
    edits, _ = _placeholder_edits(pattern, match, source, "")
    start, end = own.span(pattern.nodes[0])
    inside = lines_in_strings(own.text)
    for line in range(own.line(start) + 1, own.line(end) + 1):
        if line not in inside:
            edits.append((own.line_start(line), own.line_start(line), indent))
    return _edited(own, edits, start, end)


_Edits = list[tuple[int, int, str]]


def _edited(own: SourceText, edits: _Edits, start: int, end: int) -> str:
    out, at = [], start
    for edit_start, edit_end, text in sorted(edits, key=lambda edit: edit[:2]):
        if at <= edit_start and edit_end <= end:
            out += [own.cut(at, edit_start), text]
            at = edit_end
    return "".join(out) + own.cut(at, end)


def _placeholder_edits(
    pattern: Pattern, match: Match, source: SourceText, indent: str
) -> tuple[_Edits, Collection[int]]:
    """What to put for the placeholders of a replacement, and its lines that empty runs leave over."""
    own, captures = pattern.source, match.captures
    tree = ast.Module(list(pattern.nodes), [])  # type: ignore[arg-type]
    places = parents(tree)
    edits: _Edits = []
    dropped: set[int] = set()
    tokens = _placeholders(own)
    for node, place in places.items():
        run, name = run_name(node), any_name(node)
        if run is not None:
            start, end = own.span(node)
            has_own_line = not own.before(start).strip()
            is_needed = len(getattr(place.parent, place.field)) == 1 and not isinstance(place.parent, ast.Module)
            if captures[run]:
                edits.append((start, end, _captured_run(captures[run], match, source, own.before(start), indent)))
            elif is_needed or not has_own_line:
                edits.append((start, end, "pass"))
            else:
                dropped.add(own.line(start))
        elif name is not None and isinstance(node, ast.Name):
            start, end = own.span(node)
            _, is_in_brackets = tokens[start]
            edits.append((start, end, _captured_expression(captures[name], place, source, is_in_brackets)))
    starts = {start for start, _, _ in edits}
    for at, (identifier, _) in tokens.items():
        # What is left Python read as bare names: attributes, arguments, keywords, definitions.
        name = any_name(identifier)
        if name is not None and at not in starts:
            edits.append((at, at + len(identifier.encode()), _bare_name(name, captures)))
    return edits, dropped


def _placeholders(own: SourceText) -> dict[int, tuple[str, bool]]:
    """Placeholders by their byte offset: the identifier that stands for them, and whether brackets are around it."""
    rows = own.text.split("\n")
    found: dict[int, tuple[str, bool]] = {}
    depth = 0
    for token in tokens_of(own.text):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        elif token.type == tokenize.NAME and any_name(token.string) is not None:
            row, column = token.start
            at = own.line_start(row) + len(rows[row - 1][:column].encode())
            found[at] = (token.string, depth > 0)
    return found


def _captured_expression(value: Any, place: Place, source: SourceText, is_in_brackets: bool) -> str:
    if isinstance(value, str):
        return value
    text = source.text_of(value)
    is_root = isinstance(place.parent, ast.Module)
    is_wanted = wants_parentheses(value, None if is_root else place, text, is_in_brackets=is_in_brackets)
    return f"({text})" if is_wanted else text


def wants_parentheses(node: ast.AST, place: Place | None, text: str, *, is_in_brackets: bool = False) -> bool:
    """Whether the text of an expression must be parenthesised at a place, because of precedence or line breaks."""
    if "\n" in text and not is_in_brackets and not _stands_alone(text):
        return True
    return needs_parentheses(node, place) and not (isinstance(node, ast.Tuple) and text.startswith("("))


def _stands_alone(text: str) -> bool:
    """Whether an expression's line breaks are all inside brackets."""
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True


def _captured_run(statements: Sequence[ast.stmt], match: Match, source: SourceText, left: str, indent: str) -> str:
    """Upstream's text of a run of statements with its comments; `left` is what stands before it in the replacement."""
    first, last = source.start(match.nodes[0]), source.span(match.nodes[-1])[1]
    start, end = source.span(statements[0])[0], source.span(statements[-1])[1]
    old = source.before(start)
    while not old.strip():
        above = source.line_start(source.line(start) - 1) if source.line(start) > 1 else -1
        comment = source.after(above) if above >= first else ""
        if not comment.lstrip().startswith("#"):
            break
        start = above + len(comment) - len(comment.lstrip())
    behind = source.after(end)
    if behind.lstrip().startswith("#") and end < last:
        end += len(behind.encode())
    text = source.cut(start, end)
    # `if x: $$body` on one line: the run goes to lines of its own.
    is_inline = bool(left.strip())
    new = indent + left[: len(left) - len(left.lstrip())] + "    " if is_inline else indent + left
    if not old.strip():
        inside = lines_in_strings(f"if 1:\n{source.before(start)}{text}\n")
        lines = text.split("\n")
        for i in range(1, len(lines)):
            if i + 2 not in inside and lines[i].startswith(old):
                lines[i] = new + lines[i].removeprefix(old)
        text = "\n".join(lines)
    return f"\n{new}{text}" if is_inline else text
