"""The k largest latents of an SAE: NumPy's stable sort, ties, and the SAE itself where k is large."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError
from interp_jax.core.sites import Site
from interp_jax.forward.splicing import spliced_logits
from interp_jax.methods.sae import SAE, ReLU, TopLatents
from interp_jax.methods.sae.normalization import Normalization


@pytest.fixture
def sae(key):
    params = ReLU().init(key, d_in=6, n_latents=15, decoder_norm=0.8)
    return SAE(ReLU(), params, input_scaling=Normalization("layer"), read=Site(1, "mlp_out"))


def largest(latents, k):
    """By a stable sort: of equal latents the lower number comes first."""
    kept = np.zeros_like(latents)
    for at in np.ndindex(latents.shape[:-1]):
        order = np.argsort(-np.abs(latents[at]), kind="stable")[:k]
        kept[at][order] = latents[at][order]
    return kept


@pytest.mark.parametrize("k", [1, 4, 15])
def test_the_largest_are_kept_and_decoded_as_the_sae_does(sae, rng, k):
    x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    kept = largest(np.asarray(sae.encode(x)), k)
    top = TopLatents(sae, k)
    np.testing.assert_array_equal(top.encode(x), kept)
    np.testing.assert_array_equal(top.reconstruct(x), sae.decode(kept, x))
    if k == 15:
        np.testing.assert_array_equal(top(x), sae(x))


def test_prefixes_are_separate_runs(sae, rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    found = TopLatents(sae, 2).prefixes(x, (7, 1, 3))
    for number, k in enumerate((7, 1, 3)):
        np.testing.assert_allclose(found.reconstructions[number], TopLatents(sae, k).reconstruct(x), rtol=1e-6)
        np.testing.assert_array_equal(found.n_active[number], (TopLatents(sae, k).encode(x) != 0).sum(-1))


def test_of_equal_latents_the_lower_number_is_kept():
    params = {"W_enc": jnp.ones((1, 4)), "b_enc": jnp.array([0.0, 1.0, 1.0, 1.0]), "W_dec": jnp.ones((4, 1))}
    sae = SAE(ReLU(), params | {"b_dec": jnp.zeros(1)})
    x = jnp.array([[1.0], [-1.0]])
    assert TopLatents(sae, 2).encode(x).tolist() == [[0, 2, 2, 0], [0, 0, 0, 0]]


def test_it_is_spliced_traced_and_differentiated(tiny_llama, key, rng):
    tokens = rng.integers(0, 259, (2, 5)).astype(np.int32)
    sae = SAE(ReLU(), ReLU().init(key, d_in=24, n_latents=40), read=Site(1, "mlp_out"))
    x = np.asarray(tiny_llama.reap(tokens, sae.read)[sae.read])
    kept = np.asarray(sae.decode(largest(np.asarray(sae.encode(x)), 3)))
    expected = tiny_llama.intervene(tokens, {sae.read: kept})
    np.testing.assert_allclose(spliced_logits(tiny_llama, TopLatents(sae, 3), tokens), expected, rtol=1e-4, atol=1e-4)
    traced = jax.jit(lambda coder, x: coder.reconstruct(x))(TopLatents(sae, 3), x)
    np.testing.assert_allclose(traced, kept, rtol=1e-4, atol=1e-5)
    # Only what was kept has a gradient.
    gradient = jax.grad(lambda W: SAE(ReLU(), sae.params | {"W_enc": W}).encode(x).sum())(sae.W_enc)
    of_top = jax.grad(lambda W: TopLatents(SAE(ReLU(), sae.params | {"W_enc": W}), 1).encode(x).sum())(sae.W_enc)
    is_ever = (largest(np.asarray(sae.encode(x)), 1) != 0).any((0, 1))
    assert (np.asarray(of_top)[:, ~is_ever] == 0).all()
    assert (np.asarray(gradient)[:, ~is_ever] != 0).any()
    assert (np.asarray(of_top)[:, is_ever] != 0).any(0).all()


@pytest.mark.parametrize("k", [0, 16])
def test_a_k_that_cannot_be_is_named(sae, k):
    words = rf"k = {k} was given in TopLatents\(SAE\(relu.*[\s\S]*from 1 to 15[\s\S]*Fix"
    with pytest.raises(InvalidInputError, match=words):
        TopLatents(sae, k).encode(jnp.ones((2, 6)))
    with pytest.raises(InvalidInputError, match=rf"k = {k} was given[\s\S]*from 1 to 15"):
        TopLatents(sae, 3).prefixes(jnp.ones((2, 6)), (1, k))
