"""Tests of interp_jax.transforms.greenlets.

Source: interp_jax.
"""
