"""`Patcher`: syntax-tree patches for code we do not own, in force inside a `with` block or from install to uninstall.

A patch is a before/after pair of source. Before is found in upstream's syntax tree (patterns.py, match.py), after is
written into upstream's text (render.py, splice.py), and what that compiles to goes into the live functions
(compose.py, slots.py): every alias, subclass and instance sees it, and leaving restores the very same code objects.

>>> import textwrap
>>> patcher = Patcher(textwrap, {"TextWrapper.fill": [("self.wrap($text)", "sorted(self.wrap($text))")]})
>>> with patcher:
...     textwrap.fill("one two three", 5)
'one\\nthree\\ntwo'
>>> textwrap.fill("one two three", 5)
'one\\ntwo\\nthree'

Sharp edges: a function that is running, or a closure that was made before the function around it was patched, goes
on with the code it has. Listings of a whole class (`inspect.getsource(Class)`) are upstream's file; those of its
methods are what runs. Under `with`, other threads see the patched code too.

Source: interp_jax.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.drift import BROKEN, MISSING_UPSTREAM, Drift, DriftReport, compare
from interp_jax.transforms.patcher.importing import stop_waiting, wait_for
from interp_jax.transforms.patcher.patterns import Patch
from interp_jax.transforms.patcher.plan import Plan, make_plan
from interp_jax.transforms.patcher.splice import Spliced
from interp_jax.transforms.patcher.state import ACTIVE, PatchKey, State, Switch

# Available to every replacement, and imported only if one uses them.
DEFAULT_NAMES = ("sow", "layer_scope", "loop_layer")


class Patcher:
    """Patches for members of one module.

    Args:
        module: The module or its name. A name is imported at first use; with `install`, when anybody imports it.
        members: For each member ("function", "Class", "Class.method", "function.inner") its patches: a flat list
            `[before, after, before, after]`, or pairs, triples `(before, after, count)` or `Patch` objects.
        names: Objects the replacements may use, by name: put into the upstream module's globals while the patches
            are in force. `sow`, `layer_scope` and `loop_layer` need not be given.
        upstream: For members that are changed, the digest they had when the patches were written (see `digests`),
            or their source.
        more_members: Members whose names are Python names.

    Raises:
        PatchError: A patch is not well-formed. Whether it fits upstream is found out at first use.
    """

    def __init__(
        self,
        module: types.ModuleType | str,
        members: Mapping[str, Sequence[Any]] | None = None,
        /,
        *,
        names: Mapping[str, Any] | None = None,
        upstream: Mapping[str, str] | None = None,
        **more_members: Sequence[Any],
    ) -> None:
        if not isinstance(module, types.ModuleType | str) or not isinstance(members or {}, Mapping):
            raise PatchError(_no_patcher(module, members))
        self._module = module
        self.module_name = module if isinstance(module, str) else module.__name__
        given = [*(members or {}).items(), *more_members.items()]
        self.members: dict[str, list[Patch]] = {}
        for member, patches in given:
            where = f"Patcher({self.module_name!r}), member {member!r}"
            self.members.setdefault(member, []).extend(_as_patches(patches, where))
        self.upstream = dict(upstream or {})
        self._names = dict(names or {})
        # What follows is derived from the above, anew whenever upstream's objects are replaced.
        self.plan: Plan | None = None
        self.switches: dict[State, Switch] = {}
        self._key: PatchKey | None = None

    def __repr__(self) -> str:
        return f"Patcher({self.module_name!r}, members: {', '.join(self.members) or 'none'})"

    def __enter__(self) -> Patcher:
        ACTIVE.enter(self)
        return self

    def __exit__(self, *exc: object) -> None:
        ACTIVE.exit(self)

    def install(self) -> None:
        """Puts the patches in force until `uninstall`; for a module not yet imported, at its import.

        JAX's caches are cleared, because what was traced before the patch is wrong under it.

        Raises:
            PatchError: A patch does not fit; nothing is changed then.
        """
        if isinstance(self._module, str) and self._module not in sys.modules:
            stop_waiting(self._module, self._imported)
            wait_for(self._module, self._imported)
        else:
            ACTIVE.install(self)

    def uninstall(self) -> None:
        """Takes the patches out of force, and forgets an install that waits for an import."""
        stop_waiting(self.module_name, self._imported)
        ACTIVE.uninstall(self)

    @property
    def is_active(self) -> bool:
        """Whether the patches are in force."""
        return self in ACTIVE.state.entered or self in ACTIVE.state.installed

    def diff(self) -> str:
        """What the patches change.

        Returns:
            A unified diff of upstream's files, named by their paths inside their packages.

        Raises:
            PatchError: A patch does not fit.
        """
        parts: list[str] = []
        for upstream, edits in self._current_plan().edits.items():
            if edits:
                spliced = Spliced(upstream.source, upstream.tree, edits, where=upstream.name)
                lines = (upstream.source.text.split("\n"), spliced.without_padding().split("\n"))
                parts.extend(difflib.unified_diff(*lines, f"a/{upstream.name}", f"b/{upstream.name}", lineterm=""))
        return "\n".join(parts)

    def report(self) -> str:
        """How the patches are put in place.

        Returns:
            A line per definition that is changed: how many edits and functions, and for which classes executing
            the class body again was needed.

        Raises:
            PatchError: A patch does not fit.
        """
        plan = self._current_plan()
        notes = ACTIVE.notes(self)
        lines = []
        for node, target in plan.functions.items():
            inside = [
                edit
                for edit in plan.edits[target.upstream]
                if any(above is node for above in target.upstream.ancestors(edit.nodes[0]))
            ]
            alive = sum(function() is not None for function in target.functions)
            counts = [f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((len(inside), "edit"), (alive, "function"))]
            lines.append(f"{target.where}: {counts[0]}, code exchanged in {counts[1]}")
        return "\n".join([*lines, *notes])

    def digests(self) -> dict[str, str]:
        """Digests of the definitions the patches change, to be recorded as `upstream`.

        Returns:
            Member name to SHA-256 of what upstream's definition does.

        Raises:
            PatchError: A patch does not fit.
        """
        return {name: value for name, (value, _) in self._current_plan().members().items()}

    def check(self, upstream: Mapping[str, str] | None = None) -> DriftReport:
        """Whether the patches fit upstream as it is now. Nothing is changed.

        Args:
            upstream: Recorded digests or sources; None for those the patcher was made with.

        Returns:
            The report, with one entry for each member.
        """
        recorded = dict(self.upstream if upstream is None else upstream)
        prefix = f"{self.module_name}:"
        try:
            self._import()
        except PatchError as error:
            is_there = importlib.util.find_spec(self.module_name.partition(".")[0]) is not None
            status = BROKEN if is_there else MISSING_UPSTREAM
            return DriftReport(tuple(Drift(prefix + name, status, str(error)) for name in self.members))
        broken: list[Drift] = []
        whole = Plan()
        for name, patches in self.members.items():
            try:
                part = self._make_plan({name: patches}, ACTIVE.state)
            except PatchError as error:
                broken.append(Drift(prefix + name, BROKEN, str(error)))
            else:
                whole.functions.update(part.functions)
                whole.classes.update(part.classes)
        if not broken:
            try:
                self.report()  # all of them together, compiled
            except PatchError as error:
                broken.append(Drift(f"{prefix}{', '.join(self.members)}", BROKEN, str(error)))
        return DriftReport((*broken, *compare(whole.members(), recorded, prefix=prefix)))

    # --- what the state of the process asks a patcher for ---

    @property
    def key(self) -> PatchKey:
        """What stands for these patches in the keys of JAX's caches."""
        assert self._key is not None  # make_plan comes first
        return self._key

    def is_current(self) -> bool:
        """Whether the plan is for the objects that the module holds now."""
        return self.plan is not None and self.plan.is_current()

    def make_plan(self, state: State) -> None:
        """Matches the patches against upstream.

        Args:
            state: What is in force at present.

        Raises:
            PatchError: A patch does not fit.
        """
        plan = self._make_plan(self.members, state)
        self.plan = plan
        self.switches.clear()
        parts = [self.module_name, *plan.names]
        for upstream, edits in plan.edits.items():
            parts.append(upstream.filename)
            parts.extend(f"{edit.start}:{edit.end}:{edit.text}" for edit in edits)
        self._key = PatchKey(parts, list(plan.names.values()))

    def _current_plan(self) -> Plan:
        if self.plan is None or not self.is_current():
            self.make_plan(ACTIVE.state)
        assert self.plan is not None  # just made
        return self.plan

    def _make_plan(self, members: Mapping[str, Sequence[Patch]], state: State) -> Plan:
        used = {name for patches in members.values() for patch in patches for name in patch.new_names}
        defaults = [name for name in DEFAULT_NAMES if name in used and name not in self._names]
        names = dict(self._names)
        if defaults:
            harvest = importlib.import_module("interp_jax.transforms.sowing")
            names.update((name, getattr(harvest, name)) for name in defaults)
        return make_plan(self._import(), members, names=names, code_of=state.code_of, known_functions=state.functions())

    def _import(self) -> types.ModuleType:
        if not isinstance(self._module, str):
            return self._module
        if self._module in sys.modules:
            return sys.modules[self._module]
        try:
            return importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self._module}.".startswith(f"{error.name}."):
                raise
            package = self._module.partition(".")[0]
            raise PatchError(
                four_part(
                    f"Module {self._module!r} cannot be imported (no module named {error.name!r})",
                    where=repr(self),
                    expected="the name of an installed module.",
                    fix=f"install the distribution that has {package!r}, in a version that has this module.",
                )
            ) from error

    def _imported(self, module: types.ModuleType) -> None:
        ACTIVE.install(self)


def _as_patches(given: Any, where: str) -> list[Patch]:
    """The patches of one member, from any of the forms they may be written in."""
    if isinstance(given, (str, Patch)) or not isinstance(given, Sequence):
        raise PatchError(_malformed(f"{given!r} ({type(given).__name__}) was given", where))
    texts = [item for item in given if isinstance(item, str)]
    if texts:
        if len(texts) < len(given):
            raise PatchError(_malformed("A list that mixes strings with pairs was given", where))
        if len(texts) % 2:
            raise PatchError(
                _malformed(f"A list of {len(texts)} strings was given; the last has no replacement", where)
            )
        given = list(zip(texts[::2], texts[1::2], strict=True))
    patches = []
    for item in given:
        if isinstance(item, Patch):
            patches.append(item)
        elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
            try:
                patches.append(Patch(*item))
            except PatchError as error:
                head, _, rest = str(error).partition("\n")
                raise PatchError(f"{head.removesuffix('.')} in {where}.\n{rest}") from error
        else:
            raise PatchError(_malformed(f"{item!r} ({type(item).__name__}) was given", where))
    return patches


def _malformed(what: str, where: str) -> str:
    return four_part(
        what,
        where=where,
        expected="[before, after, before, after], or [(before, after), (before, after, count)].",
        fix="give every pattern its replacement.",
    )


def _no_patcher(module: Any, members: Any) -> str:
    """What is wrong with the arguments of a Patcher that are of the wrong kind."""
    home, name = getattr(module, "__module__", None), getattr(module, "__qualname__", None)
    if isinstance(module, types.ModuleType | str):
        what = f"{members!r:.60} ({type(members).__name__}) was given as the members"
    else:
        what = f"{module!r:.60} ({type(module).__name__}) was given as the module"
    example = f'Patcher("{home}", {{"{name}": [...]}})' if home and name else "Patcher(module, {name: [before, after]})"
    return four_part(
        what,
        where="Patcher(...)",
        expected="a module or its name, and a dict from the names of its functions and classes to their patches.",
        fix=f"write {example}.",
    )
