"""Operator precedence: whether an expression needs parentheses where it is put.

The splicer writes replacements into upstream's text. `a + b` in the place of `c` needs no parentheses in `f(c)` or
`x = c`, but does in `c * 2`; a generator expression or a tuple brings its own.

>>> import ast
>>> product = ast.parse("c * 2", mode="eval").body
>>> needs_parentheses(ast.parse("a + b", mode="eval").body, Place(product, "left", None))
True
>>> needs_parentheses(ast.parse("a ** b", mode="eval").body, Place(product, "left", None))
False

Sharp edges: where grammar is finer than a number per operator this errs towards parentheses; what is spliced is
parsed and compared afterwards in any case.

Source: the operator precedence table of the Python language reference.
"""

from __future__ import annotations

import ast

from interp_jax.transforms.patcher.syntax import Place

_LOOSE, _TEST, _OR, _AND, _NOT, _COMPARE, _BIT_OR, _BIT_XOR, _BIT_AND = range(9)
_SHIFT, _SUM, _TERM, _FACTOR, _POWER, _AWAIT, _ATOM = range(9, 16)

_BINARY: dict[type[ast.operator], int] = {
    ast.BitOr: _BIT_OR,
    ast.BitXor: _BIT_XOR,
    ast.BitAnd: _BIT_AND,
    ast.LShift: _SHIFT,
    ast.RShift: _SHIFT,
    ast.Add: _SUM,
    ast.Sub: _SUM,
    ast.Mult: _TERM,
    ast.MatMult: _TERM,
    ast.Div: _TERM,
    ast.FloorDiv: _TERM,
    ast.Mod: _TERM,
    ast.Pow: _POWER,
}
# Statements whose expression may be a bare tuple or yield.
_OPEN_FIELDS = {
    (ast.Expr, "value"),
    (ast.Return, "value"),
    (ast.Assign, "value"),
    (ast.AugAssign, "value"),
    (ast.AnnAssign, "value"),
    (ast.Assign, "targets"),
    (ast.For, "target"),
    (ast.AsyncFor, "target"),
}


def precedence(node: ast.AST) -> int:
    """How tightly an expression binds; higher is tighter. A tuple counts as written without parentheses."""
    match node:
        case ast.NamedExpr() | ast.Tuple() | ast.Yield() | ast.YieldFrom() | ast.Starred() | ast.Slice():
            return _LOOSE
        case ast.Lambda() | ast.IfExp():
            return _TEST
        case ast.BoolOp(op=ast.Or()):
            return _OR
        case ast.BoolOp():
            return _AND
        case ast.UnaryOp(op=ast.Not()):
            return _NOT
        case ast.UnaryOp():
            return _FACTOR
        case ast.Compare():
            return _COMPARE
        case ast.BinOp(op=op):
            return _BINARY[type(op)]
        case ast.Await():
            return _AWAIT
    return _ATOM


def _required(place: Place) -> int:
    """The least precedence an expression must have to stand at a place without parentheses."""
    parent, field, index = place
    match parent:
        case ast.BinOp(op=ast.Pow()):
            return _AWAIT if field == "left" else _FACTOR
        case ast.BinOp(op=op):
            return _BINARY[type(op)] + (field == "right")
        case ast.UnaryOp(op=ast.Not()):
            return _NOT
        case ast.UnaryOp():
            return _FACTOR
        case ast.BoolOp():
            return precedence(parent) + 1
        case ast.Compare() | ast.Starred():
            return _BIT_OR
        case ast.IfExp():
            return _TEST if field == "orelse" else _OR
        case ast.Attribute() | ast.Subscript(value=_) | ast.Call() | ast.Await() if field in ("value", "func"):
            return _ATOM
        case ast.comprehension():
            return _OR
        case ast.Dict(keys=keys) if field == "values" and index is not None and keys[index] is None:
            return _BIT_OR
    return _TEST


def needs_parentheses(node: ast.AST, place: Place | None) -> bool:
    """Whether an expression must be parenthesised at a place.

    Args:
        node: The expression to put there; a tuple is taken to be written without parentheses.
        place: Where it goes; None for a piece of source of its own.

    Returns:
        Whether to add parentheses.
    """
    if place is None:
        return False
    if isinstance(node, ast.Constant) and type(node.value) is int and isinstance(place.parent, ast.Attribute):
        return True  # 1.real is no Python
    if isinstance(node, (ast.Tuple, ast.Yield, ast.YieldFrom)) and (type(place.parent), place.field) in _OPEN_FIELDS:
        return False
    if isinstance(node, ast.Tuple) and isinstance(place.parent, ast.Subscript) and place.field == "slice":
        return False
    return precedence(node) < _required(place)
