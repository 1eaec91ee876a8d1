"""How activations are scaled before an SAE reads them, and how its reconstruction is scaled back.

One object holds the rule and its one number, estimated once; the SAE applies it inside, so that what goes in and
comes out is always the model's own activation. A rule with one scale for all tokens can be folded into the weights;
one with a scale for each token cannot.

    rule             x becomes
    "none"           x
    "sqrt_d"         s x, with s such that the mean of |x| is sqrt(d)
    "unit_ms"        s x, with s such that the mean of |x|^2 is 1
    "layer"          (x - mean) / (std + 1e-5) of the token's own components, with the unbiased std
    "constant_norm"  sqrt(d) x / |x|

>>> normalization = estimate("unit_ms", np.full((5, 4), 2.0))
>>> float(normalization.scale), normalization(jnp.full((1, 4), 2.0))[0].tolist()
(0.25, [[0.5, 0.5, 0.5, 0.5]])

Sharp edges: the first token's activations can be twenty times as large as others'; estimate on what is trained on.

Source: Anthropic's April 2024 update (sqrt_d); Rajamanoharan et al. 2024 (unit_ms); Gao et al. 2024's code (layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.errors import InvalidInputError, check_choice, four_part

RULES = ("none", "sqrt_d", "unit_ms", "layer", "constant_norm")
FOLDABLE = ("none", "sqrt_d", "unit_ms")
STD_EPSILON = 1e-5


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["rule"])
@dataclass(frozen=True)
class Normalization:
    """A rule and its scale.

    Args:
        rule: One of `RULES`.
        scale: What activations are multiplied by, a scalar; 1 for the rules that need none.
    """

    rule: str = "none"
    scale: jax.Array | np.ndarray | float = field(default=1.0)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The activations scaled, and the function that scales a reconstruction of them back.

        Args:
            x: `[batch, d]`.

        Returns:
            The two.
        """
        if self.rule in FOLDABLE:
            scale = jnp.asarray(self.scale, x.dtype)
            return x * scale, lambda y: y / scale
        if self.rule == "layer":
            mean, std = x.mean(axis=-1, keepdims=True), x.std(axis=-1, keepdims=True, ddof=1)
            # Restored without the epsilon, as the published SAEs under this rule were trained.
            return (x - mean) / (std + STD_EPSILON), lambda y: y * std + mean
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        factor = jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype)) / jnp.where(norm > 0, norm, 1.0)
        return x * factor, lambda y: y / factor


def check_rule(rule: str, *, where: str) -> None:
    """Raise `UnknownNameError` unless there is such a rule."""
    check_choice(rule, RULES, what="normalization", where=where)


def estimate(rule: str, sample: Any) -> Normalization:
    """The rule with the scale that a sample of activations asks for.

    Args:
        rule: One of `RULES`.
        sample: Activations, `[n, d]`; at least 100,000 tokens make the scale good to a percent.

    Returns:
        The normalization.

    Raises:
        UnknownNameError: There is no such rule.
        InvalidInputError: The sample is empty, all zeros, or not finite.
    """
    check_rule(rule, where="normalization.estimate")
    sample = np.asarray(sample, np.float32)
    squares = np.square(sample, dtype=np.float64).sum(axis=-1)
    if sample.size == 0 or not np.isfinite(squares).all() or not squares.any():
        given = "no activations" if sample.size == 0 else "activations that are all zero, or not finite,"
        raise InvalidInputError(
            four_part(
                f"{given[0].upper()}{given[1:]} were given",
                where="normalization.estimate",
                expected="finite activations, [n, d], n at least 1, not all zero.",
                fix="look at the site that is read, and at the text.",
            )
        )
    if rule == "sqrt_d":
        scale = np.sqrt(sample.shape[-1]) / np.sqrt(squares).mean()
    elif rule == "unit_ms":
        scale = 1 / np.sqrt(squares.mean())
    else:
        scale = 1.0
    return Normalization(rule, jnp.asarray(scale, jnp.float32))
