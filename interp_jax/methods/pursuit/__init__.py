"""Pursuits: sparse codes of activations over a fixed dictionary, found step by step instead of by an encoder.

Source: Mallat & Zhang 1993; the sources of each pursuit.
"""

from interp_jax.methods.pursuit.conjugate_gradient_pursuit import ConjugateGradientPursuit
from interp_jax.methods.pursuit.gradient_pursuit import GradientPursuit
from interp_jax.methods.pursuit.matching_pursuit import MatchingPursuit
from interp_jax.methods.pursuit.orthogonal_matching_pursuit import OrthogonalMatchingPursuit
from interp_jax.methods.pursuit.pursue import Pursued, dense_codes, pursue, reconstruct
from interp_jax.methods.pursuit.pursuit import Pursuit
from interp_jax.methods.pursuit.pursuit_encoder import PursuitEncoder, encoder, random_dictionary
from interp_jax.methods.pursuit.pursuits import PURSUITS

__all__ = [
    "PURSUITS",
    "ConjugateGradientPursuit",
    "GradientPursuit",
    "MatchingPursuit",
    "OrthogonalMatchingPursuit",
    "Pursued",
    "Pursuit",
    "PursuitEncoder",
    "dense_codes",
    "encoder",
    "pursue",
    "random_dictionary",
    "reconstruct",
]
