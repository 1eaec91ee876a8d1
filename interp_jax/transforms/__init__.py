"""Transforms: function to function. Nothing here knows a model or a method.

Reading order: greenlets, patcher, harvest, running_pass, layer_stack.

Source: interp_jax.
"""
