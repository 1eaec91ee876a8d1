"""The `$` language, and what is refused before any upstream is looked at.

Source: interp_jax.
"""

from __future__ import annotations

import pytest

from interp_jax.transforms.patcher import Patch, Patcher, PatchError
from interp_jax.transforms.patcher.patterns import parse, shown


@pytest.mark.parametrize(
    ("text", "is_expression", "n_nodes"),
    [
        ("f($x)", True, 1),
        ("x = $x", False, 1),
        ("f(x);", False, 1),
        ("a = 1\n        b = 2", False, 2),
        ("\n    if $c:\n        $$body\n    return $x\n", False, 2),
        ("a +\n  b", True, 1),
        ("lambda $a: $b", True, 1),
        ("for $i in $xs:\n  $$", False, 1),
        ("'$x'", True, 1),
        ("yield $x", False, 1),
        ("return", False, 1),
    ],
)
def test_what_a_pattern_is(text: str, is_expression: bool, n_nodes: int) -> None:
    pattern = parse(text)
    assert pattern.is_expression is is_expression
    assert len(pattern.nodes) == n_nodes


def test_dollars_in_strings_and_comments_are_dollars() -> None:
    pattern = parse("f('$x', \"$$y\", '''$z''', r'\\$', $w)  # $c")
    assert pattern.names == {"w"}
    assert pattern.runs == frozenset()


def test_nth_nameless_run_is_nth_nameless_run() -> None:
    patch = Patch("if $a:\n  $$\nelse:\n  $$", "if not $a:\n  $$\nelse:\n  $$")
    assert patch.pattern.runs == patch.replacement.runs == {"0", "1"}


def test_shown_puts_the_dollars_back() -> None:
    assert shown(parse("f($x)").nodes) == "`f($x)`"
    assert shown(parse("with a: $$body").nodes) == "`with a: $$body`"
    assert shown(parse("with a: $$").nodes) == "`with a: $$`"


REFUSED = {
    "not Python": (("f(", "g()"), "is not Python", "an expression, one statement"),
    "a replacement that is not Python": (("f()", "g("), "is not Python", "mend the replacement"),
    "a lone dollar": (("f($)", "g()"), "A lone $", "$name for an expression"),
    "an unbound name": (("f($x)", "g($y)"), "uses $y, which the pattern `f($x)` does not have", "$x"),
    "an unbound run": (("f($x);", "$$body"), "uses $$body", "placeholders of the pattern"),
    "statements for an expression": (("f(x)", "y = g(x)"), "its replacement is statements", "end the pattern with `;`"),
    "nothing for an expression": (("f(x)", ""), "its replacement is nothing", "an expression in the place"),
    "an empty pattern": (("", "f()"), "has no code in it", "placeholders alone match everything"),
    "a pattern of placeholders": (("$x", "f($x)"), "has no code in it", "write the code to find"),
    "a pattern of runs": (("$$a", "f()"), "has no code in it", "write the code to find"),
    "a run inside an expression": (("f($$a)", "f()"), "$$ stands inside an expression", "use $name"),
    "a count that is no number": (("f()", "g()", "1"), "count='1'", "a number of matches >= 0"),
    "a count below zero": (("f()", "g()", -1), "count=-1", "a number of matches >= 0"),
    "a count that is a truth value": (("f()", "g()", True), "count=True", "a number of matches >= 0"),
    "a range that is none": (("f()", "g()", (3, 2)), "count=(3, 2)", "(least, most)"),
    "a pattern that is no text": ((3, "g()"), "3 (int) was given", "a piece of Python source"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_refused(case: str) -> None:
    arguments, what, allowed = REFUSED[case]
    with pytest.raises(PatchError) as caught:
        Patch(*arguments)
    message = str(caught.value)
    assert what in message.splitlines()[0]
    assert allowed in message
    assert "\n  Expected: " in message
    assert "\n  Fix: " in message


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        (["a", "b", "c"], "A list of 3 strings was given; the last has no replacement"),
        (["a", ("b", "c")], "mixes strings with pairs"),
        ([("a",)], "('a',) (tuple) was given"),
        ([("a", "b", 1, 2)], "(tuple) was given"),
        ("f()", "'f()' (str) was given"),
        ({"a": "b"}, "(dict) was given"),
    ],
)
def test_refused_lists(patches, words: str) -> None:
    with pytest.raises(PatchError) as caught:
        Patcher("textwrap", dedent=patches)
    head, *rest = str(caught.value).splitlines()
    assert words in head
    assert "Patcher('textwrap'), member 'dedent'" in head
    assert rest[0].startswith("  Expected: [before, after, before, after]")
    assert rest[1].startswith("  Fix: ")


def test_errors_in_a_pair_name_the_member() -> None:
    with pytest.raises(PatchError, match=r"is not Python .* in Patcher\('textwrap'\), member 'dedent'\.\n  Expected"):
        Patcher("textwrap", dedent=["f(", "g()"])


def test_forms_of_a_list() -> None:
    patcher = Patcher(
        "textwrap", {"a": ["x", "y", "z", "w"]}, b=[("x", "y"), ("z", "w", 2), Patch("u", "v", (0, None))]
    )
    assert [(patch.before, patch.after) for patch in patcher.members["a"]] == [("x", "y"), ("z", "w")]
    assert [patch.count for patch in patcher.members["b"]] == [1, 2, (0, None)]
    assert Patcher("textwrap", {"a": [("x", "y")]}, a=[("z", "w")]).members["a"] == [Patch("x", "y"), Patch("z", "w")]


def test_strings_in_indented_patterns_keep_their_text() -> None:
    pattern = parse(
        '''
        x = """one
        two
    three"""
        y = 1
        '''
    )
    assert pattern.nodes[0].value.value == "one\n        two\n    three"  # type: ignore[attr-defined]
