"""Steering vectors, and where in a text each of their rows is added.

A steering vector is rows `[pos, d_model]` for one site. Its placement says which positions of a target these rows fall
on; positions are counted over the tokens of a row, so padding on the left moves nothing.

    "front"       rows 0, 1, 2, ... on positions 0, 1, 2, ... (BOS is position 0)
    "back"        the last row on the last position
    "middle"      as many positions free before it as after it (one more after it, if they are odd in number)
    "everywhere"  its one row on every position
    a mask        bool over absolute positions: row i on the i-th true one; one row falls on all of them

>>> vector = SteeringVector(np.array([[1.0, 0.0], [2.0, 0.0]]), Site(5, "resid_pre"), placement="back")
>>> rows, is_steered = place(vector * 10, np.array([[-1, 7, 8, 9], [4, 5, 6, 7]]))
>>> rows[0, :, 0].tolist(), is_steered[0].tolist()
([0.0, 0.0, 10.0, 20.0], [False, False, True, True])

Sharp edges: a vector from a prompt pair has exactly 0 at BOS, so "front" leaves position 0 as it is and begins at 1.
The layer of `resid_pre` is the one that reads it: `Site(6, "resid_pre")` is added to before block 6.

Source: Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization" (2308.10248).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError, four_part
from interp_jax.core.sites import Selector, Site, select_sites

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

PLACEMENTS = ("front", "middle", "back", "everywhere")


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector:
    """What is added to a site, row by row.

    Args:
        values: `[pos, d_model]`, or `[d_model]` for one row; finite.
        site: Where it is added.
        placement: One of `PLACEMENTS`, or bools over absolute positions.
        name: What to call it in tables and figures.
    """

    values: np.ndarray
    site: Site
    placement: str | np.ndarray = "front"
    name: str = ""

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float32)
        values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or 0 in values.shape:
            raise ShapeError(
                four_part(
                    f"Values of shape {list(np.shape(self.values))} were given",
                    where="SteeringVector",
                    expected="[pos, d_model], at least one row, or [d_model].",
                    fix="of activations [batch, pos, d_model] take one row of the batch: values[0].",
                )
            )
        if not np.isfinite(values).all():
            position = int(np.argwhere(~np.isfinite(values))[0, 0])
            n_wrong = int((~np.isfinite(values)).sum())
            raise _refuse(
                f"Values with {n_wrong} entries that are NaN or infinite, the first in row {position}",
                "SteeringVector",
                "finite numbers.",
                "look at what the vector was made of: a prompt of padding, an SAE that did not train, a division by 0.",
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "placement", _checked_placement(self.placement, len(values)))

    def __len__(self) -> int:
        return len(self.values)

    def __mul__(self, factor: float) -> SteeringVector:
        return replace(self, values=self.values * np.float32(factor))

    __rmul__ = __mul__

    def row(self, index: int) -> SteeringVector:
        """One of its rows as a vector of its own, such as for every generated token.

        Args:
            index: Which; negative counts from the end.

        Returns:
            A vector of one row, placed everywhere.
        """
        return replace(self, values=self.values[index], placement="everywhere", name=f"{self.name}[{index}]")

    def __repr__(self) -> str:
        where = self.placement if isinstance(self.placement, str) else f"{int(self.placement.sum())} masked positions"
        norms = ", ".join(f"{norm:.3g}" for norm in np.linalg.norm(self.values, axis=-1)[:12])
        more = ", ..." if len(self) > 12 else ""
        name = f"{self.name!r}, " if self.name else ""
        return (
            f"SteeringVector({name}{len(self)} x {self.values.shape[1]} at {self.site}, {where}; norms {norms}{more})"
        )


def _checked_placement(placement: Any, n_rows: int) -> str | np.ndarray:
    """The placement, once it is known to be one that a vector of so many rows can have."""
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            fix = "use one of these, or a bool mask over absolute positions."
            raise UnknownNameError(
                four_part(
                    f"Unknown placement {placement!r}",
                    where="SteeringVector",
                    names=PLACEMENTS,
                    given=placement,
                    fix=fix,
                )
            )
        n_places = 1 if placement == "everywhere" else n_rows
        shown = "placement 'everywhere'"
    else:
        placement = np.asarray(placement)
        if placement.ndim != 1 or placement.dtype != bool or not placement.any():
            raise ShapeError(
                four_part(
                    f"A placement {placement.dtype}{list(placement.shape)} was given",
                    where="SteeringVector",
                    expected=f"one of {', '.join(PLACEMENTS)}, or bools [pos] of which at least one is true.",
                    fix="write for example np.arange(10) < 3.",
                )
            )
        n_places = n_rows if n_rows == 1 else int(placement.sum())
        shown = f"a mask with {int(placement.sum())} true positions"
    if n_places != n_rows:
        raise ShapeError(
            four_part(
                f"{n_rows} rows and {shown} were given",
                where="SteeringVector",
                expected="as many true positions as rows, or one row (which falls on all of them).",
                fix="take one row, vector.row(2), or choose a mask that fits.",
            )
        )
    return placement


def place(vector: SteeringVector, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a vector at the positions of a target.

    Args:
        vector: The vector.
        tokens: Token ids of the target, `[batch, pos]`, padded on the left or not at all.

    Returns:
        What is added, float32 `[batch, pos, d_model]`, and where, bool `[batch, pos]`.

    Raises:
        InvalidInputError: A row of the target is shorter than the vector or its mask.
    """
    added = np.zeros((*tokens.shape, vector.values.shape[1]), np.float32)
    is_steered = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(tokens):
        columns = np.flatnonzero(ids >= 0)[_positions(vector, int((ids >= 0).sum()), row)]
        added[row, columns] = vector.values
        is_steered[row, columns] = True
    return added, is_steered


def _positions(vector: SteeringVector, n_tokens: int, row: int) -> np.ndarray:
    """The positions in a target of so many tokens that are steered."""
    n_rows, placement = len(vector), vector.placement
    n_needed = n_rows if isinstance(placement, str) else 1 + int(np.flatnonzero(placement)[-1])
    if n_tokens < n_needed:
        what = "steering vector" if isinstance(placement, str) else "placement's last true position"
        raise _refuse(
            f"A target of {n_tokens} tokens (row {row}) was given, and a {what} of {n_needed}",
            f"steering {vector.site}",
            "a target at least as long.",
            "use a longer target, a shorter prompt pair, or one row of the vector: vector.row(2).",
        )
    if not isinstance(placement, str):
        return np.flatnonzero(placement)
    starts = {"front": 0, "middle": (n_tokens - n_rows) // 2, "back": n_tokens - n_rows}
    return np.arange(n_tokens) if placement == "everywhere" else starts[placement] + np.arange(n_rows)


def as_vectors(vectors: SteeringVector | Sequence[SteeringVector], *, where: str) -> tuple[SteeringVector, ...]:
    """One vector or several, as a tuple of at least one.

    Args:
        vectors: The vectors.
        where: The public call, for error messages.

    Returns:
        The vectors.

    Raises:
        InvalidInputError: There is none, or something else among them.
    """
    found = (vectors,) if isinstance(vectors, SteeringVector) else tuple(vectors)
    wrong = [one for one in found if not isinstance(one, SteeringVector)]
    if wrong or not found:
        raise _refuse(
            f"{wrong[0]!r:.60} was given as a steering vector" if wrong else "No steering vector was given",
            where,
            "a SteeringVector or several.",
            "write SteeringVector(values, Site(6, 'resid_pre')), or take prompt_pair(...).vector().",
        )
    return found


def residual_site(lm: LanguageModel, selector: Selector, *, where: str) -> Site:
    """The one site that a selector picks, once it is known to hold a vector per position.

    Args:
        lm: The model.
        selector: Such as "6.resid_pre"; a layer alone means its `resid_pre`.
        where: The public call, for error messages.

    Returns:
        The site.

    Raises:
        UnknownNameError: The model has no such site.
        InvalidInputError: The selector picks several.
        ShapeError: The site is not `[batch, pos, d]`.
    """
    table = lm.sites()
    chosen = f"{selector}.resid_pre" if isinstance(selector, int) and not isinstance(selector, bool) else selector
    found = select_sites(chosen, table.sites, where=where)
    if len(found) != 1:
        raise _refuse(
            f"{selector!r}, which picks {len(found)} sites ({', '.join(map(str, found[:3]))}, ...), was given",
            where,
            "one site.",
            "name its layer, such as '6.resid_pre'.",
        )
    form = next(row.value for row in table.rows if row.site == found[0])
    if getattr(form, "ndim", 0) != 3:
        raise ShapeError(
            four_part(
                f"The site {found[0]}, of shape {list(getattr(form, 'shape', ()))}, was given",
                where=where,
                expected="a site with one vector per position, [batch, pos, d].",
                fix="steer the residual stream (resid_pre, resid_mid, resid_post), attn_out or mlp_out.",
            )
        )
    return found[0]


def _refuse(what: str, where: str, expected: str, fix: str) -> InvalidInputError:
    return InvalidInputError(four_part(what, where=where, expected=expected, fix=fix))
