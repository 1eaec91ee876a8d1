"""Planting: the state of a harvest by name, as in Oryx.

>>> import jax.numpy as jnp
>>> from interp_jax.transforms.harvest.keys import Names
>>> Planting(Names("t"), {("a",): 5.0}).visit(("a",), jnp.ones(())), Planting(Names("t")).visit(("a",), 1.0)
((Array(5., dtype=float32), False), (1.0, True))

Source: Oryx Harvest for the semantics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from interp_jax.core.errors import ShapeError
from interp_jax.core.interventions import same_form
from interp_jax.transforms.harvest.keys import Key, Policy, show_key
from interp_jax.transforms.harvest.state import LoopIndex
from interp_jax.transforms.harvest.survey import Sown


@dataclass(frozen=True)
class Planting:
    """Plants values by key and reaps all other wanted sows, as Oryx does."""

    policy: Policy
    plants: Mapping[Key, Any] = field(default_factory=dict)
    is_silent: bool = False
    resows = False

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        """The value to go on with at the sow `key` of `value`, and whether it is also to be reaped."""
        if not self.policy.is_wanted(key):
            return value, False
        if key not in self.plants:
            return value, True
        return same_form(value, self.plants[key], where=show_key(key)), False

    def is_planted(self, key: Key) -> bool:
        """Whether the value of `key` is given, so that it is not reaped."""
        return key in self.plants

    changes = is_planted

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[Planting, dict[Key, Any], bool]:
        """This state, and what is planted one per iteration of a loop (of any `length`): what is appended `inside`."""
        appended = {key for key, sown in inside.items() if sown.mode == "append"}
        return self, {key: value for key, value in self.plants.items() if key in appended}, False

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> Planting:
        """The state in any iteration `at`, with the `rows` that are planted in it."""
        return replace(self, plants={**self.plants, **rows})

    @property
    def arrays(self) -> Any:
        """The values to be planted."""
        return dict(self.plants)

    def with_arrays(self, arrays: Any) -> Planting:
        """The state that plants `arrays`."""
        return replace(self, plants=arrays)

    def silenced(self) -> Planting:
        """The state with `is_silent`."""
        return replace(self, is_silent=True)

    def reading_nothing(self) -> Planting:
        """The state that reaps nothing."""
        return replace(self, policy=self.policy.reading_nothing())


def check_fits(key: Key, sown: Sown, value: Any, *, where: str) -> Any:
    """A value to be planted, once it is known to have the form of what is sown.

    Args:
        key: The sow's key.
        sown: What is sown there.
        value: What is to be planted.
        where: The public call.

    Returns:
        The value as arrays of the sown dtypes; Python numbers are converted.

    Raises:
        ShapeError: Structure, a shape or a dtype differs.
    """
    try:
        return same_form(sown.form, value, where=f"{show_key(key)} (sown at {sown.source})")
    except ShapeError as error:
        raise ShapeError(str(error).replace("in site", f"in {where}, sow", 1)) from None
