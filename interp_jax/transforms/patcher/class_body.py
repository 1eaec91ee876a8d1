"""The fallback for patches of class-level statements: the class body is executed again.

Methods change in place by exchanging their code. A class attribute, a field, a decorator or a new method cannot: for
those the patched class statement is executed into a class of its own, and the attributes that differ are moved onto
the live class, with `super()` and `__class__` bound to it. Attributes that no changed statement has to do with stay
the same objects.

>>> import ast
>>> class_node = ast.parse("class A:\\n  x = 1\\n  y = x + 1\\n  z = 2\\n  def f(self): return 1").body[0]
>>> sorted(_depending(class_node, {"x"}))
['x', 'y']

Sharp edges: executing the body runs its decorators, metaclass and `__init_subclass__` again, on a class that is then
thrown away: what they registered for it stays registered. The members of an enumeration, bases, metaclasses and
`__slots__` cannot be changed in this way.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import enum
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.compiled import CompiledFile
from interp_jax.transforms.patcher.members import reachable_functions
from interp_jax.transforms.patcher.plan import ClassTarget
from interp_jax.transforms.patcher.slots import MISSING, Change, ClassSlot, Slot
from interp_jax.transforms.patcher.syntax import DEFS, normal

_LOG = logging.getLogger("interp_jax.patcher")

# What belongs to one class object or is never moved.
_OWN = frozenset(
    [
        *("__dict__", "__weakref__", "__module__", "__qualname__", "__slots__", "__firstlineno__"),
        *("__abstractmethods__", "_abc_impl", "__subclasshook__", "__parameters__", "__orig_bases__"),
        "__static_attributes__",
    ]
)


def class_changes(
    target: ClassTarget,
    file: CompiledFile,
    original: Callable[[Slot], Any],
    names: Mapping[str, Any],
    methods: set[str],
) -> tuple[list[Change], str]:
    """The changes of a class's attributes.

    Args:
        target: The class.
        file: The patched file.
        original: The value a slot has when nothing is patched.
        names: What replacements may use besides upstream's names.
        methods: Methods that must be taken from the new class although their statements stand.

    Returns:
        The changes, and a line that says what was done.

    Raises:
        PatchError: The class cannot be changed in this way.
    """
    cls = target.cls
    _check_kind(target, file)
    new = _execute(target, file, names)
    if set(_slot_names(new)) != set(_slot_names(cls)) or new.__bases__ != cls.__bases__ or type(new) is not type(cls):
        raise PatchError(
            _impossible(target, "its slots, bases or metaclass", "change attributes and methods of the class only")
        )
    bound = _bound_names(target.node)
    new_bound = _bound_names(file.node(target.node))
    same = [name for name in bound if name in new_bound and _normals(bound[name]) == _normals(new_bound[name])]
    edited = {name for name in {*bound, *new_bound} if name not in same} - _edited_inside(target.node, file)
    moved = (_depending(file.node(target.node), edited) | methods) - _OWN
    # Decorators and metaclass made these: they follow from the rest.
    moved |= {name for name in vars(new) if name not in new_bound and name not in _OWN}
    changes = []
    for name in sorted(moved):
        slot = ClassSlot(cls, name)
        value = vars(new).get(name, MISSING)
        if value is MISSING and name not in bound:
            continue
        if not _is_plainly_equal(original(slot), value):
            changes.append(Change(slot, original(slot), value))
    _rebind_class_cell(changes, new, cls)
    note = (
        f"{target.where}: class body executed again; taken from it: "
        f"{', '.join(change.slot.name for change in changes) or 'nothing'}"
    )
    _LOG.warning(note)
    return changes, note


def _check_kind(target: ClassTarget, file: CompiledFile) -> None:
    if isinstance(target.cls, enum.EnumMeta):
        raise PatchError(_impossible(target, "an enumeration's members", "patch methods of the enumeration"))
    if not isinstance(target.upstream.places[target.node].parent, ast.Module):
        raise PatchError(
            _impossible(
                target, "a class inside another class or function", "patch methods, or what is around the class"
            )
        )
    old, new = target.node, file.node(target.node)
    header = ("bases", "keywords", "decorator_list")
    if any(normal(getattr(old, field)) != normal(getattr(new, field)) for field in header):
        raise PatchError(_impossible(target, "its bases or decorators", "patch what is in the class body"))


def _execute(target: ClassTarget, file: CompiledFile, names: Mapping[str, Any]) -> Any:
    """The class that the patched class statement makes; the live one stays where it is."""
    module = sys.modules.get(target.cls.__module__)
    assert module is not None  # its source was found by way of it
    added = [name for name in names if name not in vars(module)]
    made: dict[str, Any] = {}
    try:
        vars(module).update({name: names[name] for name in added})
        exec(file.class_statement(target.node), vars(module), made)
    except Exception as error:
        raise PatchError(
            four_part(
                f"The patched class body raises {type(error).__name__}: {error}",
                where=target.where,
                expected="a class body that can be executed again.",
                fix="mend the replacement; Patcher.diff() shows the patched class.",
            )
        ) from error
    finally:
        for name in added:
            vars(module).pop(name, None)
    new = made.get(target.node.name)
    if not isinstance(new, type):
        raise PatchError(_impossible(target, "a class whose decorators make something else of it", "patch its methods"))
    return new


def _slot_names(cls: type) -> Iterator[str]:
    return (name for name, value in vars(cls).items() if isinstance(value, types.MemberDescriptorType))


def _bound_names(node: ast.ClassDef) -> dict[str, list[ast.stmt]]:
    """The names a class body binds, with the statements that do."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in node.body:
        for name in _names(statement, ast.Store):
            found.setdefault(name, []).append(statement)
    if any(isinstance(statement, ast.AnnAssign) for statement in node.body):
        found["__annotations__"] = [s for s in node.body if isinstance(s, ast.AnnAssign)]
    if ast.get_docstring(node) is not None:
        found["__doc__"] = [node.body[0]]
    return found


def _names(node: ast.AST, context: type) -> Iterator[str]:
    """Names that a class-level statement loads or binds; the insides of functions do not count."""
    if isinstance(node, (*DEFS, ast.ClassDef)):
        if context is ast.Store:
            yield node.name
        outer = [*node.decorator_list, *getattr(node, "bases", [])]
        if isinstance(node, DEFS):
            outer += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        for part in outer:
            yield from _names(part, context)
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, (ast.Import, ast.ImportFrom)) and context is ast.Store:
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    if isinstance(node, ast.Name) and isinstance(node.ctx, context):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _names(child, context)


def _normals(statements: list[ast.stmt]) -> list[Any]:
    return [normal(statement) for statement in statements]


def _edited_inside(node: ast.ClassDef, file: CompiledFile) -> set[str]:
    """Methods that are edited inside only: they are changed in place, by their code."""
    found = set()
    for statement in node.body:
        if isinstance(statement, DEFS) and not any(statement in edit.nodes for edit in file.edits):
            new = file.node(statement)
            if normal(new.decorator_list) == normal(statement.decorator_list):
                found.add(statement.name)
    return found


def _depending(node: ast.ClassDef, names: set[str]) -> set[str]:
    """`names`, and those of a class body that are computed from them."""
    found = set(names)
    size = -1
    while size != len(found):
        size = len(found)
        for statement in node.body:
            if found & set(_names(statement, ast.Load)):
                found.update(_names(statement, ast.Store))
    return found


def _is_plainly_equal(a: Any, b: Any) -> bool:
    """Whether two attributes are as good as the same object."""
    plain = (int, float, complex, str, bytes, bool, type(None))
    return a is b or (type(a) is type(b) and isinstance(a, plain) and repr(a) == repr(b))


def _rebind_class_cell(changes: list[Change], new: type, cls: type) -> None:
    """Makes `super()` and `__class__` in the moved methods mean the live class."""
    for change in changes:
        for function in reachable_functions(change.after):
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if name == "__class__" and cell.cell_contents is new:
                    cell.cell_contents = cls


def _impossible(target: ClassTarget, what: str, fix: str) -> str:
    return four_part(
        f"A patch would change {what}",
        where=target.where,
        expected="class-level patches of attributes and methods of a class at the top of its module.",
        fix=f"{fix}.",
    )
