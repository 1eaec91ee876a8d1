"""What each latent does by itself to the model's prediction, and which latents point the same way.

A decoder row is added to the residual stream; the final norm multiplies it with a gain (a LayerNorm takes its mean
off first) and divides it by a scale that is the same for all tokens; the unembedding makes logits of it:

    effect = Unembed(gain * row / |row|) - mean over the vocabulary, which a softmax does not see

The scale differs from token to token and is left out, and so is the row's norm, which depends on the units of the
latents: effects compare tokens and latents. What is written before an MLP's or a head's output weights goes through
these.

>>> found = nearest_rows(np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]), np.array([0]), 2)
>>> found.latent.tolist(), found.cosine.tolist()
([[2, 1]], [[0.0, -1.0]])

Sharp edges: this is the direct path alone; what later layers make of a row is not in it. Sites from which no single
matrix leads to the residual stream (queries, keys) have no such effects.

Source: nostalgebraist 2020 for the decoding; Bricken et al. 2023 for logit effects of latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from interp_jax.core.sites import Site
from interp_jax.forward.readout import norm_parts, norm_readout
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.transforms.compilations import counted_jit

if TYPE_CHECKING:
    from interp_jax.models.language_model import LanguageModel

IN_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
# The weights through which what is written at other sites gets there.
_OUTPUT_WEIGHTS = {"mlp_post": "W_out", "z": "W_O"}
N_BINS = 40
# What a block of logits, or of cosines, may take.
_BLOCK_BYTES = 2**27


class LogitEffects(NamedTuple):
    """The tokens each latent makes more and less likely.

    Args:
        top_ids: Ids of the tokens that gain most, best first, `[latent, k]`.
        top: Their effects, in logits at norm and scale 1, float32.
        bottom_ids: Ids of those that lose most, worst first.
        bottom: Their effects.
        counts: How many tokens have which effect, `[latent, bin]`; the bins cut the range from `bottom[:, 0]` to
            `top[:, 0]` in equal parts.
    """

    top_ids: np.ndarray
    top: np.ndarray
    bottom_ids: np.ndarray
    bottom: np.ndarray
    counts: np.ndarray


class Neighbours(NamedTuple):
    """The latents whose decoder rows point most the same way, nearest first; arrays are `[latent, k]`.

    Args:
        latent: Their numbers.
        cosine: The cosines of the rows.
    """

    latent: np.ndarray
    cosine: np.ndarray


def logit_effects(
    lm: LanguageModel, sae: SparseCoder, write: Site, latents: np.ndarray, *, n_tokens: int = 10
) -> LogitEffects | None:
    """The effects of latents on the logits.

    Args:
        lm: The model.
        sae: The SAE.
        write: The site it writes.
        latents: Which latents.
        n_tokens: How many tokens to keep at either end.

    Returns:
        The effects; None where the way to the logits is not known: the model does not say what its final norm or
        its unembedding is, or the site does not lead to the residual stream through one matrix.

    Raises:
        UnsupportedModelError: The final norm is no LayerNorm or RMSNorm.
    """
    if lm.upstream.ln_final is None or lm.upstream.unembed is None:
        return None
    W_out = _output_weights(lm, write)
    if W_out is None and write.name not in IN_RESIDUAL:
        return None
    rows = _unit(np.asarray(sae.W_dec, np.float32)[latents])
    d_model = rows.shape[1] if W_out is None else W_out.shape[1]
    dtype = next(row.value.dtype for row in lm.sites().rows if row.site == write)
    residual = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, d_model)), dtype)
    norm_readout(lm, residual, np.zeros(d_model, np.float32), np.ones((1, 1), bool), where="logit_effects")
    gain, _, is_centring = norm_parts(lm, residual)
    n_vocab = jax.eval_shape(lm.upstream.unembed, lm.params, residual).shape[-1]
    n_block = int(np.clip(_BLOCK_BYTES // (4 * n_vocab), 1, max(len(rows), 1)))
    parts = []
    for start in range(0, len(rows), n_block):
        block = rows[start : start + n_block] if W_out is None else rows[start : start + n_block] @ W_out
        block = block - block.mean(axis=1, keepdims=True) if is_centring else block
        block = jnp.asarray(np.resize(block * gain.astype(np.float32), (n_block, d_model)), residual.dtype)
        found = _effects(lm.upstream.unembed, lm.params, block, n_tokens=min(n_tokens, n_vocab))
        n_new = min(n_block, len(rows) - start)
        parts.append([np.asarray(part)[:n_new] for part in found])
    return LogitEffects(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _output_weights(lm: LanguageModel, write: Site) -> np.ndarray | None:
    """The matrix from a site to the residual stream, `[d_out, d_model]`, or None."""
    name = _OUTPUT_WEIGHTS.get(write.name)
    if name is None or name not in lm.upstream.layer_weights:
        return None
    W = np.asarray(lm.weight(name, write.layer), np.float32)
    return W.reshape(-1, W.shape[-1])


def _effects_of_rows(unembed: Any, params: Any, rows: jax.Array, *, n_tokens: int) -> tuple[jax.Array, ...]:
    # The derivative at 0: a bias is no effect of a row, and a soft cap is the identity there.
    _, logits = jax.jvp(lambda residual: unembed(params, residual), (jnp.zeros_like(rows)[None],), (rows[None],))
    logits = logits[0].astype(jnp.float32)
    logits = logits - logits.mean(axis=1, keepdims=True)
    top, top_ids = lax.top_k(logits, n_tokens)
    bottom, bottom_ids = lax.top_k(-logits, n_tokens)

    def histogram(row: jax.Array) -> jax.Array:
        low, high = row.min(), row.max()
        width = jnp.where(high > low, high - low, 1.0)
        bins = jnp.clip((N_BINS * ((row - low) / width)).astype(jnp.int32), 0, N_BINS - 1)
        return jnp.zeros(N_BINS, jnp.int32).at[bins].add(1)

    return top_ids, top, bottom_ids, -bottom, lax.map(histogram, logits)


_effects = counted_jit(_effects_of_rows, name="sae.logit_effects", static_argnums=0, static_argnames=("n_tokens",))


def nearest_rows(rows: Any, latents: np.ndarray, k: int) -> Neighbours:
    """For each of some latents the others whose decoder rows have the largest cosines with its own.

    Args:
        rows: All decoder rows, `[latent, d]`.
        latents: Of which latents.
        k: How many neighbours; fewer if there are not so many other latents.

    Returns:
        The neighbours. The cosine with a row of zeros is 0.
    """
    unit = jnp.asarray(_unit(np.asarray(rows, np.float32)))
    k = min(k, len(unit) - 1)
    n_block = int(np.clip(_BLOCK_BYTES // (4 * len(unit)), 1, max(len(latents), 1)))
    parts = []
    for start in range(0, len(latents), n_block):
        block = latents[start : start + n_block]
        cosines, found = _nearest(unit, np.resize(block, n_block), k=k)
        parts.append((np.asarray(found)[: len(block)], np.asarray(cosines)[: len(block)]))
    return Neighbours(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _unit(rows: np.ndarray) -> np.ndarray:
    """The rows at norm 1; zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _nearest_in_block(unit: jax.Array, block: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    cosines = jnp.matmul(unit[block], unit.T, precision=lax.Precision.HIGHEST)
    is_self = jnp.arange(len(unit))[None] == block[:, None]
    return lax.top_k(jnp.where(is_self, -jnp.inf, cosines), k)


_nearest = counted_jit(_nearest_in_block, name="sae.nearest_rows", static_argnames=("k",))
