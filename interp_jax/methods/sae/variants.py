"""The tuple of SAE variants, which the tests of the contract run over and files name them by.

>>> [variant.name for variant in VARIANTS]
['relu', 'gated', 'top_k', 'batch_top_k', 'jump_relu', 'matryoshka', 'matching_pursuit']

Source: interp_jax.
"""

from __future__ import annotations

from interp_jax.methods.sae.batch_top_k import BatchTopK
from interp_jax.methods.sae.gated import Gated
from interp_jax.methods.sae.jump_relu import JumpReLU
from interp_jax.methods.sae.matching_pursuit import MatchingPursuit
from interp_jax.methods.sae.matryoshka import Matryoshka
from interp_jax.methods.sae.relu import ReLU
from interp_jax.methods.sae.top_k import TopK

VARIANTS = (ReLU, Gated, TopK, BatchTopK, JumpReLU, Matryoshka, MatchingPursuit)
