"""Configs: nouns that several experiments share, such as models, data sets and scales.

Source: interp_jax.
"""
