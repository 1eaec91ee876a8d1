"""Upstream's source files: their text, tree and names, and which definition a code object came from.

A file is found by the name its code objects have for it, through `linecache`, so that what was typed into a notebook
is found too. Definitions are recognised by name, first line and, for lambdas, columns.

>>> import textwrap
>>> upstream = read_upstream(textwrap.__file__, vars(textwrap), where="textwrap")
>>> node = upstream.definition(textwrap.TextWrapper._split.__code__)
>>> upstream.name, upstream.qualname(node)
('textwrap.py', 'TextWrapper._split')

Sharp edges: two lambdas on one line are told apart by their columns. Source that was made by `exec` is not there.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import collections
import linecache
import os
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.syntax import DEFS, Place, SourceText, first_line, parents


@dataclass(frozen=True, eq=False)
class Upstream:
    """One source file.

    Args:
        filename: What code objects call it.
        name: What messages and diffs call it: its path inside the package.
        module: Dotted name of the module.
        source: Its text.
        tree: Its syntax tree.
    """

    filename: str
    name: str
    module: str
    source: SourceText
    tree: ast.Module
    places: dict[ast.AST, Place] = field(init=False, repr=False)
    definitions: Sequence[ast.AST] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", parents(self.tree))
        object.__setattr__(self, "definitions", definitions(self.tree))

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """A node and all above it, innermost first."""
        current: ast.AST | None = node
        while current is not None:
            yield current
            place = self.places.get(current)
            current = place.parent if place else None

    def qualname(self, node: ast.AST) -> str:
        """The `__qualname__` of a definition."""
        parts: list[str] = []
        for above in self.ancestors(node):
            if isinstance(above, (*DEFS, ast.ClassDef, ast.Lambda)):
                if parts and not isinstance(above, ast.ClassDef):
                    parts.append("<locals>")
                parts.append("<lambda>" if isinstance(above, ast.Lambda) else above.name)
        return ".".join(reversed(parts))

    def definition(self, code: types.CodeType) -> ast.AST | None:
        """The definition a code object was compiled from, as far as name, first line and columns tell."""
        return definition(code, self.definitions)

    def top_level(self, node: ast.AST) -> int:
        """Index of the top-level statement a node is in."""
        *_, outermost, _module = self.ancestors(node)
        return self.tree.body.index(outermost)  # type: ignore[arg-type]

    def at(self, node: ast.AST) -> str:
        """A node's file and line, for messages."""
        return f"{self.name}:{first_line(node)}"


def is_code_of(code: types.CodeType, node: ast.AST) -> bool:
    """Whether a code object was compiled from a definition, as far as its name, first line and columns tell."""
    if isinstance(node, ast.Lambda):
        if code.co_name != "<lambda>" or code.co_firstlineno != node.lineno:
            return False
        start, end = (node.body.lineno, node.body.col_offset), (node.body.end_lineno, node.body.end_col_offset)
        spots = [spot for spot in code.co_positions() if None not in spot and spot[2:] != (0, 0)]
        return all(start <= (a, c) and (b, d) <= end for a, b, c, d in spots)  # type: ignore[operator]
    return isinstance(node, DEFS) and code.co_name == node.name and code.co_firstlineno == first_line(node)


def definitions(tree: ast.AST, kinds: tuple[type, ...] = (*DEFS, ast.Lambda)) -> list[ast.AST]:
    """All functions and lambdas of a tree."""
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def definition(code: types.CodeType, among: Iterable[ast.AST]) -> ast.AST | None:
    """The definition a code object was compiled from.

    Args:
        code: The code object.
        among: Functions and lambdas of the tree it was compiled from.

    Returns:
        The definition, or None.
    """
    found = [node for node in among if is_code_of(code, node)]
    # Of nested lambdas on one line, the innermost that holds all of the code: the one whose body starts last.
    return max(found, key=lambda node: node.body.col_offset if isinstance(node, ast.Lambda) else 0, default=None)


def _upstream(filename: str, text: str, module: str, is_package: bool) -> Upstream:
    """The one `Upstream` of a file, for as long as anybody refers to it.

    Plans of one file are composed by its tree's nodes, so two of them must never hold two trees of it.
    """
    key = (filename, text, module, is_package)
    upstream = _UPSTREAMS.get(key)
    if upstream is None:
        upstream = _UPSTREAMS[key] = _read(*key)
    _RECENT.append(upstream)
    return upstream


_UPSTREAMS: weakref.WeakValueDictionary[tuple[str, str, str, bool], Upstream] = weakref.WeakValueDictionary()
# Kept although no plan refers to them: files are often looked at several times before there is a plan.
_RECENT: collections.deque[Upstream] = collections.deque(maxlen=64)


def _read(filename: str, text: str, module: str, is_package: bool) -> Upstream:
    name = module.replace(".", "/") + ("/__init__.py" if is_package else ".py")
    source = SourceText(text)
    if module == "__main__":
        name = os.path.basename(filename)
    return Upstream(filename, name, module, source, source.parse())


def read_upstream(filename: str, namespace: dict[str, Any], *, where: str) -> Upstream:
    """The source file that code objects call `filename`.

    Args:
        filename: `co_filename` of a code object, or `__file__` of a module.
        namespace: Globals of the code.
        where: The member it is read for, for the error message.

    Returns:
        The file; the same object for the same text.

    Raises:
        PatchError: There is no source, or it is not Python.
    """
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename, namespace))
    if not text:
        raise PatchError(
            four_part(
                f"No source code ({os.path.basename(filename) or 'no file'})",
                where=where,
                expected="a function or class written in Python whose source is at hand.",
                fix="patch a Python function; compiled extensions and code made by exec have no source.",
            )
        )
    return _upstream(filename, text, namespace.get("__name__", "__main__"), "__path__" in namespace)


def stale(where: str, upstream: Upstream) -> str:
    """The message for running code that its source file does not hold."""
    return four_part(
        f"The code that runs is not what {upstream.name} says",
        where=where,
        expected="a module whose source is as it was when the module was imported.",
        fix="start Python again (or importlib.reload the module) if the file changed since; a function that another "
        "tool rewrote cannot be patched.",
    )
