"""Harvest: tags in model code (sow) and, on top of them, functional reading and planting of sites.

Reading order: sow.

Source: Oryx Harvest for the semantics.
"""

from interp_jax.transforms.harvest.sow import layer_scope, loop_layer, sow

__all__ = ["layer_scope", "loop_layer", "sow"]
