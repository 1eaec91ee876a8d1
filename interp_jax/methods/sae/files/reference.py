"""Reference activations: a few inputs and what an SAE made of them, kept beside its weights.

Names, shapes and checksums do not say what the numbers are used for. Whoever reads the file computes the latents and
the reconstruction again, and refuses it if they differ: the code has changed, or reads the file as another function.

How much may they differ? Float32 sums come out differently on another machine. The reference says how much that is:
the SAE is recorded a few times more with each of its numbers, and of the inputs', moved by 64 sqrt(d) rounding errors
(d: the longest sum there is; the errors of a sum of d terms grow as sqrt(d)). A latent that appears or vanishes under
that, as one at its threshold does, is not compared. The reconstruction is compared from the recorded latents.

>>> from interp_jax.methods.sae.relu import ReLU
>>> params = ReLU().init(jax.random.key(0), d_in=3, n_latents=5) | {"b_dec": jnp.ones(3)}
>>> reference = record(SAE(ReLU(), params))
>>> differences(SAE(ReLU(), params), reference)
[]
>>> differences(SAE(ReLU(is_centred=False), params), reference)
['latents: ... differ; at input 0, latents[...] is ..., recorded ...']

Sharp edges: the inputs are random, of many sizes, not a model's activations: those need no model to be made.

Source: interp_jax; Higham 2002, Accuracy and Stability of Numerical Algorithms (errors of sums).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interp_jax.methods.sae.normalization import FOLDABLE
from interp_jax.methods.sae.sae import SAE

N_ROWS = 8
_N_DRAWS = 2
_ROUNDING = 2.0**-24
_MARGIN = 64
# Rows of many sizes, so that latents fire whatever the model's activations are like.
_SIZES = np.logspace(-1, 3, N_ROWS, dtype=np.float32)

NAMES = ("x", "latents", "latents_tolerance", "reconstruction", "reconstruction_tolerance")


def record(sae: SAE) -> dict[str, np.ndarray]:
    """The reference activations of an SAE.

    Args:
        sae: The SAE.

    Returns:
        Arrays by their names: the input `[row, d_in]`, the latents `[row, latent]` and how far they may be off
        (as far as float32 goes where they are not compared), the reconstruction `[row, d_out]` and how far it may
        be off.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N_ROWS, sae.d_in), np.float32) * _SIZES[:, None]
    if sae.input_scaling.rule in FOLDABLE:
        x = (x / np.float32(sae.input_scaling.scale)).astype(np.float32)
    latents, reconstruction = _outputs(sae, x, None)
    size = np.float32(_MARGIN * np.sqrt(max(sae.d_in, sae.n_latents)) * _ROUNDING)
    off, unstable = np.zeros_like(latents), np.zeros(latents.shape, bool)
    reconstruction_off = np.zeros((N_ROWS, 1), np.float32)
    for _ in range(_N_DRAWS):
        signs = jax.tree.map(lambda leaf: _signs(rng, np.shape(leaf)), (sae, x))
        for sign in (1, -1):
            moved, moved_x = jax.tree.map(
                lambda leaf, s, sign=sign: np.asarray(leaf, np.float32) * (s * (sign * size) + np.float32(1)),
                (sae, x),
                signs,
            )
            moved_latents = _outputs(moved, moved_x, None)[0]
            unstable |= (moved_latents == 0) != (latents == 0)
            off = np.maximum(off, np.abs(moved_latents - latents))
            moved_reconstruction = _outputs(moved, moved_x, latents)[1]
            distance = np.abs(moved_reconstruction - reconstruction).max(axis=-1, keepdims=True)
            reconstruction_off = np.maximum(reconstruction_off, distance)
    row_off = np.where(unstable, 0, off).max(axis=-1, keepdims=True)
    return {
        "x": x,
        "latents": latents,
        "latents_tolerance": np.where(unstable, np.finfo(np.float32).max, row_off),
        "reconstruction": reconstruction,
        "reconstruction_tolerance": reconstruction_off,
    }


def differences(sae: SAE, reference: Mapping[str, np.ndarray]) -> list[str]:
    """How an SAE's outputs differ from recorded ones, in words; nothing where they do not.

    Args:
        sae: The SAE.
        reference: What `record` returned.

    Returns:
        A line for the latents and one for the reconstruction, each if it differs.
    """
    x, recorded = reference["x"], reference["latents"]
    latents, reconstruction = _outputs(sae, x, recorded)
    found = []
    for name, values in (("latents", latents), ("reconstruction", reconstruction)):
        distance = np.abs(values - reference[name])
        is_off = ~(distance <= reference[f"{name}_tolerance"])
        if is_off.any():
            row, column = np.argwhere(is_off)[0]
            found.append(
                f"{name}: {int(is_off.sum()):,} of {is_off.size:,} differ; at input {row}, {name}[{column}] is "
                f"{values[row, column]:.6g}, recorded {reference[name][row, column]:.6g}"
            )
    return found


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Ones with random signs."""
    n = math.prod(shape)
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-n // 8)), np.uint8), count=n)
    return (bits.astype(np.float32) * 2 - 1).reshape(shape)


def _outputs(sae: SAE, x: Any, latents: Any | None) -> tuple[np.ndarray, np.ndarray]:
    """The latents of `x`, and the reconstruction from `latents`, or from these."""
    with jax.default_matmul_precision("highest"):
        encoded = sae.encode(jnp.asarray(x))
        return np.asarray(encoded), np.asarray(sae.decode(encoded if latents is None else jnp.asarray(latents), x))
