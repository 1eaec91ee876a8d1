"""The trained thing: a variant, its arrays, the scaling of what it reads and writes, and where in a model that is.

An SAE reads and writes a site's own activations, scaling included; a transcoder is the same thing with another
write site. Encode, decode, or splice the whole into a pass:

    latents = sae.encode(activations)
    logits = lm.intervene(tokens, {sae.read: sae})          # an SAE is a function of a site's value

>>> from interp_jax.methods.sae.relu import ReLU
>>> sae = SAE(ReLU(), ReLU().init(jax.random.key(0), d_in=3, n_latents=5))
>>> sae
SAE(relu, 3 -> 5 latents -> 3)
>>> sae(jnp.ones((2, 7, 3))).shape
(2, 7, 3)

Sharp edges: under a rule that scales each token by itself, latents alone do not say how large the reconstruction
is: `decode` then needs the activations too. Folding (`fold_scale`, `fold_norms`) changes the units of the latents.

Source: interp_jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from interp_jax.core.errors import InvalidInputError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.sparse_coder import SparseCoder
from interp_jax.methods.sae import parameters
from interp_jax.methods.sae.architecture import Architecture
from interp_jax.methods.sae.normalization import FOLDABLE, RULES, Normalization
from interp_jax.methods.sae.parameters import Params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "input_scaling", "output_scaling"],
    meta_fields=["architecture", "read", "write", "origin"],
)
@dataclass(frozen=True, repr=False)
class SAE(SparseCoder):
    """A sparse autoencoder or transcoder.

    Args:
        architecture: The variant.
        params: Its arrays.
        input_scaling: Of what is read.
        output_scaling: Of what is written; None for the same as the input's, as in an autoencoder.
        read: The site it reads.
        write: The site it writes; None for the one it reads.
        origin: Where it is from (model, text, ...), as pairs of name and value.
    """

    architecture: Architecture
    params: Params
    input_scaling: Normalization = field(default_factory=Normalization)
    output_scaling: Normalization | None = None
    read: Site | None = None
    write: Site | None = None
    origin: tuple[tuple[str, Any], ...] = ()

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return parameters.encoder_weights(self.params).shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is written."""
        return self.params["W_dec"].shape[1]

    @property
    def n_latents(self) -> int:
        """How many latents."""
        return self.params["W_dec"].shape[0]

    @property
    def W_enc(self) -> jax.Array:
        """The encoder's columns, `[d_in, latent]`, in units of the scaled activations."""
        return parameters.encoder_weights(self.params)

    @property
    def W_dec(self) -> jax.Array:
        """The decoder's rows, `[latent, d_out]`, in units of the scaled activations."""
        return self.params["W_dec"]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.output_scaling is not None or self.write not in (None, self.read) or self.d_in != self.d_out

    def encode(self, x: Any) -> jax.Array:
        """The latents of activations.

        Args:
            x: Activations of the read site, `[..., d_in]`; those of heads may be `[..., head, d_head]`.

        Returns:
            Latents, `[..., latent]`, float32.

        Raises:
            ShapeError: The activations have another width.
            InvalidInputError: The SAE lacks an array, or its numbers do not go together.
        """
        self._check(where="SAE.encode")
        rows, shape = self.rows(x, where="SAE.encode")
        try:
            latents = _encode(self.architecture, self.params, self.input_scaling, rows)
        except KeyError as error:
            raise self._lacks(str(error.args[0]), where="SAE.encode") from error
        return latents.reshape(*shape, self.n_latents)

    def decode(self, latents: Any, x: Any | None = None) -> jax.Array:
        """The reconstruction that latents stand for.

        Args:
            latents: `[..., latent]`.
            x: The activations that were read, `[..., d_in]`; needed where each token has a scale of its own, and by a
                transcoder with a skip.

        Returns:
            `[..., d_out]`, float32.

        Raises:
            InvalidInputError: The activations are needed.
            ShapeError: Another number of latents.
        """
        self._check(where="SAE.decode")
        latents = self.checked_latents(latents, where="SAE.decode")
        if x is None and self.input_scaling.rule not in FOLDABLE:
            raise InvalidInputError(
                four_part(
                    "Latents alone were given",
                    where="SAE.decode",
                    expected=f"the activations too: {self.input_scaling.rule!r} scales each token by itself.",
                    fix="call decode(latents, activations).",
                )
            )
        rows = None if x is None else self.rows(x, where="SAE.decode")[0]
        flat = latents.reshape(-1, self.n_latents)
        decoded = _decode(self.params, self.input_scaling, self.output_scaling, flat, rows)
        return decoded.reshape(*latents.shape[:-1], self.d_out)

    def _check(self, *, where: str) -> None:
        """Raise unless what was put together by hand goes together, as far as that costs nothing."""
        for name in ("W_dec", "b_dec"):
            if name not in self.params:
                raise self._lacks(name, where=where)
        self.architecture.check(self.n_latents)
        for name, scaling in (("input_scaling", self.input_scaling), ("output_scaling", self.output_scaling)):
            if not isinstance(scaling, Normalization | None) or (scaling is None and name == "input_scaling"):
                raise InvalidInputError(
                    four_part(
                        f"An SAE with {name} = {scaling!r:.60} was given",
                        where=where,
                        expected=f"a Normalization, with a rule of {', '.join(RULES)}, and its scale.",
                        fix='make one of activations, normalization.estimate("unit_ms", activations), or '
                        'Normalization("unit_ms", scale).',
                    )
                )

    def _lacks(self, name: str, *, where: str) -> InvalidInputError:
        return InvalidInputError(
            four_part(
                f"An SAE without {name} was given",
                where=where,
                expected=f"the arrays of the variant {self.architecture.name}; there are {', '.join(self.params)}.",
                fix="see which there are, and of which shapes, in architecture.init(key, d_in=..., n_latents=...).",
            )
        )

    def unplaced(self) -> SAE:
        """The same without sites and origin, which are no part of a program."""
        return replace(self, read=None, write=None, origin=())

    def fold_scale(self) -> SAE:
        """The same function with the input's scale inside the weights; latents come out in the model's units.

        Returns:
            An SAE whose scaling is "none".

        Raises:
            InvalidInputError: The rule has a scale for each token.
        """
        output_scaling = self.output_scaling or self.input_scaling
        for scaling in (self.input_scaling, output_scaling):
            if scaling.rule not in FOLDABLE:
                raise InvalidInputError(
                    four_part(
                        f"An SAE under the normalization {scaling.rule!r} was given",
                        where="SAE.fold_scale",
                        expected=f"one scale for all tokens: {', '.join(FOLDABLE)}.",
                        fix="use it as it is.",
                    )
                )
        into, out = jnp.asarray(self.input_scaling.scale), jnp.asarray(output_scaling.scale)
        ratio = into / out
        params = self.params | self.architecture.scaled_biases(self.params, 1 / out)
        params["b_dec"] = params["b_dec"] / out
        # For an autoencoder the ratio is 1, and a tied one has no W_enc of its own.
        if self.output_scaling is not None:
            params = {name: v * ratio if name in ("W_enc", "W_skip") else v for name, v in params.items()}
        return replace(
            self,
            architecture=self.architecture.in_units(float(1 / out)),
            params=params,
            input_scaling=Normalization(),
            output_scaling=None if self.output_scaling is None else Normalization(),
        )

    def fold_norms(self) -> SAE:
        """The same function with decoder rows of norm 1; each latent times its row's norm.

        Returns:
            The SAE.

        Raises:
            InvalidInputError: The variant's latents and rows belong together (tied, matching pursuit).
        """
        if not self.architecture.can_fold_norms or "W_enc" not in self.params:
            raise InvalidInputError(
                four_part(
                    f"A tied {self.architecture.name} SAE was given",
                    where="SAE.fold_norms",
                    expected="an encoder of its own, which can be scaled against the decoder.",
                    fix="use it as it is.",
                )
            )
        norms = jnp.linalg.norm(self.W_dec, axis=-1)
        norms = jnp.where(norms > 0, norms, 1.0)
        folded = {"W_enc": self.W_enc * norms[None], "W_dec": self.W_dec / norms[:, None]}
        return replace(self, params=self.params | folded | self.architecture.scaled_biases(self.params, norms))

    def __repr__(self) -> str:
        write = self.write if self.write is not None else self.read
        sites = f" at {self.read}" + (f" -> {write}" if self.is_transcoder else "") if self.read is not None else ""
        return f"SAE({self.architecture.name}, {self.d_in} -> {self.n_latents} latents -> {self.d_out}{sites})"


@partial(jax.jit, static_argnums=0)
def _encode(architecture: Architecture, params: Params, scaling: Normalization, x: jax.Array) -> jax.Array:
    return architecture.encode(params, scaling(x)[0])


@jax.jit
def _decode(
    params: Params, into: Normalization, out: Normalization | None, latents: jax.Array, x: jax.Array | None
) -> jax.Array:
    if x is None:
        width = parameters.encoder_weights(params).shape[0] if out is None else params["W_dec"].shape[1]
        scaled, restore = None, (out or into)(jnp.zeros((1, width)))[1]
    else:
        scaled, restore = into(x)
        restore = restore if out is None else out(jnp.zeros((1, params["W_dec"].shape[1])))[1]
    return restore(parameters.decode(params, latents, scaled))
