"""An SAE of which only the k largest latents of each token are kept: sparsity chosen when it is used.

    f'_j = f_j  if f_j is among the k largest in magnitude (the lower number first where two are equal), else 0

Beside a pursuit over the same dictionary this is what the SAE's own encoder comes to at the same number of latents.

    logits = spliced_logits(lm, TopLatents(sae, k=16), tokens)

>>> from interp_jax.methods.sae.relu import ReLU
>>> from interp_jax.methods.sae.sae import SAE
>>> params = {"W_enc": jnp.eye(3), "b_enc": jnp.zeros(3), "W_dec": jnp.eye(3), "b_dec": jnp.zeros(3)}
>>> TopLatents(SAE(ReLU(), params), k=1).encode(jnp.array([[1.0, 2.0, 2.0]])).tolist()
[[0.0, 2.0, 0.0]]

Sharp edges: latents are compared as they are; where decoder rows differ in norm, fold the norms first (`fold_norms`).
Fewer than k are active where the encoder gives fewer.

Source: interp_jax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.core.sites import Site
from interp_jax.forward.sparse_coder import PrefixCoder, Prefixes, SparseCoder
from interp_jax.methods.sae.sparse import largest
from interp_jax.methods.sae.top_k import check_k


@partial(jax.tree_util.register_dataclass, data_fields=["sae"], meta_fields=["k"])
@dataclass(frozen=True, repr=False)
class TopLatents(PrefixCoder):
    """The k largest latents of another coder.

    Args:
        sae: The SAE, or another coder.
        k: How many latents of a token are kept.
    """

    sae: SparseCoder
    k: int

    @property
    def read(self) -> Site | None:  # type: ignore[override]
        """The site the SAE reads."""
        return self.sae.read

    @property
    def write(self) -> Site | None:  # type: ignore[override]
        """The site it writes; None for the one it reads."""
        return self.sae.write

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.sae.d_in

    @property
    def d_out(self) -> int:
        """Width of what is written."""
        return self.sae.d_out

    @property
    def n_latents(self) -> int:
        """How many latents, kept or not."""
        return self.sae.n_latents

    @property
    def W_enc(self) -> jax.Array:
        """The SAE's."""
        return self.sae.W_enc

    @property
    def W_dec(self) -> jax.Array:
        """The SAE's."""
        return self.sae.W_dec

    def encode(self, x: Any) -> jax.Array:
        """The largest latents of activations.

        Args:
            x: Activations of the read site, `[..., d_in]`.

        Returns:
            Latents, `[..., latent]`, float32.

        Raises:
            InvalidInputError: k is below 1 or above the number of latents.
            ShapeError: The activations have another width.
        """
        check_k(self.k, self.n_latents, where=f"{self}")
        latents = self.sae.encode(x)
        return _kept(latents, _places(latents, self.k))

    def decode(self, latents: Any, x: Any | None = None) -> jax.Array:
        """What the SAE makes of `latents` (of activations `x`, where it needs them), `[..., d_out]`."""
        return self.sae.decode(latents, x)

    def prefixes(self, x: Any, ks: tuple[int, ...]) -> Prefixes:
        """What the SAE makes of activations with some numbers of latents.

        Args:
            x: Activations of the read site, `[..., d_in]`.
            ks: Numbers of latents.

        Returns:
            The reconstructions, and how many latents each has.

        Raises:
            InvalidInputError: A number below 1 or above the number of latents.
            ShapeError: The activations have another width.
        """
        for k in ks:
            check_k(k, self.n_latents, where=f"{self}, prefixes")
        latents = self.sae.encode(x)
        places = _places(latents, max(ks))
        kept = [_kept(latents, places[..., :k]) for k in ks]
        n_active = [(part != 0).sum(axis=-1, dtype=jnp.int32) for part in kept]
        return Prefixes(jnp.stack([self.sae.decode(part, x) for part in kept]), jnp.stack(n_active))

    def unplaced(self) -> TopLatents:
        """The same without sites."""
        return replace(self, sae=self.sae.unplaced())

    def __repr__(self) -> str:
        return f"TopLatents({self.sae}, k={self.k})"


def _places(latents: jax.Array, k: int) -> jax.Array:
    """Which latents are the k largest, `[..., k]`, the largest first and of equal ones the lower number."""
    flat = jnp.abs(latents).reshape(-1, latents.shape[-1])
    return largest(flat, k)[1].reshape(*latents.shape[:-1], k)


@jax.jit
def _kept(latents: jax.Array, places: jax.Array) -> jax.Array:
    flat, at = latents.reshape(-1, latents.shape[-1]), places.reshape(-1, places.shape[-1])
    kept = jnp.take_along_axis(flat, at, axis=-1)
    return jnp.zeros_like(flat).at[jnp.arange(len(flat))[:, None], at].set(kept).reshape(latents.shape)
