"""Upstream's text with only the replaced spans changed.

All edits are made at once on the original, so none can match what another put there; spans must not overlap. Where a
replacement has fewer lines than what it replaces, blank lines make up for it after the statement, so that line
numbers further down stay those of upstream. The result is parsed and must be, node for node, upstream's tree with the
replacements in it.

>>> from interp_jax.transforms.patcher.match import find
>>> from interp_jax.transforms.patcher.patterns import Patch
>>> from interp_jax.transforms.patcher.render import render
>>> source = SourceText("a = f(1,\\n      2)\\nb = a  # kept\\n")
>>> tree = source.parse()
>>> patch = Patch("f($x, $y)", "$x * $y")
>>> spliced = Spliced(source, tree, [render(patch, match, source) for match in find(patch.pattern, tree)])
>>> print(spliced.source.text.rstrip())
a = 1 * 2
<BLANKLINE>
b = a  # kept

Sharp edges: a replacement with more lines than what it replaces moves what follows down.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import bisect
from collections.abc import Sequence

from interp_jax.core.errors import PatchError, four_part
from interp_jax.transforms.patcher.patterns import shown
from interp_jax.transforms.patcher.render import Edit
from interp_jax.transforms.patcher.syntax import SourceText, logical_line_ends, normal


class Spliced:
    """Upstream's text after some edits.

    Args:
        source: Upstream's text.
        tree: Its syntax tree, to which the edits' nodes belong.
        edits: The changes, in any order.
        where: The file, for messages.

    Attributes:
        source: The new text.
        tree: Its syntax tree.

    Raises:
        PatchError: Edits overlap, or the result is not the code it should be.
    """

    def __init__(self, source: SourceText, tree: ast.Module, edits: Sequence[Edit], *, where: str = "the source"):
        self._original = source
        self._edits = sorted(edits, key=lambda edit: (edit.start, edit.end))
        for a, b in zip(self._edits, self._edits[1:], strict=False):
            if b.start < a.end:
                raise PatchError(_overlap(a, b, source, where))
        if not edits:
            self._pieces, self.source, self.tree = [], source, tree
            return
        substitution = {node: new for edit in self._edits for node, new in edit.substitution.items()}
        problem: Exception | None = None
        expected = normal(tree, substitution)
        for is_careful in (False, True):
            self._pieces = self._with_padding(is_careful)
            self.source = SourceText(_joined(source, self._pieces))
            try:
                self.tree = self.source.parse()
            except (SyntaxError, ValueError) as error:
                problem = error
                continue
            if normal(self.tree) == expected:
                return
        raise PatchError(_unreadable(self._edits, source, where, problem)) from problem

    def without_padding(self) -> str:
        """The new text without the blank lines that keep line numbers."""
        return _joined(self._original, [piece for piece in self._pieces if piece[0] < piece[1]])

    def moved(self, offset: int) -> int:
        """The byte offset in the new text of what stands at an offset of the original."""
        moved = offset
        for start, end, text in self._pieces:
            if end > offset:
                # What is inside a replaced span now starts where the replacement does.
                return moved - max(offset - start, 0)
            moved += len(text.encode()) - (end - start)
        return moved

    def _with_padding(self, is_careful: bool) -> list[tuple[int, int, str]]:
        """The edits as spans with their text, and blank lines as empty spans."""
        pieces = [(edit.start, edit.end, edit.careful if is_careful else edit.text) for edit in self._edits]
        lost: dict[int, int] = {}
        ends: list[int] | None = None
        for start, end, text in pieces:
            difference = self._original.data.count(b"\n", start, end) - text.count("\n")
            if difference:
                ends = logical_line_ends(self._original.text) if ends is None else ends
                at = bisect.bisect_left(ends, self._original.line(end))
                if at < len(ends):
                    lost[ends[at]] = lost.get(ends[at], 0) + difference
        padding = [(self._original.line_start(line + 1), n) for line, n in lost.items() if n > 0]
        return sorted(pieces + [(at, at, "\n" * n) for at, n in padding])


def _joined(source: SourceText, pieces: Sequence[tuple[int, int, str]]) -> str:
    out, at = [], 0
    for start, end, text in pieces:
        out += [source.cut(at, start), text]
        at = end
    return "".join([*out, source.cut(at, len(source.data))])


def _overlap(a: Edit, b: Edit, source: SourceText, where: str) -> str:
    return four_part(
        f"Patches {shown(a.patch.before)} (line {source.line(a.start)}) and {shown(b.patch.before)} "
        f"(line {source.line(b.start)}) change the same code",
        where=where,
        expected="patches whose matches do not overlap: all of them are matched on upstream's own code.",
        fix="make one patch of the two, or match less code with one of them.",
    )


def _unreadable(edits: Sequence[Edit], source: SourceText, where: str, problem: Exception | None) -> str:
    reason = f" ({problem.msg}, line {problem.lineno})" if isinstance(problem, SyntaxError) else ""
    given = "; ".join(f"{shown(edit.patch.after)} on line {source.line(edit.start)}" for edit in edits)
    return four_part(
        f"Replacements cannot be written where their patterns matched{reason}: {given}",
        where=where,
        expected="replacements that Python accepts in that place (assignment targets and f-strings allow less).",
        fix="match the whole statement and replace that.",
    )
