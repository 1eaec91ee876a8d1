"""The family of errors users see, and the one shape their messages have.

Every error a user's mistake causes says four things in this order: what was given, where, what is allowed and
what to do. `four_part` builds that text, so that no module invents a layout of its own.

>>> print(four_part("Unknown site 'mlp_outs'", where="reap_sites(gpt2)", names=["mlp_out", "attn_out"],
...                 given="mlp_outs", fix="use one of these names."))
Unknown site 'mlp_outs' in reap_sites(gpt2). Did you mean 'mlp_out'?
  Known: mlp_out, attn_out
  Fix: use one of these names.

Source: interp_jax.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any, cast


class InterpError(Exception):
    """Base of every error this package raises on purpose."""


class UnknownNameError(InterpError, ValueError, LookupError):
    """A name (site, model, option) that nothing here answers to."""


class ShapeError(InterpError, ValueError):
    """A value whose pytree structure, shape or dtype does not fit its place."""


class InvalidInputError(InterpError, ValueError):
    """An argument whose content (not its shape) cannot be used."""


class PatchError(InterpError, ValueError):
    """A patch that is not Python, does not match upstream, or matches it too often."""


class SiteNotReachedError(InterpError, RuntimeError):
    """A site that was asked for but that the forward pass never came to."""


class InterleavingError(InterpError, RuntimeError):
    """Control was to go to a generator that is not reachable from here."""


class RunningPassError(InterpError, RuntimeError):
    """A running pass used out of turn (read before its end, changed between sites, left suspended)."""


class LoadError(InterpError, ValueError):
    """A model file that is missing, damaged, or not what its configuration says."""


class ExportError(InterpError, OSError):
    """Files that could not be written."""


class UnsupportedModelError(InterpError, ValueError):
    """A model, or a part of one, that no patch set covers."""


def closest(given: str, names: Iterable[str], *, n: int = 1) -> list[str]:
    """The `n` names nearest to `given` by edit similarity, nearest first (none when nothing is near)."""
    return difflib.get_close_matches(given, list(names), n=n, cutoff=0.5)


def shorten(names: Iterable[str], *, limit: int = 24) -> str:
    """Names joined by commas, cut after `limit` with a count of the rest."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def check_choice(given: Any, names: Iterable[str], *, what: str, where: str) -> None:
    """Raise unless something is one of the names there are.

    Args:
        given: What was given.
        names: Those there are.
        what: What it is the name of, such as "engine".
        where: The call it was given to.

    Raises:
        UnknownNameError: It is none of them.
    """
    names = list(names)
    if given not in names:
        raise UnknownNameError(
            four_part(f"Unknown {what} {given!r}", where=where, names=names, given=str(given), fix="use one of these.")
        )


def check_number(
    given: Any,
    *,
    what: str,
    where: str,
    is_whole: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise unless something is a finite number within its bounds.

    Args:
        given: What was given.
        what: What it is called there.
        where: The call it was given to.
        is_whole: Whether it must be an integer, of an integer's type.
        at_least: The least it may be.
        above: What it must be above.
        at_most: The most it may be.
        below: What it must be below.

    Raises:
        InvalidInputError: It is no such number.
    """
    kind = numbers.Integral if is_whole else numbers.Real
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    if isinstance(given, kind) and not isinstance(given, bool) and math.isfinite(number := cast(float, given)):
        is_inside = (
            (at_least is None or number >= at_least)
            and (above is None or number > above)
            and (at_most is None or number <= at_most)
            and (below is None or number < below)
        )
        if is_inside:
            return
    allowed = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    raise InvalidInputError(
        four_part(
            f"{what} = {given!r:.60} was given",
            where=where,
            expected=", ".join(["a whole number (an int)" if is_whole else "a finite number", *allowed]) + ".",
            fix=f"give such a number for {what}.",
        )
    )


def four_part(
    what: str,
    *,
    fix: str,
    where: str | None = None,
    expected: str | None = None,
    names: Iterable[str] | None = None,
    given: str | None = None,
    note: str | None = None,
) -> str:
    """The text of an error in its four parts.

    Args:
        what: What was given, as a sentence without its full stop. It may hold several lines of offenders.
        fix: What the user can do about it, a sentence.
        where: The call, file or site it happened in.
        expected: What is allowed there, a sentence. Use `names` instead for a choice among names.
        names: The names that are allowed.
        given: With `names`, the name that was given: the closest one is then suggested.
        note: With `names`, a remark in brackets after them, such as how many layers there are.

    Returns:
        The message.
    """
    names = None if names is None else list(names)
    suggestion = closest(given, names) if given is not None and names is not None else []
    head = what + (f" in {where}" if where else "") + "."
    if suggestion:
        head += f" Did you mean {suggestion[0]!r}?"
    lines = [head]
    if expected is not None:
        lines.append(f"  Expected: {expected}")
    if names is not None:
        lines.append(f"  Known: {shorten(names) or '(none)'}" + (f" ({note})" if note else ""))
    lines.append(f"  Fix: {fix}")
    return "\n".join(lines)
