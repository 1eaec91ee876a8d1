"""Docstrings: every public thing has one, every parameter is in it, and every example in it runs.

A parameter is documented by an entry under `Args:`; a docstring without that section has its name among its words.
The fields of a dataclass or NamedTuple count as its parameters. Where a folder's `__init__` says in `__all__` what of
it is public, the rest needs a docstring, but not a word on every parameter.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.source_tree import MODULES, Module

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions(module: Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Functions, classes and methods a reader may call, under their qualified names."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
        for node in body:
            if isinstance(node, ast.If):
                yield from inside(node.body + node.orelse, prefix)
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_") or is_variant(node):
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from inside(node.body, f"{prefix}{node.name}.")

    return inside(module.tree.body, "")


def is_variant(node: Function | ast.ClassDef) -> bool:
    """Whether this is one more signature, or the setter, of something documented elsewhere."""
    return any(re.search(r"\.(setter|deleter)$|\boverload$", ast.unparse(d)) for d in node.decorator_list)


def parameters(node: Function | ast.ClassDef, prefix: str) -> list[str]:
    """The names a caller may pass."""
    if isinstance(node, ast.ClassDef):
        makers = [child for child in node.body if isinstance(child, Function) and child.name == "__init__"]
        if makers:
            return parameters(makers[0], prefix="method.")
        if not has_fields(node):
            return []
        fields = [
            child for child in node.body if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)
        ]
        return [
            child.target.id
            for child in fields
            if isinstance(child.target, ast.Name)
            and "ClassVar" not in ast.unparse(child.annotation)
            and not child.target.id.startswith("_")
            and not (child.value is not None and "init=False" in ast.unparse(child.value))
        ]
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    is_static = any("staticmethod" in ast.unparse(decorator) for decorator in node.decorator_list)
    if prefix and not is_static:
        names = names[1:]  # self or cls
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return [name for name in names if not name.lstrip("*").startswith("_")]


def has_fields(node: ast.ClassDef) -> bool:
    """Whether the annotations in this class body are its parameters."""
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return is_dataclass or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases)


def documented(docstring: str) -> list[str] | None:
    """The names under `Args:`, or None if there is no such section."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if section is None:
        return None
    entries = re.findall(r"^    (\S[^:\n]*):", section.group(1), re.MULTILINE)
    return [name.strip() for entry in entries for name in entry.split(",")]


def is_inherited(module: Module, name: str) -> bool:
    """Whether a method has the docstring of one it overrides, or of a protocol it follows, in the same module."""
    owner, _, method = name.rpartition(".")
    known = dict(public_definitions(module))
    protocols = {n for n, node in known.items() if "Protocol" in [ast.unparse(b) for b in getattr(node, "bases", [])]}
    bases = protocols | {ast.unparse(base) for base in getattr(known.get(owner), "bases", [])}
    inherited = [known[f"{base}.{method}"] for base in sorted(bases) if f"{base}.{method}" in known]
    return any(ast.get_docstring(node) for node in inherited)


def exported(module: Module, known: dict[str, Module]) -> list[str] | None:
    """What the folder the module is in calls public, or None if it does not say."""
    package = known.get(module.name.rpartition(".")[0])
    for node in package.tree.body if package is not None and package.name != "interp_jax" else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def faults(module: Module, public: list[str] | None = None) -> list[str]:
    """Everything undocumented in a module, in words; `public` are the names whose parameters matter (None: all)."""
    found = []
    for name, node in public_definitions(module):
        docstring = ast.get_docstring(node)
        at = f"{module}:{node.lineno} {name}"
        if not docstring:
            found += [] if is_inherited(module, name) else [f"{at} has no docstring"]
            continue
        names = parameters(node, name.rpartition(".")[0])
        listed = documented(docstring)
        if listed is not None and [n.lstrip("*") for n in listed] != [n.lstrip("*") for n in names]:
            found.append(f"{at} has parameters {names} and documents {listed}")
        elif listed is None and (public is None or name.split(".")[0] in public):
            words = re.findall(r"\w+", docstring.lower())
            missing = [n for n in names if n.lstrip("*").lower() not in words]
            found += [f"{at} does not document {missing}"] if missing else []
    return found


@pytest.mark.parametrize("module", MODULES.values(), ids=str)
def test_every_public_name_and_parameter_is_documented(module: Module) -> None:
    found = faults(module, exported(module, MODULES))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("module", MODULES.values(), ids=str)
def test_the_module_says_what_it_is_and_where_it_is_from(module: Module) -> None:
    paragraphs = re.split(r"\n\s*\n", ast.get_docstring(module.tree) or "")
    assert re.match(r"\S.*[.:]$", paragraphs[0].partition("\n")[0] + "."), f"{module} has no docstring"
    assert re.match(r"Source: \S", paragraphs[-1]), f"the docstring of {module} does not end with 'Source: ...'"


def test_no_two_modules_say_the_same() -> None:
    firsts = Counter((ast.get_docstring(module.tree) or "").partition("\n")[0] for module in MODULES.values())
    assert [line for line, count in firsts.items() if count > 1] == []


@pytest.mark.parametrize("module", [m for m in MODULES.values() if not m.is_package], ids=str)
def test_the_module_has_an_example(module: Module) -> None:
    assert ">>> " in (ast.get_docstring(module.tree) or ""), f"the docstring of {module} has no example"


@pytest.mark.parametrize("module", MODULES.values(), ids=str)
def test_examples_run(module: Module) -> None:
    imported = importlib.import_module(module.name)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(imported, module.name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


UNDOCUMENTED = {
    "no docstring": ("def f():\n    pass", "f has no docstring"),
    "a method": ("class A:\n    'A class.'\n    def f(self):\n        pass", "A.f has no docstring"),
    "an unnamed parameter": ("def f(x):\n    'Do it.'", "does not document ['x']"),
    "a parameter left out": ("def f(x, y):\n    '''Do.\n\n    Args:\n        x: One.\n    '''", "documents ['x']"),
    "a leftover": (
        "def f(x):\n    '''Do.\n\n    Args:\n        x: One.\n        y: Two.\n    '''",
        "documents ['x', 'y']",
    ),
    "a field": ("@dataclass\nclass A:\n    'Holds.'\n    x: int", "A does not document ['x']"),
    "a constructor": ("class A:\n    'Holds.'\n    def __init__(self, x): pass", "A does not document ['x']"),
    "another order": ("def f(x, y):\n    '''Do.\n\n    Args:\n        y: Two.\n        x: One.\n    '''", "['y', 'x']"),
    "keywords": ("def f(*a, k, **o):\n    '''Do.\n\n    Args:\n        k: One.\n    '''", "['*a', 'k', '**o']"),
    "under a condition": ("if True:\n    def f():\n        pass", "f has no docstring"),
}


@pytest.mark.parametrize("case", UNDOCUMENTED, ids=lambda case: case.replace(" ", "-"))
def test_the_checker_sees(case: str, tmp_path) -> None:
    source, words = UNDOCUMENTED[case]
    (tmp_path / "m.py").write_text(source)
    assert any(words in fault for fault in faults(Module("interp_jax.m", tmp_path / "m.py")))


def test_the_checker_allows_what_is_documented(tmp_path) -> None:
    (tmp_path / "m.py").write_text(
        "def f(x):\n    'Twice x.'\n"
        "def _private(x):\n    pass\n"
        "def g(a, b, *c):\n    '''Do.\n\n    Args:\n        a, b: Both.\n            More: of it.\n        c: Rest.\n\n"
        "    Returns:\n        c: x.\n    '''\n"
        "class A:\n    '''Holds.\n\n    Args:\n        x: One.\n    '''\n    def __init__(self, x): pass\n"
        "    def h(self):\n        'It.'\n"
        "class B(A):\n    'More.'\n    def h(self): pass\n"
        "class C:\n    'More.'\n"
        "    @property\n    def y(self):\n        'It.'\n    @y.setter\n    def y(self, value): pass\n"
    )
    assert faults(Module("interp_jax.m", tmp_path / "m.py")) == []
