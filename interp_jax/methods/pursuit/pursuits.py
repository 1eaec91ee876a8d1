"""The tuple of pursuits, which the tests of the contract run over.

>>> [pursuit.name for pursuit in PURSUITS]
['matching_pursuit', 'orthogonal_matching_pursuit', 'gradient_pursuit', 'conjugate_gradient_pursuit']

Source: interp_jax.
"""

from __future__ import annotations

from interp_jax.methods.pursuit.conjugate_gradient_pursuit import ConjugateGradientPursuit
from interp_jax.methods.pursuit.gradient_pursuit import GradientPursuit
from interp_jax.methods.pursuit.matching_pursuit import MatchingPursuit
from interp_jax.methods.pursuit.orthogonal_matching_pursuit import OrthogonalMatchingPursuit

PURSUITS = (MatchingPursuit, OrthogonalMatchingPursuit, GradientPursuit, ConjugateGradientPursuit)
