"""Site contracts: the identities that hold only if every tag stands where its name says.

A tag in the wrong place gives numbers of the right shape and the wrong meaning. Each contract here compares sites
with each other, or with the weights, and yields what it found; `interp_jax.models.check` runs them and reports. Their
arithmetic is NumPy in double precision: nothing of the model's own code is compared with itself.

>>> x = np.ones((1, 2, 4), np.float32)
>>> values = {Site(0, "resid_pre"): x, Site(0, "mlp_out"): x, Site(0, "resid_post"): 3 * x}
>>> contract = next(contract for contract in CONTRACTS if contract.sites[0] == "resid_post")
>>> [(str(finding.site), finding.error) for finding in contract.measure(Evidence(values, None))]
[('0.resid_post', 1.0)]

Sharp edges: identities with a sum of products hold to a tolerance that depends on the dtype; the others are exact
but for the rounding of one sum. What a padded query looks at is unspecified, and not judged.

Source: the identities are the definitions of TransformerLens's hook points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.core.sites import Site
from interp_jax.models.upstream import ModelConfig

# The names of a config's nonlinearity, and what it computes: written out here, so that upstream is not compared with
# itself.
ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: np.asarray(jax.scipy.stats.norm.cdf(x.astype(np.float32)), np.float64) * x,
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


class Finding(NamedTuple):
    """One comparison a contract made: the site, the largest error there, and the error that is allowed."""

    site: Site
    error: float
    allowed: float


@dataclass(frozen=True)
class Evidence:
    """What the contracts look at: the values of all sites of one pass, and what is known about the model.

    Args:
        values: Value of each site.
        result: What the function returned.
        is_token: Where there are tokens and not padding, `[batch, pos]`, if known.
        config: The model's shape, if known.
        weight: `(name, layer) -> array`, for the weights of `weight_names`.
        weight_names: The weights there are.
        decode: `residual -> logits`, the final norm and unembedding, if known.
    """

    values: Mapping[Site, Any]
    result: Any
    is_token: np.ndarray | None = None
    config: ModelConfig | None = None
    weight: Callable[[str, int | None], Any] | None = None
    weight_names: tuple[str, ...] = ()
    decode: Callable[[Any], Any] | None = None
    _double: dict[Site, np.ndarray] = field(default_factory=dict)

    def __call__(self, layer: int | None, name: str) -> np.ndarray:
        """The value of a site in double precision."""
        site = Site(layer, name)
        if site not in self._double:
            self._double[site] = np.asarray(self.values[site], np.float64)
        return self._double[site]

    def has(self, layer: int | None, *names: str) -> bool:
        """Whether the sites of these `names` are there in a layer."""
        return all(Site(layer, name) in self.values for name in names)

    def w(self, name: str, layer: int) -> np.ndarray:
        """The weight of this name and layer in double precision; zero for a bias the model does not have."""
        if name not in self.weight_names or self.weight is None:
            return np.zeros(())
        return np.asarray(self.weight(name, layer), np.float64)

    @property
    def layers(self) -> list[int]:
        """The layers there are."""
        return sorted({site.layer for site in self.values if site.layer is not None})

    def rounding(self, site: Site, *, n_roundings: int = 4) -> float:
        """Relative error of `n_roundings` roundings in the site's dtype."""
        return n_roundings * float(jnp.finfo(self.values[site].dtype).eps)

    def product(self, site: Site) -> float:
        """Relative error allowed at a site where sums of products are compared."""
        eps = float(jnp.finfo(self.values[site].dtype).eps)
        return max(1e-4, 8 * eps)


class Contract(NamedTuple):
    """An identity between sites.

    Args:
        identity: The identity.
        sites: The sites it is about, the one to blame first.
        measure: Yields a finding per comparison; none if it does not apply to this model.
        needs: What it needs besides, for the report when it does not apply.
    """

    identity: str
    sites: tuple[str, ...]
    measure: Callable[[Evidence], Iterator[Finding]]
    needs: str = ""


def _compare(site: Site, actual: Any, expected: Any, relative: float, scale: Any = None) -> Finding:
    """Largest difference; what is allowed is `relative` times the largest magnitude that went in."""
    if np.shape(actual) != np.shape(expected):
        return Finding(site, float("inf"), 0.0)
    error = np.abs(np.subtract(actual, expected, dtype=np.float64))
    largest = max(float(np.max(np.abs(part), initial=0.0)) for part in (expected, scale if scale is not None else 0.0))
    return Finding(site, float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0)), relative * largest)


def _resid_mid(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if e.has(i, "resid_mid", "resid_pre", "attn_out"):
            site, parts = Site(i, "resid_mid"), (e(i, "resid_pre"), e(i, "attn_out"))
            yield _compare(site, e(*site), sum(parts), e.rounding(site), np.stack([np.abs(p).max() for p in parts]))


def _resid_post(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if not e.has(i, "resid_post"):
            continue
        if e.has(i, "resid_mid", "mlp_out"):
            names = ["resid_mid", "mlp_out"]
        else:
            names = [name for name in ("resid_pre", "attn_out", "mlp_out") if e.has(i, name)]
            if len(names) < 2 or names[0] != "resid_pre":
                continue
        site, parts = Site(i, "resid_post"), [e(i, name) for name in names]
        yield _compare(site, e(*site), sum(parts), e.rounding(site), np.stack([np.abs(p).max() for p in parts]))


def _chain(e: Evidence) -> Iterator[Finding]:
    for i, j in zip(e.layers, e.layers[1:], strict=False):
        if e.has(i, "resid_post") and e.has(j, "resid_pre"):
            yield _compare(Site(j, "resid_pre"), e(j, "resid_pre"), e(i, "resid_post"), 0.0)


def _start(e: Evidence) -> Iterator[Finding]:
    if e.layers and e.has(None, "embed") and e.has(e.layers[0], "resid_pre"):
        site = Site(e.layers[0], "resid_pre")
        parts = [e(None, name) for name in ("embed", "pos_embed") if e.has(None, name)]
        yield _compare(site, e(*site), sum(np.broadcast_arrays(*parts)), e.rounding(site))


def _scores(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        query, key = ("rot_q", "rot_k") if e.has(i, "rot_q", "rot_k") else ("q", "k")
        if not e.has(i, "attn_scores", query, key) or e.is_token is None:
            continue
        site, q, k = Site(i, "attn_scores"), e(i, query), e(i, key)
        k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
        expected = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        seen = np.broadcast_to(_visible(e, i), expected.shape)
        actual = np.where(seen, e(*site), 0) if expected.shape == e(*site).shape else e(*site)
        scale = np.abs(q).max() * np.abs(k).max() * np.sqrt(q.shape[-1])
        # Upstream may cast to either dtype before it multiplies.
        relative = max(e.product(site), e.product(Site(i, query)))
        yield _compare(site, actual, np.where(seen, expected, 0), relative, scale)


def _visible(e: Evidence, layer: int) -> np.ndarray:
    """Where a token may look in a layer, `[batch, 1, query, key]`; false at padded queries."""
    assert e.is_token is not None
    is_token, n_pos = e.is_token, e.is_token.shape[1]
    causal = np.tril(np.ones((n_pos, n_pos), bool))
    if e.config is not None and (window := e.config.window_of(layer)) is not None:
        causal &= ~np.tril(causal, -window)
    return (causal & is_token[:, None, :] & is_token[:, :, None])[:, None]


def _rows(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if e.has(i, "pattern"):
            site, pattern = Site(i, "pattern"), e(i, "pattern")
            if (pattern < 0).any():
                yield Finding(site, float(-pattern.min()), 0.0)
            yield _compare(site, pattern.sum(-1), np.ones(pattern.shape[:-1]), e.product(site))


def _mask(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if e.has(i, "pattern") and e.is_token is not None:
            site, pattern = Site(i, "pattern"), e(i, "pattern")
            queries = e.is_token[:, None, :, None]
            hidden = queries & ~_visible(e, i)
            if pattern.ndim != 4 or pattern.shape[2:] != hidden.shape[2:]:
                yield Finding(site, float("inf"), 0.0)
            else:
                yield Finding(site, float(np.where(hidden, np.abs(pattern), 0).max()), 0.0)


def _softmax(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if e.has(i, "pattern", "attn_scores"):
            site, scores = Site(i, "pattern"), e(i, "attn_scores")
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            yield _compare(site, e(*site), powers / powers.sum(-1, keepdims=True), e.product(site))


def _z(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        if e.has(i, "z", "pattern", "v"):
            site, pattern, v = Site(i, "z"), e(i, "pattern"), e(i, "v")
            v = np.repeat(v, pattern.shape[1] // v.shape[2], axis=2)
            yield _compare(site, e(*site), np.einsum("bhqk,bkhd->bqhd", pattern, v), e.product(site), np.abs(v).max())


def _attn_out(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        # What is normed before it is added to the residual stream is a site of its own.
        name = "attn_proj" if e.has(i, "attn_proj") else "attn_out"
        if e.has(i, "z", name) and "W_O" in e.weight_names:
            site, z, w_o = Site(i, name), e(i, "z"), e.w("W_O", i)
            expected = np.einsum("bphd,hdm->bpm", z, w_o) + e.w("b_O", i)
            scale = np.einsum("bphd,hdm->bpm", np.abs(z), np.abs(w_o))
            yield _compare(site, e(*site), expected, e.product(site), scale)


def _mlp_post(e: Evidence) -> Iterator[Finding]:
    activation = None if e.config is None else ACTIVATIONS.get(e.config.activation)
    for i in e.layers:
        if activation is not None and e.has(i, "mlp_post", "mlp_pre"):
            site, pre = Site(i, "mlp_post"), e(i, "mlp_pre")
            expected = activation(e(i, "mlp_gate")) * pre if e.has(i, "mlp_gate") else activation(pre)
            yield _compare(site, e(*site), expected, e.product(site))


def _mlp_out(e: Evidence) -> Iterator[Finding]:
    for i in e.layers:
        name = "mlp_proj" if e.has(i, "mlp_proj") else "mlp_out"
        if e.has(i, "mlp_post", name) and "W_out" in e.weight_names:
            site, post, w_out = Site(i, name), e(i, "mlp_post"), e.w("W_out", i)
            scale = np.abs(post) @ np.abs(w_out)
            yield _compare(site, e(*site), post @ w_out + e.w("b_out", i), e.product(site), scale)


def _projections(e: Evidence) -> Iterator[Finding]:
    is_parallel = e.config is not None and e.config.is_parallel
    for i in e.layers:
        # One norm is enough for both where they run in parallel.
        ln2 = "ln1" if is_parallel and not e.has(i, "ln2") else "ln2"
        for name, normed in (("q", "ln1"), ("k", "ln1"), ("v", "ln1"), ("mlp_gate", ln2), ("mlp_pre", ln2)):
            weight = {"mlp_gate": "W_gate", "mlp_pre": "W_in"}.get(name, f"W_{name.upper()}")
            bias = {"mlp_gate": "b_gate", "mlp_pre": "b_in"}.get(name, f"b_{name.upper()}")
            if not e.has(i, name, normed) or weight not in e.weight_names:
                continue
            site, x, w = Site(i, name), e(i, normed), e.w(weight, i)
            formula = "bpm,hmd->bphd" if w.ndim == 3 else "bpm,md->bpd"
            scale = np.einsum(formula, np.abs(x), np.abs(w))
            yield _compare(site, e(*site), np.einsum(formula, x, w) + e.w(bias, i), e.product(site), scale)


def _lens(e: Evidence) -> Iterator[Finding]:
    if e.layers and e.decode is not None and e.has(e.layers[-1], "resid_post") and e.has(None, "logits"):
        view = e.decode(e.values[Site(e.layers[-1], "resid_post")])
        yield _compare(Site(None, "logits"), e(None, "logits"), np.asarray(view, np.float64), 0.0)


def _logits(e: Evidence) -> Iterator[Finding]:
    if e.has(None, "logits") and isinstance(e.result, (jax.Array, np.ndarray)):
        yield _compare(Site(None, "logits"), e(None, "logits"), np.asarray(e.result, np.float64), 0.0)


CONTRACTS = (
    Contract("first resid_pre = embed (+ pos_embed)", ("resid_pre", "embed"), _start),
    Contract("q, k, v, mlp_pre, mlp_gate = normed input W + b", ("q",), _projections, "weights"),
    Contract("attn_scores = q k / sqrt(d_head) where visible", ("attn_scores", "q", "k"), _scores, "tokens"),
    Contract("pattern = softmax(attn_scores)", ("pattern", "attn_scores"), _softmax),
    Contract("pattern rows are >= 0 and sum to 1", ("pattern",), _rows),
    Contract("pattern is 0 at later keys and at padding", ("pattern",), _mask, "tokens"),
    Contract("z = pattern v", ("z", "pattern", "v"), _z),
    Contract("attn_out = sum over heads of z W_O + b_O", ("attn_out", "z"), _attn_out, "weights"),
    Contract("resid_mid = resid_pre + attn_out", ("resid_mid", "resid_pre", "attn_out"), _resid_mid),
    Contract("mlp_post = act(mlp_gate) mlp_pre, or act(mlp_pre)", ("mlp_post", "mlp_pre"), _mlp_post, "a config"),
    Contract("mlp_out = mlp_post W_out + b_out", ("mlp_out", "mlp_post"), _mlp_out, "weights"),
    Contract("resid_post = resid_pre + writes", ("resid_post", "resid_pre", "mlp_out"), _resid_post),
    Contract("resid_pre = the layer before's resid_post", ("resid_pre", "resid_post"), _chain, "two layers"),
    Contract("logits = unembed(ln_final(last resid_post))", ("logits", "resid_post"), _lens, "ln_final and unembed"),
    Contract("logits are what is returned", ("logits",), _logits),
)
