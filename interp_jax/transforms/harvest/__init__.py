"""Harvest: tags in model code (sow) and, on top of them, functional reading and planting of sites.

Reading order: sowing.

Source: Oryx Harvest for the semantics.
"""

from interp_jax.transforms.harvest.sowing import layer_scope, loop_layer, sow

__all__ = ["layer_scope", "loop_layer", "sow"]
