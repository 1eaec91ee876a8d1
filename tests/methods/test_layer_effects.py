"""Layer effects: the sweep, the loop, and a closed form agree."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import ShapeError, UnknownNameError
from interp_jax.core.sites import Site
from interp_jax.forward.metrics import logit_difference
from interp_jax.methods.layer_effects import ROUTES, layer_effects
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

N_LAYERS, D_MODEL, D_VOCAB = 3, 6, 9


def additive(params, tokens):
    """Every write depends on the tokens alone, so each one's effect is its own share of the logits."""
    x = params["W_E"][tokens]
    for layer in range(N_LAYERS):
        with layer_scope(layer):
            x = x + sow(params["attn"][layer][tokens], name="attn_out")
            x = x + sow(params["mlp"][layer][tokens], name="mlp_out")
    return jnp.einsum("bpd,dv->bpv", x, params["W_U"])


def chained(params, tokens):
    """Every write depends on all before it."""
    x = params["W_E"][tokens]
    for layer in range(N_LAYERS):
        with layer_scope(layer):
            x = x + sow(jnp.tanh(x + params["attn"][layer][tokens]), name="attn_out")
            x = x + sow(jnp.tanh(x + params["mlp"][layer][tokens]), name="mlp_out")
    return jnp.einsum("bpd,dv->bpv", x, params["W_U"])


def make_lm(rng, forward, *, d_model=D_MODEL):
    shapes = {"W_E": (D_VOCAB, d_model), "W_U": (d_model, D_VOCAB)}
    shapes |= dict.fromkeys(("attn", "mlp"), (N_LAYERS, D_VOCAB, d_model))
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    # A list of layers, as in an unrolled model: a slice of one array would make every layer a program of its own.
    params |= {name: list(params[name]) for name in ("attn", "mlp")}
    return LanguageModel(Upstream(forward.__name__, forward), params)


@pytest.fixture
def tokens(rng):
    return rng.integers(0, D_VOCAB, (2, 4)).astype(np.int32)


@pytest.mark.parametrize("route", ROUTES)
def test_effects_of_writes_that_only_add_are_their_shares(rng, tokens, route):
    lm = make_lm(rng, additive)
    result = layer_effects(lm, tokens, logit_difference(3, 7), route=route, progress=False)

    direction = np.asarray(lm.params["W_U"][:, 3] - lm.params["W_U"][:, 7])
    for name, param in (("attn_out", "attn"), ("mlp_out", "mlp")):
        share = np.asarray(lm.params[param])[:, tokens[:, -1]] @ direction
        np.testing.assert_allclose(result.table(name), -share, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.clean, logit_difference(3, 7)(lm(tokens)), rtol=1e-5, atol=1e-5)


def test_both_routes_agree_where_writes_depend_on_each_other(rng, tokens):
    lm = make_lm(rng, chained)
    by_sweep, by_loop = (
        layer_effects(lm, tokens, logit_difference(3, 7), route=route, progress=False) for route in ROUTES
    )
    assert by_sweep.sites == by_loop.sites
    assert [str(site) for site in by_loop.sites] == [
        f"{layer}.{name}" for layer in range(N_LAYERS) for name in ("attn_out", "mlp_out")
    ]
    np.testing.assert_allclose(by_sweep.effects, by_loop.effects, rtol=2e-5, atol=2e-5)
    assert np.abs(by_loop.effects).min() > 1e-6


def test_the_loop_compiles_no_program_per_site(rng, tokens):
    # A size of its own: programs are shared by whatever has the same code and shapes.
    lm = make_lm(rng, chained, d_model=D_MODEL + 1)
    with count_compilations() as few:
        layer_effects(lm, tokens, logit_difference(3, 7), sites="0.*", route="loop", progress=False)
    with count_compilations() as all_sites:
        layer_effects(lm, tokens, logit_difference(3, 7), route="loop", progress=False)
    with count_compilations() as again:
        layer_effects(lm, tokens, logit_difference(1, 2), route="loop", progress=False)
    # Six sites are zeroed one after the other; the pieces between sites are few programs and do not depend on which.
    assert len(few) + len(all_sites) == 3
    assert again == []


def test_strongest_sites_and_words(rng, tokens):
    result = layer_effects(make_lm(rng, chained), tokens, logit_difference(3, 7), progress=False)
    strongest = result.strongest(6, row=1)
    assert sorted(site for site, _ in strongest) == sorted(result.sites)
    sizes = [abs(effect) for _, effect in strongest]
    assert sizes == sorted(sizes, reverse=True)
    assert dict(strongest)[Site(2, "mlp_out")] == pytest.approx(float(result.effects[5, 1]))
    assert repr(result).startswith(f"LayerEffectsResult(6 sites, batch 2; strongest: {result.strongest(1)[0][0]}")


@pytest.mark.parametrize("route", ROUTES)
def test_mistakes_are_named(rng, tokens, route):
    lm = make_lm(rng, additive)
    with pytest.raises(UnknownNameError, match="Did you mean 'attn_out'"):
        layer_effects(lm, tokens, logit_difference(3, 7), sites="attn_uot", route=route)
    with pytest.raises(ShapeError, match=r"The metric returned float32\[2, 4\]"):
        layer_effects(lm, tokens, lambda logits: logits[..., 3], route=route, progress=False)
    with pytest.raises(UnknownNameError, match=r"Unknown route 'swep' in layer_effects\. Did you mean 'sweep'"):
        layer_effects(lm, tokens, logit_difference(3, 7), route="swep")
