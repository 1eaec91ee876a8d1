"""The sweep: every number by its definition, by other routes; planted dictionaries; what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.results import load_result, save_result
from interp_jax.core.sites import Site
from interp_jax.methods.pursuit import (
    GradientPursuit,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    encoder,
    random_dictionary,
)
from interp_jax.methods.sae import SAE, ReLU, TopLatents, evaluate_sae
from interp_jax.methods.sparsity_sweep import SparsityCurve, SparsitySweep, sparsity_sweep
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

D, D_VOCAB, N_LATENTS = 8, 13, 20
SITE = Site(0, "mlp_out")
QUIET: dict[str, Any] = {"progress": False}


def toy_forward(params, tokens):
    x = params["W_E"][tokens]
    for layer in range(2):
        with layer_scope(layer):
            x = sow(x + jnp.tanh(jnp.cumsum(x, axis=1) @ params["mix"]), name="resid_mid")
            x = x + sow(params["mlp"][layer][tokens], name="mlp_out")
    return x @ params["W_U"]


@pytest.fixture
def params(rng):
    shapes = {"W_E": (D_VOCAB, D), "W_U": (D, D_VOCAB), "mix": (D, D)}
    params: dict = {name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params["mlp"] = [jnp.asarray(rng.normal(size=(D_VOCAB, D)), jnp.float32) for _ in range(2)]
    return params


@pytest.fixture
def toy(params):
    return LanguageModel(Upstream("toy", toy_forward), params, name="toy")


@pytest.fixture
def tokens(rng):
    rows = rng.integers(0, D_VOCAB, (5, 6)).astype(np.int32)
    rows[1, :2] = -1
    return rows


@pytest.fixture
def sae(key):
    return SAE(ReLU(is_centred=False), ReLU().init(key, d_in=D, n_latents=N_LATENTS), read=SITE)


def pursuit(kind, sae, k=1):
    return encoder(kind, sae.W_dec, k=k, b_dec=sae.params["b_dec"], scaling=sae.input_scaling, read=sae.read)


def test_every_point_is_an_evaluation_of_its_own(toy, tokens, sae):
    """The evaluation knows nothing of prefixes: one coder with one k at a time."""
    coders = {
        "mine": {"own": sae, "top-k": TopLatents(sae, 1), "MP": pursuit(MatchingPursuit(), sae)},
        "other": {"ito": pursuit(MatchingPursuit(), replace(sae, params=sae.params | {"W_dec": -sae.W_dec}))},
    }
    options: dict[str, Any] = {"untouched_tokens": [3], "n_untouched": 1, **QUIET}
    sweep = sparsity_sweep(toy, coders, tokens, l0s=(4, 1), batch_size=2, **options)
    assert [list(several) for several in sweep.curves.values()] == [["own", "top-k", "MP"], ["ito"]]
    for dictionary, several in coders.items():
        for name, coder in several.items():
            curve = sweep.curve(dictionary, name)
            assert curve.targets == (None if name == "own" else (1, 4))
            for i in range(len(curve.l0)):
                alone = coder if curve.targets is None else replace(coder, k=curve.targets[i])
                expected = evaluate_sae(toy, alone, tokens, **options)
                part = expected.reconstruction
                assert curve.l0[i] == pytest.approx(part.l0, abs=1.5 / part.n_tokens)
                assert curve.fvu[i] == pytest.approx(part.fvu, rel=1e-4)
                assert curve.losses[i] == pytest.approx(expected.losses["spliced"], rel=1e-5)
                assert curve.kl[i] == pytest.approx(expected.kl["spliced"], rel=1e-3, abs=1e-6)
                assert sweep.losses == pytest.approx(
                    {name: expected.losses[name] for name in ("clean", "zero", "mean")}, rel=1e-5
                )
                for ablation in ("zero", "mean"):
                    share = sweep.loss_recovered(dictionary, name, ablation)[i]
                    assert share == pytest.approx(expected.loss_recovered(ablation), rel=1e-3, abs=1e-3, nan_ok=True)
                assert (sweep.n_targets, sweep.n_tokens) == (expected.n_targets, part.n_tokens)
            assert (curve.l0 <= (curve.targets or N_LATENTS)).all()
    assert sweep.n_sequences == 5


def test_numbers_from_the_definition(toy, tokens, sae):
    """Reconstructions by the coder, everything else in NumPy and by `intervene`."""
    sweep = sparsity_sweep(toy, {"mine": {"MP": pursuit(MatchingPursuit(), sae)}}, tokens, l0s=(3,), **QUIET)
    is_token = tokens >= 0
    y = np.asarray(toy.reap(tokens, SITE)[SITE], np.float64)
    written = np.asarray(pursuit(MatchingPursuit(), sae, 3).reconstruct(y.astype(np.float32)), np.float64)
    error, mean = (y - written)[is_token], y[is_token].mean(0)
    curve = sweep.curve("mine", "MP")
    assert curve.fvu[0] == pytest.approx(np.square(error).sum() / np.square(y[is_token] - mean).sum(), rel=1e-4)

    def loss(value):
        value = np.where(is_token[..., None], value, y).astype(np.float32)
        log_p = np.asarray(jax.nn.log_softmax(toy.intervene(tokens, {SITE: value})))
        pairs = [(r, t) for r in range(5) for t in range(5) if tokens[r, t] >= 0 and tokens[r, t + 1] >= 0]
        return np.mean([-log_p[r, t, tokens[r, t + 1]] for r, t in pairs])

    expected = {"clean": loss(y), "zero": loss(np.zeros_like(y)), "mean": loss(np.broadcast_to(mean, y.shape))}
    assert sweep.losses == pytest.approx(expected, rel=1e-5)
    assert curve.losses[0] == pytest.approx(loss(written), rel=1e-5)


@pytest.mark.parametrize("kind", [GradientPursuit, pytest.param(OrthogonalMatchingPursuit, marks=pytest.mark.slow)])
def test_a_planted_dictionary_recovers_everything_from_its_own_sparsity_on(kind, params, rng):
    """What the site holds is two of eight orthonormal atoms, so two steps find all of it and one does not."""
    atoms = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    pairs = np.array([rng.choice(D, 2, replace=False) for _ in range(D_VOCAB)])
    values = rng.uniform(1.0, 2.0, (D_VOCAB, 2)) * np.array([1.0, 0.4])
    planted = (values[..., None] * atoms[pairs]).sum(1).astype(np.float32)
    toy = LanguageModel(Upstream("toy", toy_forward), params | {"mlp": [jnp.asarray(planted)] * 2}, name="toy")
    tokens = rng.integers(0, D_VOCAB, (4, 9)).astype(np.int32)
    coders = {"planted": {"ito": encoder(kind(), atoms, k=1, read=SITE)}}
    sweep = sparsity_sweep(toy, coders, tokens, l0s=(1, 2, 4), ablations=("zero",), **QUIET)
    curve, recovered = sweep.curve("planted", "ito"), sweep.loss_recovered("planted", "ito")
    np.testing.assert_allclose(curve.l0[0], 1)
    np.testing.assert_allclose(curve.fvu[1:], 0, atol=1e-9)
    assert curve.fvu[0] > 0.01
    np.testing.assert_allclose(curve.losses[1:], sweep.losses["clean"], rtol=1e-5)
    if abs(sweep.losses["zero"] - sweep.losses["clean"]) > 0.05:
        np.testing.assert_allclose(recovered[1:], 1, atol=1e-3)


def test_more_text_and_another_dictionary_compile_nothing(toy, tokens, sae, key):
    def coders(sae):
        return {"mine": {"own": sae, "MP": pursuit(MatchingPursuit(), sae)}}

    sparsity_sweep(toy, coders(sae), tokens, l0s=(1, 2), batch_size=2, **QUIET)
    other = replace(
        sae, params=ReLU().init(key, d_in=D, n_latents=N_LATENTS, decoder_norm=0.5), read=Site(0, "mlp_out")
    )
    with count_compilations() as new:
        more = np.concatenate([tokens, tokens])
        sparsity_sweep(toy, coders(other) | {"second": {"own": sae}}, more, l0s=(1, 2), batch_size=2, **QUIET)
    assert new == []


def test_the_table_and_the_files(tmp_path):
    numbers = np.array([[3.5, 6.0], [0.5, 0.25], [4.0, 3.25], [1.0, 0.25]])
    own = SparsityCurve(None, *numbers[:, :1])
    sweep = SparsitySweep(
        {"mine": {"GP": SparsityCurve((4, 8), *numbers), "own": own}}, {"clean": 3.0, "zero": 5.0}, 10, 9, 1, SITE
    )
    assert repr(sweep).splitlines() == [
        "SparsitySweep at 0.mlp_out (1 sequences, 9 targets)",
        "  loss (nats)  clean 3.0000, zero 5.0000",
        "  dictionary  encoder  target   L0     FVU    loss  recovered (zero)",
        "  mine        GP            4  3.5  0.5000  4.0000            0.5000",
        "  mine        GP            8    6  0.2500  3.2500            0.8750",
        "  mine        own         own  3.5  0.5000  4.0000            0.5000",
    ]
    saved = load_result(save_result(sweep, name="sweep", root=tmp_path)).result
    np.testing.assert_array_equal(saved["curves"]["mine"]["GP"]["losses"], [4.0, 3.25])
    for names, words in ((("mime", "GP"), "'mime'[\\s\\S]*Did you mean 'mine'"), (("mine", "MP"), "'MP'")):
        with pytest.raises(UnknownNameError, match=f"Unknown name {words}"):
            sweep.curve(*names)
    with pytest.raises(UnknownNameError, match=r"'mean' was asked for in SparsitySweep"):
        sweep.loss_recovered("mine", "GP", "mean")
    # Where ablation costs nothing there is nothing to recover.
    assert np.isnan(replace(sweep, losses={"clean": 3.0, "zero": 3.0}).loss_recovered("mine", "GP")).all()


KEY = jax.random.key(0)
PURSUIT = encoder(MatchingPursuit(), random_dictionary(KEY, n_atoms=9, d=D), k=1, read=SITE)
BAD = {
    "nothing": ({"coders": {}}, InvalidInputError, "No SAE or other coder was given"),
    "nothing-inside": ({"coders": {"mine": {}}}, InvalidInputError, "No SAE or other coder was given"),
    "flat": ({"coders": {"mine": PURSUIT}}, InvalidInputError, "'mine': PursuitEncoder"),
    "no-coder": ({"coders": {"mine": {"own": len}}}, InvalidInputError, "built-in function len"),
    "no-l0s": ({"l0s": ()}, InvalidInputError, r"l0s = \(\) was given"),
    "l0-0": ({"l0s": (0, 4)}, InvalidInputError, r"l0s = \(0, 4\) was given"),
    "l0-twice": ({"l0s": (4, 4)}, InvalidInputError, r"l0s = \(4, 4\) was given"),
    "l0-large": ({"l0s": (4, 10)}, InvalidInputError, r"l0s up to 10 were given for mine \(9\)"),
    "sites": (
        {"coders": {"mine": {"a": PURSUIT, "b": replace(PURSUIT, read=Site(1, "mlp_out"))}}},
        InvalidInputError,
        "Coders of 2 sites were given: 0.mlp_out -> 0.mlp_out, 1.mlp_out -> 1.mlp_out",
    ),
    "width": (
        {"coders": {"a": {"a": PURSUIT}, "b": {"b": replace(PURSUIT, dictionary=jnp.eye(5), b_dec=jnp.zeros(5))}}},
        ShapeError,
        r"reads vectors of 5, was given for 0\.mlp_out",
    ),
    "unknown-site": (
        {"coders": {"mine": {"a": replace(PURSUIT, read=Site(1, "mlp_uot"))}}},
        UnknownNameError,
        r"mlp_uot[\s\S]*Did you mean",
    ),
    "no-text": ({"tokens": np.zeros((0, 4), np.int32)}, InvalidInputError, "An empty prompt"),
    "no-targets": ({"tokens": np.zeros((2, 1), np.int32)}, InvalidInputError, "2 sequences without a target"),
    "nothing-touched": ({"n_untouched": 9, "ablations": ()}, InvalidInputError, "No tokens were given to measure on"),
    "ablation": ({"ablations": ("zreo",)}, UnknownNameError, r"Unknown ablation 'zreo'"),
    "nan": (
        {"coders": {"mine": {"MP": replace(PURSUIT, b_dec=jnp.full(D, jnp.nan))}}},
        InvalidInputError,
        r"Reconstructions \(of mine, MP\) that are not finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_named(toy, case):
    options, error, words = BAD[case]
    given = {"tokens": np.zeros((2, 4), np.int32), "coders": {"mine": {"MP": PURSUIT}}, "l0s": (1, 2)} | options
    with pytest.raises(error, match=rf"{words}[\s\S]*(Expected|Known):[\s\S]*Fix:") as caught:
        sparsity_sweep(toy, given.pop("coders"), given.pop("tokens"), **given, **QUIET)
    assert "sparsity_sweep" in str(caught.value)
