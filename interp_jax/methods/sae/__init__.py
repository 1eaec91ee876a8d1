"""Sparse autoencoders: from activations to a dictionary of latents, and back.

Source: Bricken et al. 2023, Towards Monosemanticity; the sources of each variant.
"""

from interp_jax.methods.sae.batch_top_k import BatchTopK
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.matching_pursuit import MatchingPursuit
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.sae import SAE
from interp_jax.methods.sae.top_k import TopK
from interp_jax.methods.sae.variants import VARIANTS

__all__ = [
    "SAE",
    "VARIANTS",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "MatchingPursuit",
    "Matryoshka",
    "ReLU",
    "TopK",
]
