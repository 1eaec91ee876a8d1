"""A pursuit as an encoder: inference-time optimisation over a fixed dictionary, wherever an SAE could be.

    r = x - b_dec;  f = the pursuit's coefficients of r over the dictionary;  x' = f W_dec + b_dec

It reads and writes raw activations of one site. An SAE's dictionary comes with the SAE's own scaling, under which the
coefficients are in the units of its latents, whatever the rule:

    own = {"b_dec": sae.params["b_dec"], "scaling": sae.input_scaling, "read": sae.read}
    logits = spliced_logits(lm, encoder(GradientPursuit(), sae.W_dec, k=32, **own), tokens)

>>> from interp_jax.methods.pursuit.gradient_pursuit import GradientPursuit
>>> ito = encoder(GradientPursuit(), jnp.array([[2.0, 0.0], [0.0, 1.0]]), k=1, b_dec=jnp.array([0.0, 1.0]))
>>> ito.encode(jnp.array([[3.0, 2.0]])).tolist(), ito(jnp.array([[3.0, 2.0]])).tolist()
([[1.5, 0.0]], [[3.0, 1.0]])

Sharp edges: coefficients are those of the atoms as they are, of norm 1 or not. A row that is not finite stays so. A
transcoder's dictionary codes what it writes, so that is the site to read here. The tolerance is in scaled units.

Source: Smith 2024, Replacing SAE Encoders with Inference-Time Optimisation (Progress Update #1 of Google DeepMind's
mechanistic interpretability team).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from interp_jax.core.errors import InvalidInputError, ShapeError, four_part
from interp_jax.core.sites import Site
from interp_jax.forward.sparse_coder import PrefixCoder, Prefixes
from interp_jax.methods.pursuit.pursue import dense_codes, pursue, reconstruct
from interp_jax.methods.pursuit.pursuit import Pursuit
from interp_jax.transforms.compilations import counted_jit

# From activations [batch, d] to scaled ones, and to the function that scales a reconstruction of them back.
Scaling = Callable[[jax.Array], tuple[jax.Array, Callable[[jax.Array], jax.Array]]]
# What the chosen atoms of the rows that are pursued at once may take.
_ATOM_BYTES = 2**28


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["dictionary", "b_dec", "scaling"],
    meta_fields=["pursuit", "k", "tolerance", "read", "write"],
)
@dataclass(frozen=True, repr=False)
class PursuitEncoder(PrefixCoder):
    """A pursuit over a dictionary; `encoder` makes one of checked parts.

    Args:
        pursuit: Which.
        dictionary: Atoms as rows, `[n_atoms, d]`.
        b_dec: What is subtracted before and added after, `[d]`.
        k: How many steps.
        scaling: Of what is read; a pytree, None for none.
        tolerance: A token is done once its residual's norm is at most this, in scaled units.
        read: The site it reads and writes.
        write: None, or the same site.
    """

    pursuit: Pursuit
    dictionary: jax.Array
    b_dec: jax.Array
    k: int
    scaling: Scaling | None = None
    tolerance: float = 0.0
    read: Site | None = None
    write: Site | None = None

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.dictionary.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is written: the same."""
        return self.dictionary.shape[1]

    @property
    def n_latents(self) -> int:
        """How many atoms."""
        return self.dictionary.shape[0]

    @property
    def W_enc(self) -> jax.Array:
        """The atoms as columns: they are detected by themselves."""
        return self.dictionary.T

    @property
    def W_dec(self) -> jax.Array:
        """The atoms."""
        return self.dictionary

    def encode(self, x: Any) -> jax.Array:
        """The coefficients of activations, one for every atom.

        Args:
            x: Activations of the read site, `[..., d]`.

        Returns:
            Latents, `[..., latent]`, float32; at most k of a token differ from 0.

        Raises:
            ShapeError: The activations have another width.
        """
        rows, shape = self.rows(x, where="PursuitEncoder.encode")
        return _latents(self.unplaced(), rows).reshape(*shape, self.n_latents)

    def decode(self, latents: Any, x: Any | None = None) -> jax.Array:
        """The reconstruction that coefficients stand for.

        Args:
            latents: `[..., latent]`.
            x: The activations that were read, `[..., d]`; needed where there is a scaling.

        Returns:
            `[..., d]`, float32.

        Raises:
            InvalidInputError: The activations are needed.
            ShapeError: Another number of latents.
        """
        latents = self.checked_latents(latents, where="PursuitEncoder.decode")
        if x is None and self.scaling is not None:
            raise InvalidInputError(
                four_part(
                    "Latents alone were given",
                    where="PursuitEncoder.decode",
                    expected="the activations too, from which the scaling is known.",
                    fix="call decode(latents, activations).",
                )
            )
        rows = None if x is None else self.rows(x, where="PursuitEncoder.decode")[0]
        decoded = _decoded(self.unplaced(), latents.reshape(-1, self.n_latents), rows)
        return decoded.reshape(*latents.shape[:-1], self.d_out)

    def reconstruct(self, x: Any) -> jax.Array:
        """The sum of the chosen atoms and `b_dec`, for activations `x`, `[..., d]`; no latent is made dense."""
        return self.prefixes(x, (self.k,)).reconstructions[0]

    def prefixes(self, x: Any, ks: tuple[int, ...]) -> Prefixes:
        """What the pursuit makes of activations after some numbers of steps, out of one run.

        Args:
            x: Activations of the read site, `[..., d]`.
            ks: Numbers of steps.

        Returns:
            The reconstructions, and how many atoms each has.

        Raises:
            InvalidInputError: A number below 1 or above the number of atoms.
            ShapeError: The activations have another width.
        """
        for k in ks:
            _check_k(k, self.n_latents, where=f"{self}, prefixes")
        rows, shape = self.rows(x, where="PursuitEncoder.prefixes")
        found = _prefixes(self.unplaced(), rows, ks=tuple(int(k) for k in ks))
        return Prefixes(
            found.reconstructions.reshape(len(ks), *shape, self.d_out), found.n_active.reshape(len(ks), *shape)
        )

    def __repr__(self) -> str:
        at = f" at {self.read}" if self.read is not None else ""
        return f"PursuitEncoder({self.pursuit!r}, k={self.k}, {self.n_latents} atoms of {self.d_out}{at})"


def encoder(
    pursuit: Pursuit,
    dictionary: Any,
    *,
    k: int,
    b_dec: Any | None = None,
    scaling: Scaling | None = None,
    tolerance: float = 0.0,
    read: Site | None = None,
) -> PursuitEncoder:
    """A pursuit over a dictionary, as what can be spliced into a model.

    Args:
        pursuit: Which, such as `GradientPursuit()`.
        dictionary: Atoms as rows, `[n_atoms, d]`, such as an SAE's `W_dec`.
        k: How many steps, from 1 to `n_atoms`.
        b_dec: What is subtracted before and added after, `[d]`; None for nothing.
        scaling: How activations are scaled before, as a pytree: `sae.input_scaling`.
        tolerance: A token is done once its residual's norm is at most this, in scaled units.
        read: The site to read and write, as in `sae.read`.

    Returns:
        The encoder.

    Raises:
        InvalidInputError: Not a pursuit, k out of range, a tolerance below 0, or atoms that are not finite.
        ShapeError: The dictionary is no matrix of floats, or `b_dec` has another width.
    """
    where = "pursuit.encoder"
    if not isinstance(pursuit, Pursuit):
        raise InvalidInputError(
            four_part(
                f"{pursuit!r} was given",
                where=where,
                expected="a pursuit.",
                fix="give one made by its class, such as GradientPursuit().",
            )
        )
    atoms = jnp.asarray(dictionary)
    bias = jnp.zeros(atoms.shape[-1:], jnp.float32) if b_dec is None else jnp.asarray(b_dec)
    is_float = jnp.issubdtype(atoms.dtype, jnp.floating) and jnp.issubdtype(bias.dtype, jnp.floating)
    if atoms.ndim != 2 or bias.shape != atoms.shape[1:] or not is_float:
        raise ShapeError(
            four_part(
                f"A dictionary {atoms.dtype}{list(atoms.shape)} and b_dec {bias.dtype}{list(bias.shape)} were given",
                where=where,
                expected="floats, [n_atoms, d] and [d].",
                fix='give sae.W_dec and sae.params["b_dec"]; atoms are rows.',
            )
        )
    _check_k(k, len(atoms), where=where)
    is_traced = any(isinstance(part, Tracer) for part in (atoms, bias))
    if not is_traced and not (np.isfinite(np.asarray(atoms)).all() and np.isfinite(np.asarray(bias)).all()):
        raise InvalidInputError(
            four_part(
                "A dictionary or b_dec with numbers that are not finite was given",
                where=where,
                expected="finite numbers; a row of zeros is an atom that is never chosen.",
                fix="look at how the dictionary was trained.",
            )
        )
    if scaling is not None and not callable(scaling):
        raise InvalidInputError(
            four_part(
                f"scaling = {scaling!r:.60} was given",
                where=where,
                expected="an SAE's input_scaling, or None.",
                fix="give sae.input_scaling, which holds the rule and its scale.",
            )
        )
    if not tolerance >= 0:
        raise InvalidInputError(
            four_part(
                f"tolerance = {tolerance} was given",
                where=where,
                expected="a number of at least 0.",
                fix="give the norm of the residual at which a token is done, or leave it out.",
            )
        )
    atoms, bias = atoms.astype(jnp.float32), bias.astype(jnp.float32)
    return PursuitEncoder(pursuit, atoms, bias, int(k), scaling, float(tolerance), read)


def random_dictionary(key: jax.Array, *, n_atoms: int, d: int) -> jax.Array:
    """Atoms of norm 1 in random directions: the baseline for a learned dictionary of that size.

    Args:
        key: Random key.
        n_atoms: How many.
        d: How wide.

    Returns:
        float32 `[n_atoms, d]`.
    """
    rows = jax.random.normal(key, (n_atoms, d), jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _check_k(k: Any, n_atoms: int, *, where: str) -> None:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= n_atoms:
        raise InvalidInputError(
            four_part(
                f"k = {k} was given",
                where=where,
                expected=f"a whole number from 1 to {n_atoms}, the number of atoms.",
                fix="lower k: each step adds at most one atom.",
            )
        )


def _scaled(coder: PursuitEncoder, x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    return (x, lambda y: y) if coder.scaling is None else coder.scaling(x)


def _latents_of(coder: PursuitEncoder, x: jax.Array) -> jax.Array:
    signals = _scaled(coder, x)[0] - coder.b_dec[None]

    def chunk(signals: jax.Array) -> jax.Array:
        found = pursue(coder.pursuit, signals, coder.dictionary, coder.k, tolerance=coder.tolerance)
        return dense_codes(found.indices, found.values, coder.n_latents)

    return _by_chunks(chunk, signals, coder.k)


def _decoded_of(coder: PursuitEncoder, latents: jax.Array, x: jax.Array | None) -> jax.Array:
    decoded = latents @ coder.dictionary + coder.b_dec[None]
    return decoded if x is None else _scaled(coder, x)[1](decoded)


def _prefixes_of(coder: PursuitEncoder, x: jax.Array, *, ks: tuple[int, ...]) -> Prefixes:
    scaled, restore = _scaled(coder, x)
    steps = tuple(sorted(set(ks)))

    def chunk(signals: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = pursue(coder.pursuit, signals, coder.dictionary, steps[-1], tolerance=coder.tolerance, prefixes=steps)
        assert found.prefix_values is not None
        sums = reconstruct(found.indices, found.prefix_values, coder.dictionary)
        counts = (found.prefix_values != 0).sum(axis=-1, dtype=jnp.int32)
        return sums.swapaxes(0, 1), counts.swapaxes(0, 1)

    sums, counts = _by_chunks(chunk, scaled - coder.b_dec[None], steps[-1])
    places = [steps.index(k) for k in ks]
    return Prefixes(jnp.stack([restore(sums[:, at] + coder.b_dec[None]) for at in places]), counts.T[jnp.array(places)])


def _by_chunks(fn: Callable[[jax.Array], Any], signals: jax.Array, k: int) -> Any:
    """A function of rows, for so many rows at a time as their atoms leave room for."""
    n, d = signals.shape
    n_rows = max(1, min(n, _ATOM_BYTES // (4 * k * d)))
    if n_rows == n:
        return fn(signals)
    chunks = jnp.pad(signals, ((0, -n % n_rows), (0, 0))).reshape(-1, n_rows, d)
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[:n], lax.map(fn, chunks))


_latents = counted_jit(_latents_of, name="pursuit_encoder.latents")
_decoded = counted_jit(_decoded_of, name="pursuit_encoder.decoded")
_prefixes = counted_jit(_prefixes_of, name="pursuit_encoder.prefixes", static_argnames=("ks",))
