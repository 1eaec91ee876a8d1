"""The package's own source files as syntax trees: what the tests of the house walk over.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders at the top level that install inside the package (pyproject.toml, package-dir).
MAPPED = ("configs", "experiments", "patches")


@dataclass(frozen=True)
class Module:
    """One source file under the name it is imported by.

    Args:
        name: Dotted name, for example "interp_jax.core.sites".
        path: The file.
    """

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    @property
    def is_package(self) -> bool:
        """Whether this is the `__init__.py` of a folder."""
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """Where the module lives: "core", "models", ..., "cli" for a file beside them, "" for the front door."""
        return [*self.name.split("."), ""][1]

    def __str__(self) -> str:
        return self.name


def modules() -> list[Module]:
    """Every module that is installed, sorted by name."""
    found = [Module(_dotted(path, ROOT), path) for path in sorted((ROOT / "interp_jax").rglob("*.py"))]
    for folder in MAPPED:
        found += [Module("interp_jax." + _dotted(path, ROOT), path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return found


def _dotted(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module.name: module for module in modules()}


def tracked_files() -> list[Path]:
    """The files that belong to the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]
