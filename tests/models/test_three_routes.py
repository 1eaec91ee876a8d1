"""Three routes to every value of a model: the compiled engine, the python engine, and harvest. All agree.

On the tiny models (transformers' Flax GPT-2 and Llama), and on SmolLM2-135M with its real weights.

Source: interp_jax.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.sites import Site
from interp_jax.models.language_model import LanguageModel
from interp_jax.transforms.harvest import harvest_sites, site_gradients

TOKENS = np.array([[5, 80, 3, 7, 200, 1], [9, 9, 41, 6, 0, 259]], np.int32)


def scaled(value: Any) -> Any:
    return value * 0.5


def reversed_heads(value: Any) -> Any:
    return value[:, ::-1]


def by_loop(lm: LanguageModel, select: Any, edits: dict[Site, Any], engine: Any) -> tuple[Any, dict[Site, Any]]:
    """The result and the values at the sites, changed where there is an edit, of a loop."""
    seen = {}
    for layer, name, value in (running_pass := lm.run(TOKENS, sites=select, engine=engine)):
        site = Site(layer, name)
        if site in edits:
            value = running_pass.modified_value = edits[site](value)
        seen[site] = np.asarray(value)
        del value
    return running_pass.retval, seen


def assert_routes_agree(lm: LanguageModel, select: Any, edits: dict[Site, Any]) -> None:
    result, activations = jax.jit(harvest_sites(lm.forward, select, edits))(lm.params, TOKENS)
    for engine in ("compiled", "python"):
        looped, seen = by_loop(lm, select, edits, engine)
        assert list(seen) == list(activations)
        assert set(edits) <= set(seen)
        for site, value in seen.items():
            scale = np.abs(value[np.isfinite(value)]).max()
            np.testing.assert_allclose(activations[site], value, rtol=1e-4, atol=1e-5 * scale, err_msg=str(site))
        np.testing.assert_allclose(result, looped, rtol=1e-4, atol=1e-5 * float(np.abs(looped).max()))


@pytest.mark.parametrize("is_edited", [False, True], ids=["read", "changed"])
def test_on_tiny_models(tiny: LanguageModel, is_edited: bool) -> None:
    edits = {Site(0, "pattern"): reversed_heads, Site(1, "mlp_out"): scaled, Site(2, "resid_pre"): scaled}
    assert_routes_agree(tiny, None, edits if is_edited else {})


@pytest.mark.slow
@pytest.mark.parametrize("is_edited", [False, True], ids=["read", "changed"])
def test_on_smollm2(smollm2: LanguageModel, is_edited: bool) -> None:
    edits = {Site(3, "pattern"): reversed_heads, Site(10, "mlp_out"): scaled, Site(20, "resid_pre"): scaled}
    assert_routes_agree(smollm2, ["resid_pre", "mlp_out", "[39].pattern", "20.z", "logits"], edits if is_edited else {})


@pytest.mark.slow
def test_gradients_of_smollm2_stacked_and_not(smollm2: LanguageModel) -> None:
    """The derivative at every residual of the layers is one, and is that of the model with something added there."""

    def metric(logits: Any) -> Any:
        return logits[:, -1, 5] - logits[:, -1, 80]

    value, _, gradients = jax.jit(site_gradients(smollm2.forward, "resid_pre", metric))(smollm2.params, TOKENS)
    stacked = smollm2.stacked()
    again, _, of_stacked = jax.jit(site_gradients(stacked.forward, "resid_pre", metric))(stacked.params, TOKENS)
    np.testing.assert_allclose(again, value, rtol=1e-3)
    assert len(gradients) == len(of_stacked) == 30
    for site, gradient in gradients.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(of_stacked[site], gradient, rtol=1e-3, atol=1e-4 * scale, err_msg=str(site))

    def with_added(added: Any) -> Any:
        for _, _, residual in (running_pass := smollm2.run(TOKENS, sites="17.resid_pre")):
            running_pass.modified_value = residual + added
            del residual
        return metric(running_pass.retval).sum()

    zeros = jnp.zeros_like(gradients["17.resid_pre"])
    truth = jax.grad(with_added)(zeros)
    scale = float(jnp.abs(truth).max())
    np.testing.assert_allclose(gradients["17.resid_pre"], truth, rtol=1e-3, atol=1e-4 * scale)
