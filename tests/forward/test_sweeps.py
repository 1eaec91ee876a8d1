"""Sweeps against closed forms and against the model run row by row."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.interventions import Masked
from interp_jax.core.sites import Site
from interp_jax.forward import sweeps
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.sweeps import scaled, sweep
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

N_LAYERS, D_MODEL, D_VOCAB, POS = 4, 6, 9, 5


def forward(params, tokens):
    x = sow(params["W_E"][tokens], name="embed")
    for layer in range(N_LAYERS):
        with layer_scope(layer):
            x = x + sow(jnp.einsum("bpd,de->bpe", jnp.cumsum(x, 1), params["W_A"][layer]), name="attn_out")
            x = x + sow(jnp.einsum("bpd,de->bpe", jnp.tanh(x), params["W_M"][layer]), name="mlp_out")
    return jnp.einsum("bpd,dv->bpv", x, params["W_U"])


UPSTREAM = Upstream("toy", forward)


@pytest.fixture
def lm(rng):
    shapes = {"W_E": (D_VOCAB, D_MODEL), "W_U": (D_MODEL, D_VOCAB)}
    shapes |= dict.fromkeys(("W_A", "W_M"), (N_LAYERS, D_MODEL, D_MODEL))
    params = {name: jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return LanguageModel(UPSTREAM, params, name="toy")


@pytest.fixture
def tokens(rng):
    return rng.integers(0, D_VOCAB, (2, POS)).astype(np.int32)


METRIC = logit_difference(3, 7)


def row_by_row(lm, tokens, table, metric, n_rows):
    """The same by plain interventions, one pass each: what the sweep must equal."""

    def of_row(intervention, row):
        if isinstance(intervention, Masked):
            parts = (intervention.value, intervention.mask)
            return Masked(*(part if np.ndim(part) == 0 else part[row] for part in parts))
        if isinstance(intervention, Partial):
            factor = np.asarray(intervention.args[0])
            return lambda value: value * (factor if factor.ndim == 0 else factor[row])
        return jnp.asarray(intervention[row])

    picked = [{selector: of_row(one, row) for selector, one in table.items()} for row in range(n_rows)]
    return np.stack([np.asarray(metric(lm.intervene(tokens, interventions))) for interventions in picked])


def tables(rng):
    alone = np.eye(5, N_LAYERS, dtype=bool)
    plants = rng.normal(size=(5, 2, POS, D_MODEL)).astype(np.float32)
    at_position = np.arange(POS)[:, None] == np.arange(POS)[None]
    return {
        "zeroed layers": {Site(layer, "mlp_out"): Masked(0.0, alone[:, layer]) for layer in range(N_LAYERS)},
        "planted arrays": {"2.attn_out": plants},
        "planted at a position": {"1.mlp_out": Masked(plants, at_position[:, None, :, None])},
        "scaled, one factor per row": {"attn_out": scaled(np.linspace(-1, 2, 5, dtype=np.float32))},
        "one factor for all, one plant per row": {"embed": plants, "3.*": scaled(np.float32(0.5))},
    }


@pytest.mark.parametrize("kind", tables(np.random.default_rng(0)))
@pytest.mark.parametrize("rows_per_step", [None, 1, 3])
def test_each_row_is_the_model_under_that_rows_intervention(lm, tokens, rng, kind, rows_per_step):
    table = tables(rng)[kind]
    values = sweep(lm, tokens, table, METRIC, rows_per_step=rows_per_step, progress=False)

    assert values.shape == (5, 2)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, row_by_row(lm, tokens, table, METRIC, 5), rtol=2e-5, atol=2e-5)
    # The interventions do something: no two rows agree.
    assert len({float(value) for value in values[:, 0]}) == 5


def test_scaling_the_write_of_a_linear_model_moves_the_metric_along_a_line(rng):
    def linear(params, tokens):
        x = params["W_E"][tokens]
        with layer_scope(0):
            x = x + sow(params["write"][tokens], name="mlp_out")
        return jnp.einsum("bpd,dv->bpv", x, params["W_U"])

    params = {name: rng.normal(size=(D_VOCAB, D_MODEL)).astype(np.float32) for name in ("W_E", "write")}
    params["W_U"] = rng.normal(size=(D_MODEL, D_VOCAB)).astype(np.float32)
    tokens = rng.integers(0, D_VOCAB, (1, POS)).astype(np.int32)
    factors = np.array([0, 1, 2, -3.5], np.float32)
    values = sweep(
        LanguageModel(Upstream("linear", linear), params),
        tokens,
        {"0.mlp_out": scaled(factors)},
        logit_difference(3, 7),
        progress=False,
    )
    direction = params["W_U"][:, 3] - params["W_U"][:, 7]
    last = tokens[0, -1]
    expected = (params["W_E"][last] + factors[:, None] * params["write"][last]) @ direction
    np.testing.assert_allclose(values[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_other_rows_prompts_answers_and_weights_compile_nothing(lm, tokens, rng):
    table = tables(rng)["zeroed layers"]
    sweep(lm, tokens, table, logit_difference(3, 7), progress=False)
    others = {site: Masked(0.0, np.repeat(~intervention.mask[:3], 2)) for site, intervention in table.items()}
    retrained = LanguageModel(UPSTREAM, {name: -value for name, value in lm.params.items()}, name="toy")
    with count_compilations() as new:
        sweep(lm, tokens, table, logit_difference(3, 7), progress=False)
        values = sweep(retrained, tokens[::-1], others, logit_difference(5, 1, position=2), progress=False)
        # Five rows take a step of eight, and so do six and eight.
        sweep(lm, tokens, {site: Masked(0.0, np.ones(8, bool)) for site in table}, METRIC, progress=False)
    assert [entry for entry in new if entry.name == "sweep"] == []
    expected = row_by_row(retrained, tokens[::-1], others, logit_difference(5, 1, position=2), 6)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-5)


def test_a_sweep_compiles_once_whatever_the_number_of_steps(lm, tokens):
    factors = np.linspace(0, 1, 7, dtype=np.float32)
    with count_compilations() as new:
        sweep(lm, tokens, {"0.attn_out": scaled(factors)}, METRIC, rows_per_step=2, progress=False)
    assert [entry.name for entry in new].count("sweep") == 1


def test_steps_shrink_with_the_memory(monkeypatch, lm, tokens):
    steps = []
    run_rows = sweeps._run_rows

    def counting(*args):
        steps.append(args[4][0].args[0].shape[0])
        return run_rows(*args)

    monkeypatch.setattr(sweeps, "_run_rows", counting)
    table = {"0.attn_out": scaled(np.linspace(0, 1, 6, dtype=np.float32))}
    roomy = sweep(lm, tokens, table, METRIC, progress=False)
    monkeypatch.setattr(sweeps, "STEP_BYTES", 2 * lm.sites(tokens).n_bytes)
    tight = sweep(lm, tokens, table, METRIC, progress=False)
    monkeypatch.setattr(sweeps, "STEP_BYTES", 0)
    one_by_one = sweep(lm, tokens, table, METRIC, progress=False)

    assert steps == [8] + [2] * 3 + [1] * 6
    np.testing.assert_allclose(tight, roomy, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(one_by_one, roomy, rtol=2e-5, atol=2e-5)


def test_any_function_of_the_logits_is_a_metric(lm, tokens):
    table = {"0.attn_out": scaled(np.linspace(0, 1, 3, dtype=np.float32))}

    def spread(logits):
        return logits.max((1, 2)) - logits.min((1, 2))

    values = sweep(lm, tokens, table, spread, progress=False)
    np.testing.assert_allclose(values, row_by_row(lm, tokens, table, spread, 3), rtol=2e-5, atol=2e-5)


ROWS = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("table", "metric", "error", "words"),
    [
        ({}, METRIC, InvalidInputError, ["empty table"]),
        ({"mlp_uot": scaled(ROWS)}, METRIC, UnknownNameError, ["'mlp_uot'", "Did you mean 'mlp_out'?"]),
        (
            {"mlp_out": scaled(ROWS), "1.mlp_out": scaled(ROWS)},
            METRIC,
            InvalidInputError,
            ["'1.mlp_out' and 'mlp_out' both intervene on 1.mlp_out"],
        ),
        (
            {"1.mlp_out": scaled(ROWS), "1.attn_out": scaled(ROWS[:2])},
            METRIC,
            ShapeError,
            ["2 at 1.attn_out", "3 at 1.mlp_out"],
        ),
        ({"1.mlp_out": scaled(np.float32(2))}, METRIC, ShapeError, ["numbers of rows are: none"]),
        ({"1.mlp_out": np.zeros((3, 4), np.float32)}, METRIC, ShapeError, ["1.mlp_out", "float32[4]"]),
        ({"1.mlp_out": scaled(ROWS)}, lambda logits: logits[:, -1], ShapeError, ["float32[2, 9]", "float[2]"]),
        ({"1.mlp_out": scaled(ROWS)}, lambda logits: logits[:, -1].argmax(-1), ShapeError, ["int32[2]", "float[2]"]),
        ({"1.mlp_out": scaled(ROWS)}, lambda logits: None, ShapeError, ["returned NoneType"]),
    ],
)
def test_mistakes_are_named(lm, tokens, table, metric, error, words):
    with pytest.raises(error) as caught:
        sweep(lm, tokens, table, metric, progress=False)
    for word in [*words, "Fix:"]:
        assert word in str(caught.value)


def test_mistakes_in_numbers_are_named(lm, tokens):
    with pytest.raises(InvalidInputError, match="rows_per_step=0"):
        sweep(lm, tokens, {"1.mlp_out": scaled(ROWS)}, METRIC, rows_per_step=0)
