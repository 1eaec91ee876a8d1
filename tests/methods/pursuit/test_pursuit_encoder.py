"""Pursuits as encoders inside models: NumPy's own pursuit by hand, exact cases, jit, the loop, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.forward.splicing import spliced_logits
from interp_jax.methods.pursuit import (
    GradientPursuit,
    MatchingPursuit,
    OrthogonalMatchingPursuit,
    encoder,
    pursue,
    random_dictionary,
)
from interp_jax.methods.sae import SAE, ReLU, evaluate_sae
from interp_jax.methods.sae.normalization import Normalization
from interp_jax.transforms.compilations import count_compilations

D = 24  # of the tiny Llama


def tokens_of(rng, shape=(3, 6)):
    return rng.integers(0, 259, shape).astype(np.int32)


def orthonormal(rng, d=D):
    return np.linalg.qr(rng.normal(size=(d, d)))[0].astype(np.float32)


def by_hand(x, dictionary, b_dec, k):
    """Gradient pursuit with coefficients of at least 0, a token and a step at a time, in float64."""
    atoms = np.asarray(dictionary, np.float64)
    written = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        signal = x[at].astype(np.float64) - b_dec
        f = np.zeros(len(atoms))
        for _ in range(k):
            residual = signal - f @ atoms
            products = atoms @ residual
            best = int(np.argmax(products))
            if products[best] <= 0:
                break
            support = (f > 0) | (np.arange(len(atoms)) == best)
            gradient = np.where(support, products, 0)
            moved = gradient @ atoms
            f = np.maximum(f + gradient * (gradient @ gradient) / (moved @ moved), 0)
        written[at] = f @ atoms + b_dec
    return written


def test_what_is_spliced_is_what_a_loop_in_numpy_makes_of_the_site(tiny_llama, key, rng):
    site, tokens = Site(1, "resid_post"), tokens_of(rng)
    dictionary, b_dec = np.asarray(random_dictionary(key, n_atoms=40, d=D)), rng.normal(size=D).astype(np.float32)
    x = np.asarray(tiny_llama.reap(tokens, site)[site])
    expected = by_hand(x, dictionary, b_dec, k=5)

    ito = encoder(GradientPursuit(), dictionary, k=5, b_dec=b_dec, read=site)
    np.testing.assert_allclose(ito.reconstruct(x), expected, rtol=1e-4, atol=1e-4)
    logits = spliced_logits(tiny_llama, ito, tokens)
    by_array = tiny_llama.intervene(tokens, {site: expected.astype(np.float32)})
    np.testing.assert_allclose(logits, by_array, rtol=1e-3, atol=1e-3)
    # The coder itself is an intervention, and a value in the loop.
    np.testing.assert_allclose(tiny_llama.intervene(tokens, {site: ito}), logits, rtol=1e-5, atol=1e-5)
    for layer, name, value in (running_pass := tiny_llama.run(tokens)):
        if (layer, name) == (1, "resid_post"):
            running_pass.modified_value = ito(value)
    np.testing.assert_allclose(running_pass.retval, logits, rtol=1e-5, atol=1e-5)
    # With the error kept nothing changes; an edit moves what its latent stands for.
    kept = spliced_logits(tiny_llama, ito, tokens, keep_error=True)
    np.testing.assert_array_equal(kept, tiny_llama.intervene(tokens, {site: x}))
    latents = np.asarray(ito.encode(x))
    edited = spliced_logits(tiny_llama, ito, tokens, keep_error=True, edits={0: lambda f: f.at[..., 3].set(2.0)})
    moved = x + (2.0 - latents[..., [3]]) * dictionary[3]
    np.testing.assert_allclose(edited, tiny_llama.intervene(tokens, {site: moved}), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [MatchingPursuit, pytest.param(OrthogonalMatchingPursuit, marks=pytest.mark.slow)])
def test_an_orthonormal_dictionary_with_all_its_atoms_leaves_the_model_as_it_is(kind, tiny_llama, rng):
    tokens, b_dec = tokens_of(rng), rng.normal(size=D).astype(np.float32)
    ito = encoder(kind(is_nonneg=False), orthonormal(rng), k=D, b_dec=b_dec, read=Site(0, "mlp_out"))
    np.testing.assert_allclose(spliced_logits(tiny_llama, ito, tokens), tiny_llama(tokens), rtol=1e-3, atol=1e-4)


def test_two_layers_compound_as_in_a_loop_by_hand_in_and_out_of_jit(tiny_llama, key, rng):
    tokens, keys = tokens_of(rng), jax.random.split(key)
    sites = [Site(0, "resid_post"), Site(2, "resid_post")]
    first, second = (
        encoder(MatchingPursuit(), random_dictionary(one, n_atoms=40, d=D), k=4, read=site)
        for one, site in zip(keys, sites, strict=True)
    )
    sae = SAE(ReLU(), ReLU().init(key, d_in=D, n_latents=30), read=Site(1, "mlp_out"))
    logits = spliced_logits(tiny_llama, [second, sae, first], tokens)

    x = tiny_llama.reap(tokens, sites[0])[sites[0]]
    edits: dict[Any, Any] = {sites[0]: np.asarray(first.reconstruct(x))}
    seen = {}

    def look(value):
        seen["x"] = value
        return value

    tiny_llama.intervene(tokens, edits | {sae.read: look})
    edits[sae.read] = np.asarray(sae(seen["x"]))
    tiny_llama.intervene(tokens, edits | {sites[1]: look})
    edits[sites[1]] = np.asarray(second.reconstruct(seen["x"]))
    np.testing.assert_allclose(logits, tiny_llama.intervene(tokens, edits), rtol=1e-3, atol=1e-3)

    traced, common = [], int(tokens[1, 3])

    @jax.jit
    def compiled(coders, tokens):
        traced.append(1)
        return spliced_logits(tiny_llama, coders, tokens, n_untouched=1, untouched_tokens=[common])

    expected = spliced_logits(tiny_llama, [first, second], tokens, n_untouched=1, untouched_tokens=[common])
    np.testing.assert_allclose(compiled([first, second], tokens), expected, rtol=1e-3, atol=1e-3)
    # Another dictionary is another argument, not another program.
    other = encoder(MatchingPursuit(), random_dictionary(key, n_atoms=40, d=D), k=4, read=sites[0])
    compiled([other, second], tokens)
    assert traced == [1]


def test_prefixes_are_separate_runs(key, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    coder = encoder(MatchingPursuit(), random_dictionary(key, n_atoms=20, d=8), k=4, b_dec=np.ones(8, np.float32))
    found = coder.prefixes(x, (4, 1))
    assert found.reconstructions.shape == (2, 2, 5, 8)
    for number, k in enumerate((4, 1)):
        alone = replace(coder, k=k).encode(x)
        np.testing.assert_allclose(found.reconstructions[number], coder.decode(alone), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.n_active[number], (alone != 0).sum(-1))


@pytest.mark.parametrize("rule", ["unit_ms", pytest.param("layer", marks=pytest.mark.slow)])
def test_an_saes_scaling_makes_its_dictionary_fit_raw_activations(rule, key, rng):
    """Coefficients are in the units of the SAE's latents: decoding them is what the SAE's decoder does."""
    params = ReLU().init(key, d_in=6, n_latents=15)
    params["b_dec"] = jnp.asarray(rng.normal(size=6), jnp.float32)
    sae = SAE(ReLU(), params, input_scaling=Normalization(rule, 0.25 if rule == "unit_ms" else 1.0))
    x = jnp.asarray(10 * rng.normal(size=(4, 6)), jnp.float32)
    ito = encoder(MatchingPursuit(), sae.W_dec, k=4, b_dec=params["b_dec"], scaling=sae.input_scaling)
    np.testing.assert_allclose(ito.reconstruct(x), sae.decode(ito.encode(x), x), rtol=1e-4, atol=1e-4)
    signals = sae.input_scaling(x)[0] - params["b_dec"][None]
    pursued = pursue(MatchingPursuit(), signals, sae.W_dec, 4)
    written = sae.input_scaling(x)[1](signals - pursued.residual + params["b_dec"][None])
    np.testing.assert_allclose(ito(x), written, rtol=1e-4, atol=1e-4)
    if rule == "unit_ms":  # What is folded into the biases is another way to the same.
        folded = encoder(MatchingPursuit(), sae.W_dec, k=4, b_dec=sae.fold_scale().params["b_dec"])
        np.testing.assert_allclose(folded(x), ito(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInputError, match=r"Latents alone were given in PursuitEncoder\.decode[\s\S]*Fix:"):
        ito.decode(ito.encode(x))


@pytest.mark.slow
def test_tokens_in_parts_and_at_once(key, rng, monkeypatch):
    from interp_jax.methods.pursuit import pursuit_encoder

    x = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    coder = encoder(OrthogonalMatchingPursuit(), random_dictionary(key, n_atoms=20, d=8), k=3)
    whole = coder.prefixes(x, (1, 3)), coder.encode(x)
    monkeypatch.setattr(pursuit_encoder, "_ATOM_BYTES", 4 * 3 * 8 * 4)  # four tokens
    jax.clear_caches()
    parts = coder.prefixes(x, (1, 3)), coder.encode(x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), parts, whole)


def test_signals_of_nothing_and_signals_that_are_no_numbers(key):
    coder = encoder(MatchingPursuit(), random_dictionary(key, n_atoms=20, d=8), k=3, b_dec=np.full(8, 2.0, np.float32))
    one = jnp.full(8, 2.0).at[0].add(1.0)
    nothing, unreadable, readable, last = coder.reconstruct(jnp.stack([one * 0 + 2, one * jnp.nan, one, one]))
    np.testing.assert_array_equal(nothing, jnp.full(8, 2.0))
    assert np.isnan(unreadable).all()
    # One token's numbers are its own affair.
    np.testing.assert_array_equal(readable, last)
    assert np.isfinite(last).all() and (last != 2.0).any()


@pytest.mark.slow
def test_an_evaluation_takes_it_as_it_takes_an_sae(tiny_llama, key, rng):
    site, tokens = Site(1, "mlp_out"), tokens_of(rng)
    ito = encoder(MatchingPursuit(), random_dictionary(key, n_atoms=40, d=D), k=6, read=site)
    evaluation = evaluate_sae(tiny_llama, ito, tokens, ablations=("zero",), progress=False)
    x = np.asarray(tiny_llama.reap(tokens, site)[site])
    written, part = np.asarray(ito.reconstruct(x)), evaluation.reconstruction
    assert part.fvu == pytest.approx(np.square(x - written).sum() / np.square(x - x.mean((0, 1))).sum(), rel=1e-3)
    assert part.l0 == pytest.approx((np.asarray(ito.encode(x)) != 0).sum(-1).mean(), abs=0.1)
    assert part.l0 <= 6
    with count_compilations() as new:
        evaluate_sae(tiny_llama, replace(ito, read=Site(0, "mlp_out")), tokens, ablations=("zero",), progress=False)
    assert [one for one in new if one.name.startswith(("pursuit", "sae"))] == []


ATOMS = np.eye(3, dtype=np.float32)
BAD = {
    "k-0": ({"k": 0}, InvalidInputError, r"k = 0 was given in pursuit\.encoder[\s\S]*from 1 to 3"),
    "k-4": ({"k": 4}, InvalidInputError, r"k = 4 was given[\s\S]*from 1 to 3"),
    "k-half": ({"k": 1.5}, InvalidInputError, r"k = 1\.5 was given"),
    "no-pursuit": ({"pursuit": GradientPursuit}, InvalidInputError, "expected: a pursuit"),
    "columns": ({"dictionary": ATOMS[0]}, ShapeError, r"dictionary float32\[3\] and b_dec float32\[3\] were given"),
    "b_dec": ({"b_dec": np.ones(2, np.float32)}, ShapeError, r"b_dec float32\[2\]"),
    "integers": ({"dictionary": np.eye(3, dtype=int)}, ShapeError, r"int32\[3, 3\]"),
    "nan": ({"dictionary": ATOMS * np.nan}, InvalidInputError, "numbers that are not finite"),
    "tolerance": ({"tolerance": -1.0}, InvalidInputError, r"tolerance = -1\.0"),
    "scaling": ({"scaling": "unit_ms"}, InvalidInputError, r"scaling = 'unit_ms' was given"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_named(case):
    options, error, words = BAD[case]
    given: dict[str, Any] = {"pursuit": GradientPursuit(), "dictionary": ATOMS, "k": 2} | options
    with pytest.raises(error, match=rf"(?i){words}") as caught:
        encoder(given.pop("pursuit"), given.pop("dictionary"), **given)
    assert all(part in str(caught.value) for part in ("pursuit.encoder", "Expected:", "Fix:"))


def test_sites_that_do_not_fit_are_named(tiny_llama, key, rng):
    tokens = tokens_of(rng)
    coder = encoder(GradientPursuit(), random_dictionary(key, n_atoms=9, d=5), k=2)
    with pytest.raises(InvalidInputError, match=r"PursuitEncoder\(GradientPursuit.*without a site was given"):
        spliced_logits(tiny_llama, coder, tokens)
    with pytest.raises(ShapeError, match=r"reads vectors of 5, was given for 1\.mlp_out"):
        spliced_logits(tiny_llama, replace(coder, read=Site(1, "mlp_out")), tokens)
    with pytest.raises(UnknownNameError, match=r"mlp_uot[\s\S]*Did you mean"):
        spliced_logits(tiny_llama, replace(coder, read=Site(1, "mlp_uot")), tokens)
    with pytest.raises(ShapeError, match=r"activations of shape \(2, 4\) were given in PursuitEncoder"):
        coder.encode(jnp.ones((2, 4)))
    with pytest.raises(InvalidInputError, match=r"k = 10 was given[\s\S]*from 1 to 9"):
        coder.prefixes(jnp.ones((2, 5)), (1, 10))
