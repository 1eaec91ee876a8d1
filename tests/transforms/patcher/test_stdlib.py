"""The identity patch on every function of several standard library modules: nothing about them changes.

Two ways: a patch that compiles everything again from unchanged text, and patches that replace the first statement of
each function by itself. Code objects, what they do, and tracebacks must be what they were.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import dis
import importlib
import inspect
import json
import shlex
import statistics
import string
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from interp_jax.transforms.patcher import Patcher, PatchError
from interp_jax.transforms.patcher.members import find_member
from interp_jax.transforms.patcher.plan import make_plan
from interp_jax.transforms.patcher.syntax import DEFS, SourceText

MODULES = [
    *("textwrap", "json.decoder", "json.encoder", "dataclasses", "string", "shlex", "statistics", "fractions"),
    *("calendar", "csv", "difflib", "contextlib", "enum", "functools", "collections", "tokenize", "pprint", "copy"),
]


def members(module: types.ModuleType) -> dict[str, tuple[()]]:
    """The functions and classes a module defines and whose source can be read, each with no patches."""
    found: dict[str, tuple[()]] = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__ or not isinstance(value, (type, types.FunctionType)):
            continue
        try:
            find_member(module, name)
        except PatchError:
            continue  # made by exec, or overwritten by a C extension
        found[name] = ()
    return found


def functions(plan: Any) -> Iterator[tuple[types.FunctionType, types.CodeType]]:
    for target in plan.functions.values():
        for reference in target.functions:
            yield reference(), target.original


def all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from all_codes(constant)


def assert_same_code(new: types.CodeType, old: types.CodeType, *, columns: bool) -> None:
    for a, b in zip(all_codes(new), all_codes(old), strict=True):
        assert a.co_code == b.co_code
        assert a.co_names == b.co_names
        assert a.co_varnames == b.co_varnames
        assert a.co_freevars == b.co_freevars
        assert a.co_cellvars == b.co_cellvars
        assert a.co_flags == b.co_flags
        assert a.co_name == b.co_name
        assert a.co_qualname == b.co_qualname
        assert a.co_exceptiontable == b.co_exceptiontable
        assert list(a.co_lines()) == list(b.co_lines())
        assert [c for c in a.co_consts if not isinstance(c, types.CodeType)] == [
            c for c in b.co_consts if not isinstance(c, types.CodeType)
        ]
        if columns:
            assert a.co_linetable == b.co_linetable
            assert a == b


@pytest.mark.parametrize("name", MODULES)
def test_compiled_again(name: str) -> None:
    module = importlib.import_module(name)
    patcher = Patcher(name, members(module))
    assert patcher.diff() == ""
    assert patcher.plan is not None
    found = list(functions(patcher.plan))
    assert len(found) >= 3
    with patcher:
        for function, old in found:
            assert function.__code__ is not old
            assert function.__code__.co_filename.startswith(f"<patched {name.replace('.', '/')}")
            assert_same_code(function.__code__, old, columns=True)
    assert all(function.__code__ is old for function, old in found)


def first_statement(node: Any, source: SourceText) -> str | None:
    """The text of the first statement of a function that is not its docstring, with its indentation."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or isinstance(body[0], (*DEFS, ast.ClassDef)):
        return None
    start, end = source.span(body[0])
    text = " " * len(source.before(start)) + source.cut(start, end)
    # As a statement, even where it could be read as an expression.
    return f"{text};" if isinstance(body[0], ast.Expr) else text


@pytest.mark.parametrize("name", MODULES)
def test_first_statement_for_itself(name: str) -> None:
    module = importlib.import_module(name)
    whole = make_plan(module, members(module))
    patches = {}
    for node, target in whole.functions.items():
        if target.upstream.module != name or "<locals>" in target.name or "@" in target.name:
            continue
        text = first_statement(node, target.upstream.source)
        accessors = [other for other in whole.functions.values() if other.name == target.name]
        if text and len(accessors) == 1:
            patches[target.name] = [(text, text, (1, None))]
    assert len(patches) >= 3
    patcher = Patcher(name, patches)
    with patcher:
        assert patcher.plan is not None
        found = list(functions(patcher.plan))
        assert len(found) >= len(patches)
        for function, old in found:
            # A statement over several lines is written anew with other columns, on the same lines.
            assert_same_code(function.__code__, old, columns=False)
            assert inspect.signature(function)
    # The text differs in semicolons and in the layout of continuation lines only.
    changed = [line for line in patcher.diff().splitlines() if not line.startswith(("+++", "---"))]
    removed, added = ({line[1:].strip(" ;") for line in changed if line.startswith(sign)} for sign in "-+")
    assert added == removed


def calls() -> dict[str, Callable[[], Any]]:
    return {
        "textwrap": lambda: textwrap.TextWrapper(width=0).wrap("a b"),
        "json.decoder": lambda: json.loads('{"a": [1, 2'),
        "json.encoder": lambda: json.dumps({"a": object()}, indent=1),
        "statistics": lambda: statistics.mean([]),
        "string": lambda: string.Formatter().format("{a.b} {}", 1),
        "shlex": lambda: shlex.split("'no end"),
    }


@pytest.mark.parametrize("name", calls())
def test_tracebacks_are_those_of_upstream(name: str) -> None:
    call = calls()[name]

    def seen() -> tuple[str, list[tuple[Any, ...]]]:
        try:
            call()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            places = [(frame.name, frame.lineno, frame.end_lineno, frame.colno, frame.line) for frame in frames[1:]]
            return repr(error), places
        raise AssertionError("no exception")

    before = seen()
    assert before[1]
    module = importlib.import_module(name)
    with Patcher(name, members(module)):
        assert seen() == before
    assert seen() == before


def test_results_are_those_of_upstream() -> None:
    data = {"a": [1, 2.5, None, True, "é\n"], "b": {"c": []}}
    text = "the quick brown fox " * 9
    before = json.dumps(data, indent=2), textwrap.fill(text, 33), shlex.split("a 'b c' d"), statistics.stdev([1, 2, 4])
    patchers = [
        Patcher(name, members(importlib.import_module(name)))
        for name in ("json.encoder", "json.decoder", "textwrap", "shlex", "statistics", "fractions")
    ]
    for patcher in patchers:
        patcher.__enter__()
    try:
        now = json.dumps(data, indent=2), textwrap.fill(text, 33), shlex.split("a 'b c' d"), statistics.stdev([1, 2, 4])
        assert json.loads(now[0]) == data
    finally:
        for patcher in reversed(patchers):
            patcher.__exit__()
    assert now == before


def test_instructions_are_compared_for_real() -> None:
    """The comparison above would notice a difference of one constant or one line."""
    code = textwrap.dedent.__code__
    with Patcher("textwrap", dedent=[("$x in $y", "$x not in $y", (0, None)), ("margin = None", "margin = 0")]):
        other = textwrap.dedent.__code__
        assert [item.opname for item in dis.get_instructions(other)] == [
            item.opname for item in dis.get_instructions(code)
        ]
        with pytest.raises(AssertionError):
            assert_same_code(other, code, columns=False)
