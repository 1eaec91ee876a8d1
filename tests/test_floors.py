"""Imports point down: the floors of the house, checked on syntax trees, imports inside functions included.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator

import pytest

from tests.source_tree import MAPPED, MODULES, Module

# A module imports from lower floors and from its own folder; folders on one floor do not import each other.
FLOORS = {
    "core": 0,
    "transforms": 1,
    "models": 2,
    "data": 2,
    "patches": 3,
    "configs": 3,
    "forward": 3,
    "methods": 4,
    "figures": 5,
    "experiments": 6,
    "experiment_files": 7,
    "cli": 8,
}
# Their members are leaves: none imports another.
LEAVES = ("methods", "experiments")


def imports(module: Module, known: dict[str, Module]) -> Iterator[tuple[str, int]]:
    """The modules a file imports and the lines it does so on: anywhere, under any condition, in any spelling."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield (submodule if submodule in known else source), node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def faults(module: Module, known: dict[str, Module]) -> list[str]:
    """Every import of a module that breaks a rule of the house, in words."""
    found = []
    for target, line in imports(module, known):
        at = f"{module}:{line} imports {target}"
        if target.startswith("jax._src") and module.name != "interp_jax.transforms.jax_compat":
            found.append(f"{at}: only transforms/jax_compat.py may touch JAX's private modules")
        top, _, rest = target.partition(".")
        if top in ("tests", "benchmarks", *MAPPED):
            found.append(f"{at}: installed code knows only installed names, such as interp_jax.patches")
        if top != "interp_jax" or not module.folder:
            continue
        if not rest:
            found.append(f"{at}: nobody inside imports the front door")
            continue
        folder = rest.split(".")[0]
        if folder not in FLOORS:
            found.append(f"{at}: there is no floor for {folder!r}; give it one in {__name__}")
        elif folder != module.folder and FLOORS[folder] >= FLOORS[module.folder]:
            found.append(f"{at}: floor {FLOORS[module.folder]} imports floor {FLOORS[folder]}")
        elif folder == module.folder and folder in LEAVES and _member(target) != _member(module.name):
            found.append(f"{at}: the members of {folder} do not import each other")
    return found


def _member(name: str) -> str:
    return ".".join(name.split(".")[:3])


def cycle(known: dict[str, Module]) -> list[str] | None:
    """A ring of files that import each other, or None."""
    graph = {name: {t for t, _ in imports(module, known) if t in known} for name, module in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize("module", MODULES.values(), ids=str)
def test_floor(module: Module) -> None:
    assert module.folder in FLOORS or not module.folder, f"{module} stands on no floor; give {module.folder!r} one"
    assert not faults(module, MODULES)


def test_no_cycles() -> None:
    assert cycle(MODULES) is None


def test_the_whole_package_was_walked() -> None:
    folders = {module.folder for module in MODULES.values()}
    assert {"core", "transforms", "models", "patches"} <= folders
    assert "interp_jax.core.sites" in MODULES
    assert "interp_jax.patches" in MODULES


BROKEN = {
    "an import upwards": ("core.low", "from interp_jax.models import high", "floor 0 imports floor 2"),
    "a lazy import upwards": ("core.low", "def f():\n    import interp_jax.models.high", "floor 0 imports floor 2"),
    "a relative import upwards": ("core.low", "from ..models import high", "floor 0 imports floor 2"),
    "an import by name upwards": (
        "core.low",
        "import importlib\nimportlib.import_module('interp_jax.models.high')",
        "floor 0 imports floor 2",
    ),
    "an import for types only": (
        "core.low",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from interp_jax.models.high import X",
        "floor 0 imports floor 2",
    ),
    "a sibling": ("data.low", "from interp_jax.models.high import X", "floor 2 imports floor 2"),
    "the front door": ("core.low", "import interp_jax as ij", "front door"),
    "a name of the front door": ("core.low", "from interp_jax import Site", "front door"),
    "private JAX": ("transforms.low", "from jax._src import core", "private modules"),
    "the tests": ("core.low", "from tests.source_tree import ROOT", "only installed names"),
    "patches by their folder": ("cli", "import patches.gpt2", "only installed names"),
    "another method": ("methods.low", "from interp_jax.methods.high import X", "do not import each other"),
    "a folder without a floor": ("core.low", "import interp_jax.attic.x", "no floor for 'attic'"),
}


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.replace(" ", "-"))
def test_the_checker_sees(case: str, tmp_path) -> None:
    name, source, words = BROKEN[case]
    known = _write(tmp_path, {name: source, "models.high": "X = 1", "methods.high": "X = 1"})
    assert [fault for fault in faults(known[f"interp_jax.{name}"], known) if words in fault]


def test_the_checker_allows_what_is_allowed(tmp_path) -> None:
    known = _write(
        tmp_path,
        {
            "transforms.jax_compat": "from jax._src import core",
            "forward.a": "from interp_jax.core import errors\nfrom .b import X\nimport numpy.linalg",
            "forward.b": "X = 1",
            "core.errors": "",
        },
    )
    assert [fault for module in known.values() for fault in faults(module, known)] == []


def test_the_checker_sees_a_cycle(tmp_path) -> None:
    known = _write(tmp_path, {"core.a": "import interp_jax.core.b", "core.b": "def f():\n    from .a import x"})
    ring = cycle(known)
    assert ring is not None
    assert set(ring) == {"interp_jax.core.a", "interp_jax.core.b"}


def _write(folder, sources: dict[str, str]) -> dict[str, Module]:
    known = {}
    for name, source in sources.items():
        path = folder / f"{name}.py"
        path.write_text(source)
        known[f"interp_jax.{name}"] = Module(f"interp_jax.{name}", path)
    return known
