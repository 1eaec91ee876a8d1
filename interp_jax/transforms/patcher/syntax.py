"""Syntax trees together with their text: spans, walks, and a normal form in which two pieces of code are equal.

`ast` nodes are compared by a normal form of plain tuples: layout, quotes, redundant parentheses and Load/Store context
play no part in it, and it is the same under every Python version, so that a digest of it can be recorded.

>>> same("f( 'a', (b) )", 'f("a", b)'), same("x = 1", "x = 1.0")
(True, False)
>>> text = SourceText("total = a + b\\n")
>>> text.text_of(text.parse().body[0].value)
'a + b'

Sharp edges: columns of syntax trees count UTF-8 bytes, so spans are byte offsets. Before Python 3.12 the columns of
code inside an f-string cannot be trusted; `text_of` checks what it cut out.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import functools
import hashlib
import io
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Def: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef)
# What stands in for a node, or for the first of a run of statements; () for the rest of the run.
Substitution: TypeAlias = Mapping[ast.AST, Sequence[ast.AST]]

# Load or Store, the `u` of u"...", and comments.
_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})

# What Python's tokenizer calls the ends of an f-string, where it takes f-strings apart (from 3.12 on).
_F_START, _F_END = (getattr(tokenize, name, -1) for name in ("FSTRING_START", "FSTRING_END"))


class Place(NamedTuple):
    """Where a node hangs in its tree: `getattr(parent, field)`, at `position` if that is a list."""

    parent: ast.AST
    field: str
    position: int | None


class SourceText:
    """Text addressed the way syntax trees do: by line and UTF-8 column.

    Args:
        text: Python source with newlines as line ends.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.data = text.encode()
        self._starts = [0]
        self._starts.extend(i + 1 for i, byte in enumerate(self.data) if byte == 10)

    def parse(self) -> ast.Module:
        """The syntax tree of the text."""
        return parsed(self.text)

    def line(self, offset: int) -> int:
        """Number (from 1) of the line a byte offset is on."""
        return bisect.bisect_right(self._starts, offset)

    def line_start(self, line: int) -> int:
        """Byte offset at which a line starts; the end of the text for lines after the last."""
        return self._starts[line - 1] if line <= len(self._starts) else len(self.data)

    def cut(self, start: int, end: int) -> str:
        """The text between two byte offsets."""
        return self.data[start:end].decode()

    def start(self, node: ast.AST) -> int:
        """Byte offset at which a node starts, its decorators included."""
        decorators = getattr(node, "decorator_list", None)
        first: Any = decorators[0] if decorators else node
        offset = self._starts[first.lineno - 1] + first.col_offset
        return self.data.rindex(b"@", 0, offset) if decorators else offset

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Byte offsets of a node's start (its decorators included) and end."""
        located: Any = node
        return self.start(node), self._starts[located.end_lineno - 1] + located.end_col_offset

    def text_of(self, node: ast.AST) -> str:
        """Upstream's own text of an expression; written anew where the text cannot be trusted (in f-strings)."""
        text = self.cut(*self.span(node))
        return text if self.is_text_of(node, text) else ast.unparse(node)

    def is_text_of(self, node: ast.AST, text: str) -> bool:
        """Whether `text` is the code of the expression `node`."""
        try:
            return normal(parsed(f"(\n{text}\n)", mode="eval").body) == normal(node)
        except (SyntaxError, ValueError):
            return False

    def before(self, offset: int) -> str:
        """What stands left of an offset on its line."""
        return self.cut(self.line_start(self.line(offset)), offset)

    def after(self, offset: int) -> str:
        """What stands right of an offset on its line, without the newline."""
        return self.cut(offset, self.line_start(self.line(offset) + 1)).removesuffix("\n")


def parsed(text: str, mode: str = "exec") -> Any:
    """The syntax tree of a text. What Python has to say about upstream's string escapes is not ours to repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode=mode)


def first_line(node: ast.AST) -> int:
    """The line a definition's code object calls its first: that of the first decorator, or of the node."""
    decorators = getattr(node, "decorator_list", None)
    return decorators[0].lineno if decorators else node.lineno  # type: ignore[attr-defined]


def walk(node: ast.AST, place: Place | None = None) -> Iterator[tuple[ast.AST, Place | None]]:
    """A node and all below it, in the order of the text (mostly), each with its place."""
    yield node, place
    for field, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield from walk(value, Place(node, field, None))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from walk(item, Place(node, field, index))


def is_block(value: Any) -> bool:
    """Whether the value of a field is a list of statements."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], ast.stmt)


def normal(node: Any, substitution: Substitution | None = None) -> Any:
    """The normal form of a node: nested tuples, equal for equal code.

    Args:
        node: A node, list of nodes, or field value.
        substitution: What to take in place of some nodes. A block that this empties is a `pass`.

    Returns:
        The normal form.
    """
    if isinstance(node, ast.AST):
        items: list[Any] = [type(node).__name__]
        for field, value in ast.iter_fields(node):
            # Absent and empty fields are left out: newer Pythons have more of them.
            if field in _IGNORED or value is None or (isinstance(value, list) and not value):
                continue
            if substitution and isinstance(value, ast.AST) and value in substitution:
                (value,) = substitution[value]
                items.append((field, normal(value)))
            else:
                items.append((field, normal(value, substitution)))
        return tuple(items)
    if isinstance(node, list):
        out: list[Any] = []
        for item in node:
            if substitution and isinstance(item, ast.AST) and item in substitution:
                out.extend(normal(new) for new in substitution[item])
            else:
                out.append(normal(item, substitution))
        return tuple(out) if out else (("Pass",),)
    return type(node).__name__, repr(node)


def same(a: str, b: str) -> bool:
    """Whether two pieces of source are the same code.

    Args:
        a: Source of any number of statements.
        b: The same.

    Returns:
        Whether their normal forms are equal.
    """
    return normal(ast.parse(a)) == normal(ast.parse(b))


def digest(node: ast.AST) -> str:
    """SHA-256 of a definition's normal form without its docstrings: what it does, not how it is written.

    Args:
        node: A definition.

    Returns:
        64 hexadecimal digits.
    """
    docstrings: dict[ast.AST, Sequence[ast.AST]] = {}
    for inner, _ in walk(node):
        if isinstance(inner, (*DEFS, ast.ClassDef)) and ast.get_docstring(inner, clean=False) is not None:
            docstrings[inner.body[0]] = ()
    return hashlib.sha256(repr(normal(node, docstrings)).encode()).hexdigest()


def parents(tree: ast.AST) -> dict[ast.AST, Place]:
    """The place of every node of a tree but its root."""
    found: dict[ast.AST, Place] = {}
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if isinstance(value, ast.AST):
                found[value] = Place(parent, field, None)
            elif isinstance(value, list):
                found.update((v, Place(parent, field, i)) for i, v in enumerate(value) if isinstance(v, ast.AST))
    return found


def tokens_of(text: str) -> list[tokenize.TokenInfo]:
    """The tokens of a text as far as it can be tokenized."""
    found: list[tokenize.TokenInfo] = []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        found.extend(tokenize.generate_tokens(io.StringIO(text).readline))
    return found


def lines_in_strings(text: str) -> frozenset[int]:
    """Numbers of the lines that start inside a string."""
    inside: set[int] = set()
    starts: list[int] = []
    for token in tokens_of(text):
        if token.type == tokenize.STRING:
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
        elif token.type == _F_START:
            starts.append(token.start[0])
        elif token.type == _F_END:
            inside.update(range(starts.pop() + 1, token.end[0] + 1))
    return frozenset(inside)


@functools.lru_cache(maxsize=32)
def logical_line_ends(text: str) -> list[int]:
    """Numbers of the lines on which a logical line ends, after which blank lines change nothing."""
    return [token.start[0] for token in tokens_of(text) if token.type == tokenize.NEWLINE]
