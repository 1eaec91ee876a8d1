"""Every method refuses a metric it cannot read, the same way, before it runs anything."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import InvalidInputError, ShapeError
from interp_jax.core.interventions import Masked
from interp_jax.forward.metrics import kl_divergence, logit_difference
from interp_jax.forward.node_effects import node_effects
from interp_jax.forward.node_subsets import subset_patching
from interp_jax.forward.nodes import node_set
from interp_jax.forward.sweeps import sweep
from interp_jax.methods.activation_patching import ablation, activation_patching
from interp_jax.methods.atp import attribution_patching
from interp_jax.methods.circuits.acdc import acdc
from interp_jax.methods.circuits.edge_attribution import edge_attribution
from interp_jax.methods.circuits.evaluation import faithfulness
from interp_jax.methods.circuits.path_patching import path_patching
from interp_jax.methods.layer_effects import layer_effects
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import Upstream
from interp_jax.transforms.compilations import count_compilations
from interp_jax.transforms.sowing import layer_scope, sow

CLEAN = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
CORRUPTED = np.array([[1, 9, 3, 4], [5, 6, 2, 8]], np.int32)
NAMES = ["embed", "mlp_out"]
ZEROED = {"0.mlp_out": Masked(0.0, np.array([True]))}
# Every function that takes a metric; those of edges want a model with a config.
METHODS = {
    "sweep": lambda lm, metric: sweep(lm, CLEAN, ZEROED, metric),
    "node_effects": lambda lm, metric: node_effects(lm, CLEAN, node_set(lm, CLEAN, NAMES), CORRUPTED, metric),
    "subset_patching": lambda lm, metric: subset_patching(lm, CLEAN, CORRUPTED, metric, node_set(lm, CLEAN, NAMES)),
    "activation_patching": lambda lm, metric: activation_patching(
        lm, CLEAN, CORRUPTED, metric, node_set(lm, CLEAN, NAMES)
    ),
    "ablation": lambda lm, metric: ablation(lm, CLEAN, metric, node_set(lm, CLEAN, NAMES), kind="mean"),
    "attribution_patching": lambda lm, metric: attribution_patching(
        lm, CLEAN, CORRUPTED, metric, node_set(lm, CLEAN, NAMES)
    ),
    "layer_effects": lambda lm, metric: layer_effects(lm, CLEAN, metric),
    "layer_effects by loop": lambda lm, metric: layer_effects(lm, CLEAN, metric, route="loop"),
}
OF_EDGES = {
    "acdc": lambda lm, metric: acdc(lm, CLEAN, CORRUPTED, threshold=0.1, metric=metric),
    "edge_attribution": lambda lm, metric: edge_attribution(lm, CLEAN, CORRUPTED, metric),
    "path_patching": lambda lm, metric: path_patching(lm, CLEAN, CORRUPTED, metric, receivers="logits"),
    "faithfulness": lambda lm, metric: faithfulness(lm, CLEAN, CORRUPTED, metric, []),
}
REFERENCE = np.zeros((2, 9, 3), np.float32)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "an id past the vocabulary": (
        logit_difference([1, 10**6], 2),
        InvalidInputError,
        "Token id 1000000 at position -1 was asked for",
    ),
    "an other id past it": (logit_difference(1, 10**6), InvalidInputError, "Token id 1000000 at position -1"),
    "a position past the prompts": (logit_difference(1, 2, position=4), InvalidInputError, "at position 4 was asked"),
    "a position before them": (logit_difference(1, 2, position=-5), InvalidInputError, "at position -5 was asked for"),
    "a divergence past them": (
        kl_divergence(REFERENCE, position=8),
        InvalidInputError,
        "Position 8 was asked for",
    ),
    "ids of three prompts": (logit_difference([1, 2, 3], 4), ShapeError, "3 token ids were given"),
    "a number": (7, InvalidInputError, r"7 (int) was given as the metric in "),
}


@functools.cache
def without_config() -> LanguageModel:
    """A model that does not say how large its vocabulary is."""

    def forward(params: Any, tokens: Any) -> Any:
        x = sow(params["W_E"][tokens], name="embed")
        for layer in range(2):
            with layer_scope(layer):
                x = sow(x, name="resid_pre")
                x = x + sow(jnp.cumsum(x, 1) * 0.5, name="attn_out")
                x = sow(x + sow(jnp.tanh(x), name="mlp_out"), name="resid_post")
        return x @ params["W_U"]

    params = {"W_E": jnp.ones((10, 3)), "W_U": jnp.ones((3, 10))}
    return LanguageModel(Upstream("toy", forward), params, name="toy")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("has_config", [True, False], ids=["config", "no config"])
def test_no_method_runs_anything_for_a_metric_it_cannot_read(tiny_llama, bad, has_config):
    """JAX would read the nearest logits there are, and the numbers would be wrong."""
    metric, error, words = BAD[bad]
    lm = tiny_llama if has_config else without_config()
    d_vocab = 10 if lm.config is None else lm.config.d_vocab
    methods = METHODS | OF_EDGES if has_config else METHODS
    for name, method in methods.items():
        with count_compilations() as new, pytest.raises(error) as caught:
            method(lm, metric)
        message = str(caught.value)
        assert words in message and "Expected: " in message and "Fix: " in message, name
        expected_where = name.split(" ")[0] if bad == "a number" else f"a metric of logits [2, 4, {d_vocab}]"
        assert expected_where in message, name
        assert [entry.name for entry in new] == [], name


@pytest.mark.parametrize("method", METHODS)
def test_each_of_these_methods_runs_with_a_metric_it_can_read(method):
    METHODS[method](without_config(), logit_difference([1, 2], 9, position=-4))
