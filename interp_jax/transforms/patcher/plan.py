"""What a patcher is going to change: its patches matched on upstream's own code, and the live objects concerned.

A plan is made without touching anything, on the original code even where other patches are in force. Each edit has a
target: the outermost function around it whose code object can be exchanged, or the class whose body it is in.

>>> import textwrap
>>> from interp_jax.transforms.patcher.patterns import Patch
>>> plan = make_plan(textwrap, {"TextWrapper": [Patch("self.wrap($x)", "self.wrap($x.strip())")]})
>>> [target.name for target in plan.functions.values()]
['TextWrapper.fill']

Sharp edges: a member with no patches at all has every one of its functions compiled again from unchanged text.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import functools
import gc
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.match import find, near_misses
from interp_jax.transforms.patcher.members import (
    CodeOf,
    Member,
    find_member,
    functions_of,
    reachable,
    reachable_functions,
)
from interp_jax.transforms.patcher.patterns import Patch, shown
from interp_jax.transforms.patcher.render import Edit, render
from interp_jax.transforms.patcher.slots import CacheSlot
from interp_jax.transforms.patcher.syntax import DEFS, digest, first_line, normal, walk
from interp_jax.transforms.patcher.upstream import Upstream


@dataclass(frozen=True, eq=False)
class FunctionTarget:
    """A definition whose functions get other code.

    Args:
        name: Its qualified name.
        upstream: Its file.
        node: The definition.
        original: The code object upstream's functions have.
        functions: Weak references to the functions.
        caches: Those of `functools` that hold results of the functions.
        cls: The class it is a method of, if any.
        class_node: The definition of that class.
    """

    name: str
    upstream: Upstream
    node: ast.AST
    original: types.CodeType
    functions: list[weakref.ref[types.FunctionType]]
    caches: Sequence[CacheSlot]
    cls: type | None = None
    class_node: ast.ClassDef | None = None

    @property
    def where(self) -> str:
        """The member and its place, for messages."""
        return f"{self.upstream.module}:{self.name} ({self.upstream.at(self.node)})"


@dataclass(frozen=True, eq=False)
class ClassTarget:
    """A class whose body is to be executed again.

    Args:
        name: Its qualified name.
        upstream: Its file.
        node: The definition.
        cls: The class.
    """

    name: str
    upstream: Upstream
    node: ast.ClassDef
    cls: type

    @property
    def where(self) -> str:
        """The member and its place, for messages."""
        return f"{self.upstream.module}:{self.name} ({self.upstream.at(self.node)})"


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a patcher is going to change.

    Args:
        edits: The edits of each file.
        functions: The functions to change, by definition.
        classes: The classes whose bodies are to be executed again, by definition.
        names: What the replacements may use besides upstream's own names.
        anchors: The objects that the members' first names meant: `(namespace, name, object)`.
    """

    edits: dict[Upstream, list[Edit]] = field(default_factory=dict)
    functions: dict[ast.AST, FunctionTarget] = field(default_factory=dict)
    classes: dict[ast.AST, ClassTarget] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    anchors: list[tuple[Mapping[str, Any], str, Any]] = field(default_factory=list)

    def is_current(self) -> bool:
        """Whether the module still holds the objects the plan was made for; not so after a reload."""
        return all(namespace.get(name) is value for namespace, name, value in self.anchors)

    def members(self) -> dict[str, tuple[str, str]]:
        """Digest and source of every definition that is changed, by name."""
        found: dict[str, list[tuple[str, str]]] = {}
        for target in (*self.functions.values(), *self.classes.values()):
            source = target.upstream.source
            start, end = source.span(target.node)
            text = source.before(start) + source.cut(start, end)
            found.setdefault(target.name, []).append((digest(target.node), text))
        # A property's getter and setter have one name.
        return {
            name: parts[0] if len(parts) == 1 else (digest(ast.Constant(repr(parts))), "\n".join(t for _, t in parts))
            for name, parts in found.items()
        }


def make_plan(
    module: types.ModuleType,
    members: Mapping[str, Sequence[Patch]],
    *,
    names: Mapping[str, Any] | None = None,
    code_of: CodeOf | None = None,
    known_functions: Sequence[types.FunctionType] = (),
) -> Plan:
    """Matches patches against upstream.

    Args:
        module: The module.
        members: The patches of each member.
        names: What the replacements may use besides upstream's own names.
        code_of: Original code of a function, where it may be patched at present.
        known_functions: Functions that are patched at present.

    Returns:
        The plan.

    Raises:
        PatchError: A patch does not fit.
    """
    code_of = code_of or (lambda function: function.__code__)
    plan = Plan(names=dict(names or {}))
    for name, patches in members.items():
        member = find_member(module, name, code_of=code_of)
        first = name.partition(".")[0]
        if first in vars(module):
            plan.anchors.append((vars(module), first, vars(module)[first]))
        for patch in patches:
            for edit in _edits(member, patch):
                plan.edits.setdefault(member.upstream, []).append(edit)
                _aim(plan, member, edit, code_of)
        if not patches:
            plan.edits.setdefault(member.upstream, [])
            for node in _outermost_functions(member):
                inner, _ = _owner(member, list(member.upstream.ancestors(node))[::-1], code_of)
                if functions_of(inner.holder, member.upstream, node, code_of):
                    _add_function(plan, inner, node, code_of)
    _add_copies(plan, code_of, known_functions)
    return plan


def _edits(member: Member, patch: Patch) -> list[Edit]:
    matches = [match for node in member.nodes for match in find(patch.pattern, node)]
    if len(matches) < patch.least or (patch.most is not None and len(matches) > patch.most):
        raise PatchError(_wrong_count(member, patch, [match.nodes[0] for match in matches]))
    return [render(patch, match, member.upstream.source) for match in matches]


def _wrong_count(member: Member, patch: Patch, found: Sequence[ast.AST]) -> str:
    upstream = member.upstream
    least, most = patch.least, patch.most
    allowed = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    lines = [f"{allowed} match{'es' * (allowed != '1')}."]
    if found:
        lines[0] += " It matches here:"
        lines.extend(f"    {upstream.name}:{first_line(node)}: {shown(node)}" for node in found[:8])
        fix = "extend the pattern by what stands around the place you mean, or pass count= to change them all."
    else:
        misses = [miss for node in member.nodes for miss in near_misses(patch.pattern, node)]
        lines[0] += " The code there that is most like it:" if misses else " Nothing there is like it."
        for miss in sorted(misses, key=lambda miss: -miss.likeness)[:3]:
            lines.append(f"    {upstream.name}:{first_line(miss.node)}: {shown(miss.node)}")
            lines.append(f"      {miss.difference}")
        fix = "write the pattern as upstream's code is now; layout, comments and quotes do not matter."
    return four_part(
        f"Pattern {shown(patch.before)} matches {len(found)} places",
        where=f"{upstream.module}:{member.name} ({upstream.at(member.nodes[0])})",
        expected="\n".join(lines),
        fix=fix,
    )


# --- targets -------------------------------------------------------------------------------------------------------


def _aim(plan: Plan, member: Member, edit: Edit, code_of: CodeOf) -> None:
    """Notes which function or class an edit changes."""
    chain = list(member.upstream.ancestors(edit.nodes[0]))[::-1]
    inner, node = _owner(member, chain, code_of)
    is_alive = node is not None and bool(functions_of(inner.holder, member.upstream, node, code_of))
    if node is not None and is_alive and _is_inside(edit, node, chain):
        _add_function(plan, inner, node, code_of)
    elif inner.class_node is None:
        raise PatchError(_not_in_place(member, edit))
    elif node is not None and not is_alive and not isinstance(node, ast.Lambda):
        raise PatchError(_not_alive(member, node))
    else:
        name = member.upstream.qualname(inner.class_node)
        plan.classes.setdefault(inner.class_node, ClassTarget(name, member.upstream, inner.class_node, inner.holder))


def _owner(member: Member, chain: Sequence[ast.AST], code_of: CodeOf) -> tuple[Member, ast.AST | None]:
    """The innermost live class (or the member itself) and the outermost function in it, on the way down to a node."""
    if member.class_node is None:
        for node in chain:
            is_function = isinstance(node, (*DEFS, ast.Lambda))
            if is_function and functions_of(member.holder, member.upstream, node, code_of):
                return member, node
        return member, None
    cls, class_node = member.holder, member.class_node
    for node in chain[chain.index(class_node) + 1 :]:
        if isinstance(node, ast.ClassDef) and isinstance(vars(cls).get(node.name), type):
            cls, class_node = vars(cls)[node.name], node
        elif isinstance(node, (*DEFS, ast.Lambda)):
            return Member(member.name, member.upstream, [node], cls, class_node), node
    return Member(member.name, member.upstream, [class_node], cls, class_node), None


def _is_inside(edit: Edit, node: ast.AST, chain: Sequence[ast.AST]) -> bool:
    """Whether exchanging a definition's code (and signature) is all that an edit asks for."""
    if edit.nodes[0] is node:
        new = edit.substitution[node]
        return (
            len(edit.nodes) == len(new) == 1
            and isinstance(node, DEFS)
            and type(new[0]) is type(node)
            and new[0].name == node.name  # type: ignore[attr-defined]
            and normal(new[0].decorator_list) == normal(node.decorator_list)  # type: ignore[attr-defined]
        )
    below = chain[chain.index(node) + 1]
    return below not in getattr(node, "decorator_list", ())


def _add_function(plan: Plan, member: Member, node: ast.AST, code_of: CodeOf) -> None:
    if node in plan.functions:
        return
    functions = functions_of(member.holder, member.upstream, node, code_of)
    name = member.upstream.qualname(node)
    cls = member.holder if isinstance(member.holder, type) else None
    class_node = member.class_node
    if cls is None and isinstance(above := member.upstream.places[node].parent, ast.ClassDef):
        cls, class_node = _class_of(functions[0], member.upstream, above), above
    plan.functions[node] = FunctionTarget(
        name,
        member.upstream,
        node,
        code_of(functions[0]),
        [weakref.ref(function) for function in functions],
        _caches(member.holder, functions),
        cls,
        class_node,
    )


def _caches(holder: Any, functions: Sequence[types.FunctionType]) -> list[CacheSlot]:
    """The caches of functools between a holder and its functions."""
    kind = type(functools.cache(lambda: None))
    values = list(vars(holder).values()) if isinstance(holder, type) else [holder]
    caches = [value for raw in values for value in reachable(raw) if type(value) is kind]
    return [CacheSlot(cache) for cache in caches if any(f in functions for f in reachable_functions(cache))]


def _class_of(function: types.FunctionType, upstream: Upstream, node: ast.ClassDef) -> type | None:
    """The live class of a class definition, by way of the globals of one of its methods."""
    value: Any = None
    for i, part in enumerate(upstream.qualname(node).split(".")):
        value = function.__globals__.get(part) if i == 0 else getattr(value, part, None)
    return value if isinstance(value, type) else None


def _outermost_functions(member: Member) -> Iterator[ast.AST]:
    """The definitions of a member whose functions live in no other function of it."""
    for root in member.nodes:
        inner: set[ast.AST] = set()
        for node, _ in walk(root):
            if isinstance(node, (*DEFS, ast.Lambda)) and node not in inner:
                inner.update(ast.walk(node))
                if isinstance(node, DEFS):
                    yield node


def _add_copies(plan: Plan, code_of: CodeOf, known_functions: Sequence[types.FunctionType]) -> None:
    """Adds all other functions that run the code of a target: copies, and closures made from one definition."""
    by_code = {id(target.original): target for target in plan.functions.values()}
    if not by_code:
        return
    seen = {id(function()) for target in plan.functions.values() for function in target.functions}
    # One pass over what the garbage collector knows, for all targets together.
    referrers: list[Any] = gc.get_referrers(*(target.original for target in plan.functions.values()))
    for candidate in (*referrers, *known_functions):
        if isinstance(candidate, types.FunctionType) and id(candidate) not in seen:
            target = by_code.get(id(code_of(candidate)))
            if target is not None:
                seen.add(id(candidate))
                target.functions.append(weakref.ref(candidate))


def _not_in_place(member: Member, edit: Edit) -> str:
    node = edit.nodes[0]
    return four_part(
        f"Pattern {shown(edit.patch.before)} changes the decorators or the name of a function",
        where=f"{member.upstream.module}:{member.name} ({member.upstream.at(node)})",
        expected="changes inside a function: those can be made in place.",
        fix="for a method, patch the class as a whole; else wrap the function in your own code.",
    )


def _not_alive(member: Member, node: Any) -> str:
    return four_part(
        f"Function {node.name!r} is not in use",
        where=f"{member.upstream.module}:{member.name} ({member.upstream.at(node)})",
        expected="code of functions that the class has: this definition was replaced or removed after it was made.",
        fix="make the pattern match elsewhere only, or patch what replaced the function.",
    )
