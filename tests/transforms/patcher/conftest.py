"""Upstream modules made for one test, and the check that no test leaves a patch behind.

Source: interp_jax.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from interp_jax.transforms.patcher.state import ACTIVE, EMPTY

_NUMBERS = itertools.count()


@pytest.fixture
def make_module(tmp_path, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Writes a module and imports it; it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def make(source: str, *, is_imported: bool = True) -> Any:
        name = f"upstream_{next(_NUMBERS)}"
        names.append(name)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(name) if is_imported else name

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _nothing_stays_in_force() -> Iterator[None]:
    yield
    assert ACTIVE.state is EMPTY
    assert not any(type(finder).__module__.endswith("patcher.importing") for finder in sys.meta_path)
