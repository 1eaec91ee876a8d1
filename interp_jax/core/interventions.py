"""Interventions: what is done to the value of a site.

An intervention is an array (or pytree of arrays) that takes the value's place, a `Masked(value, mask)` that takes
its place only where the mask is true, an `Added(value, coefficient)` that is added to it, or a function from the value
to its replacement.

>>> import numpy as np
>>> apply_intervention(Masked(0.0, np.array([True, False])), np.array([3.0, 4.0]))
Array([0., 4.], dtype=float32)
>>> apply_intervention(Added(np.array([1.0, 0.0]), 10.0), np.array([3.0, 4.0]))
Array([13.,  4.], dtype=float32)

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import ShapeError, four_part


@dataclass(frozen=True)
class Masked:
    """Replace a value only where a mask is true.

    Args:
        value: The replacement; an array that broadcasts to the site's shape, or a Python number.
        mask: Booleans that broadcast to the site's shape; true means replace.
    """

    value: Any
    mask: Any


jax.tree_util.register_dataclass(Masked, data_fields=["value", "mask"], meta_fields=[])


@dataclass(frozen=True)
class Added:
    """Add to a value: value + coefficient * added.

    Args:
        value: What is added; an array that broadcasts to the site's shape, or a Python number.
        coefficient: What it is multiplied by; broadcasts likewise.
    """

    value: Any
    coefficient: Any = 1.0


jax.tree_util.register_dataclass(Added, data_fields=["value", "coefficient"], meta_fields=[])

Intervention: TypeAlias = "jax.Array | np.ndarray | Masked | Added | Callable[[Any], Any]"


def same_form(value: Any, new: Any, *, where: str, cast: bool = False, hint: str = "") -> Any:
    """`new` as arrays of the same pytree structure, shapes and dtypes as `value`.

    Python numbers take the dtype of what they replace; everything else must have it already.

    Args:
        value: The value to be replaced.
        new: The proposed replacement.
        where: The site, for the error message.
        cast: Whether arrays of another dtype are converted instead of refused.
        hint: A further sentence for the `Fix` line.

    Returns:
        `new`, with weakly typed leaves converted.

    Raises:
        ShapeError: Structure, a shape or a dtype differs.
    """
    old_leaves, old_tree = jax.tree.flatten(value)
    new_leaves, new_tree = jax.tree.flatten(new)

    def refuse(what: str, expected: str) -> ShapeError:
        fix = f"give the new value the form of the old one, as `value * 0` has it.{hint and ' ' + hint}"
        return ShapeError(four_part(what, where=f"site {where}", expected=expected, fix=fix))

    if old_tree != new_tree:
        raise refuse(f"A new value with pytree structure {new_tree} was given", f"the structure {old_tree}.")
    converted = []
    for old, leaf in zip(old_leaves, new_leaves, strict=True):
        try:
            form = jax.typeof(leaf)
        except TypeError:
            given = f"A new value of type {type(leaf).__name__} was given"
            raise refuse(given, f"an array {describe(old)}.") from None
        expected = jax.typeof(old)
        may_cast = cast or (form.weak_type and jnp.can_cast(form.dtype, expected.dtype, "same_kind"))
        # A Python number has no dtype of its own: 15.0 may stand for the integer 15, but 15.5 may not.
        may_cast |= isinstance(leaf, (int, float)) and bool(np.asarray(leaf).astype(expected.dtype) == leaf)
        if form.shape != expected.shape or (form.dtype != expected.dtype and not may_cast):
            raise refuse(f"A new value {describe(leaf)} was given", f"{describe(old)}.")
        is_array = hasattr(leaf, "dtype") and form.dtype == expected.dtype
        converted.append(leaf if is_array else jnp.asarray(leaf).astype(expected.dtype))
    return jax.tree.unflatten(new_tree, converted)


def describe(value: Any) -> str:
    """Shape and dtype of the array `value` in words, for messages: "float32[1, 14, 576]"."""
    aval = jax.typeof(value)
    return f"{aval.dtype.name}[{', '.join(map(str, aval.shape))}]"


def apply_intervention(intervention: Intervention, value: Any, *, where: str = "apply_intervention") -> Any:
    """The replacement an intervention makes of a value.

    Args:
        intervention: An array or pytree of arrays, a `Masked`, an `Added`, or a function of the value.
        value: The value at the site.
        where: The site, for error messages.

    Returns:
        A value of the same structure, shapes and dtypes.

    Raises:
        ShapeError: The replacement does not fit.
    """
    if callable(intervention):
        return same_form(value, intervention(value), where=where)
    if isinstance(intervention, Masked):
        return _masked(intervention, value, where=where)
    if isinstance(intervention, Added):
        return _added(intervention, value, where=where)
    return same_form(value, intervention, where=where)


def _masked(intervention: Masked, value: Any, *, where: str) -> jax.Array:
    def refuse(what: str, expected: str, fix: str) -> ShapeError:
        return ShapeError(four_part(what, where=f"site {where}", expected=expected, fix=fix))

    if not hasattr(value, "shape"):
        raise refuse(
            "A Masked was given for a value that is no single array",
            "an array site.",
            "give a function of the value that replaces what it holds.",
        )
    value, mask, replacement = (jnp.asarray(part) for part in (value, intervention.mask, intervention.value))
    given = f"Masked(value={describe(replacement)}, mask={describe(mask)}) was given"
    if mask.dtype != jnp.bool_ or not _broadcasts(mask, value) or not _broadcasts(replacement, value):
        raise refuse(
            given,
            f"a value and a bool mask that broadcast to {describe(value)}.",
            "give value and mask shapes that broadcast to the site's.",
        )
    if not jnp.can_cast(replacement.dtype, value.dtype, "same_kind"):
        raise refuse(given, f"a value that casts to {value.dtype}.", "convert the replacement to the site's dtype.")
    # Broadcast by name: the session may forbid implicit promotion of ranks and dtypes.
    mask, replacement = jnp.broadcast_to(mask, value.shape), jnp.broadcast_to(replacement, value.shape)
    return jnp.where(mask, replacement.astype(value.dtype), value)


def _added(intervention: Added, value: Any, *, where: str) -> jax.Array:
    def refuse(what: str, expected: str, fix: str) -> ShapeError:
        return ShapeError(four_part(what, where=f"site {where}", expected=expected, fix=fix))

    if not hasattr(value, "shape"):
        raise refuse(
            "An Added was given for a value that is no single array",
            "an array site.",
            "give a function of the value that adds to what it holds.",
        )
    value, added, factor = (jnp.asarray(part) for part in (value, intervention.value, intervention.coefficient))
    if not all(
        _broadcasts(part, value) and jnp.can_cast(part.dtype, value.dtype, "same_kind") for part in (added, factor)
    ):
        raise refuse(
            f"Added(value={describe(added)}, coefficient={describe(factor)}) was given",
            f"both to broadcast to {describe(value)}, and to cast to its dtype.",
            "give one vector [d_model], a row per position [pos, d_model], or the whole shape of the site.",
        )
    # In float32 until the end: in bfloat16 coefficient times value would be rounded twice.
    wide = jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4 else value.dtype
    added, factor = (jnp.broadcast_to(part.astype(wide), value.shape) for part in (added, factor))
    return (value.astype(wide) + factor * added).astype(value.dtype)


def _broadcasts(part: Any, value: Any) -> bool:
    try:
        return jnp.broadcast_shapes(part.shape, value.shape) == value.shape
    except ValueError:
        return False
