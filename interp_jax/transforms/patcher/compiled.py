"""Patched source as code objects, under a file name of its own that debuggers can list.

The whole patched file is registered with `linecache`, so that tracebacks, `pdb`, `inspect.getsource` and IPython's
`??` show the code that runs. What is compiled is the file's own tree less the definitions that do not matter, so
scopes, name mangling, `__class__` cells, qualified names and line numbers are upstream's.

>>> from interp_jax.transforms.patcher.upstream import read_upstream
>>> import textwrap
>>> upstream = read_upstream(textwrap.__file__, vars(textwrap), where="textwrap")
>>> same = CompiledFile(upstream, [])
>>> code = same.code(upstream.definition(textwrap.dedent.__code__))
>>> code == textwrap.dedent.__code__, same.filename.startswith("<patched textwrap.py ")
(True, True)

Sharp edges: tools that read files and not `linecache` (coverage, graphical debuggers) need a real one: with the
environment variable INTERP_JAX_PATCHED_SOURCES set to a folder, patched files are written there and run from there.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import os
import pathlib
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.render import Edit
from interp_jax.transforms.patcher.splice import Spliced
from interp_jax.transforms.patcher.syntax import DEFS
from interp_jax.transforms.patcher.upstream import Upstream, definition, definitions

FOLDER_VARIABLE = "INTERP_JAX_PATCHED_SOURCES"


class CompiledFile:
    """An upstream file with edits, ready to run.

    Args:
        upstream: The file.
        edits: Its edits.

    Attributes:
        edits: The edits.
        new_names: Names that the edits bring along.
        filename: What the code objects call it.
        spliced: The patched text and tree.
    """

    def __init__(self, upstream: Upstream, edits: Sequence[Edit]) -> None:
        self.upstream = upstream
        self.edits = edits
        self.spliced = Spliced(upstream.source, upstream.tree, edits, where=upstream.name)
        text = self.spliced.source.text
        stamp = hashlib.sha256(f"{upstream.filename}\n{text}".encode()).hexdigest()[:12]
        self.new_names = frozenset(name for edit in edits for name in edit.patch.new_names)
        self.filename = _publish(upstream, text, stamp)
        self._codes: dict[int, dict[ast.AST, types.CodeType]] = {}
        self._nodes: dict[int, list[ast.AST]] = {}

    def node(self, original: ast.AST) -> Any:
        """The patched definition that an original one has become."""
        offset = self.spliced.moved(self.upstream.source.start(original))
        source = self.spliced.source
        candidates = [
            node
            for node in self._definitions(original)
            if type(node) is type(original)
            and getattr(node, "name", None) == getattr(original, "name", None)
            and source.start(node) >= offset
        ]
        return min(candidates, key=source.start)

    def code(self, original: ast.AST) -> types.CodeType:
        """The code object of the patched definition that an original one has become."""
        return self._compiled(original)[self.node(original)]

    def code_with_references(self, original: ast.AST, names: Sequence[str]) -> types.CodeType:
        """The same, made to have `names` among its free variables; the references are never executed."""
        node = self.node(original)
        if not isinstance(node, DEFS):
            return self.code(original)
        reference = ast.If(ast.Constant(0), [ast.Expr(ast.Name(name, ast.Load())) for name in names], [])
        for inner in ast.walk(reference):
            ast.copy_location(inner, node.body[-1])
        node.body.append(reference)
        try:
            self._codes.pop(self.upstream.top_level(original), None)
            return self.code(original)
        finally:
            self._codes.pop(self.upstream.top_level(original), None)
            node.body.remove(reference)

    def class_statement(self, original: ast.ClassDef) -> types.CodeType:
        """A module's code that executes the patched class statement and nothing else."""
        futures = [
            node for node in self.spliced.tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"
        ]
        return self._compile([*futures, self.node(original)])

    def _top_level(self, original: ast.AST) -> ast.stmt:
        # Edits never change the number of top-level statements: they are inside members.
        return self.spliced.tree.body[self.upstream.top_level(original)]

    def _definitions(self, original: ast.AST) -> list[ast.AST]:
        """Classes, functions and lambdas in the same top-level statement as an original definition."""
        index = self.upstream.top_level(original)
        if index not in self._nodes:
            self._nodes[index] = definitions(self._top_level(original), (*DEFS, ast.Lambda, ast.ClassDef))
        return self._nodes[index]

    def _compiled(self, original: ast.AST) -> dict[ast.AST, types.CodeType]:
        index = self.upstream.top_level(original)
        if index not in self._codes:
            statement = self._top_level(original)
            nodes = [node for node in self._definitions(original) if not isinstance(node, ast.ClassDef)]
            # With the module's imports: Python calls `module.function()` in another way than `object.method()`.
            others = (*DEFS, ast.ClassDef)
            needed = [node for node in self.spliced.tree.body if node is statement or not isinstance(node, others)]
            module = self._compile(needed)
            found = {definition(code, nodes): code for code in _all_codes(module)}
            self._codes[index] = {node: code for node, code in found.items() if node is not None}
        return self._codes[index]

    def _compile(self, statements: Sequence[ast.stmt]) -> types.CodeType:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # dont_inherit: this file's own __future__ imports are not upstream's.
                return compile(ast.Module(list(statements), []), self.filename, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise PatchError(
                four_part(
                    f"The patched source does not compile ({error})",
                    where=f"{self.upstream.name}, line {getattr(error, 'lineno', None) or 1}",
                    expected="replacements that are valid where they are put (return only in functions, and so on).",
                    fix="look at Patcher.diff() and mend the replacement.",
                )
            ) from error


def _publish(upstream: Upstream, text: str, stamp: str) -> str:
    """Makes the text readable for debuggers; returns the file name to compile it under."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        path = pathlib.Path(folder).absolute() / stamp / upstream.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        linecache.checkcache(str(path))
        return str(path)
    filename = f"<patched {upstream.name} {stamp}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    return filename


def _all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code objects inside a code object, outermost first."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _all_codes(constant)
