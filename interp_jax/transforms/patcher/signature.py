"""What besides its code changes when a patch changes a function's signature: defaults, annotations, docstring.

Defaults and annotations that a patch leaves alone stay the same objects; only new ones are evaluated, where the
definition stands: in the module's globals, the class's names and the function's closure.

>>> import ast
>>> old, new = (ast.parse(f"def f(a, b={b}): pass").body[0].args for b in ("1", "[1, 2]"))
>>> _defaults(old, (1,), {}, new, lambda node: eval(ast.unparse(node)))
(([1, 2],), None)

Sharp edges: wrappers that copied a docstring or annotations before the patch keep their copy.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.patterns import shown
from interp_jax.transforms.patcher.plan import FunctionTarget
from interp_jax.transforms.patcher.slots import FunctionSlot, Slot
from interp_jax.transforms.patcher.syntax import DEFS, normal

# The compiler flag of `from __future__ import annotations`.
_STRING_ANNOTATIONS = 0x1000000


def signature_changes(
    function: types.FunctionType,
    target: FunctionTarget,
    new: Any,
    code: types.CodeType,
    original: Callable[[Slot], Any],
    names: Mapping[str, Any],
) -> dict[str, Any]:
    """New values of a function's attributes other than its code.

    Args:
        function: The function.
        target: Its definition.
        new: The patched definition.
        code: The patched code.
        original: The value a slot has when nothing is patched.
        names: What replacements may use besides upstream's names.

    Returns:
        Attribute name to value; empty when the signature stays.

    Raises:
        PatchError: A new default or annotation cannot be evaluated.
    """
    old: Any = target.node

    def now(name: str) -> Any:
        return original(FunctionSlot(function, name))

    def evaluate(node: ast.expr) -> Any:
        return _evaluate(node, function, target, names)

    changes: dict[str, Any] = {}
    if normal(old.args) != normal(new.args):
        positional, by_keyword = _defaults(old.args, now("__defaults__"), now("__kwdefaults__"), new.args, evaluate)
        changes["__defaults__"] = positional
        changes["__kwdefaults__"] = by_keyword
    before, after = dict(_annotations(old)), dict(_annotations(new))
    if _normals(before) != _normals(after):
        values = now("__annotations__")
        is_text = bool(code.co_flags & _STRING_ANNOTATIONS)
        changes["__annotations__"] = {
            name: values[name]
            if name in values and name in before and normal(before[name]) == normal(node)
            else (ast.unparse(node) if is_text else evaluate(node))
            for name, node in after.items()
        }
    if isinstance(old, DEFS):
        docstring = ast.get_docstring(new, clean=False)
        if docstring != ast.get_docstring(old, clean=False):
            changes["__doc__"] = None if docstring is None else code.co_consts[0]
    return changes


def _normals(nodes: Mapping[str, ast.expr]) -> dict[str, Any]:
    return {name: normal(node) for name, node in nodes.items()}


def _with_defaults(args: ast.arguments) -> tuple[dict[str, ast.expr], dict[str, ast.expr]]:
    """The default expressions of positional and of keyword-only parameters, by name."""
    positional = [*args.posonlyargs, *args.args]
    first = len(positional) - len(args.defaults)
    by_position = {arg.arg: node for arg, node in zip(positional[first:], args.defaults, strict=True)}
    by_keyword = {
        arg.arg: node for arg, node in zip(args.kwonlyargs, args.kw_defaults, strict=True) if node is not None
    }
    return by_position, by_keyword


def _defaults(
    old: ast.arguments,
    positional: tuple[Any, ...] | None,
    by_keyword: Mapping[str, Any] | None,
    new: ast.arguments,
    evaluate: Callable[[ast.expr], Any],
) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """New `__defaults__` and `__kwdefaults__`, from the old values and both signatures."""
    old_positional, old_keyword = _with_defaults(old)
    new_positional, new_keyword = _with_defaults(new)
    known = dict(by_keyword or {})
    if positional is not None and len(positional) == len(old_positional):
        known.update(zip(old_positional, positional, strict=True))
    nodes = {**old_positional, **old_keyword}

    def value(name: str, node: ast.expr) -> Any:
        is_same = name in known and name in nodes and normal(nodes[name]) == normal(node)
        return known[name] if is_same else evaluate(node)

    by_position = tuple(value(name, node) for name, node in new_positional.items())
    return by_position or None, {name: value(name, node) for name, node in new_keyword.items()} or None


def _annotations(node: Any) -> Iterator[tuple[str, ast.expr]]:
    args = node.args
    for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
        if arg is not None and arg.annotation is not None:
            yield arg.arg, arg.annotation
    if getattr(node, "returns", None) is not None:
        yield "return", node.returns


def _evaluate(node: ast.expr, function: types.FunctionType, target: FunctionTarget, names: Mapping[str, Any]) -> Any:
    """The value of a default or annotation where the definition stands."""
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    local = dict(names) | (dict(vars(target.cls)) if target.cls is not None else {})
    try:
        local.update((name, cell.cell_contents) for name, cell in closure)
        code = compile(ast.Expression(node), "<patched signature>", "eval", dont_inherit=True)
        return eval(code, function.__globals__, local)
    except Exception as error:
        raise PatchError(
            four_part(
                f"The default or annotation {shown(node)} cannot be evaluated ({type(error).__name__}: {error})",
                where=target.where,
                expected="an expression that is valid where the function is defined.",
                fix="use names of the upstream module or class, or pass what is needed with names={...}.",
            )
        ) from error
