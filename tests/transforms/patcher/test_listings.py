"""What debuggers, tracebacks and `??` show is the code that runs.

Source: interp_jax.
"""

from __future__ import annotations

import inspect
import io
import linecache
import pathlib
import pdb
import sys
import trace
import traceback

import pytest

from interp_jax.transforms.patcher import Patcher
from interp_jax.transforms.patcher.compiled import FOLDER_VARIABLE

UPSTREAM = """
# A comment before.
def early(x):
    return x


def f(x):
    # A comment inside.
    a = g(
        x,
        1,
    )  # kept
    b = a / (x - 1)
    return b


def g(x, y):
    return x + y


class A:
    def m(self, x):
        return x * 2

    def n(self):
        raise ValueError("from n")
"""


@pytest.fixture
def module(make_module):
    return make_module(UPSTREAM)


def test_source_of_functions_and_methods(module) -> None:
    plain = inspect.getsource(module.f)
    patcher = Patcher(module, {"f": ["g($x, 1)", "g($x, 2)"], "A.m": ["x * 2", "x * 5"]})
    with patcher:
        assert inspect.getsource(module.f) == (
            "def f(x):\n    # A comment inside.\n    a = g(x, 2)  # kept\n\n\n\n    b = a / (x - 1)\n    return b\n"
        )
        assert inspect.getsource(module.A.m) == "    def m(self, x):\n        return x * 5\n"
        assert inspect.getsource(module.A().m) == "    def m(self, x):\n        return x * 5\n"
        linecache.checkcache()
        assert "x * 5" in inspect.getsource(module.A.m)
        assert inspect.getsource(module.g) == "def g(x, y):\n    return x + y\n"
    assert inspect.getsource(module.f) == plain


def test_ipython_shows_it(module) -> None:
    from IPython.core.oinspect import getsource

    with Patcher(module, {"A.m": ["x * 2", "x * 5"]}):
        assert getsource(module.A.m, "m") == "    def m(self, x):\n        return x * 5\n"


def test_tracebacks_have_upstreams_line_numbers_and_the_patched_text(module) -> None:
    def lines_and_text() -> list[tuple[str, int | None, str, str | None]]:
        with pytest.raises(ZeroDivisionError) as caught:
            module.f(1)
        frames = traceback.extract_tb(caught.value.__traceback__)[1:]
        return [(frame.filename, frame.lineno, frame.name, frame.line) for frame in frames]

    ((path, line, name, text),) = lines_and_text()
    assert (path, line, name, text) == (module.__file__, 13, "f", "b = a / (x - 1)")
    with Patcher(module, f=["g($x, 1)", "g($x, 2)"]):
        ((pseudo, *rest),) = lines_and_text()
        assert pseudo.startswith(f"<patched {module.__name__}.py ")
        assert rest == [13, "f", "b = a / (x - 1)"]
    with Patcher(module, f=["x - 1", "x * 0"]):
        assert lines_and_text()[0][1:] == (13, "f", "b = a / (x * 0)")
    with Patcher(module, f=["a = g(x, 1)", "a = g(x, 1)" + "\na += 0" * 5]):
        assert lines_and_text()[0][1:] == (15, "f", "b = a / (x - 1)")


def test_ipythons_tracebacks(module) -> None:
    from stack_data.formatting import Formatter

    with Patcher(module, f=["x - 1", "x * 0"]), pytest.raises(ZeroDivisionError) as caught:
        module.f(1)
    text = "".join(Formatter().format_exception(caught.value))
    assert "-->   13 |     b = a / (x * 0)" in text
    assert "      14 |     return b" in text


def test_columns_in_tracebacks(module) -> None:
    with Patcher(module, f=["x - 1", "x * 0"]), pytest.raises(ZeroDivisionError) as caught:
        module.f(1)
    text = "".join(traceback.format_exception(caught.value))
    assert "    b = a / (x * 0)\n        ~~^~~~~~~~~\n" in text


def test_pdb_lists_it(module) -> None:
    out = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("step\nstep\nlist\np x\ncontinue\n"), stdout=out, nosigint=True, readrc=False)
    debugger.use_rawinput = False
    old = sys.gettrace()
    try:
        with Patcher(module, {"A.m": ["return x * 2", "y = x * 5\nreturn y"]}):
            assert debugger.runcall(module.A().m, 3) == 15
    finally:
        sys.settrace(old)
    said = out.getvalue()
    assert "-> y = x * 5" in said
    assert "class A:" in said
    assert "return y" in said
    assert "(Pdb) 3" in said


def test_line_counters_see_it(module) -> None:
    counter = trace.Trace(count=True, trace=False)
    old = sys.gettrace()
    try:
        with Patcher(module, {"A.m": ["return x * 2", "if x:\n    return x * 5\nreturn 0"]}):
            assert counter.runfunc(module.A().m, 3) == 15
    finally:
        sys.settrace(old)
    counts = {linecache.getline(filename, line).strip(): n for (filename, line), n in counter.results().counts.items()}
    assert counts["return x * 5"] == 1
    assert "return 0" not in counts


def test_real_files_for_tools_that_want_them(module, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "patched"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    with Patcher(module, {"A.m": ["x * 2", "x * 5"]}):
        path = pathlib.Path(module.A.m.__code__.co_filename)
        assert path.is_relative_to(folder)
        assert path.name == f"{module.__name__}.py"
        assert "return x * 5" in path.read_text()
        assert inspect.getsource(module.A.m) == "    def m(self, x):\n        return x * 5\n"
        assert module.A().m(1) == 5


def test_diff_names_paths_inside_the_package(module) -> None:
    patcher = Patcher(module, {"f": ["g($x, 1)", "g($x, 2)"]})
    name = module.__name__
    assert patcher.diff() == (
        f"--- a/{name}.py\n+++ b/{name}.py\n@@ -6,10 +6,7 @@\n \n def f(x):\n     # A comment inside.\n-    a = g(\n"
        "-        x,\n-        1,\n-    )  # kept\n+    a = g(x, 2)  # kept\n     b = a / (x - 1)\n     return b\n "
    )
    assert (
        Patcher("json.encoder", JSONEncoder=["self.ensure_ascii = $x", "self.ensure_ascii = not $x"])
        .diff()
        .startswith("--- a/json/encoder.py\n+++ b/json/encoder.py\n")
    )
    assert Patcher("json", load=["fp.read()", "fp.read(1)"]).diff().startswith("--- a/json/__init__.py\n")
    assert Patcher(module, f=[]).diff() == ""


def test_report(module) -> None:
    patcher = Patcher(module, {"f": ["g($x, 1)", "g($x, 2)", "x - 1", "x + 1"], "A.m": ["x * 2", "x * 5"]})
    name = module.__name__
    assert patcher.report().splitlines() == [
        f"{name}:f ({name}.py:7): 2 edits, code exchanged in 1 function",
        f"{name}:A.m ({name}.py:22): 1 edit, code exchanged in 1 function",
    ]
    assert repr(patcher) == f"Patcher({name!r}, members: f, A.m)"
