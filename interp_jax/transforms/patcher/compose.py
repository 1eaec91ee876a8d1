"""The slots that a set of plans changes together, and what they hold then.

Plans of several patchers compose because each was made on upstream's own code: their edits are put into one text,
from which every function concerned is compiled once.

>>> import textwrap
>>> from interp_jax.transforms.patcher.patterns import Patch
>>> from interp_jax.transforms.patcher.plan import make_plan
>>> plan = make_plan(textwrap, {"shorten": [Patch("' '.join($x)", "'_'.join($x)")]})
>>> changes, notes = compose([plan], lambda slot: slot.read())
>>> [str(change.slot) for change in changes]
['textwrap.shorten']

Sharp edges: values of defaults and annotations that a patch does not touch stay the same objects.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.class_body import class_changes
from interp_jax.transforms.patcher.compiled import CompiledFile
from interp_jax.transforms.patcher.patterns import shown
from interp_jax.transforms.patcher.plan import ClassTarget, FunctionTarget, Plan
from interp_jax.transforms.patcher.signature import signature_changes
from interp_jax.transforms.patcher.slots import MISSING, Change, FunctionSlot, GlobalSlot, Slot
from interp_jax.transforms.patcher.upstream import Upstream, stale

Original = Callable[[Slot], Any]


def compose(plans: Sequence[Plan], original: Original) -> tuple[list[Change], list[str]]:
    """The changes from upstream's own state to that under some plans.

    Args:
        plans: The plans.
        original: The value a slot has when nothing is patched.

    Returns:
        The changes, and a line for everything that could not be done by exchanging code alone.

    Raises:
        PatchError: The plans contradict each other, or the patched code cannot be put in place.
    """
    changes: dict[Any, Change] = {}
    notes: list[str] = []

    def add(slot: Slot, value: Any) -> None:
        changes[slot.key] = Change(slot, original(slot), value)

    names = _all_names(plans)
    files = {upstream: _compiled(upstream, plans) for upstream in {u: None for plan in plans for u in plan.edits}}
    functions = {node: target for plan in plans for node, target in plan.functions.items()}
    classes = {node: target for plan in plans for node, target in plan.classes.items()}
    for namespace, name, value in _globals(plans, names, functions, classes):
        slot = GlobalSlot(namespace, name)
        if original(slot) is MISSING:
            add(slot, value)
        elif original(slot) is not value:
            raise PatchError(_collision(namespace, name, original(slot), value))
    anew: dict[ast.AST, list[FunctionTarget]] = {}
    for target in functions.values():
        needed = _function_changes(target, files[target.upstream], original, names, add)
        if needed:
            if target.cls is None or target.class_node is None or needed != {"__class__"}:
                raise PatchError(_new_free_variables(target, needed))
            anew.setdefault(target.class_node, []).append(target)
    for class_node, targets in anew.items():
        first = targets[0]
        assert first.cls is not None  # checked above
        assert first.class_node is not None
        name = first.upstream.qualname(class_node)
        classes.setdefault(class_node, ClassTarget(name, first.upstream, first.class_node, first.cls))
    for node, target in classes.items():
        methods = {item.node.name for item in anew.get(node, ())}  # type: ignore[attr-defined]
        found, note = class_changes(target, files[target.upstream], original, names, methods)
        notes.append(note)
        changes.update((change.slot.key, change) for change in found)
    return list(changes.values()), notes


def _compiled(upstream: Upstream, plans: Sequence[Plan]) -> CompiledFile:
    return CompiledFile(upstream, [edit for plan in plans for edit in plan.edits.get(upstream, ())])


def _all_names(plans: Sequence[Plan]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for plan in plans:
        for name, value in plan.names.items():
            if names.setdefault(name, value) is not value:
                raise PatchError(_two_meanings(name, names[name], value))
    return names


def _globals(
    plans: Sequence[Plan],
    names: Mapping[str, Any],
    functions: Mapping[Any, FunctionTarget],
    classes: Mapping[Any, ClassTarget],
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The names to put into the globals of each file concerned."""
    namespaces: dict[Upstream, dict[str, Any]] = {}
    for function_target in functions.values():
        for reference in function_target.functions:
            if (function := reference()) is not None:
                namespaces[function_target.upstream] = function.__globals__
    for class_target in classes.values():
        module = sys.modules.get(class_target.cls.__module__)
        if module is not None:
            namespaces.setdefault(class_target.upstream, vars(module))
    for upstream, namespace in namespaces.items():
        for plan in plans:
            if upstream in plan.edits:
                for name in plan.names:
                    yield namespace, name, names[name]


def _function_changes(
    target: FunctionTarget,
    file: CompiledFile,
    original: Original,
    names: Mapping[str, Any],
    add: Callable[[Slot, Any], None],
) -> set[str]:
    """Adds the changes of one definition's functions; returns the free variables the functions would lack."""
    _check_source(target)
    code = file.code(target.node)
    has = target.original.co_freevars
    if set(code.co_freevars) - set(has):
        return set(code.co_freevars) - set(has)
    if code.co_freevars != has:
        # A function's closure is fixed, so its new code must have the same free variables, used or not.
        code = file.code_with_references(target.node, [name for name in has if name not in code.co_freevars])
    if code.co_freevars != has:
        raise PatchError(_lost_free_variables(target, set(has) - set(code.co_freevars)))
    for cache in target.caches:
        add(cache, cache)
    is_checked = False
    for reference in target.functions:
        function = reference()
        if function is None:
            continue
        if not is_checked:
            _check_names(target, file, code, function, names)
            is_checked = True
        add(FunctionSlot(function, "__code__"), code)
        signature = signature_changes(function, target, file.node(target.node), code, original, names)
        for name, value in signature.items():
            add(FunctionSlot(function, name), value)
    return set()


def _check_source(target: FunctionTarget) -> None:
    """Makes sure that the text to be patched is the text that runs."""
    module = sys.modules.get(target.upstream.module)
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    # Other loaders (pytest's, jaxtyping's) rewrite what they load, on purpose.
    if type(loader) is not importlib.machinery.SourceFileLoader:
        return
    if _untouched(target.upstream).code(target.node) != target.original:
        raise PatchError(stale(target.where, target.upstream))


@functools.lru_cache(maxsize=32)
def _untouched(upstream: Upstream) -> CompiledFile:
    return CompiledFile(upstream, [])


def _check_names(
    target: FunctionTarget,
    file: CompiledFile,
    code: types.CodeType,
    function: types.FunctionType,
    names: Mapping[str, Any],
) -> None:
    """Refuses replacements that use names which mean nothing in upstream's module: misspelt ones, most likely."""
    brought = file.new_names - names.keys() - function.__globals__.keys() - vars(builtins).keys()
    unknown = sorted(_globals_used(code) & brought) if brought else []
    if unknown:
        raise PatchError(
            four_part(
                f"A replacement uses {', '.join(map(repr, unknown))}, which means nothing there",
                where=target.where,
                names=sorted(names),
                given=unknown[0],
                fix="use names of the upstream module, or pass what the replacement needs with names={...}.",
            )
        )


def _globals_used(code: types.CodeType) -> set[str]:
    used = {item.argval for item in dis.get_instructions(code) if item.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            used |= _globals_used(constant)
    return used


# --- messages ------------------------------------------------------------------------------------------------------


def _collision(namespace: Mapping[str, Any], name: str, there: Any, given: Any) -> str:
    return four_part(
        f"Name {name!r} ({shown(repr(given), 60)}) is taken",
        where=f"{namespace.get('__name__')}, where it is {shown(repr(there), 60)}",
        expected="names for replacements that upstream's module does not use itself.",
        fix=f"pass the object under another name: names={{'my_{name}': ...}}, and use that in the replacement.",
    )


def _two_meanings(name: str, a: Any, b: Any) -> str:
    return four_part(
        f"Name {name!r} is {shown(repr(a), 60)} for one patcher and {shown(repr(b), 60)} for another",
        where="patchers in force together",
        expected="one meaning per name.",
        fix="use another name in one of them.",
    )


def _new_free_variables(target: FunctionTarget, needed: set[str]) -> str:
    return four_part(
        f"A replacement uses {', '.join(map(repr, sorted(needed)))} of an enclosing function",
        where=target.where,
        expected="variables that the function itself already takes from around it "
        f"({', '.join(target.original.co_freevars) or 'none'}): a function that exists cannot be given more.",
        fix="patch the enclosing function, or pass the value with names={...}.",
    )


def _lost_free_variables(target: FunctionTarget, lost: set[str]) -> str:
    return four_part(
        f"A replacement in a lambda no longer uses {', '.join(map(repr, sorted(lost)))}",
        where=target.where,
        expected="a lambda that still uses all it takes from around it.",
        fix="patch the function around the lambda.",
    )
