"""What a pursuit is: how the coefficients change once the next atom has been chosen.

All pursuits choose alike (the atom with the largest product with what is left of the signal), and keep the chosen
atoms of each signal at hand, so that one product with the whole dictionary is all a step needs. They differ in what
they do then. A pursuit is a small frozen object without arrays, final, in a file of its own, and listed once in
`pursuits.py`; the tests of the contract run over that list.

>>> from interp_jax.methods.pursuit.matching_pursuit import MatchingPursuit
>>> MatchingPursuit(is_nonneg=False)
MatchingPursuit(is_nonneg=False)

Sharp edges: within a pursuit atoms have norm 1, and so differ from the dictionary's rows by their norms.

Source: interp_jax.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax


class State(NamedTuple):
    """Where each signal's pursuit stands. Slot t belongs to the atom that step t added.

    Args:
        indices: The atoms, int32 `[batch, k]`; -1 in slots of steps that added none.
        atoms: The same as unit vectors, `[batch, k, d]`; 0 where there is none.
        values: Their coefficients, `[batch, k]`.
        residual: What is left of the signals, `[batch, d]`.
        is_done: Which signals stopped, `[batch]`.
        memory: What else a pursuit keeps.
    """

    indices: jax.Array
    atoms: jax.Array
    values: jax.Array
    residual: jax.Array
    is_done: jax.Array
    memory: Any


class Choice(NamedTuple):
    """What a step chose; `State` holds it already.

    Args:
        atom: The unit vector, `[batch, d]`.
        is_slot: Which slot is its own, `[batch, k]`: that of an earlier step if the atom is chosen again.
        step: The number of the step, from 0.
    """

    atom: jax.Array
    is_slot: jax.Array
    step: jax.Array


class Update(NamedTuple):
    """What a step makes of it.

    Args:
        values: `[batch, k]`.
        residual: `[batch, d]`.
        memory: As in `State`.
        is_stale: Which residuals do not go with the values, and are to be computed afresh, `[batch]`.
        is_stuck: Which signals cannot be brought further, `[batch]`: for them all this is dropped, and they stop.
    """

    values: jax.Array
    residual: jax.Array
    memory: Any
    is_stale: jax.Array
    is_stuck: jax.Array


class Pursuit(abc.ABC):
    """The contract of a pursuit; every subclass is final."""

    is_nonneg: bool
    name: ClassVar[str]
    # Whether the coefficients are the best ones for their atoms: their derivatives then follow from that alone.
    is_least_squares: ClassVar[bool] = False

    def memory(self, signals: jax.Array, k: int) -> Any:
        """What `State.memory` begins with, for `signals` and `k` steps: nothing."""
        del signals, k

    @abc.abstractmethod
    def update(self, signals: jax.Array, state: State, choice: Choice) -> Update:
        """The coefficients and the residual once an atom has been chosen.

        Args:
            signals: `[batch, d]`.
            state: Where the pursuit stands, with the chosen atom in its slot.
            choice: Which one that is.

        Returns:
            What changes; rows that are done may hold anything.
        """
