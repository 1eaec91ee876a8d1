"""Training SAEs: each part of a step by hand, planted dictionaries recovered, runs taken up to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, LoadError, UnknownNameError
from interp_jax.forward.batch_streams import ArrayStream
from interp_jax.methods.sae import (
    AuxK,
    BatchTopK,
    Gated,
    GhostGrads,
    JumpReLU,
    MatchingPursuit,
    Redraw,
    ReLU,
    Resample,
    StepRule,
    TopK,
    TrainConfig,
    train,
    train_step,
)
from interp_jax.methods.sae.checkpoints import Checkpoints
from interp_jax.methods.sae.decoder_norm import constrained, tangent
from interp_jax.methods.sae.parameters import unit_rows
from interp_jax.methods.sae.resampling import draw, redrawn, resampled
from interp_jax.methods.sae.train_step import init_state, step, steps
from interp_jax.methods.sae.training import _Run

D, N, B = 6, 10, 16


def rows(rng, n=B, d=D):
    return jnp.asarray(rng.normal(size=(n, d)), jnp.float32)


def state_of(rule, rng, n_latents=N):
    key = jax.random.key(int(rng.integers(2**31)))
    return init_state(rule, rule.architecture.init(key, d_in=D, n_latents=n_latents))


def copied(tree):
    """A step takes its state's memory over."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


# --- one step ---


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_step_is_adam(rng, beta1) -> None:
    # Two steps of a free decoder against Adam written out in NumPy.
    rule = StepRule(ReLU(is_norm_weighted=True), learning_rate=0.01, beta1=beta1, decoder_norm="free")
    state, x = state_of(rule, rng), rows(rng)
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    if beta1 == 0:  # No memory for a momentum that is none.
        n_moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
        assert n_moments == sum(value.size for value in params.values())

    def loss(params):
        done = rule.architecture.train_pass(params, x, x)
        return jnp.square(x - done.reconstruction).sum(axis=-1).mean() + 0.1 * done.penalty

    mean, square = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for t in (1, 2):
        gradient = jax.grad(loss)({name: jnp.asarray(value, jnp.float32) for name, value in params.items()})
        for name, g in gradient.items():
            g = np.asarray(g, np.float64)
            mean[name] = beta1 * mean[name] + (1 - beta1) * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            scaled = mean[name] / (1 - beta1**t) / (np.sqrt(square[name] / (1 - 0.999**t)) + 1e-8)
            # Where the gradient is rounding alone its sign is none's.
            params[name] = params[name] - 0.01 * np.where(np.abs(g) > 1e-6, scaled, 0.0)
        state, _ = step(rule, state, x, None, jnp.asarray(0.1))
    for name, value in params.items():
        is_clear = np.sqrt(square[name]) > 1e-5
        np.testing.assert_allclose(np.asarray(state.params[name])[is_clear], value[is_clear], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("constraint", ["unit", "at_most_one"])
def test_the_decoder_keeps_its_norms(rng, constraint) -> None:
    rule = StepRule(ReLU(), learning_rate=0.1, decoder_norm=constraint)
    state = state_of(rule, rng)
    for _ in range(5):
        state, _ = step(rule, state, rows(rng), None, jnp.asarray(0.01))
        norms = np.linalg.norm(np.asarray(state.params["W_dec"]), axis=1)
        assert (norms <= 1 + 1e-6).all()
        assert constraint == "at_most_one" or np.abs(norms - 1).max() < 1e-6


def test_the_gradient_along_the_sphere(rng) -> None:
    rows_, gradient = unit_rows(rows(rng)), rows(rng)
    np.testing.assert_allclose((tangent(gradient, rows_, "unit") * rows_).sum(axis=1), 0, atol=1e-6)
    outward = (gradient * rows_).sum(axis=1) < 0
    free = tangent(gradient, rows_, "at_most_one")
    np.testing.assert_array_equal(free[~outward], gradient[~outward])
    np.testing.assert_allclose((free * rows_).sum(axis=1)[outward], 0, atol=1e-6)
    np.testing.assert_array_equal(tangent(gradient, 0.5 * rows_, "at_most_one"), gradient)
    assert not constrained(jnp.zeros((1, D)), "unit").any()


def test_the_constraint_blocks_the_escape_from_l1(rng) -> None:
    # With free rows W * c and f / c pay less and less; with unit rows they cannot.
    x, norms = rows(rng, n=64), {}
    for constraint in ("free", "unit"):
        rule = StepRule(ReLU(), learning_rate=0.05, decoder_norm=constraint)
        state = state_of(rule, np.random.default_rng(0))
        for _ in range(60):
            state, _ = step(rule, state, x, None, jnp.asarray(1.0))
        norms[constraint] = float(jnp.linalg.norm(state.params["W_dec"], axis=1).max())
    assert norms["free"] > 1.5 and norms["unit"] == pytest.approx(1, abs=1e-6)


def test_a_step_with_values_that_are_not_finite_changes_nothing(rng) -> None:
    rule = StepRule(BatchTopK(k=2), dead_term=AuxK(), dead_after_tokens=0)
    state, x = state_of(rule, rng), rows(rng)
    before = copied(state)
    state, info = step(rule, state, x.at[2, 3].set(jnp.nan).at[5, 1].set(jnp.inf), None, jnp.asarray(0.0))
    assert not info.is_finite and int(info.n_bad) == 2
    assert int(state.n_steps) == 1 and int(state.n_refused) == 1
    kept = state._replace(n_steps=before.n_steps, n_refused=before.n_refused)
    for new, old in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(new, old)
    state, info = step(rule, state, x, None, jnp.asarray(0.0))
    assert info.is_finite and (state.params["W_enc"] != before.params["W_enc"]).any()


def test_schedules_ramp_up_and_down() -> None:
    # Under a constant gradient Adam's steps have the size of the learning rate.
    rule = StepRule(ReLU(), learning_rate=1.0, n_warm_up_steps=4, n_decay_steps=5, n_steps=20)
    optimizer, weight, sizes = rule.optimizer(), {"w": jnp.zeros(1)}, []
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(weight)
        for _ in range(20):
            update, state = optimizer.update({"w": jnp.ones(1)}, state, weight)
            sizes.append(-float(update["w"][0]))  # type: ignore[index]
    expected = [0.2, 0.4, 0.6, 0.8, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4)


def test_several_saes_take_the_steps_each_would_alone(rng) -> None:
    rule, x = StepRule(TopK(k=3), dead_term=AuxK(k=2), dead_after_tokens=0), rows(rng)
    states = [state_of(rule, rng) for _ in range(3)]
    coefficients = jnp.asarray([0.0, 0.5, 1.0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together, infos = steps(rule, stacked, x, None, coefficients)
    for index, state in enumerate(states):
        alone, info = step(rule, state, x, None, coefficients[index])
        np.testing.assert_allclose(infos.loss[index], info.loss, rtol=1e-5)
        for name, value in alone.params.items():
            np.testing.assert_allclose(together.params[name][index], value, atol=1e-5)


def test_a_variant_with_half_precision_products_keeps_its_state_in_float32(rng) -> None:
    x = rows(rng)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        rule = StepRule(ReLU(), dtype=dtype)
        state, info = step(rule, state_of(rule, np.random.default_rng(1)), x, None, jnp.asarray(0.1))
        assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))
        losses[dtype] = float(info.loss)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


# --- dead latents ---


def ghost(kind, pre, W_dec, residual, dead, **options):
    return GhostGrads(kind, **options)(pre, W_dec, residual, dead, dead.mean(), jnp.float32)


@pytest.mark.parametrize(("degrees", "expected"), [(50, -0.57115), (60, 0.0), (70, 0.63192)])
def test_ghosts_turn_towards_the_residual(degrees, expected) -> None:
    angle = jnp.radians(jnp.asarray(float(degrees)))
    W_dec, e = jnp.stack([jnp.cos(angle), jnp.sin(angle)])[None], jnp.array([[2.0, 0.0]])
    slope = jax.grad(lambda pre: ghost("dead_only_rescaled", pre, W_dec, e, jnp.array([True])))(jnp.zeros((1, 1)))
    assert float(slope[0, 0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_equal_ghosts_share(m) -> None:
    # In the units of the original term's parts: each of m gets 1/m of what one would.
    W_dec, e, dead = jnp.tile(jnp.array([[1.0, 0.0]]), (m, 1)), jnp.array([[2.0, 0.0]]), jnp.ones(m, bool)
    slope = jax.grad(lambda pre: ghost("dead_only_rescaled", pre, W_dec, e, dead))(jnp.zeros((1, m)))
    np.testing.assert_allclose(slope[0], -2.0 / m, rtol=1e-5)


def test_the_kinds_of_ghosts(rng) -> None:
    pre, W_dec, e = rows(rng, d=N), unit_rows(rows(rng, n=N)), rows(rng)
    dead = jnp.arange(N) < 3
    values = {kind: float(ghost(kind, pre, W_dec, e, dead)) for kind in ("original", "rescaled", "dead_only_rescaled")}
    error = float(jnp.square(e).sum(axis=1).mean())
    assert values["original"] == pytest.approx(error, rel=1e-4)
    assert values["rescaled"] == pytest.approx(0.3 * error, rel=1e-4)
    written = np.exp(np.asarray(pre)[:, :3]) @ np.asarray(W_dec)[:3]
    scale = np.linalg.norm(np.asarray(e), axis=1) / 2 / np.linalg.norm(written, axis=1)
    by_hand = np.square(scale[:, None] * written - np.asarray(e)).sum(axis=1).mean()
    assert values["dead_only_rescaled"] == pytest.approx(0.3 * by_hand, rel=1e-4)
    # A factor common to a row cancels: nothing overflows, nothing vanishes.
    for shift in (-300.0, 300.0):
        assert float(ghost("original", pre + shift, W_dec, e, dead)) == pytest.approx(values["original"], rel=1e-4)
    capped = ghost("dead_only_rescaled", jnp.abs(pre), W_dec, e, dead, is_capped=True)
    flat = ghost("dead_only_rescaled", 0 * pre, W_dec, e, dead)
    assert float(capped) == pytest.approx(float(flat), rel=1e-5)
    for kind in values:
        assert ghost(kind, pre, W_dec, e, jnp.zeros(N, bool)) == 0
        assert ghost(kind, pre, W_dec, 0 * e, dead) == 0


@pytest.mark.parametrize("term", [GhostGrads("original"), GhostGrads("rescaled"), AuxK(k=4)], ids=str)
@pytest.mark.parametrize("variant", [ReLU(), Gated(), TopK(k=2), JumpReLU(threshold=0.1)], ids=str)
def test_a_dead_term_moves_the_dead_only(rng, term, variant) -> None:
    params = variant.init(jax.random.key(int(rng.integers(2**31))), d_in=D, n_latents=N)
    x, dead = rows(rng), jnp.arange(N) % 3 == 0

    def of_term(params):
        done = variant.train_pass(params, x, x)
        e = x - done.reconstruction
        return term(done.pre_activations, params["W_dec"], e, dead, dead.mean(), jnp.float32)

    gradient = jax.grad(of_term)(params)
    assert not gradient["b_dec"].any()
    assert not gradient["W_dec"][~dead].any() and not gradient["W_enc"][:, ~dead].any()
    assert gradient["W_dec"][dead].any() and gradient["W_enc"][:, dead].any()
    assert all(jnp.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize("term", [GhostGrads("original"), GhostGrads("rescaled", is_capped=True), AuxK(k=2)], ids=str)
@pytest.mark.parametrize("variant", [ReLU(), ReLU(is_tied=True), Gated(), TopK(3), MatchingPursuit(2)], ids=str)
def test_a_few_dead_latents_have_the_gradients_of_all(rng, term, variant, monkeypatch) -> None:
    params = variant.init(jax.random.key(0), d_in=D, n_latents=N)
    x = jnp.asarray(rng.normal(size=(16, D)), jnp.float32)
    rule = StepRule(variant, dead_term=term)
    is_dead = jnp.arange(N) % 4 == 1  # Not more than a quarter, and the first is not among them.

    def of(*shares: float):
        monkeypatch.setattr(train_step, "SHARES_OF_FEW", shares)
        one = jnp.ones(())
        (_, (*_, loss)), gradients = train_step._with_gradients(rule, params, x, x, one, is_dead, one, one)
        return loss, gradients

    (few, by_few), (whole, by_whole) = of(0.1, 0.5), of()
    assert few == pytest.approx(float(whole), rel=1e-4) and few > 0
    for name, value in by_whole.items():
        np.testing.assert_allclose(by_few[name], value, atol=1e-4 * float(jnp.abs(value).max()), err_msg=name)


def test_aux_k_by_hand(rng) -> None:
    pre, W_dec, e = rows(rng, d=N), unit_rows(rows(rng, n=N)), rows(rng)
    dead, kept = jnp.arange(N) < 5, np.zeros((B, N))
    for row, values in enumerate(np.asarray(pre)[:, :5]):
        largest = np.argsort(-values)[:2]
        kept[row, largest] = np.maximum(values[largest], 0)
    error = np.square(np.asarray(e) - kept @ np.asarray(W_dec)).sum(axis=1).mean()
    variance = np.square(np.asarray(e) - np.asarray(e).mean(axis=0)).sum(axis=1).mean()
    value = AuxK(k=2)(pre, W_dec, e, dead, dead.mean(), jnp.float32)
    assert float(value) == pytest.approx(error / variance / 32, rel=1e-4)
    assert AuxK(k=2)(pre, W_dec, e, jnp.zeros(N, bool), jnp.zeros(()), jnp.float32) == 0
    # More asked for than dead: those there are.
    assert jnp.isfinite(AuxK(k=8)(pre, W_dec, e, dead, dead.mean(), jnp.float32))


def test_the_dead_are_counted_in_tokens(rng) -> None:
    rule = StepRule(ReLU(), learning_rate=0.0, dead_after_tokens=2 * B, dead_term=GhostGrads())
    state = state_of(rule, rng)
    state = state._replace(params=state.params | {"b_enc": jnp.where(jnp.arange(N) < 4, -1e3, 1e3)})
    seen = []
    for _ in range(4):
        state, info = step(rule, state, rows(rng), None, jnp.asarray(0.0))
        seen.append((int(info.n_dead), bool(info.dead_loss > 0)))
    assert seen == [(0, False), (0, False), (4, True), (4, True)]
    assert state.n_since_fired.tolist() == [4 * B] * 4 + [0] * 6
    assert state.n_fired.tolist() == [0] * 4 + [4 * B] * 6
    first = StepRule(ReLU(), dead_term=GhostGrads(n_first_steps=2))
    state, losses = state_of(first, rng), []
    for _ in range(3):
        state, info = step(first, state, rows(rng), None, jnp.asarray(0.0))
        losses.append(float(info.dead_loss))
    assert losses[0] > 0 and losses[1] > 0 and losses[2] == 0


# --- resampling ---


def test_inputs_are_drawn_by_squared_loss(rng) -> None:
    counts = np.bincount([draw(rng, [1.0, 3.0], 1)[0] for _ in range(4000)], minlength=2)
    assert abs(counts[1] / 4000 - 0.9) < 5 * np.sqrt(0.09 / 4000)
    assert sorted(draw(rng, [1.0, 2.0, 0.0, 5.0], 3)) == [0, 1, 3]
    assert len(draw(rng, [1.0, 2.0], 5)) == 5
    assert draw(rng, [0.0, 0.0], 1).size == 0


@pytest.mark.parametrize("variant", [ReLU(), ReLU(is_tied=True), Gated(), JumpReLU(threshold=0.1)], ids=str)
def test_resampling_renews_the_dead_and_leaves_the_rest(rng, variant) -> None:
    rule = StepRule(variant, beta1=0.9)
    state = state_of(rule, rng)
    for _ in range(3):
        state, _ = step(rule, state, rows(rng), None, jnp.asarray(0.1))
    dead = np.zeros(N, bool)
    dead[[1, 4]] = True
    x, before = rows(rng, n=2), copied(state)
    after = resampled(rule, state, dead, x, x)
    np.testing.assert_allclose(after.params["W_dec"][dead], unit_rows(x), rtol=1e-6)
    if "W_enc" in after.params:
        norms = np.linalg.norm(np.asarray(after.params["W_enc"]), axis=0)
        np.testing.assert_allclose(norms[dead], 0.2 * norms[~dead].mean(), rtol=1e-5)
        np.testing.assert_allclose(unit_rows(after.params["W_enc"].T)[dead], unit_rows(x), rtol=1e-5, atol=1e-6)
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if name in after.params:
            assert not after.params[name][dead].any()
    for name, value in after.params.items():
        axis = 1 if name == "W_enc" else 0
        if name != "b_dec":
            kept = np.compress(~dead, value, axis=axis)
            np.testing.assert_array_equal(kept, np.compress(~dead, before.params[name], axis=axis))
    moments = [leaf for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim == 2 and leaf.shape == (N, D)]
    assert moments and all(not moment[dead].any() and moment[~dead].any() for moment in moments)
    again = redrawn(rule, before, dead, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(again.params["W_dec"]), axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(again.params["W_dec"][~dead], before.params["W_dec"][~dead])


@pytest.mark.parametrize(
    "recipe",
    [Resample(at_steps=(6,), window_steps=5, n_inputs=64), Redraw(at_steps=(6,), frequency=0.01)],
    ids=["resample", "redraw"],
)
def test_resampling_in_a_run_brings_latents_back(rng, recipe) -> None:
    # Biases that no input overcomes hold half of the latents down until they are renewed.
    stream = ArrayStream(np.asarray(rows(rng, n=256)), batch_size=B, seed=0)
    rule = StepRule(ReLU(), n_steps=8, learning_rate=1e-9)
    run = _Run(TrainConfig(rule, N, ("x",), n_sample_batches=2, resampling=recipe), stream)
    run.start()
    is_dead = np.arange(N) % 2 == 0
    params = run._states[0].params
    run._states[0] = run._states[0]._replace(params=params | {"b_enc": jnp.where(is_dead, -1e3, 0.0)[None]})
    for _ in range(5):
        run.step()
    before = copied(run._states[0])
    assert not before.n_fired[0][is_dead].any() and before.n_fired[0][~is_dead].all()
    run.step()
    after = copied(run._states[0])
    assert not after.params["b_enc"][0][is_dead].any() and not after.n_fired.any() and not after.n_window_tokens.any()
    run.step()
    assert run._states[0].n_fired[0][is_dead].any()


# --- runs ---


def planted(rng, n=4096, d=16, n_atoms=24, n_active=2):
    atoms = np.asarray(unit_rows(jnp.asarray(rng.normal(size=(n_atoms, d)), jnp.float32)))
    active = np.argsort(rng.random((n, n_atoms)), axis=1)[:, :n_active]
    strengths = np.zeros((n, n_atoms), np.float32)
    np.put_along_axis(strengths, active, rng.uniform(0.5, 1.5, size=active.shape).astype(np.float32), axis=1)
    return strengths @ atoms, atoms


@pytest.mark.parametrize(
    ("variant", "coefficient"),
    [(TopK(k=2), 0.0), (BatchTopK(k=2), 0.0), (ReLU(), 0.15), (JumpReLU(threshold=0.1, bandwidth=0.1), 0.05)],
    ids=["top_k", "batch_top_k", "relu", "jump_relu"],
)
def test_a_planted_dictionary_is_recovered(rng, variant, coefficient) -> None:
    x, atoms = planted(rng)
    rule = StepRule(
        variant, n_steps=1500, learning_rate=3e-3, n_decay_steps=500, dead_term=AuxK(), dead_after_tokens=5000
    )
    config = TrainConfig(rule, 48, ("x",), coefficients=(coefficient,), n_sample_batches=4)
    sae = train(config, ArrayStream(x, batch_size=256, seed=0), progress=False).saes[0]
    cosines = atoms @ np.asarray(sae.W_dec).T
    assert cosines.max(axis=1).mean() > 0.95


def config_for(n_steps=12, **changes):
    rule = StepRule(TopK(k=3), n_steps=n_steps, dead_term=AuxK(), dead_after_tokens=40, n_warm_up_steps=3)
    recipe = Resample(at_steps=(7,), window_steps=2, n_inputs=64)
    return TrainConfig(
        rule, N, ("x", ("x", "x")), coefficients=(0.0, 1.0), n_sample_batches=2, resampling=recipe, **changes
    )


def weights_of(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result.states)]


def test_a_run_taken_up_is_the_run(tmp_path, rng) -> None:
    x = np.asarray(rows(rng, n=200))
    config = config_for()
    whole = train(config, ArrayStream(x, batch_size=B, seed=3), progress=False, log_every=1)

    class StopError(Exception):
        pass

    class Stopping(ArrayStream):
        def next_batch(self):
            if self.throughput.n_rows > 10 * B:
                raise StopError
            return super().next_batch()

    with pytest.raises(StopError):
        train(config, Stopping(x, batch_size=B, seed=3), directory=tmp_path, save_every=4, log_every=1, progress=False)
    steps_done = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert 4 <= steps_done[-1] < 12
    stream = ArrayStream(x, batch_size=B, seed=3)
    resumed = train(config, stream, directory=tmp_path, save_every=4, log_every=1, progress=False)
    for ours, theirs in zip(weights_of(resumed), weights_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [entry["step"] for entry in resumed.log] == list(range(1, 13))
    assert [entry["loss"] for entry in resumed.log] == [entry["loss"] for entry in whole.log]
    # Once more: it is done, and nothing runs.
    done = train(config, ArrayStream(x, batch_size=B, seed=3), directory=tmp_path, progress=False)
    np.testing.assert_array_equal(done.saes[0].W_dec, whole.saes[0].W_dec)
    with pytest.raises(LoadError) as info:
        train(dataclasses.replace(config, seed=1), stream, directory=tmp_path, progress=False)
    assert "seed: 1, there 0" in str(info.value) and "Fix:" in str(info.value)


KILLED = """
    import os, signal, sys
    import numpy as np
    from interp_jax.forward.batch_streams import ArrayStream
    from tests.methods.sae.test_training import B, D, config_for, train, weights_of

    directory, kill_after = sys.argv[1], int(sys.argv[2])

    class Killing(ArrayStream):
        n = 0
        def next_batch(self):
            self.n += 1
            if self.n == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().next_batch()

    x = np.random.default_rng(5).normal(size=(200, D)).astype(np.float32)
    stream = Killing(x, batch_size=B, seed=3)
    result = train(config_for(), stream, directory=directory or None, save_every=2, progress=False)
    np.savez(sys.argv[3], *weights_of(result))
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path) -> None:
    def run(directory, kill_after):
        code = [sys.executable, "-c", textwrap.dedent(KILLED), str(directory), str(kill_after), str(tmp_path / "out")]
        return subprocess.run(code, env=os.environ | {"PYTHONPATH": "."}, check=False).returncode

    assert run("", 0) == 0
    whole = np.load(tmp_path / "out.npz")
    # Batches of the run: 2 for the sample, 12 steps, 4 for resampling. Killed wherever, again and again.
    for kill_after in (1, 4, 6, 3):
        assert run(tmp_path / "run", kill_after) == -signal.SIGKILL
    assert run(tmp_path / "run", 0) == 0
    resumed = np.load(tmp_path / "out.npz")
    assert all((resumed[name] == whole[name]).all() for name in whole.files) and len(whole.files) > 10


def test_a_torn_checkpoint_is_passed_over(tmp_path) -> None:
    with Checkpoints(tmp_path, {}) as checkpoints:
        for number in (1, 2):
            # One array: of several, Orbax leaves the reading of the rest to a loop that is closed by then.
            checkpoints.save(number, {"x": np.arange(1000.0) * number})
            checkpoints.wait()
    for file in (tmp_path / "steps" / "2").rglob("*"):
        if file.is_file() and "metadata" not in file.name.lower():
            file.write_bytes(b"")
    with Checkpoints(tmp_path, {}) as checkpoints:
        with pytest.warns(UserWarning, match="step 2.*passed over"):
            found = checkpoints.latest()
        assert found is not None and found[0] == 1
        np.testing.assert_array_equal(found[1]["x"], np.arange(1000.0))


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path, monkeypatch) -> None:
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, {"x": np.arange(3.0)})
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.warns(UserWarning, match="step 2 could not be written.*No space left"):
            checkpoints.save(2, {"x": np.arange(3.0)})
        found = checkpoints.latest()
        assert found is not None and found[0] == 1


def test_activations_that_are_not_finite_stop_a_run(rng) -> None:
    x = np.asarray(rows(rng, n=64)).copy()
    sample = x.copy()
    x[:, 2] = np.nan

    class Spoiling(ArrayStream):
        n = 0

        def next_batch(self):
            self.n += 1
            return {"x": sample[:B]} if self.n <= 4 else {"x": x[:B]}

    config = TrainConfig(StepRule(ReLU(), n_steps=50), N, ("x",), n_sample_batches=2, n_refused_max=3)
    with pytest.raises(InvalidInputError) as info:
        train(config, Spoiling(sample, batch_size=B, seed=0), progress=False)
    text = str(info.value)
    assert "in 3 steps" in text and f"{B} values of the last batch at x" in text and "after step 5" in text


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sites": ("y",)}, UnknownNameError, "Unknown site 'y'"),
        ({"sites": ()}, InvalidInputError, "the number of sites = 0"),
        ({"coefficients": (0.1, -0.1)}, InvalidInputError, "coefficient = -0.1"),
        ({"coefficients": (float("nan"),)}, InvalidInputError, "coefficient = nan"),
        ({"n_latents": 2}, InvalidInputError, "k = 3"),
        ({"scaling": "unit"}, UnknownNameError, "unit_ms"),
        ({"b_dec": "median"}, UnknownNameError, "geometric_median"),
        ({"rule": StepRule(TopK(k=1))}, InvalidInputError, "n_steps = 0"),
        ({"rule": StepRule(TopK(k=1), n_steps=1, decoder_norm="one")}, UnknownNameError, "unit"),
        ({"sites": (("x", "z"),)}, InvalidInputError, "is_centred=False"),
    ],
    ids=["site", "no_site", "below_0", "nan", "k", "scaling", "b_dec", "n_steps", "norm", "transcoder"],
)
def test_bad_configurations(rng, changes, error, words) -> None:
    stream = ArrayStream({"x": np.asarray(rows(rng)), "z": np.asarray(rows(rng))}, batch_size=4, seed=0)
    with pytest.raises(error) as info:
        train(dataclasses.replace(config_for(), **changes), stream, progress=False)
    assert words in str(info.value) and "Fix:" in str(info.value)


def test_a_transcoder_learns_a_map(rng) -> None:
    x = np.asarray(rows(rng, n=512))
    z = (x @ rng.normal(size=(D, 4))).astype(np.float32) + 3
    stream = ArrayStream({"x": x, "z": z}, batch_size=64, seed=0)
    rule = StepRule(ReLU(is_centred=False), n_steps=600, learning_rate=1e-2, n_decay_steps=200)
    config = TrainConfig(rule, 32, (("x", "z"),), n_sample_batches=4, has_skip=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = train(config, stream, progress=False).saes[0]
    assert (sae.d_in, sae.d_out, str(sae.read), str(sae.write)) == (D, 4, "x", "z")
    error = np.square(np.asarray(sae(x)) - z).sum() / np.square(z - z.mean(axis=0)).sum()
    assert error < 0.05
