"""Whether patches still fit upstream, member by member.

A member's status is one of: applies; applies, but upstream changed nearby (its digest is not the recorded one); does
not apply; upstream is not installed. A digest (syntax.py) is of what a definition does, so that a new comment or
docstring upstream is no drift.

>>> changed = Drift("textwrap:dedent", CHANGED, "recorded 0123, now 4567")
>>> report = DriftReport((changed, Drift("textwrap:fill", APPLIES)))
>>> print(report)
applies, but upstream changed nearby
  textwrap:dedent: applies, but upstream changed nearby
    recorded 0123, now 4567
  textwrap:fill: applies
>>> report.is_broken
False

Sharp edges: without a recorded digest a member can only apply or not.

Source: interp_jax.
"""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from interp_jax.transforms.patcher.syntax import digest

APPLIES = "applies"
CHANGED = "applies, but upstream changed nearby"
MISSING_UPSTREAM = "upstream is not installed"
BROKEN = "does not apply"
STATUSES = (APPLIES, CHANGED, MISSING_UPSTREAM, BROKEN)  # best to worst


@dataclass(frozen=True)
class Drift:
    """How one member stands.

    Args:
        member: "module:member".
        status: One of `STATUSES`.
        detail: Where and why, or a diff; empty when there is nothing to say.
    """

    member: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class DriftReport:
    """How all members of a patcher or patch set stand.

    Args:
        members: One entry per member.
    """

    members: tuple[Drift, ...]

    @property
    def status(self) -> str:
        """The worst status of any member."""
        return max((drift.status for drift in self.members), key=STATUSES.index, default=APPLIES)

    @property
    def is_broken(self) -> bool:
        """Whether some patch does not apply."""
        return self.status == BROKEN

    def __str__(self) -> str:
        lines = [self.status]
        for drift in self.members:
            lines.append(f"  {drift.member}: {drift.status}")
            lines.extend(f"    {line}" for line in drift.detail.splitlines())
        return "\n".join(lines)

    def __add__(self, other: DriftReport) -> DriftReport:
        return DriftReport(self.members + other.members)


def compare(members: Mapping[str, tuple[str, str]], recorded: Mapping[str, str], *, prefix: str) -> list[Drift]:
    """How the members whose patches apply stand against what was recorded of them.

    Args:
        members: By name, digest and source of each member as it is now.
        recorded: By name, the digest (or the whole source) each member had. May be empty.
        prefix: Put before the names.

    Returns:
        One entry per member.
    """
    drifts = []
    for name, (now, source) in members.items():
        then = recorded.get(name)
        if then is None:
            detail = "no digest is recorded for it; digests() gives the present one" if recorded else ""
            drifts.append(Drift(prefix + name, APPLIES, detail))
        elif now in (then, _digest_of(then)):
            drifts.append(Drift(prefix + name, APPLIES))
        else:
            drifts.append(Drift(prefix + name, CHANGED, _difference(name, then, now, source)))
    return drifts


def _digest_of(recorded: str) -> str | None:
    """The digest of a recorded source; None if a digest was recorded."""
    if "\n" not in recorded:
        return None
    try:
        body = ast.parse(textwrap.dedent(recorded)).body
    except SyntaxError:
        return None
    return digest(body[0]) if len(body) == 1 else None


def _difference(name: str, then: str, now: str, source: str) -> str:
    if "\n" not in then:
        return f"recorded {then[:12]}, now {now[:12]}; the patterns still match, look at what is around them"
    lines = difflib.unified_diff(
        then.splitlines(), source.splitlines(), f"{name} (recorded)", f"{name} (now)", lineterm=""
    )
    return "\n".join(lines)
