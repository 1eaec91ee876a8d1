"""Sparse codes by pursuit: `pursue(pursuit, signals, dictionary, k)`, for any of the pursuits.

Each step takes one product of all residuals with the dictionary, of which only the best atom is kept; everything else
touches the at most k atoms a signal has chosen. The coefficients after fewer steps come out of the same run.

>>> from interp_jax.methods.pursuit import OrthogonalMatchingPursuit
>>> dictionary = jnp.array([[1.0, 0.0], [0.6, 0.8]])
>>> pursued = pursue(OrthogonalMatchingPursuit(), jnp.ones((1, 2)), dictionary, k=2, prefixes=(1, 2))
>>> pursued.indices.tolist(), [[f"{value:.2f}" for value in row[0]] for row in pursued.prefix_values]
([[1, 0]], [['1.40', '0.00'], ['1.25', '0.25']])
>>> [f"{abs(value):.2f}" for value in pursued.residual[0]]
['0.00', '0.00']

Sharp edges: no bias is subtracted: with an SAE's decoder give `x - b_dec`. Atoms need not have norm 1 (they are chosen
as if they had, and the coefficients are those of the atoms as they are); an atom of zeros is never chosen. A signal
with a number that is not finite gives NaN in its own row and no atoms. Which atoms are chosen has no derivative; the
coefficients and the residual have those of the steps that were taken, to signals and dictionary.

Source: interp_jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from interp_jax.core.best_rows import BestRows, Cut, best_rows, best_rows_across, cut_of
from interp_jax.core.errors import InvalidInputError, ShapeError, four_part, shorten
from interp_jax.methods.pursuit.atoms import combination
from interp_jax.methods.pursuit.least_squares import refined
from interp_jax.methods.pursuit.pursuit import Choice, Pursuit, State
from interp_jax.transforms.compilations import counted_jit

# After so many steps the residual is computed afresh.
_N_DRIFT = 16
# Products up to so many units in the last place of the signal's norm count as 0.
_N_NOISE = 16


class Pursued(NamedTuple):
    """Sparse codes; a slot belongs to the step that filled it.

    Args:
        indices: Which atoms, int32 `[batch, k]`; -1 in slots without one.
        values: Their coefficients, float32 (float64 where the signals are) `[batch, k]`; 0 in slots without an atom,
            and in those of atoms that were set to 0 again.
        residual: What the atoms leave of the signals, `[batch, d]`.
        prefix_values: The coefficients after each of the asked numbers of steps, `[prefix, batch, k]`, or None.
    """

    indices: jax.Array
    values: jax.Array
    residual: jax.Array
    prefix_values: jax.Array | None


def pursue(
    pursuit: Pursuit,
    signals: Any,
    dictionary: Any,
    k: int,
    *,
    tolerance: Any = 0.0,
    prefixes: Sequence[int] | np.ndarray | None = None,
) -> Pursued:
    """The sparse codes of signals over a dictionary, found in k steps.

    Args:
        pursuit: Which, such as `GradientPursuit()`.
        signals: `[batch, d]`, of a floating dtype.
        dictionary: Atoms as rows, `[n_atoms, d]`, of a floating dtype; possibly cut over devices along the atoms.
        k: How many steps, from 0 to `n_atoms`; not more atoms than that are chosen for each signal.
        tolerance: A signal stops once its residual's norm is at most this, in the signals' units.
        prefixes: Numbers of steps, from 0 to k, after which coefficients are wanted too.

    Returns:
        The codes.

    Raises:
        InvalidInputError: Not a pursuit, k or a prefix out of range, a tolerance below 0, an atom that is not finite.
        ShapeError: Signals or dictionary of the wrong shape or dtype, or of different widths.
    """
    signals, dictionary = _array(signals, "signals", "[batch, d]"), _array(dictionary, "dictionary", "[n_atoms, d]")
    prefixes = None if prefixes is None else tuple(np.atleast_1d(np.asarray(prefixes)).tolist())
    _check(pursuit, signals, dictionary, k, prefixes)
    is_traced = any(isinstance(value, Tracer) for value in (signals, dictionary, tolerance))
    if not is_traced:
        _check_values(dictionary, tolerance)
    tolerance = jnp.asarray(tolerance, jnp.float32)
    cut = None if isinstance(dictionary, Tracer) else cut_of(dictionary, signals)
    run = _pursue if is_traced else _compiled
    return run(pursuit, signals, dictionary, tolerance, k=int(k), prefixes=prefixes, cut=cut)


def dense_codes(indices: jax.Array, values: jax.Array, n_atoms: int) -> jax.Array:
    """Codes with a column for every atom.

    Args:
        indices: `[batch, k]`; -1 in slots without an atom.
        values: `[..., batch, k]`, such as those of prefixes.
        n_atoms: How many atoms the dictionary has.

    Returns:
        `[..., batch, n_atoms]`.
    """
    _check_indices(indices, n_atoms, where="dense_codes")
    rows = jnp.arange(len(indices))[:, None]
    empty = jnp.zeros((*values.shape[:-1], n_atoms), values.dtype)
    return empty.at[..., rows, jnp.maximum(indices, 0)].add(values)


def reconstruct(indices: jax.Array, values: jax.Array, dictionary: jax.Array) -> jax.Array:
    """The sums of atoms that codes stand for.

    Args:
        indices: `[batch, k]`; -1 in slots without an atom, whose value must be 0.
        values: `[..., batch, k]`, such as those of prefixes.
        dictionary: `[n_atoms, d]`.

    Returns:
        `[..., batch, d]`, in the dtype of the values.
    """
    _check_indices(indices, len(dictionary), where="reconstruct")
    atoms = dictionary[jnp.maximum(indices, 0)].astype(values.dtype)
    return jnp.einsum("...bk,bkd->...bd", values, atoms, precision=lax.Precision.HIGHEST)


def _check_indices(indices: jax.Array, n_atoms: int, *, where: str) -> None:
    """Refuse codes over another dictionary, as far as they can be looked at."""
    if isinstance(indices, Tracer) or not indices.size or int(largest := indices.max()) < n_atoms:
        return
    raise InvalidInputError(
        four_part(
            f"Codes of atom {int(largest)} were given",
            where=f"{where}, with {n_atoms} atoms",
            expected=f"indices from 0 to {n_atoms - 1}, or -1.",
            fix="use the dictionary that the codes were found with.",
        )
    )


def _array(value: Any, name: str, shape: str) -> jax.Array:
    """`value` as a matrix of floating numbers."""
    array = value if isinstance(value, jax.Array) else jnp.asarray(np.asarray(value))
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ShapeError(
            four_part(
                f"{name} {array.dtype}{list(array.shape)} was given",
                where="pursue",
                expected=f"floating numbers, {shape}.",
                fix=f"give {name} as {shape}, for example by reshape(-1, d) and astype(jnp.float32).",
            )
        )
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    if isinstance(array, Tracer):
        raise InvalidInputError(
            four_part(
                f"{name} sharded over the explicit axes {mesh.axis_names} was given",
                where="pursue, inside a transformation",
                expected="arrays whose sharding is XLA's to choose there.",
                fix="wrap the call in jax.sharding.auto_axes, or make the mesh with axis_types=(AxisType.Auto, ...).",
            )
        )
    # The same bytes in the same places: only what JAX asks of the operations differs.
    sharding: Any = array.sharding
    return jax.device_put(array, NamedSharding(Mesh(sharding.mesh.devices, mesh.axis_names), sharding.spec))


def _check(pursuit: Pursuit, signals: jax.Array, dictionary: jax.Array, k: int, prefixes: Sequence[int] | None) -> None:
    """Raise an error in four parts for what shapes and Python numbers already show."""
    if not isinstance(pursuit, Pursuit):
        raise InvalidInputError(
            four_part(
                f"{pursuit!r} was given",
                where="pursue",
                expected="a pursuit.",
                fix="give one made by its class, such as GradientPursuit() or MatchingPursuit(is_nonneg=False).",
            )
        )
    (_, width), (n_atoms, d) = signals.shape, dictionary.shape
    if width != d or d == 0:
        raise ShapeError(
            four_part(
                f"Signals of width {width} and atoms of width {d} were given",
                where="pursue",
                expected="the same width, at least 1.",
                fix="give the dictionary with atoms as rows, [n_atoms, d], such as an SAE's W_dec.",
            )
        )
    if not _is_count(k) or not 0 <= k <= n_atoms:
        raise InvalidInputError(
            four_part(
                f"k = {k} was given",
                where=f"pursue, with {n_atoms} atoms",
                expected=f"a whole number from 0 to {n_atoms}.",
                fix="lower k: it is the number of steps, each of which adds at most one atom.",
            )
        )
    wrong = [n_steps for n_steps in prefixes or () if not _is_count(n_steps) or not 0 <= n_steps <= k]
    if wrong or len(set(prefixes or ())) != len(prefixes or ()):
        raise InvalidInputError(
            four_part(
                f"prefixes = {prefixes} were given",
                where=f"pursue, with k = {k}",
                expected=f"different whole numbers from 0 to {k}.",
                fix="leave out those above k and those that come twice.",
            )
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_values(dictionary: jax.Array, tolerance: Any) -> None:
    """Raise an error in four parts for numbers no pursuit can use."""
    if np.ndim(tolerance) != 0 or not float(tolerance) >= 0:
        raise InvalidInputError(
            four_part(
                f"tolerance = {tolerance} was given",
                where="pursue",
                expected="a number of at least 0.",
                fix="give the norm of the residual at which a signal is done, or leave it out.",
            )
        )
    wrong = np.flatnonzero(np.asarray(_has_bad_numbers(dictionary)))
    if len(wrong):
        raise InvalidInputError(
            four_part(
                f"Atoms with numbers that are not finite were given: {shorten(map(str, wrong))}",
                where="pursue",
                expected="finite numbers; a row of zeros is an atom that is never chosen.",
                fix="look at how the dictionary was made, or set those rows to 0.",
            )
        )


def _pursue(
    pursuit: Pursuit,
    signals: jax.Array,
    dictionary: jax.Array,
    tolerance: jax.Array,
    *,
    k: int,
    prefixes: tuple[int, ...] | None,
    cut: Cut | None,
) -> Pursued:
    dtype = jnp.float64 if signals.dtype == jnp.float64 else jnp.float32
    is_finite = jnp.isfinite(signals).all(axis=1)
    units, exponents = _in_units(jnp.where(is_finite[:, None], signals.astype(dtype), 0))
    tolerances = jnp.ldexp(jnp.broadcast_to(tolerance.astype(dtype), exponents.shape), -exponents)
    scales = _inverse_norms(dictionary, dtype)
    state, record = _run(pursuit, units, dictionary, scales, tolerances, k, prefixes or (), cut)

    is_filled, atoms = state.indices >= 0, state.atoms
    if pursuit.is_least_squares and k:
        atoms = _unit_atoms(dictionary, scales, state.indices)

        def polish(values: jax.Array, n_steps: jax.Array) -> jax.Array:
            is_free = is_filled & (jnp.arange(k, dtype=jnp.int32) < n_steps)[None]
            if not pursuit.is_nonneg:
                return refined(units, atoms, values, is_free)
            return jnp.maximum(refined(units, atoms, values, is_free & (values > 0)), 0)

        record = jax.vmap(polish)(record, jnp.array([*(prefixes or ()), k], jnp.int32))
    residual = units - combination(record[-1], atoms)

    def to_signals(array: jax.Array) -> jax.Array:
        """Back in the signals' units, with NaN in the rows of signals that were not finite."""
        return jnp.where(is_finite[:, None], jnp.ldexp(array, exponents[:, None]), jnp.nan)

    stretches = jnp.where(is_filled, scales[jnp.maximum(state.indices, 0)], 0)
    record = jax.vmap(to_signals)(record * stretches[None])
    return Pursued(state.indices, record[-1], to_signals(residual), None if prefixes is None else record[:-1])


def _run(
    pursuit: Pursuit,
    signals: jax.Array,
    dictionary: jax.Array,
    scales: jax.Array,
    tolerances: jax.Array,
    k: int,
    prefixes: tuple[int, ...],
    cut: Cut | None,
) -> tuple[State, jax.Array]:
    """All steps, of signals in a range where squares are harmless; the coefficients after each prefix and after all."""
    if pursuit.is_least_squares:
        signals, dictionary, scales = lax.stop_gradient((signals, dictionary, scales))
    (n_batch, d), dtype = signals.shape, signals.dtype
    state = State(
        indices=jnp.full((n_batch, k), -1, jnp.int32),
        atoms=jnp.zeros((n_batch, k, d), dtype),
        values=jnp.zeros((n_batch, k), dtype),
        residual=signals,
        is_done=jnp.zeros(n_batch, bool),
        memory=pursuit.memory(signals, k),
    )

    # Products of what rounding leaves of a signal. A pursuit without a positive product ends there, not at 0.
    noise = _N_NOISE * jnp.finfo(dtype).eps * jnp.linalg.norm(lax.stop_gradient(signals), axis=1)
    # Which entry of the record a step's coefficients go to; the last is for those that nobody asked for.
    entries = np.full(k, len(prefixes), np.int32)
    for entry, n_steps in enumerate(prefixes):
        entries[n_steps - 1 : n_steps] = entry

    def step(carry: tuple[State, jax.Array], at: tuple[jax.Array, jax.Array]) -> tuple[tuple[State, jax.Array], None]:
        (state, recorded), (number, entry) = carry, at
        state = _step(pursuit, signals, dictionary, scales, tolerances, noise, cut, state, number)
        return (state, lax.dynamic_update_index_in_dim(recorded, state.values, entry, axis=0)), None

    recorded = jnp.zeros((len(prefixes) + 1, n_batch, k), dtype)
    steps = (jnp.arange(k, dtype=jnp.int32), jnp.asarray(entries))
    if k:
        state, recorded = lax.scan(step, (state, recorded), steps)[0]
    return state, recorded.at[-1].set(state.values)


def _step(
    pursuit: Pursuit,
    signals: jax.Array,
    dictionary: jax.Array,
    scales: jax.Array,
    tolerances: jax.Array,
    noise: jax.Array,
    cut: Cut | None,
    state: State,
    number: jax.Array,
) -> State:
    norms = jnp.sqrt(jnp.square(lax.stop_gradient(state.residual)).sum(axis=1))
    is_done = state.is_done | (norms <= tolerances)
    choose = best_rows if cut is None else partial(best_rows_across, cut=cut)
    best = lax.cond(
        is_done.all(),
        lambda: BestRows(jnp.zeros(len(signals), jnp.int32), jnp.zeros_like(norms)),
        lambda: choose(state.residual, dictionary, scales, is_signed=not pursuit.is_nonneg),
    )
    is_done |= (best.products if pursuit.is_nonneg else jnp.abs(best.products)) <= noise

    atom = _unit_atoms(dictionary, scales, best.indices)
    earlier = state.indices == best.indices[:, None]
    is_new = ~is_done & ~earlier.any(axis=1)
    is_next = jnp.arange(state.indices.shape[1], dtype=jnp.int32)[None] == number
    entered = state._replace(
        indices=jnp.where(is_next & is_new[:, None], best.indices[:, None], state.indices),
        atoms=lax.dynamic_update_index_in_dim(state.atoms, jnp.where(is_new[:, None], atom, 0), number, axis=1),
    )
    choice = Choice(atom, (entered.indices == best.indices[:, None]) & ~is_done[:, None], number)
    update = pursuit.update(signals, entered, choice)

    is_done |= update.is_stuck
    # Seldom any: it takes another pass over all the atoms.
    is_stale = update.is_stale | (number % _N_DRIFT == _N_DRIFT - 1)
    residual = lax.cond(
        is_stale.any(),
        lambda: jnp.where(is_stale[:, None], signals - combination(update.values, entered.atoms), update.residual),
        lambda: update.residual,
    )
    return State(
        indices=jnp.where(is_next & is_done[:, None], -1, entered.indices),
        atoms=entered.atoms,
        values=jnp.where(is_done[:, None], state.values, update.values),
        residual=jnp.where(is_done[:, None], state.residual, residual),
        is_done=is_done,
        memory=update.memory,
    )


def _unit_atoms(dictionary: jax.Array, scales: jax.Array, indices: jax.Array) -> jax.Array:
    """The atoms of these indices with norm 1, 0 where the index is -1."""
    chosen = jnp.maximum(indices, 0)
    lengths = jnp.where(indices >= 0, scales[chosen], 0)
    return dictionary[chosen].astype(scales.dtype) * lengths[..., None]


def _inverse_norms(dictionary: jax.Array, dtype: Any) -> jax.Array:
    """One over the norms of the atoms, `[n_atoms]`; 0 for an atom of zeros."""
    # Of a dictionary that is a constant of the program XLA would find the norms while it compiles, which takes minutes.
    dictionary = lax.optimization_barrier(dictionary)
    largest = jnp.abs(dictionary).max(axis=1, initial=0).astype(dtype)
    is_zero = largest < jnp.finfo(dtype).tiny
    largest = lax.stop_gradient(jnp.where(is_zero, jnp.ones_like(largest), largest))
    squares = jnp.square(dictionary.astype(dtype) / largest[:, None]).sum(axis=1)
    return jnp.where(is_zero, 0, 1 / (largest * jnp.sqrt(jnp.where(is_zero, jnp.ones_like(squares), squares))))


def _in_units(signals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signals over a power of 2 each, so that their largest number is below 1, and the exponents; exact."""
    _, exponents = jnp.frexp(lax.stop_gradient(jnp.abs(signals).max(axis=1, initial=0)))
    return jnp.ldexp(signals, -exponents[:, None]), exponents


_has_bad_numbers = counted_jit(lambda dictionary: ~jnp.isfinite(dictionary).all(axis=1), name="pursuit.has_bad_numbers")
_compiled = counted_jit(_pursue, name="pursuit.pursue", static_argnums=(0,), static_argnames=("k", "prefixes", "cut"))
