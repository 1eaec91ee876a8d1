"""Harvest: tags in model code (sow) and, on top of them, functional reading and planting of sites.

The primitive itself is in transforms/sowing.py, below, where the running pass finds it too.

Source: Oryx Harvest for the semantics.
"""

from interp_jax.transforms.sowing import layer_scope, loop_layer, sow

__all__ = ["layer_scope", "loop_layer", "sow"]
