"""What an SAE variant is: how activations become latents, and what training asks of them.

A variant is a small frozen object of numbers (`TopK(k=32)`), no arrays: the arrays are handed to its methods, so
that one compiled program serves every SAE of a variant. It is a final class in a file of its own, listed once in
`variants.py`; the tests of the contract run over that list.

>>> from interp_jax.methods.sae.relu import ReLU
>>> variant = ReLU()
>>> params = variant.init(jax.random.key(0), d_in=3, n_latents=5)
>>> training_pass = variant.train_pass(params, jnp.ones((4, 3)), jnp.ones((4, 3)))
>>> training_pass.latents.shape, training_pass.reconstruction.shape
((4, 5), (4, 3))

Sharp edges: squared errors are summed over d_out and averaged over the batch; a sparsity coefficient from code that
averages over d_out, or sums over the batch, is another number.

Source: interp_jax.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.dense import batch_sum
from interp_jax.methods.sae.parameters import Params


class SparseLatents(NamedTuple):
    """The few latents of each row that may differ from zero.

    Args:
        values: `[batch, k]`, at least 0.
        indices: Which latents, `[batch, k]`.
    """

    values: jax.Array
    indices: jax.Array


class TrainPass(NamedTuple):
    """What one batch gives in training.

    Args:
        pre_activations: What the nonlinearity read, `[batch, latent]`; its gradient reaches the encoder only.
        latents: `[batch, latent]`, or the sparse form.
        reconstruction: `[batch, d_out]`.
        penalty: What the sparsity coefficient multiplies, a scalar: a mean over the batch.
        auxiliary: What is added whatever the coefficient, a scalar.
    """

    pre_activations: jax.Array
    latents: jax.Array | SparseLatents
    reconstruction: jax.Array
    penalty: jax.Array
    auxiliary: jax.Array


class Architecture(abc.ABC):
    """The contract of a variant; every subclass is final."""

    name: ClassVar[str]
    # Whether the squared error is measured in units of the batch's variance, as where nothing is to be balanced
    # against it but a term in the same units.
    is_normalised: ClassVar[bool] = False
    # Whether latents and decoder rows may be rescaled against each other without a change of the reconstruction.
    can_fold_norms: ClassVar[bool] = True
    # Name of the encoder's bias.
    bias: ClassVar[str] = "b_enc"

    @property
    def reads_b_dec(self) -> bool:
        """Whether `b_dec`, which is in the space that is written, is taken from what is read."""
        return getattr(self, "is_centred", False)

    def init(self, key: jax.Array, *, d_in: int, n_latents: int, d_out: int | None = None, **options: Any) -> Params:
        """The arrays at the start.

        Args:
            key: Random key.
            d_in: Width of what is read.
            n_latents: How many latents.
            d_out: Width of what is written; None for the same as `d_in`.
            options: As in `init_params`.

        Returns:
            The arrays.

        Raises:
            InvalidInputError: The numbers do not go together.
        """
        self.check(n_latents)
        if d_out not in (None, d_in) and self.reads_b_dec:
            raise InvalidInputError(
                four_part(
                    f"d_in = {d_in} and d_out = {d_out} were given",
                    where=f"{self}",
                    expected="the same width: b_dec, which is written, is subtracted from what is read.",
                    fix="use a variant with is_centred=False, such as TopK(k, is_centred=False).",
                )
            )
        params = parameters.init_params(key, d_in=d_in, n_latents=n_latents, d_out=d_out, **options)
        return dict(sorted((params | self.extra_params(n_latents)).items()))

    def check(self, n_latents: int) -> None:  # noqa: B027 - most variants go with any number of latents
        """Raise `InvalidInputError` if the variant does not go with so many latents."""

    def extra_params(self, n_latents: int) -> Params:
        """The arrays beyond the four all variants have, as they begin."""
        del n_latents
        return {}

    def pre_activations(self, params: Params, x: jax.Array, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """What the nonlinearity reads, `[batch, latent]`, and the same with a gradient to the encoder only.

        Args:
            params: The arrays.
            x: `[batch, d_in]`.
            dtype: What the product's factors are rounded to.

        Returns:
            Both.
        """
        return parameters.pre_activations(params, x, is_centred=self.reads_b_dec, bias=self.bias, dtype=dtype)

    @abc.abstractmethod
    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The latents of activations.

        Args:
            params: The arrays.
            x: `[batch, d_in]`.

        Returns:
            Latents, `[batch, latent]`, at least 0.
        """

    @abc.abstractmethod
    def train_pass(self, params: Params, x: jax.Array, y: jax.Array, *, dtype: Any = jnp.float32) -> TrainPass:
        """One batch, with what the loss is made of.

        Args:
            params: The arrays.
            x: What is read, `[batch, d_in]`.
            y: What is to be written, `[batch, d_out]`; `x` itself for an autoencoder.
            dtype: What the factors of products are rounded to.

        Returns:
            The parts.
        """

    def observed(self, params: Params, latents: jax.Array | SparseLatents, step: jax.Array) -> Params:
        """The arrays with what is learned by counting rather than by gradients, after a batch.

        Args:
            params: The arrays.
            latents: The batch's.
            step: How many batches came before.

        Returns:
            The arrays.
        """
        del latents, step
        return params

    def in_units(self, factor: float) -> Architecture:
        """The variant whose own numbers, where they are in units of the activations, are `factor` times as large."""
        del factor
        return self

    def scaled_biases(self, params: Params, factors: jax.Array) -> Params:
        """All that is added to or compared with pre-activations, `factors` times as large.

        With `W_enc` (or the activations) times as large as well, so are the latents.

        Args:
            params: The arrays.
            factors: Above 0, `[latent]` or a scalar.

        Returns:
            The scaled ones of the arrays.
        """
        return {"b_enc": params["b_enc"] * factors}


def fired(latents: jax.Array | SparseLatents, n_latents: int) -> jax.Array:
    """How many rows of the batch each latent is above 0 in, `[latent]`."""
    if not isinstance(latents, SparseLatents):
        return batch_sum(lambda rows: rows > 0, latents, dtype=jnp.int32)
    counts = jnp.zeros(n_latents, jnp.int32)
    return counts.at[latents.indices.reshape(-1)].add((latents.values > 0).reshape(-1).astype(jnp.int32))


def squared_error(y: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Squared error, summed over d_out and averaged over the batch."""
    return jnp.square(y - reconstruction).sum(axis=-1).mean()
