"""One file per promise: what is measured, and what it must reach.

Source: interp_jax.
"""
