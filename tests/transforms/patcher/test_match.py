"""Matching on nodes, and the near-misses that errors show.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp_jax.transforms.patcher.match import find, near_misses
from interp_jax.transforms.patcher.patterns import parse
from interp_jax.transforms.patcher.syntax import digest, first_line, normal, same

SOURCE = textwrap.dedent(
    '''
    import os
    class A:
        """f(x, 1)"""
        y: int = 3
        def m(self, a, b=f(1, 2)):
            x = f(a, 1)  # f(x, 1)
            with lock:
                self.x = f(x,
                           1)
                del x[0]
            try:
                x = 1
                y = x + x
                z = x + y
            except ValueError as e:
                raise
            else:
                x = 1
                y = 2
            return (lambda q: q + 1)("f(x, 1)")
        @property
        def p(self):
            return self.p
    '''
)


def matches(text: str, source: str = SOURCE) -> list[str]:
    return ["; ".join(map(ast.unparse, match.nodes)) for match in find(parse(text), ast.parse(source))]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("f($x, 1)", ["f(a, 1)", "f(x, 1)"]),
        ("f( $x,\n 1, )", ["f(a, 1)", "f(x, 1)"]),
        ("f($x, $y)", ["f(1, 2)", "f(a, 1)", "f(x, 1)"]),
        ("$x + $x", ["x + x"]),
        ("$x + $y", ["x + x", "x + y", "q + 1"]),
        ("self.x", ["self.x"]),  # a store context
        ("self.$name", ["self.x", "self.p"]),
        ("x[$i]", ["x[0]"]),  # a delete context
        ("lambda $q: $q + 1", ["lambda q: q + 1"]),
        ("$a.p", ["self.p"]),
        ("x = 1", ["x = 1", "x = 1"]),
        ("y = 3", []),  # annotated upstream
        ("y: int = 3", ["y: int = 3"]),
        ("x = 1\ny = $v", ["x = 1; y = x + x", "x = 1; y = 2"]),
        ("x = 1\ny = 2", ["x = 1; y = 2"]),
        ("x = 1\nz = $v", []),
        ("x = 1\n$$\nz = $v", ["x = 1; y = x + x; z = x + y"]),
        ("x = 1\n$$", ["x = 1; y = x + x; z = x + y", "x = 1; y = 2"]),
        ("$$\ny = 2", ["x = 1; y = 2"]),
        ("with lock: $$", ["with lock:\n    self.x = f(x, 1)\n    del x[0]"]),
        ("def p(self): $$", []),  # decorators are part of a definition
        ("@property\ndef p(self): $$", ["@property\ndef p(self):\n    return self.p"]),
        ("@property\ndef $n(self): return self.$n", ["@property\ndef p(self):\n    return self.p"]),
        ("'f(x, 1)'", ["'f(x, 1)'", "'f(x, 1)'"]),
        ("True + $x", []),
    ],
)
def test_find(pattern: str, found: list[str]) -> None:
    assert matches(pattern) == found


def test_constants_are_equal_only_in_type_and_sign() -> None:
    source = "f(1, True, 1.0, 0.0, -0.0, 1j, '1', b'1', None, ...)"
    for constant in ("1", "True", "1.0", "'1'", "b'1'", "None", "..."):
        assert matches(constant, source) in ([constant], [constant, constant]), constant
    assert matches("1", source) == ["1"]
    assert matches("0.0", source) == ["0.0", "0.0"]
    assert matches("-0.0", source) == ["-0.0"]


def test_interior_runs_are_as_short_as_they_can_be() -> None:
    source = "a = 1\nb = 2\na = 1\nb = 2"
    assert matches("a = 1\n$$x\nb = 2", source) == ["a = 1; b = 2", "a = 1; b = 2"]


def test_repeated_runs_must_be_equal() -> None:
    pattern = "if $c:\n  $$x\nelse:\n  $$x"
    assert len(matches(pattern, "if a:\n  f( 'x' )\n  g()\nelse:\n  f(\"x\")\n  g()")) == 1
    assert matches(pattern, "if a:\n  f()\nelse:\n  g()") == []


def test_starred_arguments_are_no_expressions() -> None:
    assert matches("f($x)", "f(*a)") == []
    assert matches("f(*$x)", "f(*a)") == ["f(*a)"]
    assert matches("f(k=$x, **$y)", "f(k=1, **b)") == ["f(k=1, **b)"]


def test_every_kind_of_block() -> None:
    source = """
        for i in x:
            f(1);
        else:
            f(1)
        while x:
            f(1)
        try:
            f(1)
        except A:
            f(1)
        finally:
            f(1)
        match x:
            case 1:
                f(1)
        async def g():
            async with y:
                f(1)
    """
    assert matches("f($x);", textwrap.dedent(source)) == ["f(1)"] * 8


@pytest.mark.parametrize(
    ("pattern", "line", "difference"),
    [
        ("f(a, 2)", 7, "upstream has `1` where the pattern has `2`"),
        ("g(a, 1)", 7, "upstream has `f` where the pattern has `g`"),
        ("f(a)", 7, "upstream has `1` besides"),
        ("f(a, 1, 2)", 7, "upstream has nothing where the pattern has `2`"),
        ("x = 1\ny = 3", 19, "upstream has `2` where the pattern has `3`"),
        ("x - x", 14, "upstream has Add where the pattern has Sub"),
        ("self.q", 9, "upstream has `self.x` where the pattern has `self.q`"),
    ],
)
def test_near_misses(pattern: str, line: int, difference: str) -> None:
    misses = near_misses(parse(pattern), ast.parse(SOURCE))
    assert (line, difference) in [(first_line(miss.node), miss.difference) for miss in misses]
    assert misses[0].likeness >= misses[-1].likeness > 0.4


def test_nothing_alike() -> None:
    assert near_misses(parse("await some.thing[else_]"), ast.parse("x = 1")) == []


def test_normal_form_and_digest() -> None:
    assert same("x = 'a' 'b'", 'x = (u"ab")')
    assert not same("x = 1", "x = True")
    plain = ast.parse("def f(a): return a").body[0]
    documented = ast.parse("def f(a):\n  'what it is'\n  # why\n  return (a)").body[0]
    other = ast.parse("def f(a): return b").body[0]
    assert digest(plain) == digest(documented) != digest(other)
    # Recorded, so that a change of the normal form does not pass unnoticed.
    assert digest(plain) == "af049dc83c3cb1ae56fac14d909eb521d4c4c59c227902c7f5fd2a77085d1ce7"


# --- properties ----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from("abcxy")


def expressions() -> st.SearchStrategy[ast.expr]:
    leaves = st.one_of(
        NAMES.map(lambda name: ast.Name(name, ast.Load())),
        st.one_of(st.integers(0, 9), st.booleans(), st.sampled_from(["s", "a b", "é"])).map(ast.Constant),
    )

    def extend(inner: st.SearchStrategy[ast.expr]) -> st.SearchStrategy[ast.expr]:
        return st.one_of(
            st.builds(ast.BinOp, inner, st.sampled_from([ast.Add(), ast.Mult(), ast.Pow(), ast.MatMult()]), inner),
            st.builds(ast.UnaryOp, st.sampled_from([ast.USub(), ast.Not()]), inner),
            st.builds(ast.Call, inner, st.lists(inner, max_size=2), st.just([])),
            st.builds(ast.Attribute, inner, NAMES, st.just(ast.Load())),
            st.builds(ast.Subscript, inner, inner, st.just(ast.Load())),
            st.builds(lambda elts: ast.Tuple(elts, ast.Load()), st.lists(inner, min_size=1, max_size=3)),
            st.builds(ast.IfExp, inner, inner, inner),
        )

    return st.recursive(leaves, extend, max_leaves=12)


@given(expressions())
def test_everything_finds_itself(expression: ast.expr) -> None:
    text = ast.unparse(expression)
    tree = ast.parse(text, mode="eval").body
    (first, *_) = find(parse(text), tree)
    assert first.nodes == [tree]
    # And everywhere that the same code stands, nowhere else.
    equal = [node for node in ast.walk(tree) if isinstance(node, ast.expr) and normal(node) == normal(tree)]
    assert len(find(parse(text), tree)) == len(equal)


@given(expressions(), expressions())
def test_wildcards_capture_what_makes_the_pattern_the_code(left: ast.expr, right: ast.expr) -> None:
    tree = ast.parse(f"f({ast.unparse(left)}, {ast.unparse(right)})", mode="eval").body
    assert isinstance(tree, ast.Call)
    outer = [match for match in find(parse("f($l, $r)"), tree) if match.nodes == [tree]]
    assert [(normal(m.captures["l"]), normal(m.captures["r"])) for m in outer] == [
        (normal(tree.args[0]), normal(tree.args[1]))
    ]
    is_same = normal(tree.args[0]) == normal(tree.args[1])
    assert any(match.nodes == [tree] for match in find(parse("f($l, $l)"), tree)) is is_same
