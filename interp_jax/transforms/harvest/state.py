"""What a harvest does at the sows it meets (a `State`), and what it takes from them (`Reaped`).

The interpreter and its rules know no more of a harvest than is said here. There are two states: `Planting`, by name,
and `Sites`, by layer and name.

>>> float(choose(True, 1.0, 2.0)), choose(jnp.array([True, False]), jnp.ones((2, 1)), jnp.zeros((2, 1)))[:, 0].tolist()
(1.0, [1.0, 0.0])

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from interp_jax.transforms.harvest.keys import Key, Place, Policy
from interp_jax.transforms.harvest.survey import Sown


class Reaped(NamedTuple):
    """A value taken from a sow, and the predicate under which it was sown (None: always)."""

    value: Any
    when: Any = None


class LoopIndex(NamedTuple):
    """The (traced) index of a loop, and how often the loop runs. A while loop knows neither."""

    index: Any
    length: int | None


class State(Protocol):
    """What is done at the sows: which count, and what their values become."""

    @property
    def policy(self) -> Policy:
        """Which sows count."""
        ...

    @property
    def is_silent(self) -> bool:
        """Whether effects whose results nobody reads are left out, because the same code also runs elsewhere."""
        ...

    def visit(self, key: Key, value: Any) -> tuple[Any, bool]:
        """The value to go on with at a sow, and whether it is also to be reaped."""
        ...

    @property
    def resows(self) -> bool:
        """Whether the sows stay, on the new values, for whoever listens further out."""
        ...

    def is_planted(self, key: Key) -> bool:
        """Whether the sow's value is given, so that it is not reaped."""
        ...

    def changes(self, key: Key) -> bool:
        """Whether the value at this sow may become another."""
        ...

    def enter_loop(self, inside: Mapping[Key, Sown], length: int | None) -> tuple[State, dict[Key, Any], bool]:
        """The state for a loop, the values it plants one per iteration, and whether it must know the index."""
        ...

    def in_iteration(self, at: LoopIndex, rows: Mapping[Key, Any]) -> State:
        """The state for the body, in one iteration with its row of the values planted one per iteration."""
        ...

    @property
    def arrays(self) -> Any:
        """The arrays the state holds, for code that must be given them as arguments."""
        ...

    def with_arrays(self, arrays: Any) -> State:
        """The state with those arrays replaced."""
        ...

    def silenced(self) -> State:
        """The state with `is_silent`."""
        ...

    def reading_nothing(self) -> State:
        """The state that reaps nothing."""
        ...


Result: TypeAlias = tuple[Sequence[Any], dict[Key, Reaped]]
"""The results of an equation, and what was reaped in it."""

Run: TypeAlias = Callable[[ClosedJaxpr, Sequence[Any], State, Place], tuple[list[Any], dict[Key, Reaped]]]
"""How a rule runs a jaxpr inside its equation."""


def choose(predicate: Any, value: Any, other: Any) -> Any:
    """`value` where the predicate is true, else `other`; leading axes of the predicate are those of the values."""

    def leaf(a: Any, b: Any) -> Any:
        shape = jnp.shape(predicate) + (1,) * (jnp.ndim(a) - jnp.ndim(predicate))
        return jnp.where(jnp.broadcast_to(jnp.reshape(predicate, shape), jnp.shape(a)), a, b)

    return jax.tree.map(leaf, value, other)


def zeros_of(form: Any) -> Any:
    """Zeros of a form."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)
