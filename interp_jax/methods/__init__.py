"""Methods: a model and tokens to a result. Leaves: no method imports another.

Reading order: logit_lens, layer_effects.

Source: interp_jax.
"""
