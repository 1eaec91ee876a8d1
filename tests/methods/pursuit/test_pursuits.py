"""Laws of all pursuits, against textbook forms in NumPy, tables by hand, brute force and scikit-learn.

Source: interp_jax.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp

from interp_jax.methods.pursuit import (
    PURSUITS,
    ConjugateGradientPursuit,
    GradientPursuit,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    Pursuit,
)
from tests.methods.pursuit.problems import MODES, N_ATOMS, N_BATCH, D, K, name_of, random_problem, run
from tests.methods.pursuit.textbook import codes_after_each_step

all_modes = pytest.mark.parametrize("pursuit", MODES, ids=name_of)
# Those whose every step lowers the error: where a step is cut off at 0 and taken all the same, it need not.
LOWERING = [
    mode for mode in MODES if not mode.is_nonneg or "gradient" not in mode.name or getattr(mode, "guard", False)
]
OMPS = [mode for mode in MODES if mode.name == "orthogonal_matching_pursuit"]


def errors(codes: np.ndarray, signals: np.ndarray, dictionary: np.ndarray) -> np.ndarray:
    """Norms of what codes leave of signals."""
    return np.linalg.norm(signals - codes @ dictionary, axis=-1)


def test_the_modes_are_all_pursuits() -> None:
    assert {type(mode) for mode in MODES} == set(PURSUITS)
    assert all(issubclass(cls, Pursuit) and getattr(cls, "__final__", False) for cls in PURSUITS)
    assert len({cls.name for cls in PURSUITS}) == len(PURSUITS)


@all_modes
@pytest.mark.parametrize("common", [0.0, 0.7])
def test_after_each_step_as_the_textbook(pursuit: Pursuit, common: float, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, common=common)
    found = run(pursuit, signals, dictionary)
    for row, x in enumerate(signals):
        expected = codes_after_each_step(
            pursuit.name, x, dictionary, K, is_nonneg=pursuit.is_nonneg, guard=getattr(pursuit, "guard", False)
        )
        np.testing.assert_allclose(found.after[:, row], expected, atol=1e-8)
    np.testing.assert_allclose(found.residual, signals - found.final @ dictionary, atol=1e-10)


def test_the_table_by_hand() -> None:
    signals, dictionary = np.ones((1, 2)), np.array([[1.0, 0.0], [0.6, 0.8]])
    mp = run(MatchingPursuit(is_nonneg=False), signals, dictionary)
    assert mp.indices[0].tolist() == [1, 0, *[-1] * 6]
    np.testing.assert_allclose(mp.after[:5, 0], [[0, 0], [0, 1.4], [0.16, 1.4], [0.16, 1.304], [0.2176, 1.304]])
    np.testing.assert_allclose(errors(mp.after[1:5, 0], signals, dictionary), [0.2, 0.12, 0.072, 0.0432])
    gp = run(GradientPursuit(is_nonneg=False), signals, dictionary)
    np.testing.assert_allclose(errors(gp.after[1:5, 0], signals, dictionary), [0.2, 0.12, 0.072, 0.0432])
    for solver in (OrthogonalMatchingPursuit, ConjugateGradientPursuit):
        for is_nonneg in (True, False):
            codes = run(solver(is_nonneg=is_nonneg), signals, dictionary).after[:, 0]
            np.testing.assert_allclose(codes[2:], [[0.25, 1.25]] * 7, atol=1e-12)


def test_only_an_unsigned_matching_pursuit_takes_back() -> None:
    # Its third step would lower the coefficient of the second atom.
    codes = run(MatchingPursuit(), np.ones((1, 2)), np.array([[1.0, 0.0], [0.6, 0.8]])).after[:, 0]
    np.testing.assert_allclose(codes[2:], [[0.16, 1.4]] * 7)


@all_modes
def test_of_orthonormal_atoms_the_largest_products_are_kept(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals = rng.normal(size=(N_BATCH, D))
    dictionary = np.linalg.qr(rng.normal(size=(D, D)))[0]
    products = signals @ dictionary.T
    sizes = np.maximum(products, 0) if pursuit.is_nonneg else np.abs(products)
    found = run(pursuit, signals, dictionary).after
    for n_steps in range(K + 1):
        kept = sizes >= np.sort(sizes, axis=1)[:, [-n_steps]] if n_steps else np.zeros_like(sizes, bool)
        np.testing.assert_allclose(found[n_steps], np.where(kept & (sizes > 0), products, 0), atol=1e-12)


@pytest.mark.parametrize("pursuit", LOWERING, ids=name_of)
@pytest.mark.parametrize("common", [0.0, 1.5])
def test_each_step_lowers_the_error(pursuit: Pursuit, common: float, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, common=common)
    after = errors(run(pursuit, signals, dictionary).after, signals, dictionary)
    assert (np.diff(after, axis=0) <= 1e-12).all()


@pytest.mark.parametrize("pursuit", OMPS, ids=name_of)
@pytest.mark.parametrize("common", [0.0, 1.5])
def test_orthogonal_residuals(pursuit: Pursuit, common: float, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, common=common)
    found = run(pursuit, signals, dictionary)
    for n_steps, codes in enumerate(found.after):
        products = (signals - codes @ dictionary) @ dictionary.T
        assert np.abs(products[codes != 0]).max(initial=0) < 1e-9
        for row in range(N_BATCH):
            chosen = found.indices[row, :n_steps]
            # With a sign: no chosen atom could lower the error by coming back.
            assert products[row, chosen[chosen >= 0]].max(initial=0) < 1e-9


@pytest.mark.parametrize("n_nonzero", range(1, K + 1))
def test_orthogonal_matching_pursuit_as_scikit_learn(n_nonzero: int, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, common=0.5)
    theirs = np.transpose(orthogonal_mp(dictionary.T, signals.T, n_nonzero_coefs=n_nonzero))
    found = run(OrthogonalMatchingPursuit(is_nonneg=False), signals, dictionary)
    np.testing.assert_allclose(found.after[n_nonzero], theirs, atol=1e-8)


def test_few_atoms_of_a_dictionary_without_coherence_are_recovered(rng: np.random.Generator) -> None:
    dictionary = np.concatenate([np.eye(D), scipy.linalg.hadamard(D) / 4])
    coherence = np.abs(dictionary @ dictionary.T - np.eye(N_ATOMS)).max()
    assert coherence < 1 / 3, "orthogonal matching pursuit is sure of two atoms below 1 / (2 * 2 - 1)"
    codes = np.zeros((N_BATCH, N_ATOMS))
    for row in codes:
        row[rng.choice(N_ATOMS, 2, replace=False)] = rng.uniform(0.1, 2.0, 2)
    for pursuit in OMPS:
        np.testing.assert_allclose(run(pursuit, codes @ dictionary, dictionary).after[2], codes, atol=1e-12)


def test_as_many_steps_as_independent_atoms_leave_nothing(rng: np.random.Generator) -> None:
    _, dictionary = random_problem(rng, n_atoms=K)
    signals = rng.normal(size=(N_BATCH, K)) @ dictionary
    assert np.abs(run(OrthogonalMatchingPursuit(is_nonneg=False), signals, dictionary).residual).max() < 1e-8


@all_modes
def test_no_support_does_better_than_the_best_of_all(pursuit: Pursuit, rng: np.random.Generator) -> None:
    n_atoms, n_steps = 8, 3
    signals, dictionary = random_problem(rng, n_atoms=n_atoms)
    found = run(pursuit, signals, dictionary)
    for row, x in enumerate(signals):
        best = {}
        for support in itertools.combinations(range(n_atoms), n_steps):
            atoms = dictionary[list(support)].T
            solution = nnls(atoms, x)[0] if pursuit.is_nonneg else np.linalg.lstsq(atoms, x, rcond=None)[0]
            best[support] = np.linalg.norm(x - atoms @ solution)
        error = errors(found.after[n_steps, row], x, dictionary)
        assert error >= min(best.values()) - 1e-12
        support = tuple(np.flatnonzero(found.after[n_steps, row]))
        if pursuit.name == "orthogonal_matching_pursuit" and len(support) == n_steps:
            assert abs(error - best[support]) < 1e-9


@all_modes
def test_without_a_positive_product_nothing_is_chosen(pursuit: Pursuit, rng: np.random.Generator) -> None:
    dictionary = np.abs(rng.normal(size=(N_ATOMS, D)))
    signals = -np.abs(rng.normal(size=(N_BATCH, D)))
    found = run(pursuit, signals, dictionary)
    if pursuit.is_nonneg:
        assert (found.indices == -1).all()
        assert (found.values == 0).all()
        assert (found.residual == signals).all()
    else:
        assert (found.after[1] <= 0).all()
        assert (found.indices[:, 0] >= 0).all()


@all_modes
def test_coefficients_stay_at_least_0(pursuit: Pursuit, rng: np.random.Generator) -> None:
    found = run(pursuit, *random_problem(rng, common=2.0))
    assert (found.after.min() >= 0) == pursuit.is_nonneg


@all_modes
def test_a_signal_knows_nothing_of_the_others(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, common=0.5)
    together = run(pursuit, signals, dictionary)
    for row in range(N_BATCH):
        alone = run(pursuit, signals[row : row + 1], dictionary)
        assert (alone.indices[0] == together.indices[row]).all()
        np.testing.assert_allclose(alone.after[:, 0], together.after[:, row], atol=1e-9)


@all_modes
def test_a_signal_that_is_not_finite_spoils_its_own_row(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng)
    spoiled = signals.copy()
    spoiled[1, 3], spoiled[4, 0] = np.nan, np.inf
    found, clean = run(pursuit, spoiled, dictionary), run(pursuit, signals, dictionary)
    is_bad = np.isin(np.arange(N_BATCH), [1, 4])
    assert np.isnan(found.values[is_bad]).all()
    assert np.isnan(found.residual[is_bad]).all()
    assert (found.indices[is_bad] == -1).all()
    assert (found.values[~is_bad] == clean.values[~is_bad]).all()
    assert (found.residual[~is_bad] == clean.residual[~is_bad]).all()


@all_modes
def test_lengths_of_atoms_and_signals_change_units_only(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng)
    lengths, units = 2.0 ** rng.integers(-300, 300, N_ATOMS), 2.0 ** rng.integers(-300, 300, (N_BATCH, 1))
    plain = run(pursuit, signals, dictionary)
    scaled = run(pursuit, signals * units, dictionary * lengths[:, None])
    assert (scaled.indices == plain.indices).all()
    np.testing.assert_allclose(scaled.final * lengths / units, plain.final, atol=1e-9)
    np.testing.assert_allclose(scaled.residual / units, plain.residual, atol=1e-9)


@all_modes
def test_atoms_that_come_twice_and_atoms_of_zeros(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng, n_atoms=12)
    signals[0], signals[1] = dictionary[2], 0
    both = run(pursuit, signals, np.concatenate([dictionary, np.zeros((4, D)), dictionary, 2 * dictionary[:4]]))
    assert np.isfinite(both.after).all()
    assert (both.after[:, :, 12:16] == 0).all()
    assert (both.indices[1] == -1).all()
    # Which of equal atoms is chosen is rounding's choice: their coefficients are added up.
    folded = both.after[:, :, :12] + both.after[:, :, 16:28]
    folded[:, :, :4] += 2 * both.after[:, :, 28:]
    np.testing.assert_allclose(folded[-1, 0], np.eye(12)[2], atol=1e-12)
    if "gradient" not in pursuit.name:
        # A gradient moves an atom that was chosen as two of them twice as far.
        np.testing.assert_allclose(folded, run(pursuit, signals, dictionary).after, atol=1e-9)


@all_modes
def test_the_order_of_atoms_does_not_matter(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng)
    order = rng.permutation(N_ATOMS)
    plain, shuffled = run(pursuit, signals, dictionary), run(pursuit, signals, dictionary[order])
    np.testing.assert_allclose(shuffled.after, plain.after[:, :, order], atol=1e-9)


@all_modes
def test_a_signal_stops_at_its_tolerance(pursuit: Pursuit, rng: np.random.Generator) -> None:
    signals, dictionary = random_problem(rng)
    freely = run(pursuit, signals, dictionary)
    after = errors(freely.after, signals, dictionary)
    tolerance = float(np.median(after[3]))
    stopped = run(pursuit, signals, dictionary, tolerance=tolerance)
    for row in range(N_BATCH):
        reached = np.flatnonzero(after[:, row] <= tolerance)
        last = reached[0] if len(reached) else K
        np.testing.assert_allclose(stopped.after[: last + 1, row], freely.after[: last + 1, row], atol=1e-9)
        # Least squares are refined anew for each prefix, which on some versions of XLA rounds otherwise.
        np.testing.assert_allclose(stopped.after[last:, row], stopped.after[[last] * (K + 1 - last), row], atol=1e-13)
        assert (stopped.indices[row, last:] == -1).all()


def test_a_guard_drops_the_step_that_would_raise_the_error() -> None:
    # Found among thousands of random ones: the fourth step is cut off at 0 and leaves more than it found.
    dictionary = [[0, 10, -18], [17, 13, -2], [-10, -5, -7], [7, -13, 1], [-11, 2, -31], [11, 5, -23]]
    dictionary = np.array(dictionary) / np.linalg.norm(dictionary, axis=1, keepdims=True)
    signals = np.array([[0.4, 1.1, -0.3]])
    plain, guarded = (run(GradientPursuit(guard=guard), signals, dictionary).after[:, 0] for guard in (False, True))
    assert errors(plain, signals[0], dictionary)[4] > errors(plain, signals[0], dictionary)[3] + 0.03
    np.testing.assert_allclose(guarded[:4], plain[:4])
    assert (guarded[4:] == guarded[3]).all()
