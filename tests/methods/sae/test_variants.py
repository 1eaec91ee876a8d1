"""The contract every SAE variant keeps, and what each computes, against plain NumPy and values worked out by hand."""

from __future__ import annotations

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.methods.sae import (
    SAE,
    VARIANTS,
    BatchTopK,
    Gated,
    JumpReLU,
    MatchingPursuit,
    Matryoshka,
    ReLU,
    TopK,
)
from interp_jax.methods.sae.architecture import SparseLatents, fired
from interp_jax.methods.sae.batch_top_k import as_jump_relu, batch_top_k
from interp_jax.methods.sae.jump_relu import jump_relu, mean_l0
from interp_jax.methods.sae.normalization import RULES, Normalization, estimate
from interp_jax.methods.sae.parameters import geometric_median, unit_rows
from interp_jax.methods.sae.top_k import densify

D, N, B = 6, 10, 16
EXAMPLES = (
    ReLU(),
    ReLU(is_tied=True),
    ReLU(is_centred=False),
    ReLU(is_norm_weighted=True),
    Gated(),
    TopK(k=3),
    TopK(k=3, is_centred=False),
    BatchTopK(k=2),
    JumpReLU(threshold=0.3, bandwidth=0.2),
    JumpReLU(threshold=0.3, penalty="tanh", is_centred=True),
    JumpReLU(threshold=0.3, penalty="target_l0", target_l0=3.0),
    Matryoshka(k=2, groups=(2, 3, 5)),
    MatchingPursuit(k=3),
)
every_variant = pytest.mark.parametrize("variant", EXAMPLES, ids=str)


def random_params(variant, rng, d_out=None):
    params = variant.init(jax.random.key(int(rng.integers(2**31))), d_in=D, n_latents=N, d_out=d_out)
    noise = {
        name: value + 0.1 * jnp.asarray(rng.normal(size=value.shape), jnp.float32) for name, value in params.items()
    }
    if "threshold" in noise:
        noise["threshold"] = jnp.asarray(0.4, jnp.float32)
    return noise | {"W_dec": unit_rows(noise["W_dec"])}


def rows(rng, d=D):
    return jnp.asarray(rng.normal(size=(B, d)), jnp.float32)


def dense(latents):
    return densify(latents, N) if isinstance(latents, SparseLatents) else latents


def test_the_examples_cover_every_variant() -> None:
    assert {type(variant) for variant in EXAMPLES} == set(VARIANTS)


@every_variant
def test_contract(variant, rng) -> None:
    params, x = random_params(variant, rng), rows(rng)
    sae = SAE(variant, params)
    latents = sae.encode(x)
    assert latents.shape == (B, N) and latents.dtype == jnp.float32
    assert (latents >= 0).all() and (latents > 0).any()
    np.testing.assert_allclose(sae.decode(latents, x), latents @ params["W_dec"] + params["b_dec"][None], atol=1e-5)
    # Leading axes are batches, rows do not see each other, and half precision goes in and out.
    np.testing.assert_allclose(sae.encode(x.reshape(4, 4, D)), latents.reshape(4, 4, N), atol=1e-5)
    np.testing.assert_allclose(sae.encode(x[3]), latents[3], atol=1e-5)
    half = sae(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and half.shape == x.shape
    # The same under jit, as an argument.
    np.testing.assert_allclose(jax.jit(lambda sae, x: sae(x))(sae, x), sae(x), atol=1e-5)
    assert hash(variant) == hash(copy.copy(variant))


@every_variant
def test_a_training_pass_is_made_of_its_parts(variant, rng) -> None:
    params, x = random_params(variant, rng), rows(rng)
    done = variant.train_pass(params, x, x)
    latents = dense(done.latents)
    np.testing.assert_allclose(done.reconstruction, latents @ params["W_dec"] + params["b_dec"][None], atol=1e-5)
    assert done.penalty.shape == done.auxiliary.shape == () and jnp.isfinite(done.penalty + done.auxiliary)
    assert done.pre_activations.shape == (B, N)
    np.testing.assert_array_equal(fired(done.latents, N), (np.asarray(latents) > 0).sum(axis=0))
    if not isinstance(variant, BatchTopK | Matryoshka):  # These use the whole batch in training.
        np.testing.assert_allclose(latents, SAE(variant, params).encode(x), atol=1e-5)


@every_variant
def test_what_is_no_number_is_not_hidden(variant, rng) -> None:
    if isinstance(variant, TopK | MatchingPursuit):
        return_values = variant.train_pass(random_params(variant, rng), rows(rng).at[0, 0].set(jnp.nan), rows(rng))
        assert not np.isfinite(np.asarray(return_values.reconstruction[0])).all()
        return
    params, x = random_params(variant, rng), rows(rng).at[0, 0].set(jnp.nan)
    latents = np.asarray(SAE(variant, params).encode(x))
    assert np.isnan(latents[0]).all() and np.isfinite(latents[1:]).all()


@every_variant
def test_gradients_are_those_of_finite_differences(variant, rng) -> None:
    # Of the reconstruction's error, along random directions that change no choice of latents.
    if isinstance(variant, JumpReLU | Gated):
        # Thresholds and gates have estimated gradients, tested below.
        names = ("W_enc", "W_dec", "b_dec") + (("r_mag", "b_mag") if isinstance(variant, Gated) else ())
    else:
        names = tuple(name for name in random_params(variant, rng) if name != "threshold")
    params, x = random_params(variant, rng), rows(rng)
    if isinstance(variant, JumpReLU | Gated | BatchTopK | Matryoshka | TopK | MatchingPursuit):
        x = x[:4]

    @jax.jit
    def error(params):
        done = variant.train_pass(params, x, x)
        return jnp.square(x - done.reconstruction).sum(), dense(done.latents) > 0

    (_, chosen), gradient = jax.jit(jax.value_and_grad(error, has_aux=True))(params)
    n_tested = 0
    for name in names:
        for _ in range(3):
            direction = jnp.asarray(rng.normal(size=params[name].shape), jnp.float32)
            size = 1e-3 / float(jnp.linalg.norm(direction))
            there, back = (params | {name: params[name] + sign * size * direction} for sign in (1, -1))
            (up, chosen_there), (down, chosen_back) = error(there), error(back)
            if (chosen_there != chosen_back).any() or (chosen_there != chosen).any():
                continue
            n_tested += 1
            by_difference = (np.float64(up) - np.float64(down)) / (2 * size)
            scale = float(jnp.linalg.norm(gradient[name]) * jnp.linalg.norm(direction)) + float(up)
            assert abs(float((gradient[name] * direction).sum()) - by_difference) < 0.01 * scale
    assert n_tested > 0


def test_relu_is_its_formula(rng) -> None:
    params, x = random_params(ReLU(), rng), rows(rng)
    W_enc, b_enc, b_dec = (np.asarray(params[name], np.float64) for name in ("W_enc", "b_enc", "b_dec"))
    latents = np.maximum((np.asarray(x, np.float64) - b_dec) @ W_enc + b_enc, 0)
    np.testing.assert_allclose(ReLU().encode(params, x), latents, atol=1e-5)
    done = ReLU().train_pass(params, x, x)
    np.testing.assert_allclose(done.penalty, latents.sum(axis=1).mean(), rtol=1e-5)
    params["W_dec"] = params["W_dec"] * 3
    weighted = ReLU(is_norm_weighted=True).train_pass(params, x, x)
    np.testing.assert_allclose(weighted.penalty, 3 * latents.sum(axis=1).mean(), rtol=1e-5)


def test_the_pre_encoder_bias_is_a_reparameterisation(rng) -> None:
    params, x = random_params(ReLU(), rng), rows(rng)
    moved = params | {"b_enc": params["b_enc"] - (params["b_dec"][None] @ params["W_enc"])[0]}
    np.testing.assert_allclose(ReLU().encode(params, x), ReLU(is_centred=False).encode(moved, x), atol=1e-5)


def test_tied_weights_are_one_array(rng) -> None:
    params = random_params(ReLU(is_tied=True), rng)
    assert "W_enc" not in params
    np.testing.assert_array_equal(SAE(ReLU(is_tied=True), params).W_enc, params["W_dec"].T)


def test_a_gated_sae_with_shared_directions_is_a_jump_relu(rng) -> None:
    params, x = random_params(Gated(), rng), rows(rng)
    params["b_gate"] = -jnp.abs(params["b_gate"])
    params["b_mag"] = jnp.abs(params["b_mag"])  # So that the thresholds below are above 0.
    threshold = params["b_mag"] - jnp.exp(params["r_mag"]) * params["b_gate"]
    u = (x - params["b_dec"][None]) @ params["W_enc"]
    pre = jnp.exp(params["r_mag"])[None] * u + params["b_mag"][None]
    np.testing.assert_allclose(
        Gated().encode(params, x), jnp.where(pre > threshold[None], pre, 0.0), rtol=1e-5, atol=1e-5
    )


def test_the_gate_learns_from_penalty_and_auxiliary_only(rng) -> None:
    params, x = random_params(Gated(), rng), rows(rng)

    def part(params, name):
        done = Gated().train_pass(params, x, x)
        return jnp.square(x - done.reconstruction).sum() if name == "error" else getattr(done, name)

    assert (jax.grad(part)(params, "error")["b_gate"] == 0).all()
    for name in ("penalty", "auxiliary"):
        assert (jax.grad(part)(params, name)["b_gate"] != 0).any()
    of_auxiliary = jax.grad(part)(params, "auxiliary")
    for name in ("W_dec", "r_mag", "b_mag"):
        assert (of_auxiliary[name] == 0).all(), name


def test_a_gated_saes_gradients_are_those_of_its_formula(rng) -> None:
    params, x = random_params(Gated(), rng), rows(rng)

    def by_hand(params):
        linear = (x - params["b_dec"][None]) @ params["W_enc"]
        gate = linear + params["b_gate"][None]
        magnitude = jax.nn.relu(jnp.exp(params["r_mag"])[None] * linear + params["b_mag"][None])
        latents = jax.lax.stop_gradient((gate > 0).astype(x.dtype)) * magnitude
        frozen = jax.lax.stop_gradient(params)
        error = jnp.square(x - latents @ params["W_dec"] - params["b_dec"][None]).sum(axis=-1).mean()
        by_gate = jnp.square(x - jax.nn.relu(gate) @ frozen["W_dec"] - frozen["b_dec"][None]).sum(axis=-1).mean()
        return error + 0.3 * jax.nn.relu(gate).sum(axis=-1).mean() + by_gate

    def ours(params):
        done = Gated().train_pass(params, x, x)
        error = jnp.square(x - done.reconstruction).sum(axis=-1).mean()
        return error + 0.3 * done.penalty + done.auxiliary

    (expected, to_expected), (found, to_found) = (jax.value_and_grad(fn)(params) for fn in (by_hand, ours))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, gradient in to_expected.items():
        size = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(to_found[name], gradient, rtol=1e-4, atol=1e-5 * size, err_msg=name)


def test_top_k_keeps_the_largest(rng) -> None:
    params, x = random_params(TopK(k=3), rng), rows(rng)
    pre = np.asarray((x - params["b_dec"][None]) @ params["W_enc"] + params["b_enc"][None])
    kept = pre >= np.sort(pre, axis=1)[:, -3:-2]
    np.testing.assert_allclose(TopK(k=3).encode(params, x), np.where(kept, np.maximum(pre, 0), 0), atol=1e-5)
    assert ((np.asarray(TopK(k=N).encode(params, x)) > 0).sum(axis=1) < N).any()  # Those below 0 are not active.
    np.testing.assert_allclose(TopK(k=N).encode(params, x), ReLU().encode(params, x), atol=1e-5)


@pytest.mark.parametrize("n_batch", [1, 7, 200])
def test_sparse_gradients_are_the_dense_ones(rng, n_batch) -> None:
    params = random_params(TopK(k=3), rng)
    x = jnp.asarray(rng.normal(size=(n_batch, D)), jnp.float32)

    def by_index(params, x):
        return jnp.square(x - TopK(k=3).train_pass(params, x, x).reconstruction).sum()

    def by_mask(params, x):
        pre = (x - params["b_dec"][None]) @ params["W_enc"] + params["b_enc"][None]
        smallest = jax.lax.stop_gradient(jnp.sort(pre, axis=1)[:, -3:-2])
        latents = jnp.where(pre >= smallest, jax.nn.relu(pre), 0.0)
        return jnp.square(x - latents @ params["W_dec"] - params["b_dec"][None]).sum()

    ours, theirs = (jax.jit(jax.grad(fn, argnums=(0, 1)))(params, x) for fn in (by_index, by_mask))
    for name in params:
        size = float(jnp.abs(theirs[0][name]).max())
        np.testing.assert_allclose(ours[0][name], theirs[0][name], rtol=1e-3, atol=1e-5 * max(size, 1), err_msg=name)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3, atol=1e-4)


def test_batch_top_k_keeps_the_largest_of_the_batch(rng) -> None:
    variant, x = BatchTopK(k=2), rows(rng)
    params = random_params(variant, rng)
    latents = np.asarray(variant.train_pass(params, x, x).latents)
    by_relu = np.asarray(ReLU().encode(params, x))
    assert (latents > 0).sum() == min(2 * B, (by_relu > 0).sum())
    assert latents[latents > 0].min() >= by_relu[latents == 0].max()
    np.testing.assert_array_equal(latents[latents > 0], by_relu[latents > 0])


def test_batch_top_k_where_one_row_takes_all() -> None:
    # A row with more latents than a multiple of the mean: looking at each row's largest is not enough.
    pre = jnp.concatenate([jnp.arange(100.0)[None] + 1000, jnp.arange(100.0)[None] / 1000 + 1e-3])
    latents = batch_top_k(pre, 5)
    assert (latents[0] > 0).sum() == 10 and not latents[1].any()
    assert set(np.flatnonzero(latents[0])) == set(range(90, 100))


def test_the_threshold_is_the_mean_of_the_smallest_kept(rng) -> None:
    variant = BatchTopK(k=2)
    params = random_params(variant, rng) | {"threshold": jnp.zeros(())}
    smallest = []
    for step in range(5):
        done = variant.train_pass(params, x := rows(rng), x)
        latents = np.asarray(done.latents)
        smallest.append(latents[latents > 0].min())
        params = variant.observed(params, done.latents, jnp.asarray(step))
    weights = 0.999 ** np.arange(4, -1, -1)
    np.testing.assert_allclose(params["threshold"], np.average(smallest, weights=weights), rtol=1e-5)
    x = rows(rng)
    jump, jump_params = as_jump_relu(variant, params)
    np.testing.assert_allclose(jump.encode(jump_params, x), variant.encode(params, x), atol=1e-6)


def test_matryoshka_reconstructs_with_every_prefix(rng) -> None:
    variant, x = Matryoshka(k=2, groups=(2, 3, 5)), rows(rng)
    params = random_params(variant, rng)
    done = variant.train_pass(params, x, x)
    errors = []
    for size in (2, 5, 10):
        prefix = np.asarray(done.latents)[:, :size] @ np.asarray(params["W_dec"])[:size] + np.asarray(params["b_dec"])
        errors.append(np.square(np.asarray(x) - prefix).sum(axis=1).mean())
    np.testing.assert_allclose(done.auxiliary + errors[-1], np.mean(errors), rtol=1e-4)


def test_jump_relu_at_its_limits(rng) -> None:
    variant, x = JumpReLU(is_centred=True), rows(rng)
    params = random_params(variant, rng)
    low = params | {"log_threshold": jnp.full(N, -60.0)}
    np.testing.assert_allclose(variant.encode(low, x), ReLU().encode(params, x), atol=1e-6)
    high = params | {"log_threshold": jnp.full(N, 1e9)}
    done = variant.train_pass(high, x, x)
    assert not np.asarray(done.latents).any() and jnp.isfinite(jnp.square(x - done.reconstruction).sum() + done.penalty)
    gradient = jax.grad(lambda p: variant.train_pass(p, x, x).penalty)(high)
    assert (gradient["log_threshold"] == 0).all()


def test_the_kernel_estimates_the_gradient_of_the_expected_step() -> None:
    # E 1[z > t] falls by the density at t: for a million draws within four standard errors of the kernel's mean.
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1_000_000, 1)), jnp.float32)
    slope = float(jax.grad(lambda t: mean_l0(z, t, 0.05))(jnp.array([0.7]))[0])
    density = math.exp(-0.5 * 0.7**2) / math.sqrt(2 * math.pi)
    assert slope == pytest.approx(-density, abs=4 * math.sqrt(density / 0.05 / 1e6))


def test_jump_relu_gradients_by_hand() -> None:
    # threshold 1, bandwidth 1: pre-activations 0.8 and 1.2 lie in the kernel, 2.0 does not.
    pre, threshold = jnp.array([[0.8], [1.2], [2.0]]), jnp.array([1.0])
    to_pre, to_threshold = jax.grad(lambda p, t: jump_relu(p, t, 1.0).sum(), argnums=(0, 1))(pre, threshold)
    assert to_pre[:, 0].tolist() == [0.0, 1.0, 1.0] and to_threshold.tolist() == [-2.0]
    to_pre, to_threshold = jax.grad(lambda p, t: 3 * mean_l0(p, t, 1.0), argnums=(0, 1))(pre, threshold)
    assert to_pre[:, 0].tolist() == [0.0, 0.0, 0.0] and to_threshold.tolist() == [-2.0]


@pytest.mark.parametrize(("l0_now", "sign"), [(1, -1), (3, 1)])
def test_the_target_penalty_pulls_from_either_side(l0_now, sign) -> None:
    # Raising the thresholds lowers L0: below the target that must cost, above it must pay.
    variant = JumpReLU(threshold=1.0, bandwidth=4.0, penalty="target_l0", target_l0=2.0)
    pre = np.full(4, -5.0, np.float32)
    pre[:l0_now] = 1.5
    params = {"W_enc": jnp.eye(4), "W_dec": jnp.eye(4), "b_dec": jnp.zeros(4), "b_enc": jnp.zeros(4)}
    params["log_threshold"] = jnp.zeros(4)
    x = jnp.asarray(pre)[None]
    slope = jax.jit(jax.grad(lambda p: variant.train_pass(p, x, x).penalty))(params)
    assert np.sign(float(slope["log_threshold"].sum())) == -sign


def test_matching_pursuit_by_hand() -> None:
    params = {"W_dec": jnp.array([[1.0, 0.0], [0.6, 0.8]]), "b_dec": jnp.zeros(2)}
    x, norms = jnp.ones((1, 2)), []
    for k, expected in ((1, [0, 1.4]), (2, [0.16, 1.4]), (3, [0.16, 1.304]), (4, [0.2176, 1.304])):
        latents = MatchingPursuit(k=k, is_nonneg=False).encode(params, x)
        np.testing.assert_allclose(latents[0], expected, atol=1e-6)
        norms.append(float(jnp.linalg.norm(x - latents @ params["W_dec"])))
    np.testing.assert_allclose(norms, [0.2, 0.12, 0.072, 0.0432], atol=1e-6)


def test_matching_pursuit_never_makes_it_worse(rng) -> None:
    params, x = random_params(MatchingPursuit(k=1), rng), rows(rng)
    params["b_dec"] = jnp.zeros(D)
    errors = [np.linalg.norm(np.asarray(x - SAE(MatchingPursuit(k=k), params)(x)), axis=-1) for k in (1, 2, 3, 6)]
    assert (np.diff(errors, axis=0) <= 1e-5).all()
    stopped = SAE(MatchingPursuit(k=8, tolerance=1e9), params).encode(x)
    assert not stopped.any()
    with_nothing_positive = {"W_dec": -unit_rows(jnp.abs(params["W_dec"])), "b_dec": jnp.zeros(D)}
    assert not MatchingPursuit(k=3).encode(with_nothing_positive, jnp.abs(x)).any()


@every_variant
@pytest.mark.parametrize("rule", ["sqrt_d", "unit_ms"])
def test_folding_the_scale_changes_units_only(variant, rule, rng) -> None:
    x = 5 * rows(rng) + 1
    sae = SAE(variant, random_params(variant, rng), estimate(rule, x))
    folded = sae.fold_scale()
    assert folded.input_scaling.rule == "none"
    np.testing.assert_allclose(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded.encode(x), sae.encode(x) / sae.input_scaling.scale, rtol=1e-4, atol=1e-4)
    again = folded.fold_scale()
    for name, value in folded.params.items():
        np.testing.assert_array_equal(value, again.params[name])


@every_variant
def test_folding_the_norms_changes_units_only(variant, rng) -> None:
    params, x = random_params(variant, rng), rows(rng)
    if isinstance(variant, BatchTopK | Matryoshka):
        variant, params = as_jump_relu(variant, params)  # One threshold for all has no latent's units.
    if "W_enc" not in params:
        with pytest.raises(InvalidInputError, match="tied"):
            SAE(variant, params).fold_norms()
        return
    norms = jnp.asarray(rng.uniform(0.5, 2, size=N), jnp.float32)
    params["W_dec"] = params["W_dec"] * norms[:, None]
    sae = SAE(variant, params)
    folded = sae.fold_norms()
    np.testing.assert_allclose(jnp.linalg.norm(folded.W_dec, axis=-1), 1.0, rtol=1e-5)
    if not isinstance(variant, TopK):  # Which of a row's latents are largest depends on their units.
        np.testing.assert_allclose(folded(x), sae(x), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(folded.encode(x), sae.encode(x) * norms[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_normalization_and_back(rule, rng) -> None:
    x = 3 * rows(rng) + 2
    normalization = estimate(rule, x)
    scaled, restore = normalization(x)
    np.testing.assert_allclose(restore(scaled), x, rtol=1e-4, atol=1e-4)
    norms = np.linalg.norm(np.asarray(scaled), axis=-1)
    expected = {
        "none": np.linalg.norm(np.asarray(x), axis=-1).mean(),
        "sqrt_d": math.sqrt(D),
        "constant_norm": math.sqrt(D),
        "layer": math.sqrt(D - 1),
    }
    if rule == "unit_ms":
        assert np.square(norms).mean() == pytest.approx(1, rel=1e-5)
    else:
        assert norms.mean() == pytest.approx(expected[rule], rel=1e-4)


@pytest.mark.parametrize("has_skip", [False, True])
def test_a_transcoder_writes_another_width(rng, has_skip) -> None:
    variant, d_out = ReLU(is_centred=False), 4
    params = variant.init(jax.random.key(0), d_in=D, n_latents=N, d_out=d_out, has_skip=has_skip)
    if has_skip:
        params["W_skip"] = jnp.asarray(rng.normal(size=(D, d_out)), jnp.float32)
    params["b_dec"], x = jnp.asarray(rng.normal(size=d_out), jnp.float32), rows(rng)
    sae = SAE(variant, params, Normalization("unit_ms", 0.5), Normalization("unit_ms", 3.0))
    latents = np.maximum(0.5 * np.asarray(x) @ np.asarray(params["W_enc"]), 0)
    expected = latents @ np.asarray(params["W_dec"]) + np.asarray(params["b_dec"])
    if has_skip:
        expected += 0.5 * np.asarray(x) @ np.asarray(params["W_skip"])
        with pytest.raises(InvalidInputError, match="skip"):
            sae.decode(sae.encode(x))
    np.testing.assert_allclose(sae(x), expected / 3, rtol=1e-4, atol=1e-5)
    assert sae.is_transcoder
    folded = sae.fold_scale()
    np.testing.assert_allclose(folded(x), expected / 3, rtol=1e-4, atol=1e-5)


def test_heads_go_in_side_by_side(rng) -> None:
    sae, x = SAE(ReLU(), random_params(ReLU(), rng)), rows(rng)
    heads = x.reshape(4, 4, 2, D // 2)
    np.testing.assert_array_equal(sae.encode(heads), sae.encode(x.reshape(4, 4, D)))
    np.testing.assert_array_equal(sae(heads), sae(x.reshape(4, 4, D)).reshape(4, 4, 2, D // 2))


def test_a_tolerance_is_folded_too(rng) -> None:
    x = 5 * rows(rng)
    variant = MatchingPursuit(k=6, tolerance=0.5)
    sae = SAE(variant, random_params(variant, rng), Normalization("unit_ms", 0.1))
    assert (sae.encode(x) != SAE(MatchingPursuit(k=6), sae.params, sae.input_scaling).encode(x)).any()
    np.testing.assert_allclose(sae.fold_scale()(x), sae(x), rtol=1e-4, atol=1e-4)


def test_the_geometric_median(rng) -> None:
    points = rng.normal(size=(50, 3))
    median = geometric_median(points)
    at = np.linalg.norm(points - median, axis=1).sum()
    for _ in range(20):
        moved = median + 1e-2 * rng.normal(size=3)
        assert np.linalg.norm(points - moved, axis=1).sum() >= at - 1e-6
    # On a point that is the median, and on equal points, nothing is divided by 0.
    np.testing.assert_allclose(geometric_median([[-1.0, 0], [0, 0], [1, 0]]), [0, 0], atol=1e-5)
    np.testing.assert_allclose(geometric_median(np.ones((4, 2))), [1, 1])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: TopK(k=11).check(10), InvalidInputError, "k = 11"),
        (lambda: BatchTopK(k=0).check(10), InvalidInputError, "from 1 to 10"),
        (lambda: Matryoshka(k=2, groups=(3, 3)).check(10), InvalidInputError, "add up to 6"),
        (lambda: JumpReLU(penalty="l1"), UnknownNameError, "Did you mean 'l0'"),
        (lambda: JumpReLU(bandwidth=0.0), InvalidInputError, "bandwidth = 0.0"),
        (lambda: ReLU().init(jax.random.key(0), d_in=0, n_latents=4), InvalidInputError, "d_in = 0"),
        (lambda: ReLU().init(jax.random.key(0), d_in=3, n_latents=4, d_out=2), InvalidInputError, "is_centred=False"),
        (
            lambda: MatchingPursuit(k=1).init(jax.random.key(0), d_in=3, n_latents=4, d_out=2),
            InvalidInputError,
            "d_out",
        ),
        (lambda: estimate("unit", np.ones((2, 2))), UnknownNameError, "unit_ms"),
        (lambda: estimate("unit_ms", np.zeros((2, 2))), InvalidInputError, "all zero"),
        (lambda: estimate("unit_ms", np.zeros((0, 2))), InvalidInputError, "No activations"),
    ],
    ids=[
        "top_k",
        "batch_top_k",
        "matryoshka",
        "penalty",
        "bandwidth",
        "d_in",
        "centred",
        "pursuit",
        "rule",
        "zeros",
        "empty",
    ],
)
def test_bad_input(make, error, words) -> None:
    with pytest.raises(error) as info:
        make()
    assert words in str(info.value) and "Fix:" in str(info.value)


def test_bad_activations(rng) -> None:
    sae = SAE(ReLU(), random_params(ReLU(), rng), estimate("layer", rows(rng)))
    for x, words in ((jnp.ones((2, D + 1)), f"[..., {D}]"), (jnp.ones((2, D), jnp.int32), "int32")):
        with pytest.raises(ShapeError) as info:
            sae(x)
        assert words in str(info.value)
    with pytest.raises(InvalidInputError, match="'layer' scales each token"):
        sae.decode(jnp.ones((2, N)))
    with pytest.raises(InvalidInputError, match="one scale for all tokens"):
        sae.fold_scale()
    with pytest.raises(ShapeError, match=f"{N}"):
        sae.decode(jnp.ones((2, N + 1)), jnp.ones((2, D)))


def test_an_sae_put_together_by_hand(rng) -> None:
    params, x = random_params(TopK(k=2), rng), jnp.ones((2, D))
    for sae, words in (
        (SAE(TopK(k=2), {}), "An SAE without W_dec was given"),
        (SAE(TopK(k=2), {n: v for n, v in params.items() if n != "b_enc"}), "An SAE without b_enc was given"),
        (SAE(TopK(k=2), {n: v for n, v in params.items() if n != "b_dec"}), "An SAE without b_dec was given"),
        (SAE(TopK(k=N + 1), params), f"k = {N + 1} was given in TopK, with {N} latents"),
        (SAE(TopK(k=2), params, input_scaling="unit_ms"), "input_scaling = 'unit_ms' was given"),  # type: ignore[arg-type]
        (SAE(TopK(k=2), params, output_scaling=2.0), "output_scaling = 2.0 was given"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInputError) as info:
            sae(x)
        text = str(info.value)
        assert words in text and "Expected:" in text and "Fix:" in text
