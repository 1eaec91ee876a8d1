"""Bodies written once and built twice: as a native generator and as a function that calls `yield_`.

The source of a body says `YIELD(x)` and `YIELD_FROM(x)`. The native twin is the oracle for what the other must do, in
whatever Python the tests run.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Callable, Generator
from types import CodeType
from typing import Any, NamedTuple

from interp_jax.transforms.greenlets import generator, yield_, yield_from


class Pair(NamedTuple):
    """Two ways to make the same generator."""

    native: Callable[..., Generator[Any, Any, Any]]
    ours: Callable[..., Generator[Any, Any, Any]]


class _Native(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "YIELD":
            return ast.copy_location(ast.Yield(node.args[0] if node.args else None), node)
        if isinstance(node.func, ast.Name) and node.func.id == "YIELD_FROM":
            return ast.copy_location(ast.YieldFrom(node.args[0]), node)
        return node


def build_pair(name: str, source: str, **names: Any) -> Pair:
    """Compiles a body.

    Args:
        name: What the body is called, in both.
        source: The statements of the body.
        names: Other names it uses.

    Returns:
        Functions that make a generator; their keyword arguments are further names the body uses.
    """
    filename = f"<body {name}>"
    text = f"def {name}():\n" + textwrap.indent(textwrap.dedent(source).strip() or "pass", "    ") + "\n"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    native_tree = ast.fix_missing_locations(_Native().visit(ast.parse(text)))
    if not any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(native_tree)):
        native_tree = ast.parse(text + "    if False: yield\n")

    codes = [compile(tree, filename, "exec") for tree in (native_tree, ast.parse(text))]

    def make(code: CodeType, arguments: dict[str, Any]) -> Callable[..., Any]:
        space = {"YIELD": yield_, "YIELD_FROM": yield_from} | names | arguments
        exec(code, space)
        return space[name]

    return Pair(
        native=lambda **arguments: make(codes[0], arguments)(),
        ours=lambda **arguments: generator(make(codes[1], arguments)),
    )
