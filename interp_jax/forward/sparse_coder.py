"""What a sparse coder is: from the activations of a site to few latents, and from these to what is written to a site.

An SAE is one; so is a pursuit over a fixed dictionary, or an encoder of which only the k largest latents are kept. What
splices coders into a pass, and what measures them there, knows this contract and nothing else.

    coder.encode(x)          latents [..., latent], most of them 0
    coder.decode(f, x)       what is written, [..., d_out]
    coder.reconstruct(x)     the same of the coder's own latents, by the shortest way
    coder(x)                 that in the activations' dtype and form: an intervention, or a value for the loop

The plainest coder there is, which keeps what is above 0:

>>> from dataclasses import dataclass
>>> @jax.tree_util.register_static
... @dataclass(frozen=True)
... class Positive(SparseCoder):
...     d: int
...     read = write = None
...     d_in = d_out = n_latents = property(lambda self: self.d)
...     W_enc = W_dec = property(lambda self: jnp.eye(self.d))
...     def encode(self, x):
...         return jnp.maximum(self.rows(x, where="Positive.encode")[0], 0).reshape(jnp.shape(x))
...     def decode(self, latents, x=None):
...         return latents
>>> Positive(2)(jnp.array([[3.0, -1.0]])).tolist()
[[3.0, 0.0]]

Sharp edges: a coder is a pytree, so it can be traced; its sites are no part of a program (`unplaced`). Latents may be
below 0 where a pursuit allows it: those that differ from 0 count as active.

Source: interp_jax.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from interp_jax.core.errors import ShapeError, four_part
from interp_jax.core.sites import Site


class SparseCoder(abc.ABC):
    """The contract: a frozen dataclass that is a pytree. The sites may be None until it is spliced somewhere."""

    read: Site | None
    write: Site | None

    @property
    @abc.abstractmethod
    def d_in(self) -> int:
        """Width of what is read."""

    @property
    @abc.abstractmethod
    def d_out(self) -> int:
        """Width of what is written."""

    @property
    @abc.abstractmethod
    def n_latents(self) -> int:
        """How many latents."""

    @property
    @abc.abstractmethod
    def W_enc(self) -> jax.Array:
        """The directions in which latents are detected, `[d_in, latent]`."""

    @property
    @abc.abstractmethod
    def W_dec(self) -> jax.Array:
        """What each latent stands for, `[latent, d_out]`."""

    @abc.abstractmethod
    def encode(self, x: Any) -> jax.Array:
        """The latents of activations.

        Args:
            x: Activations of the read site, `[..., d_in]`; those of heads may be `[..., head, d_head]`.

        Returns:
            Latents, `[..., latent]`, float32.
        """

    @abc.abstractmethod
    def decode(self, latents: Any, x: Any | None = None) -> jax.Array:
        """The reconstruction that latents stand for.

        Args:
            latents: `[..., latent]`.
            x: The activations that were read; some coders need them.

        Returns:
            `[..., d_out]`, float32.
        """

    def reconstruct(self, x: Any) -> jax.Array:
        """What the coder makes of activations `x`, `[..., d_out]`, float32."""
        return self.decode(self.encode(x), x)

    def __call__(self, x: Any) -> jax.Array:
        """The reconstruction of activations, in their dtype.

        Args:
            x: Activations of the read site, `[..., d_in]`.

        Returns:
            `[..., d_out]`; heads are apart as they came.
        """
        x = jnp.asarray(x)
        written = self.reconstruct(x).astype(x.dtype)
        return written.reshape(x.shape) if written.size == x.size else written

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.write not in (None, self.read) or self.d_in != self.d_out

    def unplaced(self) -> Self:
        """The same without sites: one program serves coders of one kind at all of them."""
        return replace(self, read=None, write=None)  # type: ignore[type-var]

    def rows(self, x: Any, *, where: str) -> tuple[jax.Array, tuple[int, ...]]:
        """Activations one below the other.

        Args:
            x: Activations of the read site.
            where: The public call, for error messages.

        Returns:
            float32 `[batch, d_in]`, and the shape of the axes before the last.

        Raises:
            ShapeError: They have another width, or are no floats.
        """
        x = jnp.asarray(x)
        if x.ndim > 1 and x.shape[-1] != self.d_in and x.shape[-2] * x.shape[-1] == self.d_in:
            x = x.reshape(*x.shape[:-2], self.d_in)  # What heads hold, side by side.
        if x.ndim < 1 or x.shape[-1] != self.d_in or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ShapeError(
                four_part(
                    f"{x.dtype} activations of shape {x.shape} were given",
                    where=where,
                    expected=f"floats, [..., {self.d_in}]"
                    + (f", of the site {self.read}." if self.read is not None else "."),
                    fix="give activations of the site that the SAE was trained on.",
                )
            )
        return x.reshape(-1, self.d_in).astype(jnp.float32), x.shape[:-1]

    def checked_latents(self, latents: Any, *, where: str) -> jax.Array:
        """Latents as float32, `[..., latent]`, once there are as many as `where` needs.

        Raises:
            ShapeError: Another number of latents.
        """
        latents = jnp.asarray(latents, jnp.float32)
        if latents.ndim < 1 or latents.shape[-1] != self.n_latents:
            raise ShapeError(
                four_part(
                    f"Latents of shape {latents.shape} were given",
                    where=where,
                    expected=f"[..., {self.n_latents}].",
                    fix="pass what encode returns.",
                )
            )
        return latents


class Prefixes(NamedTuple):
    """What a coder makes of activations with some numbers of steps.

    Args:
        reconstructions: float32 `[prefix, ..., d_out]`.
        n_active: How many latents differ from 0, int32 `[prefix, ...]`; at most the number of steps.
    """

    reconstructions: jax.Array
    n_active: jax.Array


class PrefixCoder(SparseCoder):
    """A coder that chooses one latent after the other: one run says what fewer steps would have come to."""

    @abc.abstractmethod
    def prefixes(self, x: Any, ks: tuple[int, ...]) -> Prefixes:
        """What the coder makes of activations after some numbers of steps.

        Args:
            x: Activations of the read site, `[..., d_in]`.
            ks: Numbers of steps; the coder's own k does not matter.

        Returns:
            The reconstructions, and how many latents each has.

        Raises:
            InvalidInputError: A number below 1 or above the number of latents.
            ShapeError: The activations have another width.
        """
