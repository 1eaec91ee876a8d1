"""The call: what it takes and refuses, in which dtypes, under which transformations, and on how many devices.

Source: interp_jax.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.methods.pursuit import (
    GradientPursuit,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    Pursuit,
    dense_codes,
    pursue,
    reconstruct,
)
from interp_jax.transforms.compilations import count_compilations
from tests.methods.pursuit.problems import MODES, name_of

N_BATCH, N_ATOMS, D, K = 4, 20, 8, 5
GP, OMP = GradientPursuit(), OrthogonalMatchingPursuit()


@pytest.fixture
def problem(rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """Signals and atoms, in float32."""
    signals, dictionary = rng.normal(size=(N_BATCH, D)), rng.normal(size=(N_ATOMS, D))
    return jnp.asarray(signals, jnp.float32), jnp.asarray(dictionary, jnp.float32)


def same(left: Any, right: Any, *, atol: float = 0.0) -> None:
    """Assert that both found the same."""
    assert (np.asarray(left.indices) == np.asarray(right.indices)).all()
    for name in ("values", "residual", "prefix_values"):
        if getattr(left, name) is not None:
            np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-6, atol=atol)


def test_what_comes_out(problem: tuple[jax.Array, jax.Array]) -> None:
    signals, dictionary = problem
    found = pursue(GP, signals, dictionary, K, prefixes=(4, 0, K))
    with count_compilations() as new:
        stopped = pursue(GP, signals, dictionary, K, prefixes=(4, 0, K), tolerance=1e6)
    assert [compilation.name for compilation in new] == []
    assert (stopped.values == 0).all()
    assert found.indices.dtype == jnp.int32
    assert found.values.dtype == found.residual.dtype == jnp.float32
    assert found.indices.shape == found.values.shape == (N_BATCH, K)
    assert found.prefix_values is not None
    assert found.prefix_values.shape == (3, N_BATCH, K)
    assert (found.prefix_values[0, :, 4:] == 0).all()
    assert (found.prefix_values[1] == 0).all()
    assert (found.prefix_values[2] == found.values).all()
    assert (found.values[found.indices < 0] == 0).all()
    np.testing.assert_allclose(
        reconstruct(found.indices, found.values, dictionary) + found.residual, signals, atol=1e-5
    )
    dense = dense_codes(found.indices, found.prefix_values, N_ATOMS)
    assert dense.shape == (3, N_BATCH, N_ATOMS)
    np.testing.assert_allclose(
        dense @ dictionary, reconstruct(found.indices, found.prefix_values, dictionary), atol=1e-5
    )


def test_fewer_steps_are_a_prefix(problem: tuple[jax.Array, jax.Array]) -> None:
    found = pursue(GP, *problem, K, prefixes=(4, 0, K))
    shorter = pursue(GP, *problem, 4)
    assert found.prefix_values is not None
    assert (found.indices[:, :4] == shorter.indices).all()
    np.testing.assert_allclose(found.prefix_values[0, :, :4], shorter.values, atol=1e-6)


@pytest.mark.parametrize("pursuit", [MatchingPursuit(), OMP], ids=name_of)
def test_no_steps_and_no_signals(pursuit: Pursuit, problem: tuple[jax.Array, jax.Array]) -> None:
    signals, dictionary = problem
    nothing = pursue(pursuit, signals, dictionary, 0, prefixes=(0,))
    assert nothing.indices.shape == nothing.values.shape == (N_BATCH, 0)
    assert nothing.prefix_values is not None
    assert nothing.prefix_values.shape == (1, N_BATCH, 0)
    none_asked = pursue(pursuit, signals, dictionary, 0, prefixes=()).prefix_values
    assert none_asked is not None
    assert none_asked.shape == (0, N_BATCH, 0)
    assert (nothing.residual == signals).all()
    assert dense_codes(nothing.indices, nothing.values, N_ATOMS).tolist() == [[0.0] * N_ATOMS] * N_BATCH
    assert pursue(pursuit, signals[:0], dictionary, K).values.shape == (0, K)


def test_half_width_numbers_are_taken_as_they_are(problem: tuple[jax.Array, jax.Array]) -> None:
    signals, dictionary = (array.astype(jnp.bfloat16) for array in problem)
    wide = pursue(GP, signals.astype(jnp.float32), dictionary.astype(jnp.float32), K, prefixes=(4, 0, K))
    narrow = pursue(GP, signals, dictionary, K)
    assert narrow.values.dtype == narrow.residual.dtype == jnp.float32
    assert (narrow.indices == wide.indices).all()
    np.testing.assert_allclose(narrow.values, wide.values, atol=1e-6)
    np.testing.assert_allclose(narrow.residual, wide.residual, atol=1e-6)
    assert reconstruct(wide.indices, wide.values, dictionary).dtype == jnp.float32


def test_numpy_arrays_are_as_good(problem: tuple[jax.Array, jax.Array]) -> None:
    signals, dictionary = (np.asarray(array, np.float64) for array in problem)
    found = pursue(GP, signals, dictionary, K, prefixes=(4, 0, K))
    same(found, pursue(GP, *problem, K, prefixes=(4, 0, K)))


@pytest.mark.parametrize("pursuit", MODES[::2], ids=name_of)
@pytest.mark.slow
def test_many_steps_leave_what_they_say(pursuit: Pursuit, rng: np.random.Generator) -> None:
    # In float32, of coherent atoms: what rounding does to the residual does not build up.
    common = rng.normal(size=32)
    dictionary = (rng.normal(size=(256, 32)) + common).astype(np.float32)
    signals = (rng.normal(size=(8, 32)) + common).astype(np.float32)
    found = pursue(pursuit, signals, dictionary, 100)
    dense = np.asarray(dense_codes(found.indices, found.values, 256), np.float64)
    left = signals - dense @ dictionary
    np.testing.assert_allclose(found.residual, left, atol=2e-5 * np.abs(dense).sum(axis=1).max())
    if pursuit.name == "orthogonal_matching_pursuit":
        products = left @ (dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)).T
        assert np.abs(products[dense != 0]).max() < 1e-3


class TestTransformations:
    @pytest.mark.parametrize(
        "pursuit",
        [pytest.param(mode, marks=[pytest.mark.slow] if mode != MODES[0] else [], id=name_of(mode)) for mode in MODES],
    )
    def test_derivatives_are_those_of_the_steps(self, pursuit: Pursuit, rng: np.random.Generator) -> None:
        signals, dictionary = rng.normal(size=(N_BATCH, D)), rng.normal(size=(N_ATOMS, D))
        weights, changes = (
            rng.normal(size=(N_BATCH, K)),
            (rng.normal(size=signals.shape), rng.normal(size=(N_ATOMS, D))),
        )

        def outcome(signals: jax.Array, dictionary: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = pursue(pursuit, signals, dictionary, K)
            return (found.values * weights).sum() + (found.residual**3).sum(), found.indices

        with jax.enable_x64(True):
            run = jax.jit(jax.grad(outcome, argnums=(0, 1), has_aux=True))
            gradients, chosen = run(signals, dictionary)
            size, beside = 1e-6, []
            for sign in (1, -1):
                moved = [
                    array + sign * size * change for array, change in zip((signals, dictionary), changes, strict=True)
                ]
                value, chosen_there = jax.jit(outcome)(*moved)
                assert (chosen_there == chosen).all(), "the atoms chosen changed: not a place to differentiate at"
                beside.append(float(value))
            predicted = sum(float((g * c).sum()) for g, c in zip(gradients, changes, strict=True))
        np.testing.assert_allclose((beside[0] - beside[1]) / (2 * size), predicted, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("pursuit", MODES, ids=name_of)
    def test_jit_and_vmap(self, pursuit: Pursuit, problem: tuple[jax.Array, jax.Array]) -> None:
        signals, dictionary = problem
        plain = pursue(pursuit, signals, dictionary, K, prefixes=(2, K))
        inside = jax.jit(lambda x, atoms: pursue(pursuit, x, atoms, K, prefixes=(2, K)))(signals, dictionary)
        same(inside, plain, atol=1e-6)
        several = jax.vmap(lambda x, atoms, tolerance: pursue(pursuit, x, atoms, K, tolerance=tolerance))
        tolerances = jnp.array([0.0, 1.0])
        found = several(jnp.stack([signals] * 2), jnp.stack([dictionary] * 2), tolerances)
        for row, tolerance in enumerate([0.0, 1.0]):
            alone = pursue(pursuit, signals, dictionary, K, tolerance=tolerance)
            same(jax.tree.map(lambda leaf: leaf[row], found), alone, atol=1e-5)  # noqa: B023 - called at once


class TestDevices:
    @pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
    def test_atoms_cut_in_two(self, axes: AxisType, problem: tuple[jax.Array, jax.Array]) -> None:
        signals, dictionary = problem
        mesh = jax.make_mesh((2,), ("atoms",), axis_types=(axes,))
        cut = jax.device_put(dictionary, NamedSharding(mesh, PartitionSpec("atoms")))
        same(
            pursue(GP, signals, cut, K, prefixes=(4, 0, K)),
            pursue(GP, signals, dictionary, K, prefixes=(4, 0, K)),
            atol=1e-5,
        )

    def test_explicit_axes_inside_a_transformation_are_refused(self, problem: tuple[jax.Array, jax.Array]) -> None:
        mesh = jax.make_mesh((2,), ("atoms",), axis_types=(AxisType.Explicit,))
        cut = jax.device_put(problem[1], NamedSharding(mesh, PartitionSpec("atoms")))
        with pytest.raises(InvalidInputError, match=r"explicit axes \('atoms',\)[^$]*auto_axes"):
            jax.jit(lambda atoms: pursue(GP, problem[0], atoms, K).values)(cut)

    @pytest.mark.slow
    def test_on_eight_devices(self) -> None:
        flags = "--xla_force_host_platform_device_count=8"
        program = Path(__file__).with_name("eight_devices.py")
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["8", "devices", "agree"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "error", "words"),
        [
            ({"pursuit": GradientPursuit}, InvalidInputError, "GradientPursuit.*was given.*Fix: give one made by"),
            ({"signals": np.ones(D, np.float32)}, ShapeError, r"signals float32\[8\] was given.*\[batch, d\]"),
            ({"signals": np.ones((2, D), int)}, ShapeError, r"signals int.*floating numbers.*astype"),
            ({"dictionary": np.ones((2, D), bool)}, ShapeError, r"dictionary bool\[2, 8\].*\[n_atoms, d\]"),
            ({"dictionary": np.ones((D, N_ATOMS), "f")}, ShapeError, "width 8 and atoms of width 20.*atoms as rows"),
            ({"dictionary": np.ones((3, 0), "f"), "signals": np.ones((2, 0), "f")}, ShapeError, "at least 1"),
            ({"k": -1}, InvalidInputError, "k = -1 was given in pursue, with 20 atoms.*from 0 to 20"),
            ({"k": 21}, InvalidInputError, "k = 21 was given.*lower k"),
            ({"k": 2.0}, InvalidInputError, "k = 2.0 was given.*a whole number"),
            ({"k": True}, InvalidInputError, "k = True was given"),
            ({"prefixes": (1, 6)}, InvalidInputError, r"prefixes = \(1, 6\).*with k = 5.*from 0 to 5"),
            ({"prefixes": (2, 2)}, InvalidInputError, "different whole numbers"),
            ({"prefixes": (1.5,)}, InvalidInputError, "different whole numbers"),
            ({"tolerance": -0.1}, InvalidInputError, "tolerance = -0.1 was given.*at least 0"),
            ({"tolerance": float("nan")}, InvalidInputError, "tolerance = nan"),
            ({"tolerance": np.ones(2)}, InvalidInputError, "tolerance = .*a number"),
        ],
    )
    def test_is_told(self, changes: dict[str, Any], error: type, words: str, problem: Any) -> None:
        given = {"pursuit": GP, "signals": problem[0], "dictionary": problem[1], "k": K, **changes}
        with pytest.raises(error, match=f"(?s){words}"):
            pursue(**given)

    def test_prefixes_may_be_an_array(self, problem: tuple[jax.Array, jax.Array]) -> None:
        found = pursue(GP, *problem, K, prefixes=np.array([1, 2]))
        expected = pursue(GP, *problem, K, prefixes=(1, 2))
        np.testing.assert_array_equal(np.asarray(found.prefix_values), np.asarray(expected.prefix_values))

    def test_codes_of_another_dictionary(self, problem: tuple[jax.Array, jax.Array]) -> None:
        found = pursue(GP, *problem, K)
        for wrong in (
            lambda: dense_codes(found.indices, found.values, 1),
            lambda: reconstruct(found.indices, found.values, problem[1][:1]),
        ):
            with pytest.raises(InvalidInputError, match=r"(?s)Codes of atom .*with 1 atoms.*from 0 to 0.*Fix:"):
                wrong()

    def test_atoms_that_are_not_finite_are_named(self, problem: tuple[jax.Array, jax.Array]) -> None:
        dictionary = problem[1].at[3, 1].set(jnp.nan).at[7, 0].set(jnp.inf)
        with pytest.raises(InvalidInputError, match=r"(?s)not finite were given: 3, 7 in pursue.*Fix: look at"):
            pursue(GP, problem[0], dictionary, K)
