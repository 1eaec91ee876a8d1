"""Harvest: read and plant the values that sows mark, as function transformations.

Reading order: survey (what is sown), interpret and control_flow (the transformation), functions (Oryx's names),
sites (by layer and name). The primitive itself is in transforms/sowing.py, where the running pass finds it too.

Source: Oryx Harvest for the semantics.
"""

from interp_jax.transforms.harvest.functions import call_and_reap, harvest, nest, plant, reap
from interp_jax.transforms.harvest.sites import harvest_sites, intervene, reap_sites, site_gradients, site_vjp
from interp_jax.transforms.sowing import layer_scope, loop_layer, sow, sow_cond, sow_p

__all__ = [
    "call_and_reap",
    "harvest",
    "harvest_sites",
    "intervene",
    "layer_scope",
    "loop_layer",
    "nest",
    "plant",
    "reap",
    "reap_sites",
    "site_gradients",
    "site_vjp",
    "sow",
    "sow_cond",
    "sow_p",
]
