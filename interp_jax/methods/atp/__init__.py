"""AtP*: estimates of the effect of every node by gradients, and what makes them robust.

Source: Kramar et al. 2024 (2403.00745).
"""

from interp_jax.methods.atp.attribution import AttributionResult, attribution_patching
from interp_jax.methods.atp.qk_fix import key_effects, query_effects

__all__ = ["AttributionResult", "attribution_patching", "key_effects", "query_effects"]
