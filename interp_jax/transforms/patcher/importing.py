"""Patching modules at their import: a finder that hands each module over as soon as it has run.

The finder stands first in `sys.meta_path` only while something waits. It asks the other finders for the module and
wraps the loader they found; the real loader is back in its place before the module's own code runs, so the module
cannot tell.

>>> heard = []
>>> wait_for("this_module_is_never_imported", heard.append)
>>> stop_waiting("this_module_is_never_imported", heard.append); heard
[]

Sharp edges: a module that is imported already is not imported again. An exception in a listener makes the import
fail, as an exception in the module itself would.

Source: the import system's reference in the Python documentation.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

Listener = Callable[[types.ModuleType], None]


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then the listeners."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.tell(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.listeners: dict[str, list[Listener]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.listeners:
            return None
        for finder in sys.meta_path:
            if finder is not self and (find := getattr(finder, "find_spec", None)) is not None:
                spec = find(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self)
                    return spec
        return None

    def tell(self, module: types.ModuleType) -> None:
        for listener in list(self.listeners.get(module.__name__, ())):
            listener(module)
        _forget(module.__name__)


_FINDER = _Finder()


def wait_for(name: str, listener: Listener) -> None:
    """Calls a listener with a module once it is imported.

    Args:
        name: Dotted name of a module that is not imported yet.
        listener: Called once, right after the module's code has run.
    """
    _FINDER.listeners.setdefault(name, []).append(listener)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def stop_waiting(name: str, listener: Listener) -> None:
    """Takes a listener back; does nothing if it is not waiting.

    Args:
        name: As given to `wait_for`.
        listener: As given to `wait_for`.
    """
    waiting = _FINDER.listeners.get(name, [])
    if listener in waiting:
        waiting.remove(listener)
    if not waiting:
        _forget(name)


def _forget(name: str) -> None:
    _FINDER.listeners.pop(name, None)
    if not _FINDER.listeners and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
