"""The language of patches: Python with `$name` for any expression and `$$name` for any run of statements.

A `Patch` holds two pieces of source, what to find and what to put there. Both are parsed when it is made, so that a
pattern that is not Python is an error where it is written. `$name` may also stand where Python wants a bare name
(`def $f(self): $$body`). The second `$$` without a name in a replacement is the second in the pattern.

>>> patch = Patch("f($x, 1)", "g($x)")
>>> patch.pattern.is_expression, sorted(patch.pattern.names)
(True, ['x'])
>>> Patch("for $i in $items: $$body", "for $i in reversed($items): $$body").pattern.is_expression
False

Sharp edges: `$` inside a string or a comment is that character. A pattern that can be read as an expression is one,
and matches anywhere; end it with `;` to match the whole statement `f(x);` and replace it with statements.

Source: interp_jax; the wildcards are those of structural search tools.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.syntax import SourceText, lines_in_strings, walk

# Identifiers that stand for `$name` and `$$name` while Python parses the pattern.
_ANY = "_any_expression_"
_RUN = "_any_statements_"
_TOKENS = re.compile(
    r"""
    (?P<skip> \#[^\n]*
        | (?:\b(?:[rbuf]|rb|br|fr|rf))?
          (?: \"{3}(?:\\.|[^\\])*?\"{3} | '{3}(?:\\.|[^\\])*?'{3} | "(?:\\.|[^\\"\n])*" | '(?:\\.|[^\\'\n])*' ) )
    | \$\$ (?P<run>[^\W\d]\w*)?
    | \$ (?P<any>[^\W\d]\w*)
    | (?P<stray>\$)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_PLACEHOLDERS = re.compile(rf"{_ANY}(\w+)|{_RUN}(\w+)")

Count: TypeAlias = "int | tuple[int, int | None]"


@dataclass(frozen=True, eq=False)
class Pattern:
    """One side of a patch, parsed.

    Args:
        text: The source as the user wrote it.
        source: The same, dedented and with identifiers for the placeholders.
        nodes: One expression, or a run of statements.
        names: Names of the `$name` in it.
        runs: Names of the `$$name` in it; runs without a name are numbered.
    """

    text: str
    source: SourceText
    nodes: Sequence[ast.AST]
    names: frozenset[str]
    runs: frozenset[str]

    @property
    def is_expression(self) -> bool:
        """Whether it is an expression, as opposed to statements."""
        return len(self.nodes) == 1 and isinstance(self.nodes[0], ast.expr)


@dataclass(frozen=True)
class Patch:
    """A before/after pair.

    Args:
        before: The pattern: an expression, one statement, or a run of consecutive statements.
        after: The replacement: an expression for an expression, else any number of statements.
        count: How often the pattern must match: a number, or `(least, most)` where most may be None for no limit.
    """

    before: str
    after: str
    count: Count = 1
    pattern: Pattern = field(init=False, repr=False, compare=False)
    replacement: Pattern = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for side in (self.before, self.after):
            if not isinstance(side, str):
                _refuse(f"{side!r} ({type(side).__name__}) was given as a side of a patch", "a piece of Python source.")
        self._check_count()
        pattern = parse(self.before)
        replacement = parse(self.after, like=pattern)
        unbound = sorted((replacement.names - pattern.names) | (replacement.runs - pattern.runs))
        if unbound:
            given = ", ".join(_run_shown(name) if name in replacement.runs else f"${name}" for name in unbound)
            bound = [f"${name}" for name in sorted(pattern.names)] + [_run_shown(run) for run in sorted(pattern.runs)]
            _refuse(
                f"Replacement {shown(self.after)} uses {given}, which the pattern {shown(self.before)} does not have",
                f"placeholders of the pattern: {', '.join(bound) or 'none'}.",
                fix="use a placeholder of the pattern, or put this one into the pattern too.",
            )
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "replacement", replacement)

    @functools.cached_property
    def new_names(self) -> frozenset[str]:
        """Names the replacement brings along: those it uses that are no placeholders."""
        nodes = [node for root in self.replacement.nodes for node in ast.walk(root)]
        return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and not _PLACEHOLDERS.match(node.id))

    @property
    def least(self) -> int:
        """The least number of matches."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int | None:
        """The greatest number of matches; None for no limit."""
        return self.count if isinstance(self.count, int) else self.count[1]

    def _check_count(self) -> None:
        count: Any = self.count
        is_range = isinstance(count, tuple) and len(count) == 2
        least, most = count if is_range else (count, count)
        is_limit = is_range if most is None else type(most) is int and type(least) is int and most >= least
        if type(least) is not int or least < 0 or not is_limit:
            _refuse(
                f"count={count!r} was given for the pattern {shown(self.before)}",
                "a number of matches >= 0, or (least, most) with most >= least or None.",
                fix="count the places that should change.",
            )


def parse(text: str, *, like: Pattern | None = None) -> Pattern:
    """A pattern, or with `like` the replacement of that pattern.

    Args:
        text: Python source with placeholders.
        like: The pattern it is the replacement of, which decides whether it is an expression or statements.

    Returns:
        The parsed side of a patch.

    Raises:
        PatchError: It is not Python, is empty, or is of another kind than `like`.
    """
    source, names, runs = _with_identifiers(text)
    role = "pattern" if like is None else "replacement"
    expression = _expression(source) if like is None or like.is_expression else None
    if expression is not None:
        nodes: Sequence[ast.AST] = [expression[1].body]
        source = expression[0]
    else:
        source, nodes = _statements(source, text, role)
    if like is not None and like.is_expression and expression is None:
        what = "nothing" if not nodes else "statements"
        _refuse(
            f"Pattern {shown(like.text)} is an expression, but its replacement is {what}: {shown(text)}",
            "an expression in the place of an expression.",
            fix="write an expression, or end the pattern with `;` to match the whole statement.",
        )
    _check_placeholders(nodes, text, role, is_pattern=like is None)
    return Pattern(text, SourceText(source), nodes, names, runs)


def any_name(node: Any) -> str | None:
    """The name of the `$name` that a node or identifier stands for, or None."""
    identifier = node.id if isinstance(node, ast.Name) else node
    is_placeholder = isinstance(identifier, str) and identifier.startswith(_ANY)
    return identifier.removeprefix(_ANY) if is_placeholder else None


def run_name(node: Any) -> str | None:
    """The name of the `$$name` that a statement stands for, or None."""
    value = node.value if isinstance(node, ast.Expr) else None
    is_run = isinstance(value, ast.Name) and value.id.startswith(_RUN)
    return value.id.removeprefix(_RUN) if is_run else None  # type: ignore[union-attr]


def shown(code: str | ast.AST | Iterable[ast.AST], limit: int = 100) -> str:
    """Code as it is shown in messages: on one line, with `$name` for placeholders, in backticks."""
    if isinstance(code, ast.AST):
        code = ast.unparse(code)
    elif not isinstance(code, str):
        code = "; ".join(ast.unparse(node) for node in code)
    code = _PLACEHOLDERS.sub(lambda found: f"${found[1]}" if found[1] else _run_shown(found[2]), code)
    code = " ".join(code.split())
    return f"`{code if len(code) <= limit else code[:limit] + ' ...'}`"


def _run_shown(name: str) -> str:
    return "$$" if name.isdecimal() else f"$${name}"


def _with_identifiers(text: str) -> tuple[str, frozenset[str], frozenset[str]]:
    names: set[str] = set()
    runs: set[str] = set()
    numbers = itertools.count()

    def replace(found: re.Match[str]) -> str:
        if found["skip"]:
            return found[0]
        if found["stray"]:
            _refuse(f"A lone $ in {shown(text)}", "$name for an expression, $$ or $$name for a run of statements.")
        if found["any"]:
            names.add(found["any"])
            return _ANY + found["any"]
        run = found["run"] or str(next(numbers))
        runs.add(run)
        return _RUN + run

    return _TOKENS.sub(replace, text), frozenset(names), frozenset(runs)


def _layouts(source: str) -> list[str]:
    """Ways to take the indentation off a piece of source; the first that Python accepts is meant."""
    stripped = source.strip("\n").rstrip()
    head, _, tail = stripped.partition("\n")
    return [stripped, _dedented(stripped), f"{head.lstrip()}\n{_dedented(tail)}"]


def _dedented(source: str) -> str:
    """Source without its common indentation; lines that start inside a string are left alone."""
    inside = lines_in_strings(source)
    lines = source.split("\n")
    own = [i for i, line in enumerate(lines) if line.strip() and i + 1 not in inside]
    margin = min((lines[i][: len(lines[i]) - len(lines[i].lstrip())] for i in own), key=len, default="")
    return "\n".join(line.removeprefix(margin) if i in own else line for i, line in enumerate(lines))


def _expression(source: str) -> tuple[str, ast.Expression] | None:
    layouts = [_dedented(source.strip("\n")).strip()]
    try:
        _statements(source, "", "")
    except PatchError:
        # No statements: perhaps an expression over several lines whose brackets stayed behind in upstream's text.
        layouts.append(f"(\n{source}\n)")
    for layout in layouts:
        try:
            return layout, ast.parse(layout, mode="eval")
        except (SyntaxError, ValueError):
            continue
    return None


def _statements(source: str, text: str, role: str) -> tuple[str, Sequence[ast.AST]]:
    problem: Exception | None = None
    for layout in _layouts(source):
        try:
            return layout, ast.parse(layout).body
        except (SyntaxError, ValueError) as error:
            problem = problem or error
    reason = problem.msg if isinstance(problem, SyntaxError) else str(problem)
    raise PatchError(
        four_part(
            f"The {role} {shown(text)} is not Python ({reason})",
            expected="an expression, one statement, or a run of consecutive statements, with $name for any "
            "expression and $$ for any run of statements.",
            fix=f"mend the {role}; `ast.parse` shows where Python stumbles.",
        )
    ) from problem


def _check_placeholders(nodes: Sequence[ast.AST], text: str, role: str, *, is_pattern: bool) -> None:
    """Refuse patterns that would match anything, and runs of statements where Python wants something else."""
    if is_pattern and all(_PLACEHOLDERS.fullmatch(ast.unparse(node)) for node in nodes):
        _refuse(
            f"The pattern {shown(text)} has no code in it",
            "at least one piece of upstream's code.",
            fix="write the code to find; placeholders alone match everything.",
        )
    tree = ast.Module(list(nodes), [])  # type: ignore[arg-type]
    in_place = {node.value for node, _ in walk(tree) if isinstance(node, ast.Expr) and run_name(node) is not None}
    for node, _ in walk(tree):
        identifiers = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        if node not in in_place and any(name.startswith(_RUN) for name in identifiers):
            _refuse(
                f"$$ stands inside an expression in the {role} {shown(text)}",
                "$$ on a line of its own, where it is a run of statements.",
                fix="use $name for an expression.",
            )


def _refuse(what: str, expected: str, *, fix: str = "write the patch in this form.") -> NoReturn:
    raise PatchError(four_part(what, expected=expected, fix=fix))
