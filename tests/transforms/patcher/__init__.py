"""Tests of interp_jax.transforms.patcher.

Source: interp_jax.
"""
