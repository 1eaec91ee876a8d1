"""Patching and attribution against a transformer in NumPy and double precision, one pass per node.

What a node does is the metric of a pass with that node's value put in. Estimates are slopes: AtP's of the metric along
a node's change, the QK fix's along the change of z that a query or key makes, GradDrop's with a layer's writes held.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interp_jax.core.errors import UnsupportedModelError
from interp_jax.forward.metrics import logit_difference
from interp_jax.forward.nodes import node_set
from interp_jax.methods.activation_patching import activation_patching
from interp_jax.methods.atp import attribution_patching
from interp_jax.models.language_model import LanguageModel
from interp_jax.models.upstream import ModelConfig, Upstream
from interp_jax.transforms.sowing import layer_scope, sow

LAYERS, HEADS, KV_HEADS, D, D_HEAD, D_MLP, D_VOCAB, POS = 3, 4, 2, 8, 3, 6, 12, 5
METRIC = logit_difference(3, 7)
NAMES = ["embed", "resid_pre", "q", "k", "v", "z", "attn_out", "mlp_post", "mlp_out"]
SHAPES: dict[str, dict[str, Any]] = {
    "sequential, sliding window": {"window": 2},
    "parallel, capped scores": {"is_parallel": True, "score_cap": 2.0},
}


def forward(config: ModelConfig, params: Any, tokens: Any) -> Any:
    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    n_pos = tokens.shape[1]
    distance = np.arange(n_pos)[:, None] - np.arange(n_pos)[None]
    visible = (distance >= 0) & (distance < (config.window_of(0) or n_pos))
    x = sow(params["W_E"][tokens], name="embed")
    for layer, w in enumerate(params["layers"]):
        with layer_scope(layer):
            x = sow(x, name="resid_pre")
            q, k, v = (sow(jnp.einsum("bpm,hmd->bphd", norm(x), w[name]), name=name) for name in "qkv")
            k, v = (jnp.repeat(part, HEADS // KV_HEADS, axis=2) for part in (k, v))
            scores = 1.5 * jnp.einsum("bqhd,bkhd->bhqk", q, k)
            if config.score_cap is not None:
                scores = config.score_cap * jnp.tanh(scores / config.score_cap)
            seen = jnp.broadcast_to(jnp.asarray(visible), scores.shape)
            scores = sow(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), name="attn_scores")
            z = sow(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v), name="z")
            attn = sow(jnp.einsum("bqhd,hdm->bqm", z, w["o"]), name="attn_out")
            mid = x + attn
            hidden = sow(jnp.tanh(norm(x if config.is_parallel else mid) @ w["in"]), name="mlp_post")
            x = sow(mid + sow(hidden @ w["out"], name="mlp_out"), name="resid_post")
    return norm(x) @ params["W_U"]


@functools.lru_cache
def upstream(config: ModelConfig) -> Upstream:
    return Upstream("float64", functools.partial(forward, config))


def model(rng: np.random.Generator, shape: dict[str, Any]) -> LanguageModel:
    config = ModelConfig(
        "toy", LAYERS, D, HEADS, KV_HEADS, D_HEAD, D_MLP, D_VOCAB, POS, "tanh", False, False, "rmsnorm", 1e-6, None,
        "float32", **shape,
    )  # fmt: skip

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)

    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    layers = [
        {name: draw(n, D, D_HEAD) for name, n in heads.items()}
        | {"o": draw(HEADS, D_HEAD, D), "in": draw(D, D_MLP), "out": draw(D_MLP, D)}
        for _ in range(LAYERS)
    ]
    params = {"W_E": draw(D_VOCAB, D), "W_U": draw(D, D_VOCAB), "layers": layers}
    return LanguageModel(upstream(config), params, config=config, name="toy")


class Slow:
    """The same arithmetic in NumPy, for one prompt: every query, head and token in a loop of its own."""

    def __init__(self, lm: LanguageModel):
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), lm.params)
        assert lm.config is not None
        self.config = lm.config

    def run(self, tokens: np.ndarray, do: dict[tuple[int | None, str], Any]) -> tuple[float, dict[Any, np.ndarray]]:
        """The metric, and the value at every site; `do` has functions from a site's value to another."""
        config, values = self.config, {}

        def at(layer: int | None, name: str, value: np.ndarray) -> np.ndarray:
            values[layer, name] = do.get((layer, name), lambda own: own)(value)
            return values[layer, name]

        def norm(x: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

        x = at(None, "embed", self.params["W_E"][tokens])
        for layer, w in enumerate(self.params["layers"]):
            x = at(layer, "resid_pre", x)
            q, k, v = (at(layer, name, np.stack([norm(x) @ head for head in w[name]], 1)) for name in "qkv")
            z = np.zeros_like(q)
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                for here in range(len(tokens)):
                    first = max(0, here + 1 - config.window) if isinstance(config.window, int) else 0
                    scores = 1.5 * k[first : here + 1, shared] @ q[here, head]
                    if config.score_cap is not None:
                        scores = config.score_cap * np.tanh(scores / config.score_cap)
                    pattern = np.exp(scores - scores.max())
                    z[here, head] = pattern / pattern.sum() @ v[first : here + 1, shared]
            z = at(layer, "z", z)
            attn = at(layer, "attn_out", np.sum([z[:, head] @ w["o"][head] for head in range(HEADS)], axis=0))
            hidden = at(layer, "mlp_post", np.tanh(norm(x if config.is_parallel else x + attn) @ w["in"]))
            x = x + attn + at(layer, "mlp_out", hidden @ w["out"])
        logits = norm(x[-1]) @ self.params["W_U"]
        return logits[3] - logits[7], values

    def slope(self, tokens: np.ndarray, site: Any, change: np.ndarray, held: dict[Any, Any], step: float) -> float:
        """d metric / d value along a change of a site's value."""
        ends = [self.run(tokens, held | {site: lambda own, by=by: own + by * change})[0] for by in (step, -step)]
        return (ends[0] - ends[1]) / (2 * step)


def put(new: np.ndarray, node: Any) -> Any:
    """The function that puts one node's new value in."""

    def placed(own: np.ndarray) -> np.ndarray:
        own = own.copy()
        own[node.position if node.unit is None else (node.position, node.unit)] = new[
            node.position if node.unit is None else (node.position, node.unit)
        ]
        return own

    return placed


@pytest.mark.parametrize("shape", SHAPES)
def test_effects_and_estimates_of_some_nodes_of_every_kind(rng, shape) -> None:
    lm = model(rng, SHAPES[shape])
    clean = rng.permutation(D_VOCAB)[:POS].astype(np.int32)
    corrupted = clean.copy()
    corrupted[1:] = (clean[1:] + 1 + rng.integers(0, D_VOCAB - 1, POS - 1)) % D_VOCAB
    nodes = node_set(lm, clean[None], NAMES)
    pair = np.stack([clean, clean]), np.stack([corrupted, clean])  # The second row has the same prompt twice.
    with pytest.warns(UserWarning, match=r"Rows \[1\] are the same clean and corrupted"):
        exact, same = activation_patching(lm, *pair, metric=METRIC, nodes=nodes, progress=False).effects
    with pytest.warns(UserWarning, match=r"Rows \[1\] are the same clean and corrupted"):
        found = attribution_patching(lm, *pair, metric=METRIC, nodes=nodes)
    assert not same.any() and not found.estimates[1].any() and not found.scores[1].any()
    slow, chosen = Slow(lm), np.sort(rng.choice(nodes.n_nodes, 60, replace=False))
    plain, values = slow.run(clean, {})
    _, other = slow.run(corrupted, {})
    effects, estimates, scores = [], [], []
    for node in (nodes[int(i)] for i in chosen):
        site = (node.site.layer, node.site.name)
        change = put(other[site], node)
        patched, after = slow.run(clean, {site: change})
        effects.append(patched - plain)
        if node.site.name in ("q", "k"):  # Along the change of what the heads read, not of the query or key itself.
            site = (node.site.layer, "z")
            difference = after[site] - values[site]
        else:
            difference = change(values[site]) - values[site]
        terms = []
        for held in (None, *range(LAYERS)):
            writes = {} if held is None else {(held, name): values[held, name] for name in ("attn_out", "mlp_out")}
            hold = {at: lambda own, value=value: value for at, value in writes.items()}
            terms.append(0.0 if site in hold else slow.slope(clean, site, difference, hold, 1e-5))
        estimates.append(terms[0])
        is_inside = site[0] is not None and site[1] != "resid_pre"
        scores.append(np.abs(terms[1:]).sum() / (LAYERS - is_inside))
    size = np.abs(effects).max()
    assert size > 1e-2
    np.testing.assert_allclose(exact[chosen], effects, rtol=1e-4, atol=1e-5 * max(size, 1.0))
    np.testing.assert_allclose(found.estimates[0, chosen], estimates, rtol=1e-3, atol=3e-5 * max(size, 1.0))
    np.testing.assert_allclose(found.scores[0, chosen], scores, rtol=1e-3, atol=3e-5 * max(size, 1.0))


def test_a_cap_that_the_config_does_not_tell_of_is_refused(rng) -> None:
    capped = model(rng, {"score_cap": 0.5})
    untold = LanguageModel(capped.upstream, capped.params, name="untold")
    tokens = np.arange(POS, dtype=np.int32)[None]
    with pytest.raises(UnsupportedModelError, match=r"scores differ from scaled products[\s\S]*score_cap[\s\S]*Fix:"):
        attribution_patching(untold, tokens, tokens + 1, METRIC, node_set(untold, tokens, "q"), grad_drop=False)
