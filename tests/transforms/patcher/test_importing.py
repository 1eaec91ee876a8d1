"""Patches that wait for their module to be imported.

Source: interp_jax.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest

from interp_jax.transforms.patcher import Patcher, PatchError
from interp_jax.transforms.patcher.importing import _FINDER

UPSTREAM = """
LOADER = __loader__, __spec__.loader
def f(x):
    return x * 2
VALUE = f(1)
"""


def test_install_before_import(make_module) -> None:
    name = make_module(UPSTREAM, is_imported=False)
    patcher = Patcher(name, f=["x * 2", "x * 5"])
    patcher.install()
    patcher.install()
    assert sys.meta_path[0] is _FINDER
    assert name not in sys.modules
    assert not patcher.is_active
    module = importlib.import_module(name)
    assert patcher.is_active
    assert _FINDER not in sys.meta_path
    assert (module.f(1), module.VALUE) == (5, 2)
    # The module and the tools that look at it cannot tell.
    assert module.__spec__ is not None
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert (module.__loader__, module.__loader__) == module.LOADER
    assert module.__spec__.loader is module.__loader__
    assert "x * 5" in inspect.getsource(module.f)
    assert "x * 2" in inspect.getsource(module)
    patcher.uninstall()
    assert module.f(1) == 2


def test_uninstall_before_import(make_module) -> None:
    name = make_module(UPSTREAM, is_imported=False)
    patcher = Patcher(name, f=["x * 2", "x * 5"])
    patcher.install()
    patcher.uninstall()
    assert _FINDER not in sys.meta_path
    assert importlib.import_module(name).f(1) == 2


def test_several_wait_for_one_module(make_module) -> None:
    name = make_module("def f(x, y): return x * 2 + y * 3\n", is_imported=False)
    a, b, c = (Patcher(name, f=[before, "0"]) for before in ("x * 2", "y * 3", "x * 2"))
    for patcher in (a, b, c):
        patcher.install()
    c.uninstall()
    module = importlib.import_module(name)
    assert module.f(1, 1) == 0
    a.uninstall()
    assert module.f(1, 1) == 2
    b.uninstall()


def test_a_patch_that_does_not_fit_fails_the_import(make_module) -> None:
    name = make_module(UPSTREAM, is_imported=False)
    patcher = Patcher(name, f=["x * 3", "x * 5"])
    patcher.install()
    with pytest.raises(PatchError, match=r"Pattern `x \* 3` matches 0 places"):
        importlib.import_module(name)
    assert name not in sys.modules
    patcher.uninstall()
    assert importlib.import_module(name).f(1) == 2


def test_with_imports_the_module(make_module) -> None:
    name = make_module(UPSTREAM, is_imported=False)
    patcher = Patcher(name, f=["x * 2", "x * 5"])
    assert name not in sys.modules
    with patcher:
        assert sys.modules[name].f(1) == 5
    assert sys.modules[name].f(1) == 2


def test_an_import_that_fails_inside_says_so(make_module) -> None:
    name = make_module("import this_is_no_module_either\n", is_imported=False)
    with pytest.raises(ModuleNotFoundError, match="this_is_no_module_either"):
        Patcher(name, f=["1", "2"]).__enter__()


def test_submodules_and_packages(tmp_path, monkeypatch) -> None:
    package = tmp_path / "some_upstream_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .deep import f\n")
    (package / "deep.py").write_text("def f(x): return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    patcher = Patcher("some_upstream_package.deep", f=["x * 2", "x * 5"])
    patcher.install()
    try:
        module: types.ModuleType = importlib.import_module("some_upstream_package")
        assert module.f(1) == 5
        assert patcher.diff().startswith("--- a/some_upstream_package/deep.py\n")
        assert (
            Patcher("some_upstream_package", f=["x * 2", "x"])
            .diff()
            .startswith("--- a/some_upstream_package/deep.py\n")
        )
    finally:
        patcher.uninstall()
        for name in ("some_upstream_package", "some_upstream_package.deep"):
            sys.modules.pop(name, None)
    assert module.f(1) == 2
