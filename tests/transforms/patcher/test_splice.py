"""Upstream's text after edits: only the replaced spans change, and it is the code it should be.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import textwrap

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from interp_jax.transforms.patcher import Patch, PatchError
from interp_jax.transforms.patcher.match import find
from interp_jax.transforms.patcher.render import render
from interp_jax.transforms.patcher.splice import Spliced
from interp_jax.transforms.patcher.syntax import SourceText, normal
from tests.transforms.patcher.test_match import expressions


def spliced(source: str, *patches: Patch) -> Spliced:
    text = SourceText(source)
    tree = text.parse()
    edits = []
    for patch in patches:
        found = find(patch.pattern, tree)
        assert len(found) >= patch.least, patch
        edits += [render(patch, match, text) for match in found]
    return Spliced(text, tree, edits)


def patched(source: str, *pairs: tuple) -> str:
    return spliced(source, *(Patch(*pair) for pair in pairs)).source.text


EXPRESSIONS = [
    # upstream, before, after, what must come out
    ("y = a * b", "b", "c + d", "y = a * (c + d)"),
    ("y = a + b", "b", "c * d", "y = a + c * d"),
    ("y = a - b", "b", "c - d", "y = a - (c - d)"),
    ("y = b - a", "b", "c - d", "y = c - d - a"),
    ("y = b ** a", "b", "-c", "y = (-c) ** a"),
    ("y = a ** b", "b", "-c", "y = a ** -c"),
    ("y = f(b)", "b", "c + d", "y = f(c + d)"),
    ("y = f(b)", "b", "c, d", "y = f((c, d))"),
    ("y = f(b)", "b", "(c, d)", "y = f((c, d))"),
    ("y = x[b]", "b", "c, d", "y = x[c, d]"),
    ("y = b", "b", "c, d", "y = c, d"),
    ("y = b", "b", "c if d else e", "y = c if d else e"),
    ("y = b.real", "b", "c + d", "y = (c + d).real"),
    ("y = b.real", "b", "1", "y = (1).real"),
    ("y = b.real", "b", "f(c)", "y = f(c).real"),
    ("y = b()", "b", "lambda: 0", "y = (lambda: 0)()"),
    ("y = not b", "b", "c or d", "y = not (c or d)"),
    ("y = b or a", "b", "c and d", "y = c and d or a"),
    ("y = b and a", "b", "c or d", "y = (c or d) and a"),
    ("y = b < a", "b", "c < d", "y = (c < d) < a"),
    ("y = a * (b)", "b", "c + d", "y = a * (c + d)"),
    ("y = a * ( b )", "b", "c + d", "y = a * ( c + d )"),
    ("y = [b for b in c]", "b", "(d, e)", "y = [(d, e) for (d, e) in c]"),
    ("y = f(x for x in b)", "$g for x in b", "g", "y = f(g)"),
    ("y = f(x for x in b)", "(x for x in b)", "g", "y = f(g)"),
    ("y = f(k=b)", "b", "(c := 1)", "y = f(k=(c := 1))"),
    ("return(a, b)", "(a, b)", "c", "return c"),
    ("y = 1 if(a)else b", "a", "c", "y = 1 if(c)else b"),
    ("y = [1]if[2]else[3]", "[2]", "c", "y = [1]if c else[3]"),
    ("y = {**b}", "b", "c or d", "y = {**(c or d)}"),
    ("f(*b)", "b", "c or d", "f(*(c or d))"),
    ("y = await_(b)", "await_($x)", "$x.r", "y = b.r"),
    ("y = g(a + b)", "g($x)", "$x * 2", "y = (a + b) * 2"),
    ("y = g(a.b)", "g($x)", "$x * 2", "y = a.b * 2"),
    ("y = z * g(a)", "g($x)", "$x", "y = z * a"),
    ("y = z * g(a + 1)", "g($x)", "$x", "y = z * (a + 1)"),
    ("y = (\n    a\n    + b\n)", "a + b", "f(a,\n  b)", "y = (\n    f(a,\n      b)\n)"),
    (
        "if x:\n    y = b",
        "b",
        """
                f(
                    a,
                    k='''
    z''',
                )
        """,
        "if x:\n    y = f(\n        a,\n        k='''\n    z''',\n    )",
    ),
    ("y = (a +\n     b) * c", "$x + b", "h($x)", "y = (h(a)) * c\n"),
    ("y = f(a +  # why\n      b)", "f($x)", "g($x, 1)", "y = g(a +  # why\n      b, 1)"),
    ("y = f(a\n      + b)", "f($x)", "$x", "y = (a\n      + b)"),
    ("y = é + f(ü)", "f($x)", "g($x, 'ö')", "y = é + g(ü, 'ö')"),
    ("y = self.f(a)", "self.$m($x)", "other.$m($x, $m)", "y = other.f(a, f)"),
    ("y = f(k=1)", "f($k=$v)", "g($k=$v, $v=$k)", None),
    ("y = f(k=z)", "f($k=$v)", "g($k=$v, $v=$k)", "y = g(k=z, z=k)"),
]


@pytest.mark.parametrize(("source", "before", "after", "expected"), EXPRESSIONS)
def test_expressions(source: str, before: str, after: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(PatchError):
            patched(source, (before, after))
    else:
        assert patched(source + "\n", (before, after, (1, None))).rstrip("\n") == expected.rstrip("\n")


STATEMENTS = {
    "one for one": ("a = 1  # one\nb = 2\n", "a = 1", "a = 5", "a = 5  # one\nb = 2\n"),
    "two for one": (
        "if x:\n  a = 1  # one\n  b = 2\n",
        "a = 1",
        "a = 5\nif a:\n    c = 3",
        "if x:\n  a = 5\n  if a:\n      c = 3  # one\n  b = 2\n",
    ),
    "one for three keeps lines": ("a = 1\nb = 2\nc = 3\nd = 4\n", "a = 1\nb = 2\nc = 3", "e()", "e()\n\n\nd = 4\n"),
    "nothing": ("a = 1  # one\nb = 2\n", "a = 1", "", "  # one\nb = 2\n"),
    "nothing in a block": ("if x:\n  a = 1\nb = 2\n", "a = 1", "", "if x:\n  pass\nb = 2\n"),
    "nothing on a shared line": ("a = 1; b = 2\n", "a = 1", "", "pass; b = 2\n"),
    "a comment": ("if x:\n  a = 1\n", "a = 1", "# gone", "if x:\n  # gone\n  pass\n"),
    "wrapped": (
        "with l:\n  # first\n  a = 1  # one\n\n  # second\n  b = '''x\n y'''\n  c = 3  # three\nd = 4\n",
        "with l: $$body",
        "if m:\n    with n:\n        $$body\n        e = 5",
        "if m:\n    with n:\n        # first\n        a = 1  # one\n\n        # second\n"
        "        b = '''x\n y'''\n        c = 3\n        e = 5  # three\nd = 4\n",
    ),
    "unwrapped": (
        "if x:\n\twith l:\n\t\ta = 1\n\t\tb = 2\n\tc = 3\n",
        "with l: $$body",
        "$$body",
        "if x:\n\ta = 1\n\tb = 2\n\n\tc = 3\n",
    ),
    "comments between survive": (
        "a = 1\n# about b\nb = 2  # b\nc = 3\n",
        "a = 1\n$$mid\nc = 3",
        "start()\n$$mid\nstop()",
        "start()\n# about b\nb = 2  # b\nstop()\n",
    ),
    "an empty run": ("a = 1\nc = 3\n", "a = 1\n$$mid\nc = 3", "s()\n$$mid\nt()", "s()\nt()\n"),
    "an empty run first": ("a = 1\nc = 3\n", "a = 1\n$$mid\nc = 3", "$$mid\nt()", "t()\n\n"),
    "an empty run alone": ("a = 1\nc = 3\n", "a = 1\n$$mid\nc = 3", "if x:\n  $$mid", "if x:\n  pass\n"),
    "a run on one line": ("with l: a = 1; b = 2\n", "with l: $$b", "if x: $$b", "if x: \n    a = 1; b = 2\n"),
    "one line stays one line": ("if x: a = 1; b = 2\n", "a = 1", "c = 3", "if x: c = 3; b = 2\n"),
    "one line with two": ("if x: a = 1\nz = 1\n", "a = 1", "b = 2\nc = 3", "if x: \n    b = 2\n    c = 3\nz = 1\n"),
    "one line broken up": (
        "  \nif x: a = 1; b = 2; c = 3  # end\n",
        "b = 2",
        "for i in d:\n  e()",
        "  \nif x: \n    a = 1\n    for i in d:\n      e()\n    c = 3  # end\n",
    ),
    "semicolons": ("a = 1; b = 2;\n", "b = 2", "if c: d()", "a = 1\nif c: d()\n"),
    "elif for if": ("if a:\n  b\nelif c:\n  d\nelse:\n  e\n", "if c: $$x\nelse: $$y", "if f: $$x", None),
    "elif stays elif": (
        "if a:\n  b()\nelif c:\n  d()\n",
        "if c: $$x",
        "if f:\n  $$x",
        "if a:\n  b()\nelif f:\n  d()\n",
    ),
    "elif becomes else": (
        "if a:\n  b()\nelif c:\n  d()\n",
        "if c: $$x",
        "g()\nh()",
        "if a:\n  b()\nelse:\n    g()\n    h()\n",
    ),
    "a definition": (
        "@d\ndef f(a, b=1):\n    # why\n    return a\n",
        "@d\ndef f($x, b=$y):\n    $$body",
        "@d\ndef f($x, b=$y, c=2):\n    if c:\n        $$body",
        "@d\ndef f(a, b=1, c=2):\n    if c:\n        # why\n        return a\n",
    ),
    "strings are not indented": (
        "if x:\n    a = 1\n",
        "a = 1",
        'a = """\none\n  two"""\nb = 2',
        'if x:\n    a = """\none\n  two"""\n    b = 2\n',
    ),
    "an expression statement": ("f(x)\ny = f(x)\n", "f($a);", "g($a)\nh()", "g(x)\nh()\ny = f(x)\n"),
}


@pytest.mark.parametrize("case", STATEMENTS, ids=lambda case: case.replace(" ", "-"))
def test_statements(case: str) -> None:
    source, before, after, expected = STATEMENTS[case]
    if expected is None:
        expected = "if a:\n  b\nelif f: \n    d\n\n\n"
    assert patched(source, (before, after)) == expected


def test_lost_lines_come_back_after_the_statement() -> None:
    source = "x = f(\n    1,\n    2,\n) + g(3)  # sum\ny = 2\n"
    assert patched(source, ("f(1, 2)", "h")) == "x = h + g(3)  # sum\n\n\n\ny = 2\n"
    assert spliced(source, Patch("f(1, 2)", "h")).without_padding() == "x = h + g(3)  # sum\ny = 2\n"


def test_lines_lost_and_won_in_one_statement_cancel() -> None:
    source = "x = f(\n    1\n) + g(3)\ny = 2\n"
    assert patched(source, ("f(1)", "h"), ("g(3)", "g(\n3)")) == "x = h + g(\n3)\n\ny = 2\n"


def test_patches_see_upstream_and_not_each_other() -> None:
    assert patched("a = K * 2\nb = K * 3\n", ("K * 2", "K * 3"), ("K * 3", "K * 4")) == "a = K * 3\nb = K * 4\n"


def test_offsets_move_along() -> None:
    source = "a = 1\nb = f(\n1)\nc = 3\nd = 4\n"
    result = spliced(source, Patch("a = 1", "a = 1\na = 2"), Patch("f(1)", "g"), Patch("c = 3", "c = 33333"))
    for text in ("b =", "d = 4"):
        at = result.moved(source.index(text))
        assert result.source.cut(at, at + len(text)) == text


def test_overlap_is_refused() -> None:
    with pytest.raises(PatchError) as caught:
        patched("y = f(g(x))\n", ("f($a)", "$a"), ("g(x)", "h(x)"))
    head, expected, fix = str(caught.value).splitlines()
    assert head == "Patches `f($a)` (line 1) and `g(x)` (line 1) change the same code in the source."
    assert expected.startswith("  Expected: patches whose matches do not overlap")
    assert fix.startswith("  Fix: make one patch of the two")


def test_a_pattern_that_overlaps_itself_is_refused() -> None:
    with pytest.raises(PatchError, match="change the same code"):
        patched("y = a + b + c\n", ("$x + $y", "f($x, $y)", 2))


def test_replacements_that_python_does_not_take_there() -> None:
    with pytest.raises(PatchError, match="cannot be written where their patterns matched") as caught:
        patched("f(x).y = 1\n", ("f(x).y", "3"))
    assert "`3` on line 1" in str(caught.value)
    assert "Fix: match the whole statement" in str(caught.value)


def test_f_strings() -> None:
    assert patched("y = f'{a} {b:>{w}}'\n", ("f'{a} {b:>{w}}'", "g(a, b)")) == "y = g(a, b)\n"
    assert patched("y = g(f'{a:>3}')\n", ("g($x)", "h($x)")) == "y = h(f'{a:>3}')\n"
    source = "y = f'''\n{aa} {bb}'''\n"
    try:
        inner = patched(source, ("bb", "cc"))
    except PatchError as error:
        assert "inside an f-string" in str(error)  # noqa: PT017 - which of the two depends on the Python version
    else:
        assert inner == "y = f'''\n{aa} {cc}'''\n"


# --- properties ----------------------------------------------------------------------------------------------------


@given(expressions(), st.sampled_from(["y = {}\n", "f(a, {}, k=1)  # c\n", "if x:\n    return {}\n", "é[{}] += 1\n"]))
def test_a_patch_by_itself_reproduces_the_text(expression: ast.expr, frame: str) -> None:
    text = ast.unparse(expression)
    source = frame.format(text)
    matches = find(Patch(text, text).pattern, ast.parse(source))
    assume(len(matches) == 1)
    assert patched(source, (text, text)) == source


@given(expressions(), expressions(), expressions())
def test_any_expression_fits_anywhere(whole: ast.expr, new: ast.expr, other: ast.expr) -> None:
    """Replaces a marked part by any expression: the tree is as it should be, the text around it untouched."""
    names = [node for node in ast.walk(whole) if isinstance(node, ast.Name)]
    assume(names)
    names[-1].id = "marked"
    before, after = ast.unparse(whole), ast.unparse(new)
    source = f"first({ast.unparse(other)})\ny = {before}  # kept\n"
    assume(source.count("marked") == 1)
    out = patched(source, ("marked", after))
    head, tail = source.split("marked")
    assert out.startswith(head)
    assert out.endswith(tail)
    assert out[len(head) : len(out) - len(tail)] in (after, f"({after})")

    class Replaced(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return new if node.id == "marked" else node

    assert normal(ast.parse(out)) == normal(Replaced().visit(ast.parse(source)))


@given(expressions(), expressions())
def test_parentheses_only_where_needed(whole: ast.expr, new: ast.expr) -> None:
    names = [node for node in ast.walk(whole) if isinstance(node, ast.Name)]
    assume(names)
    names[-1].id = "marked"
    source = f"y = {ast.unparse(whole)}\n"
    assume(source.count("marked") == 1)
    after = ast.unparse(new)
    out = patched(source, ("marked", after))
    head, tail = source.split("marked")
    middle = out[len(head) : len(out) - len(tail)]
    if middle != after:
        # Then leaving them out would be another program, or none.
        try:
            bare = normal(ast.parse(head + after + tail))
        except SyntaxError:
            return
        assert bare != normal(ast.parse(out))


@given(expressions(), expressions(), st.sampled_from(["($x, $y)", "$y * $x", "$x.a", "-$y", "h(*$x, k=$y)", "$x[$y]"]))
def test_captures_fit_anywhere(left: ast.expr, right: ast.expr, after: str) -> None:
    source = f"y = g(f({ast.unparse(left)},\n  {ast.unparse(right)}))\n"
    assume(len(find(Patch("f($x, $y)", after).pattern, ast.parse(source))) == 1)
    new = ast.parse(patched(source, ("f($x, $y)", after))).body[0].value.args[0]  # type: ignore[attr-defined]
    literally = after.replace("$x", f"({ast.unparse(left)})").replace("$y", f"({ast.unparse(right)})")
    assert normal(new) == normal(ast.parse(literally, mode="eval").body)


@given(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.sampled_from(["", "  # c"]))
def test_runs_of_any_length_keep_their_lines(n_body: int, n_after: int, is_nested: bool, comment: str) -> None:
    body = [f"s{i}(){comment}" for i in range(n_body + 1)]
    tail = [f"t{i}()" for i in range(n_after)]
    lines = ["with lock:", *(f"    {line}" for line in body), *tail]
    if is_nested:
        lines = ["def f():", *(f"  {line}" for line in lines)]
    source = "\n".join(lines) + "\n"
    out = patched(source, ("with lock: $$body", "for i in x:\n    $$body"))
    assert out == source.replace("with lock:", "for i in x:")
    assert textwrap.dedent(out) == out
