"""Members: the part of a module that a dotted name means, as live objects and as definitions.

A member ("function", "Class", "Class.method") is looked up as an object first, through every decorator and wrapper
that holds the function it wraps, and then in the syntax tree of the file its code object names. So members that a
module merely imports, property setters, methods that Flax wrapped and functions inside `jax.jit` are all found.

>>> import textwrap
>>> member = find_member(textwrap, "TextWrapper._split")
>>> member.upstream.name, [type(node).__name__ for node in member.nodes]
('textwrap.py', ['FunctionDef'])

Sharp edges: an inherited method is not a member of the class that inherits it.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.syntax import DEFS
from interp_jax.transforms.patcher.upstream import Upstream, is_code_of, read_upstream, stale

# Where wrappers keep what they wrap: functools, descriptors, partial, jax.custom_jvp and jax.custom_vjp.
_LINKS = ("__wrapped__", "__func__", "func", "fget", "fset", "fdel", "fun", "fwd", "bwd", "jvp")
_MOST_OBJECTS = 400
_SCOPES = (*DEFS, ast.Lambda, ast.ClassDef, ast.Module)

CodeOf = Callable[[types.FunctionType], types.CodeType]


@dataclass(frozen=True, eq=False)
class Member:
    """A part of a module that is to be patched.

    Args:
        name: As the user calls it.
        upstream: The file it is defined in.
        nodes: Its definitions; several for a property with getter and setter.
        holder: The live object the definitions' functions are looked for in: a class, or what holds the function.
        class_node: The definition of the class that `holder` is.
    """

    name: str
    upstream: Upstream
    nodes: Sequence[ast.AST]
    holder: Any
    class_node: ast.ClassDef | None = None


def reachable_functions(holder: Any) -> list[types.FunctionType]:
    """All Python functions an object holds: itself, what it wraps, what its closure or attributes refer to.

    Args:
        holder: A function, descriptor, wrapper or callable object.

    Returns:
        The functions, outermost first.
    """
    return [value for value in reachable(holder) if isinstance(value, types.FunctionType)]


def reachable(holder: Any) -> list[Any]:
    """All callables and descriptors an object holds, itself included, outermost first."""
    queue: deque[Any] = deque([holder])
    seen: dict[int, Any] = {}
    while queue and len(seen) < _MOST_OBJECTS:
        current = queue.popleft()
        if id(current) in seen or isinstance(current, (type, types.ModuleType)):
            continue
        seen[id(current)] = current
        queue.extend(link for name in _LINKS if (link := _attribute(current, name)) is not None)
        held: Iterable[Any] = ()
        if isinstance(current, types.FunctionType):
            held = [cell.cell_contents for cell in current.__closure__ or () if _is_full(cell)]
        elif not isinstance(current, types.BuiltinFunctionType):
            held = list((_attribute(current, "__dict__") or {}).values())
        queue.extend(item for item in held if callable(item) or isinstance(item, (property, staticmethod, classmethod)))
    return list(seen.values())


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except Exception:  # whatever a stranger's __getattr__ raises
        return None


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def functions_of(holder: Any, upstream: Upstream, node: ast.AST, code_of: CodeOf) -> list[types.FunctionType]:
    """The functions that were made from a definition and that an object holds.

    Args:
        holder: A class, or what holds functions.
        upstream: The definition's file.
        node: The definition.
        code_of: Original code of a function, where it may be patched at present.

    Returns:
        The functions.
    """
    if isinstance(holder, type):
        attributes = vars(holder)
        name = getattr(node, "name", "<lambda>")
        raws = [attributes[name]] if name in attributes else []
        found = _from_definition(raws, upstream, node, code_of)
        return found or _from_definition(list(attributes.values()), upstream, node, code_of)
    return _from_definition([holder], upstream, node, code_of)


def _from_definition(
    holders: Sequence[Any], upstream: Upstream, node: ast.AST, code_of: CodeOf
) -> list[types.FunctionType]:
    found: dict[int, types.FunctionType] = {}
    for holder in holders:
        for function in reachable_functions(holder):
            code = code_of(function)
            if code.co_filename == upstream.filename and is_code_of(code, node) and upstream.definition(code) is node:
                found[id(function)] = function
    return list(found.values())


def find_member(module: types.ModuleType, name: str, *, code_of: CodeOf | None = None) -> Member:
    """The member of a module that a dotted name means.

    Args:
        module: The module.
        name: "function", "Class", "Class.method", "function.inner", and so on.
        code_of: Original code of a function, where it may be patched at present.

    Returns:
        The member.

    Raises:
        PatchError: There is no such member, it is inherited, or its source is not to be had.
    """
    code_of = code_of or (lambda function: function.__code__)
    where = f"{module.__name__}:{name}"
    holder: Any = module
    owner: Any = None
    parts = name.split(".")
    for depth, part in enumerate(parts):
        owner = holder
        if isinstance(holder, type):
            if part not in vars(holder) and part.startswith("__"):
                part = parts[depth] = f"_{holder.__name__.lstrip('_')}{part}"  # as Python stores private names
            if part not in vars(holder):
                raise PatchError(_unknown(module, holder, parts[: depth + 1]))
            holder = vars(holder)[part]
        elif isinstance(holder, types.ModuleType):
            if not hasattr(holder, part):
                raise PatchError(_unknown(module, holder, parts[: depth + 1]))
            holder = getattr(holder, part)
        else:
            return _inner(_function_member(".".join(parts[:depth]), holder, code_of, where), parts[depth:], where)
    if isinstance(holder, type):
        return _class_member(name, holder, code_of, where)
    method = _method_member(name, owner, parts[-1], code_of, where) if isinstance(owner, type) else None
    return method or _function_member(name, holder, code_of, where)


def _function_member(name: str, holder: Any, code_of: CodeOf, where: str) -> Member:
    accessors = [holder.fget, holder.fset, holder.fdel] if isinstance(holder, property) else [holder]
    upstream: Upstream | None = None
    nodes: list[ast.AST] = []
    for accessor in accessors:
        function = _innermost(accessor, name.rpartition(".")[2], code_of) if accessor is not None else None
        if function is None:
            continue
        code = code_of(function)
        upstream = read_upstream(code.co_filename, function.__globals__, where=where)
        node = upstream.definition(code)
        if node is None:
            raise PatchError(stale(where, upstream))
        nodes.append(node)
    if upstream is None:
        raise PatchError(
            four_part(
                f"{where} ({type(holder).__name__}) holds no Python function",
                expected="a function, method or class written in Python, or a wrapper that holds one.",
                fix="patch what it calls instead.",
            )
        )
    return Member(name, upstream, nodes, holder)


def _innermost(holder: Any, name: str, code_of: CodeOf) -> types.FunctionType | None:
    """The function a holder is about: the last in the chain of wrappers, or else the one of that name."""
    functions = reachable_functions(holder)
    chain: list[types.FunctionType] = []
    current: Any = holder
    while current is not None and len(chain) < _MOST_OBJECTS:
        if isinstance(current, types.FunctionType):
            chain.append(current)
        current = next((link for link in (_attribute(current, part) for part in _LINKS) if link is not None), None)
    named = [function for function in functions if code_of(function).co_name == name]
    if chain and (chain[-1] in named or not named):
        return chain[-1]
    return (named or functions or [None])[-1]


def _class_member(name: str, cls: type, code_of: CodeOf, where: str) -> Member:
    module = sys.modules.get(cls.__module__)
    codes = [code_of(function) for raw in list(vars(cls).values()) for function in reachable_functions(raw)]
    own = [code for code in codes if code.co_qualname.rpartition(".")[0] == cls.__qualname__]
    filename = own[0].co_filename if own else getattr(module, "__file__", None) or ""
    upstream = read_upstream(filename, vars(module) if module else {}, where=where)
    nodes = [
        node
        for node in upstream.places
        if isinstance(node, ast.ClassDef) and upstream.qualname(node) == cls.__qualname__
    ]
    if len(nodes) > 1:
        # Defined twice, say under `if` and `else`: the one whose methods are alive.
        defined = {upstream.definition(code) for code in own}
        nodes = [node for node in nodes if any(item in defined for item in ast.walk(node))] or nodes
    if not nodes:
        raise PatchError(stale(where, upstream))
    return Member(name, upstream, [nodes[-1]], cls, nodes[-1])


def _method_member(name: str, cls: type, part: str, code_of: CodeOf, where: str) -> Member | None:
    """The definitions of a method in the body of its class, if they are in use.

    What the class has under the name can be something else: `enum` puts a `__new__` of its own in the place of one.
    """
    try:
        whole = _class_member(name, cls, code_of, where)
    except PatchError:
        return None
    upstream = whole.upstream
    nodes = [
        node
        for node in upstream.definitions
        if isinstance(node, DEFS)
        and part in (node.name, f"_{cls.__name__.lstrip('_')}{node.name}")
        and next(a for a in upstream.ancestors(node) if a is not node and isinstance(a, _SCOPES)) is whole.class_node
        and functions_of(cls, upstream, node, code_of)
    ]
    return Member(name, upstream, nodes, cls, whole.class_node) if nodes else None


def _inner(member: Member, parts: Sequence[str], where: str) -> Member:
    """The definition inside a function that the rest of a dotted name means."""
    nodes = list(member.nodes)
    for part in parts:
        inner = [
            item
            for node in nodes
            for item in ast.walk(node)
            if isinstance(item, (*DEFS, ast.ClassDef)) and item is not node and item.name == part
        ]
        if not inner:
            raise PatchError(
                four_part(
                    f"Unknown member {part!r}",
                    where=f"{where} ({member.upstream.at(nodes[0])})",
                    names=sorted({i.name for n in nodes for i in ast.walk(n) if isinstance(i, (*DEFS, ast.ClassDef))}),
                    given=part,
                    fix="use the name of a function defined inside this one.",
                )
            )
        nodes = inner
    return Member(".".join([member.name, *parts]), member.upstream, nodes, member.holder)


def _unknown(module: types.ModuleType, holder: Any, parts: Sequence[str]) -> str:
    path, part = ".".join(parts), parts[-1]
    if isinstance(holder, type):
        for base in holder.__mro__[1:]:
            if part in vars(base):
                return four_part(
                    f"Member {path!r} of {module.__name__} is inherited",
                    where=f"{base.__module__}.{base.__qualname__}",
                    expected="a method that the class defines itself: all classes that inherit it see the patch.",
                    fix=f"patch {base.__qualname__}.{part} in {base.__module__}.",
                )
    names = [key for key, value in vars(holder).items() if _is_patchable(value, module, holder)]
    where = module.__name__ if holder is module else f"{module.__name__}:{'.'.join(parts[:-1])}"
    return four_part(
        f"Unknown member {path!r}",
        where=where,
        names=sorted(names),
        given=part,
        fix="use the name of a function, class or method that is there.",
    )


def _is_patchable(value: Any, module: types.ModuleType, holder: Any) -> bool:
    if not (inspect.isroutine(value) or isinstance(value, (type, property, functools.cached_property))):
        return False
    return holder is not module or getattr(value, "__module__", None) == module.__name__
